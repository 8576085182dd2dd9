//! A checkpoint that is open: its configuration and its tensors.
//!
//! Not here: the files' own formats (`folder`, `header`).

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::file::WeightFile;
use super::floats;
use super::folder::{Folder, WeightFiles};
use super::header::Entry;
use super::quantized::Quantization;
use crate::{Dtype, ModelError, Tensor};

/// Bytes read at once of a tensor that is read in pieces.
const PIECE_BYTES: usize = 4 << 20;
/// Faults that one message names.
const NAMED: usize = 4;

/// What the files say of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type as stored.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Bytes of its elements.
    pub bytes: usize,
}

#[derive(Debug)]
struct Located {
    info: TensorInfo,
    shard: usize,
    range: Range<usize>,
}

/// A checkpoint's configuration, and its tensors, each read when it is asked for.
///
/// The weight files stay open and should not be changed while this lives.
#[derive(Debug)]
pub struct Checkpoint {
    folder: Folder,
    config: serde_json::Value,
    config_text: Vec<u8>,
    pub(super) quantization: Option<Quantization>,
    files: Vec<PathBuf>,
    shards: Vec<WeightFile>,
    tensors: BTreeMap<String, Located>,
}

impl Checkpoint {
    /// Opens a folder: `config.json` and `model.safetensors`, or `model.safetensors.index.json` with its files.
    ///
    /// Where there is an index it decides which tensors exist.
    ///
    /// # Errors
    /// `Io`; `InFile` naming the file and, inside it, what breaks the format: nothing is believed that does not fit
    /// the files' lengths.
    pub fn open(folder: &Path) -> Result<Checkpoint, ModelError> {
        let folder = Folder::open(folder)?;
        let (config_text, config) = folder.config()?;
        let weights = folder.weights()?;
        let (mut shards, mut tensors) = (Vec::new(), BTreeMap::new());
        for (shard, name) in weights.files.iter().enumerate() {
            let file = WeightFile::open(&folder.file(name)?)?;
            let entries = file.entries()?;
            shards.push(file);
            tensors.extend(entries.into_iter().filter_map(|entry| located(entry, shard, &weights)));
        }
        refuse_missing(&folder, &weights, &tensors)?;
        let files = folder.used(&weights);
        let quantization = Quantization::of(&config);
        Ok(Checkpoint { folder, config, config_text, quantization, files, shards, tensors })
    }

    /// The folder, as it was named.
    pub fn folder(&self) -> &Path {
        &self.folder.path
    }

    /// What `config.json` says: an object.
    pub fn config(&self) -> &serde_json::Value {
        &self.config
    }

    /// `config.json` as it was read.
    pub fn config_text(&self) -> &[u8] {
        &self.config_text
    }

    /// The files that decide what this is: `config.json`, the index if it is used, the weight files.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Name and place of the folder's other files that belong to the model, sorted: tokenizer, chat template, generation
    /// settings. Weights of any format, the manifest and reports of a job are none.
    ///
    /// # Errors
    /// `Io`; `InFile` for a link that leads out of the folder.
    pub fn companions(&self) -> Result<Vec<(String, PathBuf)>, ModelError> {
        let names = self.folder.companions()?;
        names.into_iter().map(|name| self.folder.file(&name).map(|path| (name, path))).collect()
    }

