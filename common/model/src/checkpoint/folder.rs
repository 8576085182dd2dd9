//! The files of a checkpoint: which there are, and that none is taken from elsewhere.
//!
//! Files lie directly in the folder. A symbolic link may lead to another file of the folder or, as in the cache of the
//! Hugging Face hub, into `../../blobs`; nowhere else. Not here: what is in a weight file (`header`).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::ModelError;

pub(super) const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Bytes that `config.json` may have.
const CONFIG_BYTES_MAX: u64 = 16 << 20;
/// Bytes that the index may have: one short line for each of a million tensors.
const INDEX_BYTES_MAX: u64 = 128 << 20;

/// Whether this is a folder with a `config.json`: what is read as a checkpoint rather than as an ONNX file.
pub fn is_checkpoint(path: &Path) -> bool {
    path.is_dir() && path.join(CONFIG).is_file()
}

/// A checkpoint's folder.
#[derive(Debug, Clone)]
pub(super) struct Folder {
    /// As the user named it.
    pub(super) path: PathBuf,
    root: PathBuf,
    /// Where the hub's cache keeps the files that the folder links to.
    blobs: Option<PathBuf>,
}

/// The weight files, and which tensors are in which where an index says so.
pub(super) struct WeightFiles {
    /// Names in the folder, sorted.
    pub(super) files: Vec<String>,
    /// Tensor to position in `files`.
    pub(super) index: Option<BTreeMap<String, usize>>,
}

impl Folder {
    pub(super) fn open(path: &Path) -> Result<Folder, ModelError> {
        let io = |source| ModelError::Io { path: path.to_owned(), action: "open", source };
        let root = path.canonicalize().map_err(io)?;
        let blobs = root.ancestors().nth(2).and_then(|above| above.join("blobs").canonicalize().ok());
        Ok(Folder { path: path.to_owned(), root, blobs })
    }

    /// Where the file of that name lies.
    ///
    /// # Errors
    /// `InFile` if the name or a link leads out of the folder, `Io` if there is no such file.
    pub(super) fn file(&self, name: &str) -> Result<PathBuf, ModelError> {
        let shown = self.path.join(name);
        let refused = |problem: &str| ModelError::InFile {
            path: self.path.clone(),
            source: Box::new(ModelError::Malformed {
                subject: format!("file `{name}`"),
                problem: problem.into(),
            }),
        };
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\\', '\0']) {
            return Err(refused("expected a name of a file in the folder, without `/` or `..`"));
        }
        let io = |source| ModelError::Io { path: shown.clone(), action: "open", source };
        let real = shown.canonicalize().map_err(io)?;
        let allowed = real.parent() == Some(&self.root)
            || self.blobs.as_ref().is_some_and(|blobs| real.parent() == Some(blobs));
        if allowed { Ok(shown) } else { Err(refused("is a symbolic link that leads out of the folder")) }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.path.join(name).is_file()
    }

    /// The text of `config.json` and what it says.
    pub(super) fn config(&self) -> Result<(Vec<u8>, serde_json::Value), ModelError> {
        let text = self.read(CONFIG, CONFIG_BYTES_MAX)?;
        let value: serde_json::Value =
            serde_json::from_slice(&text).map_err(|e| self.broken(CONFIG, format!("is not JSON: {e}")))?;
        if !value.is_object() {
            return Err(self.broken(CONFIG, "expected an object".to_owned()));
        }
        Ok((text, value))
    }

    /// One file if there is one of the usual name, else those of the index.
    pub(super) fn weights(&self) -> Result<WeightFiles, ModelError> {
        if self.has(SINGLE) {
            return Ok(WeightFiles { files: vec![SINGLE.to_owned()], index: None });
        }
        if !self.has(INDEX) {
            let source = ModelError::Malformed {
                subject: "checkpoint".to_owned(),
                problem: format!(
                    "expected weights in `{SINGLE}` or in the files of `{INDEX}`, found neither"
                ),
            };
            return Err(ModelError::InFile { path: self.path.clone(), source: Box::new(source) });
        }
        let text = self.read(INDEX, INDEX_BYTES_MAX)?;
        let index: Index =
            serde_json::from_slice(&text).map_err(|e| self.broken(INDEX, format!("is not an index: {e}")))?;
        let mut files: Vec<String> = index.weight_map.values().cloned().collect();
        files.sort();
        files.dedup();
        if files.is_empty() {
            return Err(self.broken(INDEX, "`weight_map` names no tensor".to_owned()));
        }
        let place = |file: &String| files.binary_search(file).unwrap_or(0);
        let index = index.weight_map.iter().map(|(name, file)| (name.clone(), place(file))).collect();
        Ok(WeightFiles { files, index: Some(index) })
    }

    /// `config.json`, the index if it is used, the weight files.
    pub(super) fn used(&self, weights: &WeightFiles) -> Vec<PathBuf> {
        let index = weights.index.as_ref().map(|_| INDEX.to_owned());
        let names = [CONFIG.to_owned()].into_iter().chain(index).chain(weights.files.iter().cloned());
        names.map(|name| self.path.join(name)).collect()
    }

    /// Names of the files that belong to the model without being weights or configuration, sorted: tokenizer, chat
    /// template, generation settings.
    pub(super) fn companions(&self) -> Result<Vec<String>, ModelError> {
        let io = |source| ModelError::Io { path: self.path.clone(), action: "list", source };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(io)? {
            // A name that is no text is nothing that a loader asks for.
            let Ok(name) = entry.map_err(io)?.file_name().into_string() else { continue };
            if is_companion(&name) && self.has(&name) {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// A fault of one of the small files.
    pub(super) fn broken(&self, name: &str, problem: String) -> ModelError {
        let subject = name.trim_end_matches(".json").to_owned();
        let source = Box::new(ModelError::Malformed { subject, problem });
        ModelError::InFile { path: self.path.join(name), source }
    }

    fn read(&self, name: &str, bytes_max: u64) -> Result<Vec<u8>, ModelError> {
        let path = self.file(name)?;
        let io = |action| {
            let path = path.clone();
            move |source| ModelError::Io { path, action, source }
        };
        let file = File::open(&path).map_err(io("open"))?;
        let mut text = Vec::new();
        // One more than allowed, so that a file that grows meanwhile is caught as well.
        file.take(bytes_max + 1).read_to_end(&mut text).map_err(io("read"))?;
        if text.len() as u64 > bytes_max {
            return Err(self.broken(name, format!("expected at most {bytes_max} bytes, found more")));
        }
        Ok(text)
    }
}

fn is_companion(name: &str) -> bool {
    /// What Halfstep itself writes beside a checkpoint.
    const OURS: [&str; 4] = [CONFIG, "manifest.json", "report.json", "timing.json"];
    let taken = [".json", ".txt", ".model", ".jinja"].iter().any(|end| name.ends_with(end));
    (taken || name.starts_with("tokenizer"))
        && !name.starts_with('.')
        && !name.ends_with(".index.json")
        && !name.ends_with(".safetensors")
        && !OURS.contains(&name)
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}
