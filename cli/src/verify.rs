//! `verify`: hashes of files against a manifest.
//!
//! A manifest is JSON with `version` 1, `outputs` and `inputs`, lists of `{"path", "bytes", "blake3"}`. Output paths are relative
//! to the manifest's folder and may not leave it. Inputs are checked where they still are; a missing one is reported,
//! not an error, since a result may outlive its data.
//! Not here: writing manifests (`coordinator`).

use std::fs::File;
use std::path::{Component, Path, PathBuf};

use halfstep_work::JobId;
use serde::{Deserialize, Serialize};

use crate::exit::CliError;

/// Name of a manifest in a folder of results.
pub(crate) const MANIFEST: &str = "manifest.json";
/// A manifest larger than this is not one.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;

/// The one output that no manifest names: it differs between runs.
const TIMING: &str = "timing.json";

#[derive(Debug, Deserialize)]
struct Manifest {
    version: u32,
    /// Empty in manifests of versions that did not write it.
    #[serde(default)]
    job: String,
    #[serde(default)]
    halfstep: String,
    outputs: Vec<Entry>,
    #[serde(default)]
    inputs: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
struct Entry {
    path: PathBuf,
    bytes: u64,
    blake3: String,
}

/// What was checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Verified {
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) bytes: u64,
    /// Inputs that are no longer where they were.
    pub(crate) missing_inputs: Vec<PathBuf>,
}

/// Whether a folder holds the complete and undamaged results of this very job, made by this version, and nothing else.
pub(crate) fn holds(folder: &Path, job: JobId) -> bool {
    let Ok(manifest) = read(&folder.join(MANIFEST)) else { return false };
    if manifest.version != 1
        || manifest.job != job.to_string()
        || manifest.halfstep != env!("CARGO_PKG_VERSION")
        || manifest.outputs.is_empty()
    {
        return false;
    }
    let whole = |entry: &Entry| inside(&entry.path).is_ok_and(|p| check(&folder.join(p), entry).is_ok());
    let Ok(entries) = std::fs::read_dir(folder) else { return false };
    let ours = |name: &Path| {
        name == Path::new(MANIFEST)
            || name == Path::new(TIMING)
            || manifest.outputs.iter().any(|entry| entry.path == name)
    };
    let mut names = entries.map(|entry| entry.map(|entry| PathBuf::from(entry.file_name())));
    names.all(|name| name.is_ok_and(|name| ours(&name)))
        && folder.join(TIMING).is_file()
        && manifest.outputs.iter().all(whole)
}

