//! Damage to files at rest: one flipped bit, a lost tail.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// All regular files below `folder`, sorted; none if it does not exist.
///
/// # Errors
/// If a folder cannot be read.
pub fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(next) = open.pop() {
        let entries = match fs::read_dir(&next) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries.with_context(|| format!("folder {}", next.display()))?,
        };
        for entry in entries {
            let entry = entry?;
            // What vanishes while we look was temporary.
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => open.push(entry.path()),
                Ok(kind) if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Flips bit `bit`, counted from the start of the file and wrapping around its end.
///
/// # Errors
/// If the file is empty or cannot be rewritten.
pub fn flip_bit(path: &Path, bit: u64) -> Result<()> {
    let mut bytes = fs::read(path).with_context(|| format!("file {}", path.display()))?;
    ensure!(!bytes.is_empty(), "{}: empty, there is no bit to flip", path.display());
    let bit = bit % (bytes.len() as u64 * 8);
    bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
    fs::write(path, bytes).with_context(|| format!("file {}", path.display()))
}

/// Keeps the first `len` bytes.
///
/// # Errors
/// If the file cannot be cut.
pub fn truncate(path: &Path, len: u64) -> Result<()> {
    let file =
        OpenOptions::new().write(true).open(path).with_context(|| format!("file {}", path.display()))?;
    Ok(file.set_len(len)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flip_changes_one_bit_and_twice_nothing() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("f");
        fs::write(&path, [0u8; 3]).unwrap();
        flip_bit(&path, 24 + 9).unwrap();
        assert_eq!(fs::read(&path).unwrap(), [0, 2, 0]);
        flip_bit(&path, 9).unwrap();
        truncate(&path, 1).unwrap();
        assert_eq!(fs::read(&path).unwrap(), [0]);
    }
}
