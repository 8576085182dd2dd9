//! The database: tables, group commit, reading back.
//!
//! Keys sort as ids do (big-endian), so a job's records lie together. Values are framed records (`record`).

use super::lock::FolderLock;
use super::record::{Kind, RecordError, decode, encode};
use super::stored::{StoredCounts, StoredFailure, StoredJob};
use super::{JobRecord, StoreError};
use crate::failpoints::visit;
use halfstep_work::{ChunkId, Failure, JobId, LayerId};
use redb::{
    Builder, Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction,
};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

const FILE: &str = "state.redb";
/// The whole state is a few megabytes.
const CACHE_BYTES: usize = 16 << 20;

type Table = TableDefinition<'static, &'static [u8], &'static [u8]>;
const META: Table = TableDefinition::new("meta");
const JOBS: Table = TableDefinition::new("jobs");
const ROUNDINGS: Table = TableDefinition::new("roundings");
const GIVEN_UP: Table = TableDefinition::new("given-up");
const COUNTS: Table = TableDefinition::new("counts");
const EPOCH: &[u8] = b"epoch";
/// Job, layer, chunk.
const KEY_BYTES_MAX: usize = 16 + 4 + 4;

/// Something to remember.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A job, new or in a new stage.
    Job(JobRecord),
    /// A chunk is solved; its artefact is durable already.
    Rounding {
        /// The job.
        job: JobId,
        /// The layer.
        layer: LayerId,
        /// Its rows.
        chunk: ChunkId,
        /// Of the artefact.
        hash: blake3::Hash,
    },
    /// A committed artefact turned out to be damaged: the chunk has to be solved again.
    ForgetRounding {
        /// The job.
        job: JobId,
        /// The layer.
        layer: LayerId,
        /// Its rows.
        chunk: ChunkId,
    },
    /// A layer keeps its weights.
    GivenUp {
        /// The job.
        job: JobId,
        /// The layer.
        layer: LayerId,
        /// Why.
        failure: Failure,
    },
    /// Forget a job with all that belongs to it.
    ForgetJob(JobId),
}

/// What is durable of one job's work.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Committed {
    /// Artefact of every solved chunk.
    pub roundings: BTreeMap<(LayerId, ChunkId), blake3::Hash>,
    /// Layers that keep their weights, and why.
    pub given_up: BTreeMap<LayerId, Failure>,
}

/// The open state of one coordinator.
pub struct Store {
    /// Absent after a failed write until the next use: redb refuses everything after one, a new opening does not.
    database: Mutex<Option<Database>>,
    path: PathBuf,
    folder: PathBuf,
    epoch: u64,
    _lock: FolderLock,
    /// Dropped last: the folder is free then.
    alive: Arc<()>,
}

