//! Hidden folders beside a target, each locked by its process for as long as that works on it.
//!
//! So a folder of this kind that can be locked was left by a process that was killed, and goes. Where a file system has
//! no locks, nothing can be locked and nothing goes. Not here: what is in them.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Letters and digits at the end of a name.
const RANDOM: usize = 6;
/// Another process that sweeps may take a new folder for an old one, once.
const ATTEMPTS: usize = 4;

/// What a folder is for; part of its name.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    /// New results grow in it.
    Partial,
    /// Old results wait in it until the new ones are in their place.
    Old,
}

/// Removed when dropped.
pub(super) struct Scratch {
    folder: TempDir,
    // Dropped last, and kept when the folder gets another name.
    lock: Option<File>,
}

impl Scratch {
    /// Makes one in the folder of `target`.
    pub(super) fn beside(target: &Path, purpose: Purpose) -> io::Result<Self> {
        let mut last = io::Error::from(io::ErrorKind::AlreadyExists);
        for _ in 0..ATTEMPTS {
            let folder = tempfile::Builder::new()
                .prefix(&prefix(target, purpose))
                .rand_bytes(RANDOM)
                .tempdir_in(super::parent_of(target))?;
            match lock(folder.path()) {
                Ok(lock) if folder.path().is_dir() => return Ok(Self { folder, lock }),
                Ok(_) => {}
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// It is not removed any more; it stays locked as long as the second lives.
    pub(super) fn keep(self) -> (PathBuf, Option<File>) {
        (self.folder.keep(), self.lock)
    }
}

/// Removes what killed processes left beside `target`. What cannot be removed stays: it does no harm but take space.
pub(super) fn sweep(target: &Path, purpose: Purpose) {
    let Ok(entries) = fs::read_dir(super::parent_of(target)) else { return };
    let prefix = prefix(target, purpose);
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let ours = name.strip_prefix(&prefix).is_some_and(|end| {
            end.len() == RANDOM && end.bytes().all(|letter| letter.is_ascii_alphanumeric())
        });
        if !ours || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let path = entry.path();
        if let Ok(Some(_lock)) = lock(&path)
            && fs::remove_dir_all(&path).is_ok()
        {
            tracing::info!(folder = %path.display(), "removed what a killed process had left");
        }
    }
}

fn prefix(target: &Path, purpose: Purpose) -> String {
    let name = target.file_name().map_or_else(|| "out".into(), |name| name.to_string_lossy().into_owned());
    match purpose {
        Purpose::Partial => format!(".{name}.partial-"),
        Purpose::Old => format!(".{name}.old-"),
    }
}

/// `None` where folders cannot be locked.
///
/// # Errors
/// If another has the lock or the folder is gone.
fn lock(folder: &Path) -> io::Result<Option<File>> {
    let file = match File::open(folder) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(error),
        Err(_) => return Ok(None),
    };
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(fs::TryLockError::WouldBlock) => Err(io::ErrorKind::WouldBlock.into()),
        Err(fs::TryLockError::Error(_)) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_a_killed_process_left_goes_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        // As a kill leaves it: not locked.
        let left = Scratch::beside(&target, Purpose::Partial).unwrap().keep().0;
        fs::write(left.join("model.onnx"), "half").unwrap();
        let others = [".out.partial-", ".out.partial-short", ".out.partial-abc.ef", ".outer.partial-abcdef"];
        others.iter().for_each(|name| fs::create_dir(root.path().join(name)).unwrap());
        fs::write(root.path().join(".out.partial-abcdef"), "a file").unwrap();
        let old = Scratch::beside(&target, Purpose::Old).unwrap().keep().0;
        sweep(&target, Purpose::Partial);
        assert!(!left.exists() && old.exists());
        assert_eq!(names(root.path()).len(), others.len() + 2);
        sweep(&target, Purpose::Old);
        assert!(!old.exists());
    }

    #[test]
    fn what_another_process_works_on_stays_also_under_its_last_name() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        let working = Scratch::beside(&target, Purpose::Partial).unwrap();
        sweep(&target, Purpose::Partial);
        assert!(working.path().is_dir());
        let (path, lock) = working.keep();
        sweep(&target, Purpose::Partial);
        assert!(path.is_dir());
        drop(lock);
        sweep(&target, Purpose::Partial);
        assert!(!path.exists());
    }
}
