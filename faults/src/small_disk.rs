//! A disk that is too small: a tmpfs of a few megabytes. Root only.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::binary::is_root;

/// A mounted tmpfs, unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one of `kibibytes` at `place`, which is made.
    ///
    /// # Errors
    /// If it cannot be mounted although we are root; `Ok(Err(reason))` where it is not allowed.
    pub fn mount(place: &Path, kibibytes: u64) -> Result<Result<Self, String>> {
        if !is_root() {
            return Ok(Err("mounting a tmpfs needs root".into()));
        }
        fs::create_dir_all(place)?;
        let options = format!("size={kibibytes}k");
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(place);
        let output = command.output().context("mount")?;
        if !output.status.success() {
            return Ok(Err(format!("mount: {}", String::from_utf8_lossy(&output.stderr).trim())));
        }
        Ok(Ok(Self(place.into())))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Gives it another size.
    ///
    /// # Errors
    /// If it does not take it.
    pub fn resize(&self, kibibytes: u64) -> Result<()> {
        let options = format!("remount,size={kibibytes}k");
        let status = Command::new("mount").args(["-o", &options]).arg(&self.0).status()?;
        ensure!(status.success(), "remount of {} failed", self.0.display());
        Ok(())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::print_stderr, reason = "a skipped test says why")]
    fn a_small_disk_fills_up_and_takes_more_when_it_grows() {
        let place = tempfile::TempDir::new().unwrap();
        let disk = match SmallDisk::mount(&place.path().join("disk"), 64).unwrap() {
            Ok(disk) => disk,
            Err(reason) => return eprintln!("SKIPPED: {reason}"),
        };
        let file = disk.path().join("f");
        let full = fs::write(&file, vec![0; 100 << 10]).unwrap_err();
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
        disk.resize(1024).unwrap();
        fs::write(&file, vec![0; 100 << 10]).unwrap();
    }
}