impl Store {
    /// Opens the state in `folder`, creating it if there is none, and begins a new incarnation.
    ///
    /// # Errors
    /// `InUse` if another coordinator has it; `Database` or `Record` if it is damaged or of another version; `Io`.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let io = |action| move |source| StoreError::Io { path: folder.into(), action, source };
        fs::create_dir_all(folder).map_err(io("create folder"))?;
        let lock = FolderLock::take(folder)?;
        let path = folder.join(FILE);
        let database = open_database(&path)?;
        let database = Mutex::new(Some(database));
        let mut store =
            Self { database, path, folder: folder.into(), epoch: 0, _lock: lock, alive: Arc::new(()) };
        store.begin_incarnation()?;
        Ok(store)
    }

    /// This incarnation: larger than any before on the same folder, 1 the first time.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Cannot be upgraded any more once the folder is free for another store.
    pub(crate) fn alive(&self) -> Weak<()> {
        Arc::downgrade(&self.alive)
    }

    /// The state folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Runs one transaction. After a failure the database is opened again at the next use.
    fn with<T>(&self, run: impl FnOnce(&Database) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut slot = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        let database = match slot.take() {
            Some(database) => database,
            None => open_database(&self.path)?,
        };
        let result = run(&database);
        if !matches!(result, Err(StoreError::Database { .. })) {
            *slot = Some(database);
        }
        result
    }

    fn begin_incarnation(&mut self) -> Result<(), StoreError> {
        self.epoch = self.with(|database| self.next_epoch(database))?;
        Ok(())
    }

    fn next_epoch(&self, database: &Database) -> Result<u64, StoreError> {
        let transaction = self.begin(database)?;
        let epoch;
        {
            let mut table = transaction.open_table(META).map_err(|e| self.broken(e))?;
            let stored = table.get(EPOCH).map_err(|e| self.broken(e))?.map(|value| value.value().to_vec());
            let last = stored.map_or(Ok(0), |record| decode::<u64>(Kind::Epoch, &record));
            epoch = last.map_err(|e| self.bad_record("incarnation", e))?.saturating_add(1);
            let record = encode(Kind::Epoch, &epoch).map_err(|e| self.bad_record("incarnation", e))?;
            table.insert(EPOCH, record.as_slice()).map_err(|e| self.broken(e))?;
            // Tables exist from the start, so that reading never finds one missing.
            for name in [JOBS, ROUNDINGS, GIVEN_UP, COUNTS] {
                transaction.open_table(name).map_err(|e| self.broken(e))?;
            }
        }
        visit("store.open.epoch").map_err(|e| self.broken(e))?;
        transaction.commit().map_err(|e| self.broken(e))?;
        Ok(epoch)
    }

    /// Makes all changes durable in one step: after an error none of them is.
    ///
    /// # Errors
    /// `Database` if it cannot be written, for example because the disk is full.
    pub fn commit(&self, changes: &[Change]) -> Result<(), StoreError> {
        if changes.is_empty() {
            return Ok(());
        }
        visit("store.commit.before").map_err(|e| self.broken(e))?;
        self.with(|database| {
            let transaction = self.begin(database)?;
            changes.iter().try_for_each(|change| self.write(&transaction, change))?;
            transaction.commit().map_err(|e| self.broken(e))
        })?;
        visit("store.commit.after").map_err(|e| self.broken(e))
    }

    /// All jobs in submit order.
    ///
    /// # Errors
    /// `Database`, or `Record` naming the job.
    pub fn jobs(&self) -> Result<Vec<JobRecord>, StoreError> {
        let mut jobs = Vec::new();
        let mut counts = BTreeMap::new();
        self.scan(COUNTS, &[], |key, record| {
            counts.insert(job_id(key)?, decode::<StoredCounts>(Kind::Counts, record)?.into());
            Ok(())
        })?;
        self.scan(JOBS, &[], |key, record| {
            let id = job_id(key)?;
            let job = decode::<StoredJob>(Kind::Job, record)?.into_record(id)?;
            jobs.push(JobRecord { counts: counts.get(&id).copied().unwrap_or_default(), ..job });
            Ok(())
        })?;
        jobs.sort_by_key(|job: &JobRecord| (job.order, job.id));
        Ok(jobs)
    }

    /// What is durable of one job's work.
    ///
    /// # Errors
    /// `Database`, or `Record` naming the record.
    pub fn committed(&self, job: JobId) -> Result<Committed, StoreError> {
        let mut committed = Committed::default();
        self.scan(ROUNDINGS, &job.0, |key, record| {
            let place = (LayerId(number(key, 16)?), ChunkId(number(key, 20)?));
            let hash = decode::<[u8; 32]>(Kind::Rounding, record)?;
            committed.roundings.insert(place, blake3::Hash::from_bytes(hash));
            Ok(())
        })?;
        self.scan(GIVEN_UP, &job.0, |key, record| {
            let failure = decode::<StoredFailure>(Kind::GivenUp, record)?.try_into()?;
            committed.given_up.insert(LayerId(number(key, 16)?), failure);
            Ok(())
        })?;
        Ok(committed)
    }

    fn begin(&self, database: &Database) -> Result<WriteTransaction, StoreError> {
        let mut transaction = database.begin_write().map_err(|e| self.broken(e))?;
        transaction.set_durability(Durability::Immediate).map_err(|e| self.broken(e))?;
        Ok(transaction)
    }

    fn write(&self, transaction: &WriteTransaction, change: &Change) -> Result<(), StoreError> {
        let fail = |e| self.bad_record("a new record", e);
        match change {
            Change::Job(job) => {
                let record = encode(Kind::Job, &StoredJob::from(job)).map_err(fail)?;
                self.insert(transaction, JOBS, &job.id.0, &record)?;
                let record = encode(Kind::Counts, &StoredCounts::from(job.counts)).map_err(fail)?;
                self.insert(transaction, COUNTS, &job.id.0, &record)
            }
            Change::Rounding { job, layer, chunk, hash } => {
                let record = encode(Kind::Rounding, hash.as_bytes()).map_err(fail)?;
                self.insert(transaction, ROUNDINGS, &rounding_key(*job, *layer, *chunk), &record)
            }
            Change::ForgetRounding { job, layer, chunk } => {
                let key = rounding_key(*job, *layer, *chunk);
                let mut table = transaction.open_table(ROUNDINGS).map_err(|e| self.broken(e))?;
                table.remove(key.as_slice()).map(drop).map_err(|e| self.broken(e))
            }
            Change::GivenUp { job, layer, failure } => {
                let record = encode(Kind::GivenUp, &StoredFailure::from(failure)).map_err(fail)?;
                self.insert(transaction, GIVEN_UP, &layer_key(*job, *layer), &record)
            }
            Change::ForgetJob(job) => [JOBS, ROUNDINGS, GIVEN_UP, COUNTS]
                .into_iter()
                .try_for_each(|table| self.forget(transaction, table, *job)),
        }
    }

    fn insert(
        &self,
        transaction: &WriteTransaction,
        table: Table,
        key: &[u8],
        record: &[u8],
    ) -> Result<(), StoreError> {
        let mut table = transaction.open_table(table).map_err(|e| self.broken(e))?;
        table.insert(key, record).map(drop).map_err(|e| self.broken(e))
    }

    fn forget(&self, transaction: &WriteTransaction, table: Table, job: JobId) -> Result<(), StoreError> {
        let mut table = transaction.open_table(table).map_err(|e| self.broken(e))?;
        let (first, last) = key_range(&job.0);
        table.retain_in(first.as_slice()..=last.as_slice(), |_, _| false).map_err(|e| self.broken(e))
    }

    /// Calls `each` with key and record of every entry whose key begins with `prefix` (nothing, or a job id).
    fn scan(
        &self,
        table: Table,
        prefix: &[u8],
        mut each: impl FnMut(&[u8], &[u8]) -> Result<(), RecordError>,
    ) -> Result<(), StoreError> {
        let (first, last) = key_range(prefix);
        self.with(|database| {
            let transaction = database.begin_read().map_err(|e| self.broken(e))?;
            let opened = transaction.open_table(table).map_err(|e| self.broken(e))?;
            for entry in opened.range(first.as_slice()..=last.as_slice()).map_err(|e| self.broken(e))? {
                let (key, record) = entry.map_err(|e| self.broken(e))?;
                let (key, record) = (key.value(), record.value());
                each(key, record).map_err(|e| self.bad_record(&subject(key), e))?;
            }
            Ok(())
        })
    }

    fn broken(&self, problem: impl std::fmt::Display) -> StoreError {
        StoreError::Database { path: self.path.clone(), problem: problem.to_string() }
    }

    fn bad_record(&self, subject: &str, source: RecordError) -> StoreError {
        StoreError::Record { path: self.path.clone(), subject: subject.into(), source }
    }
}

