//! The bodies of records, and their public forms.
//!
//! The stored forms are spelled out field by field: a change of a public type must not change bytes on disk unnoticed.
//! Enums are numbers that are never reused.

use super::RecordError;
use halfstep_work::{Failure, FailureClass, JobId};
use std::path::PathBuf;
use wincode::{SchemaRead, SchemaWrite};

/// Part of a job that a file plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileRole {
    /// The ONNX file; a job has one.
    Model,
    /// A file of tensors beside it.
    ModelData,
    /// Calibration data.
    Calibration,
    /// The tokenizer of calibration text; at most one.
    Tokenizer,
}

impl FileRole {
    /// As on the wire.
    pub fn text(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::ModelData => "model-data",
            Self::Calibration => "calibration",
            Self::Tokenizer => "tokenizer",
        }
    }

    /// From the wire.
    pub fn parse(text: &str) -> Option<Self> {
        let all = [Self::Model, Self::ModelData, Self::Calibration, Self::Tokenizer];
        all.into_iter().find(|role| role.text() == text)
    }
}

/// One input of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputFile {
    /// What it is for.
    pub role: FileRole,
    /// Relative to the folder of the model, or of the calibration data; `/` between parts.
    pub name: String,
    /// Length in bytes.
    pub size: u64,
    /// Of its bytes.
    pub hash: blake3::Hash,
    /// Where the client has it: used in place if the same file is seen there. Absolute.
    pub path: Option<PathBuf>,
}

/// A file of a finished job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResultFile {
    /// Its name in the results folder.
    pub name: String,
    /// Length in bytes.
    pub size: u64,
    /// Of its bytes.
    pub hash: blake3::Hash,
}

/// Where a job stands, as far as is durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobStage {
    /// Waits for the jobs before it.
    Queued,
    /// Is worked on, or would be if the coordinator ran.
    Running,
    /// Its results are there.
    Finished {
        /// Documented exit code: 0, 3 (layers kept) or 4 (layers failed).
        exit: u8,
        /// In name order.
        results: Vec<ResultFile>,
    },
    /// It cannot be done.
    Failed {
        /// Documented exit code.
        exit: u8,
        /// Why.
        failure: Failure,
    },
    /// Somebody asked for that.
    Cancelled,
}

impl JobStage {
    /// Whether nothing more will happen to it.
    pub fn is_over(&self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }
}

/// How far a job came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JobCounts {
    /// Stages of its plan; 0 if it was never planned.
    pub stages: u64,
    /// Those whose layers are all over.
    pub stages_done: u64,
    /// Layers of its plan.
    pub layers: u64,
    /// Those that are solved or given up.
    pub layers_done: u64,
}

/// A job as it was submitted and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobRecord {
    /// Its id.
    pub id: JobId,
    /// Place in the queue: jobs run in this order.
    pub order: u64,
    /// Wall clock at submission, milliseconds since 1970; for people, never part of a result.
    pub submitted_unix_ms: u64,
    /// The configuration as JSON (`jobs::JobSpec`).
    pub spec: Vec<u8>,
    /// Its inputs.
    pub files: Vec<InputFile>,
    /// Where it stands.
    pub stage: JobStage,
    /// Device kind and ONNX engine of every node that worked on it, fixed by the first: others compute other bits.
    pub computed_by: Option<(String, String)>,
    /// How far it came when it ended; zeros before.
    pub counts: JobCounts,
}

#[derive(SchemaWrite, SchemaRead)]
pub(super) struct StoredInput {
    role: u8,
    name: String,
    size: u64,
    hash: [u8; 32],
    path: Option<String>,
}

#[derive(SchemaWrite, SchemaRead)]
pub(super) struct StoredResult {
    name: String,
    size: u64,
    hash: [u8; 32],
}

#[derive(SchemaWrite, SchemaRead)]
pub(super) struct StoredFailure {
    class: u8,
    message: String,
}

#[derive(SchemaWrite, SchemaRead)]
pub(super) struct StoredJob {
    order: u64,
    submitted_unix_ms: u64,
    spec: Vec<u8>,
    files: Vec<StoredInput>,
    stage: u8,
    exit: u8,
    results: Vec<StoredResult>,
    failure: Option<StoredFailure>,
    computed_by: Option<(String, String)>,
}

/// Number on disk of each class; the index is the number.
const CLASSES: [FailureClass; 12] = [
    FailureClass::BadInput,
    FailureClass::NonFinite,
    FailureClass::OutOfMemory,
    FailureClass::Storage,
    FailureClass::NodeLost,
    FailureClass::PeerLost,
    FailureClass::Hung,
    FailureClass::Damaged,
    FailureClass::HandedBack,
    FailureClass::Nondeterminism,
    FailureClass::Cancelled,
    FailureClass::Internal,
];

fn body(what: String) -> RecordError {
    RecordError::Body(what)
}

