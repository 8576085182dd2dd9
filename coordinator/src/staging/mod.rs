//! A folder that appears whole or not at all.
//!
//! Files are written beside the target under a temporary name, synced, and renamed in one step; dropping the staging
//! area before that removes everything. What a process that was killed left there is removed by the next one that places
//! something in the same place.

mod scratch;

use crate::CoordinatorError;
use crate::failpoints::visit;
use scratch::{Purpose, Scratch, sweep};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Where the outputs grow.
pub struct Staging {
    area: Scratch,
    target: PathBuf,
    force: bool,
}

impl Staging {
    /// # Errors
    /// `Configuration` if the target holds something and `force` is off; `Storage` if the place cannot be written.
    pub fn new(target: &Path, force: bool) -> Result<Self, CoordinatorError> {
        check_target(target, force)?;
        let parent = parent_of(target);
        fs::create_dir_all(&parent).map_err(|e| CoordinatorError::storage(&parent, "create folder", e))?;
        sweep(target, Purpose::Partial);
        let area = visit("export.create").and_then(|()| Scratch::beside(target, Purpose::Partial));
        let area = area.map_err(|e| CoordinatorError::storage(&parent, "create a folder in", e))?;
        Ok(Self { area, target: target.to_path_buf(), force })
    }

    /// Where a file of this name grows.
    pub fn path(&self, name: &str) -> PathBuf {
        self.area.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<(), CoordinatorError> {
        let path = self.path(name);
        let mut file = File::create(&path).map_err(|e| CoordinatorError::storage(&path, "create", e))?;
        visit("export.write")
            .and_then(|()| file.write_all(bytes))
            .and_then(|()| file.sync_all())
            .map_err(|e| CoordinatorError::storage(&path, "write", e))
    }

    /// Names of the files so far, sorted.
    pub(crate) fn files(&self) -> Result<Vec<String>, CoordinatorError> {
        let read = |e| CoordinatorError::storage(self.area.path(), "list", e);
        let mut names = Vec::new();
        for entry in fs::read_dir(self.area.path()).map_err(read)? {
            names.push(entry.map_err(read)?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    /// Makes the folder appear under its name.
    pub fn publish(self) -> Result<(), CoordinatorError> {
        check_target(&self.target, self.force)?;
        let target = self.target.clone();
        let fail = |action| move |e| CoordinatorError::storage(&target, action, e);
        open_to_others(self.area.path()).map_err(fail("set permissions of"))?;
        sync_folder(self.area.path());
        let target = self.target.clone();
        let fail = |action| {
            let target = target.clone();
            move |e| CoordinatorError::storage(target, action, e)
        };
        // The old results leave only when the new ones are complete.
        let old = if self.target.exists() {
            let aside = Scratch::beside(&self.target, Purpose::Old).map_err(fail("make room for"))?;
            fs::rename(&self.target, aside.path().join("old")).map_err(fail("replace"))?;
            Some(aside)
        } else {
            None
        };
        let (area, _lock) = self.area.keep();
        let renamed = visit("export.rename").and_then(|()| fs::rename(&area, &self.target));
        if let Err(e) = renamed {
            if let Some(aside) = &old {
                // Best effort: the error below is what the user must see.
                let _ = fs::rename(aside.path().join("old"), &self.target);
            }
            let _ = fs::remove_dir_all(&area);
            return Err(CoordinatorError::storage(&self.target, "rename the finished folder to", e));
        }
        sync_folder(&parent_of(&self.target));
        // Not earlier: old results are all there is until the new ones have their name.
        sweep(&self.target, Purpose::Old);
        visit("export.folder").map_err(|e| CoordinatorError::storage(&self.target, "sync the folder of", e))
    }
}

fn parent_of(target: &Path) -> PathBuf {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// Whether results may go there; asked before any work is done, and again before they appear.
///
/// # Errors
/// `Configuration` unless the target is absent, empty, or may be replaced.
pub fn check_target(target: &Path, force: bool) -> Result<(), CoordinatorError> {
    if !target.exists() {
        return check_writable(&parent_of(target));
    }
    if !target.is_dir() {
        return Err(CoordinatorError::Configuration(format!(
            "output `{}`: expected a folder, found a file",
            target.display()
        )));
    }
    let mut entries = fs::read_dir(target).map_err(|e| CoordinatorError::storage(target, "list", e))?;
    if force {
        let known = target.join("manifest.json").is_file() || entries.next().is_none();
        return if known {
            Ok(())
        } else {
            Err(CoordinatorError::Configuration(format!(
                "output `{}`: is not a folder that Halfstep wrote (no manifest.json), refusing to replace it",
                target.display()
            )))
        };
    }
    if entries.next().is_some() {
        return Err(CoordinatorError::Configuration(format!(
            "output `{}`: expected an empty or absent folder, found files in it; `--force` replaces them",
            target.display()
        )));
    }
    Ok(())
}

/// Makes and removes a folder in `parent`, or in the nearest folder above it that exists: a place that cannot be
/// written must be known before hours of work, not after.
fn check_writable(parent: &Path) -> Result<(), CoordinatorError> {
    let there = |path: &&Path| path.as_os_str().is_empty() || path.exists();
    let nearest = parent.ancestors().find(there).unwrap_or(parent);
    let nearest = if nearest.as_os_str().is_empty() { Path::new(".") } else { nearest };
    let probe = tempfile::Builder::new().prefix(".probe-").tempdir_in(nearest);
    probe.map(drop).map_err(|e| CoordinatorError::storage(nearest, "create a folder in", e))
}

#[cfg(unix)]
fn open_to_others(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

#[cfg(not(unix))]
fn open_to_others(_path: &Path) -> std::io::Result<()> {
    Ok(())
}

/// Best effort: some file systems refuse to sync a folder, and the rename is atomic all the same.
fn sync_folder(path: &Path) {
    if let Ok(folder) = File::open(path) {
        let _ = folder.sync_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_visible_before_publish_and_nothing_stays_after_drop() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        let staging = Staging::new(&target, false).unwrap();
        staging.write("a", b"1").unwrap();
        assert!(!target.exists());
        drop(staging);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn publish_renames_and_force_replaces_only_our_own_folders() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        let staging = Staging::new(&target, false).unwrap();
        staging.write("manifest.json", b"{}").unwrap();
        staging.publish().unwrap();
        assert!(Staging::new(&target, false).is_err());
        let staging = Staging::new(&target, true).unwrap();
        staging.write("manifest.json", b"{1}").unwrap();
        staging.publish().unwrap();
        assert_eq!(fs::read(target.join("manifest.json")).unwrap(), b"{1}");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        let foreign = root.path().join("photos");
        fs::create_dir(&foreign).unwrap();
        fs::write(foreign.join("cat.png"), b"x").unwrap();
        assert!(Staging::new(&foreign, true).is_err());
    }
}