/// Checks every page of an old database: a flipped bit must be found now, not when a wrong value is used.
fn open_database(path: &Path) -> Result<Database, StoreError> {
    let open = || Builder::new().set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true).create(path);
    // redb asserts on some damage instead of returning it.
    let opened = std::panic::catch_unwind(open);
    let broken = |problem: String| StoreError::Database { path: path.into(), problem };
    match opened {
        Ok(Ok(database)) => Ok(database),
        Ok(Err(error)) => Err(broken(format!("cannot be opened: {error}"))),
        Err(_) => Err(broken("is damaged; move the state folder away to start anew".into())),
    }
}

fn layer_key(job: JobId, layer: LayerId) -> Vec<u8> {
    [job.0.as_slice(), &layer.0.to_be_bytes()].concat()
}

fn rounding_key(job: JobId, layer: LayerId, chunk: ChunkId) -> Vec<u8> {
    [job.0.as_slice(), &layer.0.to_be_bytes(), &chunk.0.to_be_bytes()].concat()
}

/// First and last possible key that begins with `prefix`.
fn key_range(prefix: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let mut last = prefix.to_vec();
    last.resize(KEY_BYTES_MAX + 1, 0xff);
    (prefix.to_vec(), last)
}

fn job_id(key: &[u8]) -> Result<JobId, RecordError> {
    let id =
        key.try_into().map_err(|_| RecordError::Body(format!("key of {} bytes, expected 16", key.len())))?;
    Ok(JobId(id))
}

fn number(key: &[u8], at: usize) -> Result<u32, RecordError> {
    let bytes = key.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    let short = || RecordError::Body(format!("key of {} bytes, expected at least {}", key.len(), at + 4));
    bytes.map(u32::from_be_bytes).ok_or_else(short)
}

fn subject(key: &[u8]) -> String {
    let mut text = String::from("record ");
    key.iter().for_each(|byte| text.push_str(&format!("{byte:02x}")));
    text
}