impl From<&Failure> for StoredFailure {
    fn from(failure: &Failure) -> Self {
        // A class beyond the table cannot be: a test walks all of them.
        let class =
            CLASSES.iter().position(|class| *class == failure.class).unwrap_or(CLASSES.len() - 1) as u8;
        Self { class, message: failure.message.clone() }
    }
}

impl TryFrom<StoredFailure> for Failure {
    type Error = RecordError;

    fn try_from(stored: StoredFailure) -> Result<Self, RecordError> {
        let class = CLASSES.get(usize::from(stored.class));
        let class = class.ok_or_else(|| body(format!("failure class {} is unknown", stored.class)))?;
        Ok(Self { class: *class, message: stored.message })
    }
}

impl From<&InputFile> for StoredInput {
    fn from(file: &InputFile) -> Self {
        Self {
            role: match file.role {
                FileRole::Model => 0,
                FileRole::ModelData => 1,
                FileRole::Calibration => 2,
                FileRole::Tokenizer => 3,
            },
            name: file.name.clone(),
            size: file.size,
            hash: *file.hash.as_bytes(),
            path: file.path.as_ref().map(|path| path.to_string_lossy().into_owned()),
        }
    }
}

impl TryFrom<StoredInput> for InputFile {
    type Error = RecordError;

    fn try_from(stored: StoredInput) -> Result<Self, RecordError> {
        let role = match stored.role {
            0 => FileRole::Model,
            1 => FileRole::ModelData,
            2 => FileRole::Calibration,
            3 => FileRole::Tokenizer,
            other => return Err(body(format!("file `{}`: role {other} is unknown", stored.name))),
        };
        let (hash, path) = (blake3::Hash::from_bytes(stored.hash), stored.path.map(PathBuf::from));
        Ok(Self { role, name: stored.name, size: stored.size, hash, path })
    }
}

impl From<&JobRecord> for StoredJob {
    fn from(job: &JobRecord) -> Self {
        let (stage, exit, results, failure) = match &job.stage {
            JobStage::Queued => (0, 0, &[][..], None),
            JobStage::Running => (1, 0, &[][..], None),
            JobStage::Finished { exit, results } => (2, *exit, results.as_slice(), None),
            JobStage::Failed { exit, failure } => (3, *exit, &[][..], Some(failure.into())),
            JobStage::Cancelled => (4, 0, &[][..], None),
        };
        let result = |file: &ResultFile| StoredResult {
            name: file.name.clone(),
            size: file.size,
            hash: *file.hash.as_bytes(),
        };
        Self {
            order: job.order,
            submitted_unix_ms: job.submitted_unix_ms,
            spec: job.spec.clone(),
            files: job.files.iter().map(StoredInput::from).collect(),
            stage,
            exit,
            results: results.iter().map(result).collect(),
            failure,
            computed_by: job.computed_by.clone(),
        }
    }
}

/// A record of its own: jobs written before there were counts have none.
#[derive(SchemaWrite, SchemaRead)]
pub(super) struct StoredCounts {
    stages: u64,
    stages_done: u64,
    layers: u64,
    layers_done: u64,
}

impl From<JobCounts> for StoredCounts {
    fn from(counts: JobCounts) -> Self {
        let JobCounts { stages, stages_done, layers, layers_done } = counts;
        Self { stages, stages_done, layers, layers_done }
    }
}

impl From<StoredCounts> for JobCounts {
    fn from(stored: StoredCounts) -> Self {
        let StoredCounts { stages, stages_done, layers, layers_done } = stored;
        Self { stages, stages_done, layers, layers_done }
    }
}

impl StoredJob {
    /// The id is the key under which the record lies; counts lie elsewhere.
    pub(super) fn into_record(self, id: JobId) -> Result<JobRecord, RecordError> {
        let results = self.results.into_iter().map(|file| ResultFile {
            name: file.name,
            size: file.size,
            hash: blake3::Hash::from_bytes(file.hash),
        });
        let stage = match (self.stage, self.failure) {
            (0, None) => JobStage::Queued,
            (1, None) => JobStage::Running,
            (2, None) => JobStage::Finished { exit: self.exit, results: results.collect() },
            (3, Some(failure)) => JobStage::Failed { exit: self.exit, failure: failure.try_into()? },
            (4, None) => JobStage::Cancelled,
            (other, failure) => {
                let with = if failure.is_some() { "with" } else { "without" };
                return Err(body(format!("stage {other} {with} a failure is unknown")));
            }
        };
        let files: Result<_, _> = self.files.into_iter().map(InputFile::try_from).collect();
        Ok(JobRecord {
            id,
            order: self.order,
            submitted_unix_ms: self.submitted_unix_ms,
            spec: self.spec,
            files: files?,
            stage,
            computed_by: self.computed_by,
            counts: JobCounts::default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_class_has_its_number() {
        for class in FailureClass::ALL {
            let failure = Failure::new(class, "why");
            assert_eq!(Failure::try_from(StoredFailure::from(&failure)).unwrap(), failure);
        }
        assert!(Failure::try_from(StoredFailure { class: 99, message: String::new() }).is_err());
    }
}
