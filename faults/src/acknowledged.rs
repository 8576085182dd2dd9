//! What the coordinator has acknowledged, as seen from outside: artefacts on its disk.
//!
//! A rounding is in the artefact folder before its commit is answered, so everything that was acknowledged is among the
//! files found when the coordinator is dead. After a restart each of them must still be the same file: same inode, time
//! and size. One that was lost and computed anew would be a new file, since artefacts appear by rename.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::damage::files_below;

/// Name of the folders that hold artefacts.
const FOLDER: &str = "artefacts";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    changed_ns: i128,
    size: u64,
}

/// Artefacts on disk at some moment.
#[derive(Clone, Debug, Default)]
pub struct Acknowledged(BTreeMap<PathBuf, Stamp>);

impl Acknowledged {
    /// Artefacts below a coordinator's state folder.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn of(state_dir: &Path) -> Result<Self> {
        let mut found = BTreeMap::new();
        for path in files_below(state_dir)? {
            if path.components().any(|part| part.as_os_str() == FOLDER) && !is_temporary(&path) {
                // A file may go between listing and looking; then nothing acknowledged it.
                if let Some(stamp) = stamp(&path) {
                    found.insert(path, stamp);
                }
            }
        }
        Ok(Self(found))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The files themselves.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.0.keys().map(PathBuf::as_path)
    }

    /// Adds what was seen later.
    pub fn extend(&mut self, later: Self) {
        self.0.extend(later.0);
    }

    /// Those of `self` that are not the same file any more in `later`.
    pub fn lost(&self, later: &Self) -> Vec<PathBuf> {
        let same = |path: &Path, stamp: &Stamp| later.0.get(path) == Some(stamp);
        self.0.iter().filter(|(path, stamp)| !same(path, stamp)).map(|(path, _)| path.clone()).collect()
    }
}

/// Not under its final name yet.
fn is_temporary(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with('.') || name.contains("tmp") || name.contains("part")
}

fn stamp(path: &Path) -> Option<Stamp> {
    let data = fs::metadata(path).ok()?;
    let changed_ns = i128::from(data.mtime()) * 1_000_000_000 + i128::from(data.mtime_nsec());
    Some(Stamp { inode: data.ino(), changed_ns, size: data.size() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_written_again_counts_as_lost() {
        let state = tempfile::TempDir::new().unwrap();
        let folder = state.path().join("jobs/1/artefacts");
        fs::create_dir_all(&folder).unwrap();
        let write = |name: &str| fs::write(folder.join(name), "bytes").unwrap();
        ["kept", "again", "gone"].into_iter().for_each(write);
        fs::write(state.path().join("other"), "").unwrap();
        let before = Acknowledged::of(state.path()).unwrap();
        assert_eq!(before.len(), 3);
        fs::remove_file(folder.join("gone")).unwrap();
        write("new");
        fs::rename(folder.join("new"), folder.join("again")).unwrap();
        let lost = before.lost(&Acknowledged::of(state.path()).unwrap());
        assert_eq!(lost, [folder.join("again"), folder.join("gone")]);
    }
}
