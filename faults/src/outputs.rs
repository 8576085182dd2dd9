//! What a run produced: every file but the one that holds times, by hash.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// The only file that may differ from run to run.
const TIMES: &str = "timing.json";

/// Size and BLAKE3 of every file, by path relative to the folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outputs(BTreeMap<String, (u64, String)>);

impl Outputs {
    /// Reads a folder.
    ///
    /// # Errors
    /// If it cannot be read or holds nothing.
    pub fn of(folder: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        for path in crate::damage::files_below(folder)? {
            let name = path.strip_prefix(folder)?.to_string_lossy().into_owned();
            if name != TIMES {
                let bytes = fs::read(&path).with_context(|| format!("output {}", path.display()))?;
                files.insert(name, (bytes.len() as u64, blake3::hash(&bytes).to_string()));
            }
        }
        ensure!(!files.is_empty(), "{}: holds no output", folder.display());
        Ok(Self(files))
    }

    /// How `self` differs from `expected`, one sentence a file; empty if it does not.
    pub fn differences(&self, expected: &Self) -> Vec<String> {
        let missing = expected.0.keys().filter(|name| !self.0.contains_key(*name));
        let mut found: Vec<String> = missing.map(|name| format!("{name} is missing")).collect();
        for (name, (size, hash)) in &self.0 {
            match expected.0.get(name) {
                None => found.push(format!("{name} was not expected")),
                Some((bytes, blake3)) if (bytes, blake3) != (size, hash) => {
                    found.push(format!("{name} has {size} bytes, BLAKE3 {hash}; expected {bytes}, {blake3}"));
                }
                Some(_) => {}
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    fn folder(files: &[(&str, &str)]) -> Outputs {
        let folder = TempDir::new().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        Outputs::of(folder.path()).unwrap()
    }

    #[test]
    fn one_byte_a_missing_and_a_new_file_are_seen_but_times_are_not() {
        let expected = folder(&[("a", "1"), ("b", "2"), (TIMES, "3")]);
        assert!(folder(&[("a", "1"), ("b", "2"), (TIMES, "4")]).differences(&expected).is_empty());
        let differences = folder(&[("a", "2"), ("c", "2")]).differences(&expected);
        assert_eq!(differences.len(), 3, "{differences:?}");
    }
}
