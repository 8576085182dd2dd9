//! Files named by the BLAKE3 hash of their bytes: `artefacts/ab/abcdef...` below the state folder.
//!
//! Written under a temporary name in `artefacts`, hashed on the way, synced, renamed, folder synced: a file under its
//! name is whole. Read with the hash checked: a damaged one is removed and reported, so that it is made again.
//! Temporaries that a crash left are removed when the folder is opened.
//! Not here: which artefacts matter (`store`), what is in them.

use crate::failpoints::visit;
use bytes::Bytes;
use halfstep_proto::data::Sink;
use halfstep_proto::telemetry::Damaged;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Temporaries begin with this; no hash does.
const TEMPORARY: &str = ".partial-";

/// An artefact that cannot be kept or had.
#[derive(Debug, thiserror::Error)]
pub enum ArtefactError {
    /// Reading or writing failed.
    #[error("artefact `{}`: cannot {action}: {source}", path.display())]
    Storage {
        /// Which file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// What arrived is not what was announced.
    #[error("artefact {announced}: arrived with hash {found}")]
    Differs {
        /// Announced hash.
        announced: blake3::Hash,
        /// Hash of what came.
        found: blake3::Hash,
    },
    /// More or fewer bytes than announced or allowed.
    #[error("artefact {announced}: expected {expected} bytes, found {found}")]
    Size {
        /// Announced hash.
        announced: blake3::Hash,
        /// Announced or allowed bytes.
        expected: u64,
        /// Bytes so far.
        found: u64,
    },
    /// The file was there, but its bytes are not what was written; it has been removed.
    #[error("artefact {hash}: its file is damaged (hash {found}) and was removed")]
    Damaged {
        /// Its name.
        hash: blake3::Hash,
        /// Hash of what was there.
        found: blake3::Hash,
    },
    /// Nobody has put it there.
    #[error("artefact {hash}: not here")]
    Missing {
        /// Its name.
        hash: blake3::Hash,
    },
}

/// All artefacts of one coordinator.
#[derive(Debug)]
pub struct Artefacts {
    root: PathBuf,
    next: AtomicU64,
}

impl Artefacts {
    /// Opens `root`, creating it if need be, and removes what a crash left half-written. The caller has the state
    /// folder to itself.
    ///
    /// # Errors
    /// `Storage`.
    pub fn open(root: &Path) -> Result<Self, ArtefactError> {
        fs::create_dir_all(root).map_err(|e| storage(root, "create folder", e))?;
        for file in entries(root)?.into_iter().filter(|file| is_temporary(file)) {
            fs::remove_file(&file).map_err(|e| storage(&file, "remove", e))?;
        }
        Ok(Self { root: root.into(), next: AtomicU64::new(0) })
    }

    /// Where an artefact lies, whether it is there or not.
    pub fn path(&self, hash: &blake3::Hash) -> PathBuf {
        place(&self.root, hash)
    }

    /// Whether a file has its name; its bytes are not looked at.
    pub fn contains(&self, hash: &blake3::Hash) -> bool {
        self.path(hash).is_file()
    }

    /// Begins to write an artefact.
    ///
    /// # Errors
    /// `Storage`.
    pub fn create(&self) -> Result<ArtefactWriter, ArtefactError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let temporary = self.root.join(format!("{TEMPORARY}{number}"));
        let created = visit("artefact.create")
            .and_then(|()| OpenOptions::new().write(true).create_new(true).open(&temporary));
        let file = created.map_err(|e| storage(&temporary, "create", e))?;
        Ok(ArtefactWriter {
            file,
            temporary,
            root: self.root.clone(),
            hasher: blake3::Hasher::new(),
            renamed: false,
        })
    }

    /// Keeps bytes; durable when this returns.
    ///
    /// # Errors
    /// `Storage`; nothing is left then.
    pub fn put(&self, bytes: &[u8]) -> Result<blake3::Hash, ArtefactError> {
        let hash = blake3::hash(bytes);
        let mut writer = self.create()?;
        writer.write(bytes)?;
        writer.finish(&hash)?;
        Ok(hash)
    }

    /// All bytes of an artefact, checked. At most `bytes_max` are read.
    ///
    /// # Errors
    /// `Missing`; `Damaged`, then the file is gone; `Size` if it is longer than allowed; `Storage`.
    pub fn read(&self, hash: &blake3::Hash, bytes_max: u64) -> Result<Bytes, ArtefactError> {
        let path = self.path(hash);
        let file = self.open_file(hash, &path)?;
        let size = file.metadata().map_err(|e| storage(&path, "read", e))?.len();
        if size > bytes_max {
            return Err(ArtefactError::Size { announced: *hash, expected: bytes_max, found: size });
        }
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
        file.take(bytes_max).read_to_end(&mut bytes).map_err(|e| storage(&path, "read", e))?;
        self.judge(hash, &path, blake3::hash(&bytes))?;
        Ok(bytes.into())
    }