/// Checks every file a manifest names.
///
/// # Errors
/// Bad input naming the first file that is missing, of another length, or of another hash.
pub(crate) fn verify(path: &Path) -> Result<Verified, CliError> {
    let manifest = read(path)?;
    if manifest.version != 1 {
        let version = manifest.version;
        return Err(CliError::bad_input(format!(
            "manifest `{}`: has version {version}, expected 1",
            path.display()
        )));
    }
    if manifest.outputs.is_empty() {
        return Err(CliError::bad_input(format!("manifest `{}`: names no outputs", path.display())));
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut done = Verified { outputs: 0, inputs: 0, bytes: 0, missing_inputs: Vec::new() };
    for entry in &manifest.outputs {
        check(&folder.join(inside(&entry.path)?), entry)?;
        done.outputs += 1;
        done.bytes += entry.bytes;
    }
    for entry in &manifest.inputs {
        if !entry.path.exists() {
            done.missing_inputs.push(entry.path.clone());
            continue;
        }
        check(&entry.path, entry)?;
        done.inputs += 1;
        done.bytes += entry.bytes;
    }
    Ok(done)
}

fn read(path: &Path) -> Result<Manifest, CliError> {
    let refuse = |what: String| CliError::bad_input(format!("manifest `{}`: {what}", path.display()));
    let size = std::fs::metadata(path).map_err(|e| refuse(format!("cannot be read: {e}")))?.len();
    if size > MANIFEST_BYTES_MAX {
        return Err(refuse(format!("has {size} bytes, expected at most {MANIFEST_BYTES_MAX}")));
    }
    let text = std::fs::read(path).map_err(|e| refuse(format!("cannot be read: {e}")))?;
    serde_json::from_slice(&text).map_err(|e| refuse(format!("is not a manifest: {e}")))
}

fn inside(path: &Path) -> Result<&Path, CliError> {
    let plain = path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if plain && path.components().next().is_some() {
        return Ok(path);
    }
    let message =
        format!("output `{}`: leaves the folder of the manifest, expected a path inside it", path.display());
    Err(CliError::bad_input(message))
}

fn check(file: &Path, entry: &Entry) -> Result<(), CliError> {
    let refuse = |what: String| CliError::bad_input(format!("file `{}`: {what}", file.display()));
    let mut hasher = blake3::Hasher::new();
    let open = File::open(file).map_err(|e| refuse(format!("cannot be read: {e}")))?;
    let bytes = open.metadata().map_err(|e| refuse(format!("cannot be read: {e}")))?.len();
    if bytes != entry.bytes {
        return Err(refuse(format!("has {bytes} bytes, the manifest says {}", entry.bytes)));
    }
    hasher.update_reader(open).map_err(|e| refuse(format!("cannot be read: {e}")))?;
    let actual = hasher.finalize().to_hex();
    if *actual == *entry.blake3.to_lowercase() {
        return Ok(());
    }
    Err(refuse(format!("has BLAKE3 {actual}, the manifest says {}", entry.blake3)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;
    use serde_json::json;

    fn folder(outputs: &serde_json::Value) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("model.onnx"), b"weights").unwrap();
        let manifest = folder.path().join("manifest.json");
        let text = json!({ "version": 1, "outputs": outputs, "inputs": [] });
        std::fs::write(&manifest, text.to_string()).unwrap();
        (folder, manifest)
    }

    fn entry(path: &str) -> serde_json::Value {
        json!([{ "path": path, "bytes": 7, "blake3": blake3::hash(b"weights").to_hex().to_string() }])
    }

    #[test]
    fn intact_files_are_verified() {
        let (_folder, manifest) = folder(&entry("model.onnx"));
        let done = verify(&manifest).unwrap();
        assert_eq!((done.outputs, done.inputs, done.bytes), (1, 0, 7));
    }

    #[test]
    fn a_changed_file_is_named() {
        let (folder, manifest) = folder(&entry("model.onnx"));
        std::fs::write(folder.path().join("model.onnx"), b"Weights").unwrap();
        let error = verify(&manifest).unwrap_err();
        assert_eq!(error.exit, Exit::BadInput);
        assert!(error.message.contains("model.onnx`: has BLAKE3"), "{error}");
        std::fs::write(folder.path().join("model.onnx"), b"short").unwrap();
        assert!(verify(&manifest).unwrap_err().message.ends_with("has 5 bytes, the manifest says 7"));
        std::fs::remove_file(folder.path().join("model.onnx")).unwrap();
        assert!(verify(&manifest).unwrap_err().message.contains("cannot be read"));
    }

    #[test]
    fn outputs_cannot_lie_outside() {
        for path in ["../model.onnx", "/etc/passwd", "a/../../b", ""] {
            let (_folder, manifest) = folder(&entry(path));
            assert!(verify(&manifest).unwrap_err().message.contains("leaves the folder"), "{path}");
        }
    }

    #[test]
    fn something_else_is_not_a_manifest() {
        let (future, _) = folder(&json!([]));
        let path = future.path().join("manifest.json");
        std::fs::write(&path, r#"{"version": 2, "outputs": []}"#).unwrap();
        assert!(verify(&path).unwrap_err().message.ends_with("has version 2, expected 1"));
        let (folder, manifest) = folder(&json!([]));
        assert!(verify(&manifest).unwrap_err().message.ends_with("names no outputs"));
        let error = verify(&folder.path().join("model.onnx")).unwrap_err();
        assert!(error.message.contains("is not a manifest"), "{error}");
    }
}