    /// Names of the stored tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Type, shape and size of a stored tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|located| &located.info)
    }

    /// Type, shape and size of a tensor that must be there.
    ///
    /// # Errors
    /// `InFile` if there is no such tensor.
    pub fn expect(&self, name: &str) -> Result<&TensorInfo, ModelError> {
        self.located(name).map(|located| &located.info)
    }

    /// The stored tensor: type, shape and its bytes (little-endian, row-major), read now.
    ///
    /// # Errors
    /// `InFile` if there is no such tensor; `Io`.
    pub fn stored(&self, name: &str) -> Result<(Dtype, Vec<usize>, Bytes), ModelError> {
        let found = self.located(name)?;
        let bytes = self.shards[found.shard].read(found.range.clone())?;
        Ok((found.info.dtype, found.info.shape.clone(), bytes))
    }

    /// The stored tensor's bytes in pieces, for whoever needs no more than one of them at a time.
    ///
    /// # Errors
    /// As [`Checkpoint::stored`].
    pub fn pieces(
        &self,
        name: &str,
    ) -> Result<impl Iterator<Item = Result<Bytes, ModelError>> + '_, ModelError> {
        let Located { shard, range, .. } = self.located(name)?;
        let starts = range.clone().step_by(PIECE_BYTES);
        Ok(starts.map(|start| self.shards[*shard].read(start..range.end.min(start + PIECE_BYTES))))
    }

    fn located(&self, name: &str) -> Result<&Located, ModelError> {
        self.tensors.get(name).ok_or_else(|| self.wrong(name, "expected, but not in the checkpoint"))
    }

    /// A float tensor as f32. Doubles are rounded to nearest; packed weights are `(q - zero_point) * scale`, in f32.
    ///
    /// # Errors
    /// `InFile` if there is no such tensor, it does not hold floats, or one of them is not finite (its index is named);
    /// as [`Checkpoint::packed`].
    pub fn tensor(&self, name: &str) -> Result<Tensor, ModelError> {
        if self.info(name).is_none()
            && let Some(tensor) = self.dequantized(name)?
        {
            return Ok(tensor);
        }
        let (dtype, shape, raw) = self.stored(name)?;
        let values = floats::to_f32(dtype, &raw)
            .ok_or_else(|| self.wrong(name, format!("holds {dtype}, expected a floating-point type")))?;
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            let value = values[index];
            return Err(self.wrong(name, format!("element {index} is {value}, expected a finite number")));
        }
        Tensor::f32(shape, values)
    }

    /// Checks that these tensors are there as floats of these shapes, plain or packed.
    ///
    /// # Errors
    /// `InFile`, one sentence with the first few faults by name; as [`Checkpoint::packed`].
    pub fn check(&self, expected: &[(&str, Vec<usize>)]) -> Result<(), ModelError> {
        let mut faults = Vec::new();
        for (name, shape) in expected {
            let packed = if self.info(name).is_none() { self.packed_info(name)? } else { None };
            faults.extend(fault(name, shape, self.info(name).or(packed.as_ref())));
        }
        if faults.is_empty() {
            return Ok(());
        }
        let mut problem = faults.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join("; ");
        if faults.len() > NAMED {
            problem.push_str(&format!("; and {} more", faults.len() - NAMED));
        }
        let source =
            ModelError::Malformed { subject: "its tensors do not fit config.json".to_owned(), problem };
        Err(ModelError::InFile { path: self.folder.path.clone(), source: Box::new(source) })
    }

    /// The floating-point type that most bytes are stored in; f32 if there are none.
    pub fn dtype(&self) -> Dtype {
        let bytes = |dtype: Dtype| -> u128 {
            let of_type = self.tensors.values().filter(|located| located.info.dtype == dtype);
            of_type.map(|located| located.info.bytes as u128).sum()
        };
        // The last of equals: f32 where there is nothing.
        [Dtype::F64, Dtype::F16, Dtype::Bf16, Dtype::F32]
            .into_iter()
            .max_by_key(|dtype| bytes(*dtype))
            .unwrap_or(Dtype::F32)
    }

    pub(super) fn wrong(&self, tensor: &str, problem: impl Into<String>) -> ModelError {
        let source = ModelError::Malformed { subject: format!("tensor `{tensor}`"), problem: problem.into() };
        let shard = self.tensors.get(tensor).map(|located| located.shard);
        // Weight files are the last of the list.
        let first = self.files.len() - self.shards.len();
        let path = shard.and_then(|shard| self.files.get(first + shard)).unwrap_or(&self.folder.path);
        ModelError::InFile { path: path.clone(), source: Box::new(source) }
    }
}

/// The entry if it counts: without an index all do, else those that it places in this file.
fn located(entry: Entry, shard: usize, weights: &WeightFiles) -> Option<(String, Located)> {
    if let Some(index) = &weights.index {
        index.get(&entry.name).filter(|place| **place == shard)?;
    }
    let info = TensorInfo { dtype: entry.dtype, shape: entry.shape, bytes: entry.range.len() };
    Some((entry.name, Located { info, shard, range: entry.range }))
}

/// Every tensor of the index must be where it says.
fn refuse_missing(
    folder: &Folder,
    weights: &WeightFiles,
    tensors: &BTreeMap<String, Located>,
) -> Result<(), ModelError> {
    let Some(index) = &weights.index else { return Ok(()) };
    match index.iter().find(|(name, _)| !tensors.contains_key(*name)) {
        Some((name, place)) => {
            let problem = format!("expected, but not in `{}` where the index has it", weights.files[*place]);
            let source = ModelError::Malformed { subject: format!("tensor `{name}`"), problem };
            Err(ModelError::InFile { path: folder.path.clone(), source: Box::new(source) })
        }
        None => Ok(()),
    }
}

fn fault(name: &str, shape: &[usize], found: Option<&TensorInfo>) -> Option<String> {
    match found {
        None => Some(format!("`{name}` is missing")),
        Some(info) if info.shape != shape => {
            Some(format!("`{name}` has shape {:?}, expected {shape:?}", info.shape))
        }
        Some(info) if !info.dtype.is_float() => {
            Some(format!("`{name}` holds {}, expected a floating-point type", info.dtype))
        }
        Some(_) => None,
    }
}