    /// Checks an artefact's bytes without keeping them; its length.
    ///
    /// # Errors
    /// As [`Artefacts::read`].
    pub fn verify(&self, hash: &blake3::Hash) -> Result<u64, ArtefactError> {
        let path = self.path(hash);
        let file = self.open_file(hash, &path)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(file).map_err(|e| storage(&path, "read", e))?;
        self.judge(hash, &path, hasher.finalize())?;
        Ok(hasher.count())
    }

    /// Removes an artefact; returns its length, 0 if it is not there.
    ///
    /// # Errors
    /// `Storage`.
    pub fn remove(&self, hash: &blake3::Hash) -> Result<u64, ArtefactError> {
        let path = self.path(hash);
        let removed = fs::metadata(&path).and_then(|found| fs::remove_file(&path).map(|()| found.len()));
        match removed {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(0),
            removed => removed.map_err(|e| storage(&path, "remove", e)),
        }
    }

    fn open_file(&self, hash: &blake3::Hash, path: &Path) -> Result<File, ArtefactError> {
        File::open(path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => ArtefactError::Missing { hash: *hash },
            _ => storage(path, "open", e),
        })
    }

    fn judge(&self, hash: &blake3::Hash, path: &Path, found: blake3::Hash) -> Result<(), ArtefactError> {
        if found == *hash {
            return Ok(());
        }
        fs::remove_file(path).map_err(|e| storage(path, "remove the damaged file", e))?;
        Damaged::Stored.count();
        Err(ArtefactError::Damaged { hash: *hash, found })
    }
}

/// An artefact that grows; dropped before `finish`, it leaves nothing.
#[derive(Debug)]
pub struct ArtefactWriter {
    file: File,
    temporary: PathBuf,
    root: PathBuf,
    hasher: blake3::Hasher,
    renamed: bool,
}

impl ArtefactWriter {
    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.hasher.count()
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// `Storage`.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ArtefactError> {
        self.append(bytes).map_err(|e| storage(&self.temporary, "write", e))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        visit("artefact.write")?;
        self.file.write_all(bytes)?;
        self.hasher.update(bytes);
        Ok(())
    }

    /// Makes the artefact durable under its announced name.
    ///
    /// # Errors
    /// `Differs` if it is not what was announced; `Storage`. Nothing is left then.
    pub fn finish(mut self, announced: &blake3::Hash) -> Result<(), ArtefactError> {
        let found = self.hasher.finalize();
        if found != *announced {
            return Err(ArtefactError::Differs { announced: *announced, found });
        }
        let synced = visit("artefact.fsync").and_then(|()| self.file.sync_all());
        synced.map_err(|e| storage(&self.temporary, "sync", e))?;
        let target = place(&self.root, announced);
        let folder = folder_of(&target);
        let is_new = !folder.is_dir();
        fs::create_dir_all(&folder).map_err(|e| storage(&folder, "create folder", e))?;
        let renamed = visit("artefact.rename").and_then(|()| fs::rename(&self.temporary, &target));
        renamed.map_err(|e| storage(&target, "rename to", e))?;
        self.renamed = true;
        let synced = visit("artefact.folder").and_then(|()| sync_folder(&folder));
        let synced = synced.and_then(|()| if is_new { sync_folder(&self.root) } else { Ok(()) });
        synced.map_err(|e| storage(&folder, "sync folder", e))
    }
}

/// An upload that begins again forgets what has come.
impl Sink for ArtefactWriter {
    const BLOCKS: bool = true;

    fn begin(&mut self, _size: u64) -> io::Result<()> {
        self.hasher.reset();
        self.file.set_len(0)?;
        self.file.rewind()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.append(bytes)
    }
}

fn place(root: &Path, hash: &blake3::Hash) -> PathBuf {
    let name = hash.to_hex();
    root.join(&name[..2]).join(name.as_str())
}

impl Drop for ArtefactWriter {
    fn drop(&mut self) {
        if !self.renamed {
            // What cannot be removed now is removed at the next start.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Entries of a folder become durable with this.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

fn folder_of(path: &Path) -> PathBuf {
    path.parent().map(Path::to_path_buf).unwrap_or_default()
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, ArtefactError> {
    let read = fs::read_dir(folder).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    read.map_err(|e| storage(folder, "list", e))
}

fn is_temporary(file: &Path) -> bool {
    file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(TEMPORARY))
}

fn storage(path: &Path, action: &'static str, source: io::Error) -> ArtefactError {
    ArtefactError::Storage { path: path.into(), action, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> (tempfile::TempDir, Artefacts) {
        let folder = tempfile::tempdir().unwrap();
        let artefacts = Artefacts::open(&folder.path().join("artefacts")).unwrap();
        (folder, artefacts)
    }

    fn files(artefacts: &Artefacts) -> usize {
        let found = entries(&artefacts.root).unwrap();
        let inside = |path: &PathBuf| if path.is_dir() { entries(path).unwrap().len() } else { 1 };
        found.iter().map(inside).sum()
    }

    #[test]
    fn what_is_put_is_read_again_also_twice() {
        let (_folder, artefacts) = fresh();
        for bytes in [&b""[..], b"x", &[7; 100_000]] {
            let hash = artefacts.put(bytes).unwrap();
            assert_eq!(artefacts.put(bytes).unwrap(), hash);
            assert_eq!(artefacts.read(&hash, 1 << 20).unwrap(), bytes);
            assert_eq!(artefacts.verify(&hash).unwrap(), bytes.len() as u64);
        }
        assert_eq!(files(&artefacts), 3);
    }

    #[test]
    fn every_flipped_bit_is_found_before_use_and_the_file_is_removed() {
        let (_folder, artefacts) = fresh();
        let bytes = b"rounded";
        for bit in 0..bytes.len() * 8 {
            let hash = artefacts.put(bytes).unwrap();
            let mut bad = bytes.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            fs::write(artefacts.path(&hash), &bad).unwrap();
            assert!(matches!(artefacts.read(&hash, 99), Err(ArtefactError::Damaged { .. })), "bit {bit}");
            assert!(matches!(artefacts.read(&hash, 99), Err(ArtefactError::Missing { .. })), "bit {bit}");
        }
    }

    #[test]
    fn a_truncated_file_is_damaged() {
        let (_folder, artefacts) = fresh();
        let hash = artefacts.put(b"rounded").unwrap();
        fs::write(artefacts.path(&hash), b"round").unwrap();
        let error = artefacts.verify(&hash).unwrap_err().to_string();
        assert!(error.ends_with("and was removed"), "{error}");
        assert!(!artefacts.contains(&hash));
    }

    #[test]
    fn what_differs_from_its_announcement_leaves_nothing() {
        let (_folder, artefacts) = fresh();
        let mut writer = artefacts.create().unwrap();
        writer.write(b"abd").unwrap();
        assert!(matches!(writer.finish(&blake3::hash(b"abc")), Err(ArtefactError::Differs { .. })));
        let mut writer = artefacts.create().unwrap();
        writer.write(b"ab").unwrap();
        drop(writer);
        assert_eq!(files(&artefacts), 0);
    }

    #[test]
    fn a_writer_that_begins_again_forgets() {
        let (_folder, artefacts) = fresh();
        let mut writer = artefacts.create().unwrap();
        writer.put(b"something longer").unwrap();
        writer.begin(3).unwrap();
        writer.put(b"abc").unwrap();
        writer.finish(&blake3::hash(b"abc")).unwrap();
        assert_eq!(artefacts.read(&blake3::hash(b"abc"), 9).unwrap(), &b"abc"[..]);
    }

    #[test]
    fn a_longer_file_than_allowed_is_not_read() {
        let (_folder, artefacts) = fresh();
        let hash = artefacts.put(b"1234").unwrap();
        assert!(matches!(artefacts.read(&hash, 3), Err(ArtefactError::Size { expected: 3, found: 4, .. })));
        assert!(artefacts.read(&hash, 4).is_ok());
    }

    #[test]
    fn what_a_crash_left_is_removed_at_the_next_start_and_nothing_else() {
        let (folder, artefacts) = fresh();
        let hash = artefacts.put(b"kept").unwrap();
        let mut writer = artefacts.create().unwrap();
        writer.write(b"ke").unwrap();
        std::mem::forget(writer);
        assert_eq!(files(&artefacts), 2);
        let again = Artefacts::open(&folder.path().join("artefacts")).unwrap();
        assert_eq!(files(&again), 1);
        assert_eq!(again.read(&hash, 9).unwrap(), &b"kept"[..]);
    }
}
