//! Files whose tensors are known by name, type and shape before their contents are: safetensors, and others by their header.
//!
//! All headers are written first; then contents arrive in any order and go straight to their places, so that no more
//! than one of them is in memory. Wide types come first in a file, so that each tensor lies on a multiple of its
//! element. Not here: which tensors there are (`form`).

use super::form::Part;
use crate::CoordinatorError;
use crate::failpoints::visit;
use crate::staging::Staging;
use halfstep_model::checkpoint::{HEADER_BYTES_MAX, stored_type_name};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;

/// Where a tensor goes.
struct Place {
    shard: usize,
    offset: u64,
    bytes: u64,
    written: bool,
}

struct Shard {
    name: String,
    path: PathBuf,
    file: File,
}

/// The weight files of one checkpoint while they are written.
pub(super) struct WeightWriter {
    shards: Vec<Shard>,
    places: HashMap<String, Place>,
}

impl WeightWriter {
    /// Creates the files and writes their headers. `parts` fill files in order, each up to `shard_bytes`; a larger
    /// tensor has a file of its own.
    ///
    /// # Errors
    /// `Storage`; `ReadBack` for a name that comes twice or a type that the format lacks.
    pub(super) fn create(
        staging: &Staging,
        parts: Vec<Part>,
        shard_bytes: u64,
    ) -> Result<Self, CoordinatorError> {
        let mut writer = Self { shards: Vec::new(), places: HashMap::new() };
        let filled = fill(parts, shard_bytes);
        let count = filled.len();
        for (index, parts) in filled.into_iter().enumerate() {
            let name = match count {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            writer.begin(staging, name, parts)?;
        }
        Ok(writer)
    }

    /// Creates one file of another format: its header, then tensors by name, first byte and number of bytes, in a file of
    /// `length` bytes.
    ///
    /// # Errors
    /// As [`WeightWriter::create`].
    pub(super) fn laid_out(
        staging: &Staging,
        name: &str,
        header: &[u8],
        tensors: impl IntoIterator<Item = (String, u64, u64)>,
        length: u64,
    ) -> Result<Self, CoordinatorError> {
        let mut writer = Self { shards: Vec::new(), places: HashMap::new() };
        writer.place(tensors)?;
        writer.open(staging, name.to_owned(), header, length)?;
        Ok(writer)
    }

    fn begin(
        &mut self,
        staging: &Staging,
        name: String,
        mut parts: Vec<Part>,
    ) -> Result<(), CoordinatorError> {
        parts.sort_by_key(|part| std::cmp::Reverse(part.dtype.size()));
        let header = header(&name, &parts)?;
        let mut length = header.len() as u64;
        let tensors = parts.into_iter().map(|part| {
            let (offset, bytes) = (length, part.bytes());
            length += bytes;
            (part.name, offset, bytes)
        });
        self.place(tensors)?;
        self.open(staging, name, &header, length)
    }

    /// Gives tensors of the file that is opened next their places.
    fn place(
        &mut self,
        tensors: impl IntoIterator<Item = (String, u64, u64)>,
    ) -> Result<(), CoordinatorError> {
        let shard = self.shards.len();
        for (name, offset, bytes) in tensors {
            let place = Place { shard, offset, bytes, written: false };
            if self.places.insert(name.clone(), place).is_some() {
                return Err(broken(&name, "it stands twice among what is to be written"));
            }
        }
        Ok(())
    }

    fn open(
        &mut self,
        staging: &Staging,
        name: String,
        header: &[u8],
        length: u64,
    ) -> Result<(), CoordinatorError> {
        let path = staging.path(&name);
        let fail = |e| CoordinatorError::storage(&path, "write", e);
        let mut file = File::create(&path).map_err(|e| CoordinatorError::storage(&path, "create", e))?;
        file.write_all(header).and_then(|()| file.set_len(length)).map_err(fail)?;
        self.shards.push(Shard { name, path, file });
        Ok(())
    }

    /// Writes the contents of one tensor, piece after piece.
    ///
    /// # Errors
    /// `Storage`; `ReadBack` if there is no such tensor or it has another size; what the pieces say.
    pub(super) fn put<B: AsRef<[u8]>>(
        &mut self,
        name: &str,
        pieces: impl IntoIterator<Item = Result<B, CoordinatorError>>,
    ) -> Result<(), CoordinatorError> {
        let place = self.places.get_mut(name).ok_or_else(|| broken(name, "it has no place in the files"))?;
        let shard = &mut self.shards[place.shard];
        let fail = |e| CoordinatorError::storage(&shard.path, "write", e);
        visit("export.write").and_then(|()| shard.file.seek(SeekFrom::Start(place.offset))).map_err(fail)?;
        let mut written = 0;
        for piece in pieces {
            let piece = piece?;
            written += piece.as_ref().len() as u64;
            // What is too long would run into the next tensor.
            if written > place.bytes {
                break;
            }
            shard.file.write_all(piece.as_ref()).map_err(fail)?;
        }
        if written != place.bytes {
            return Err(broken(name, format!("it has {written} bytes or more, expected {}", place.bytes)));
        }
        place.written = true;
        Ok(())
    }

    /// Brings everything to the disk, and the index where there are several files.
    ///
    /// # Errors
    /// `Storage`; `ReadBack` if a tensor is missing.
    pub(super) fn finish(self, staging: &Staging) -> Result<(), CoordinatorError> {
        if let Some((name, _)) = self.places.iter().find(|(_, place)| !place.written) {
            return Err(broken(name, "it was never written"));
        }
        for shard in &self.shards {
            shard.file.sync_all().map_err(|e| CoordinatorError::storage(&shard.path, "write", e))?;
        }
        if self.shards.len() == 1 {
            return Ok(());
        }
        let total: u64 = self.places.values().map(|place| place.bytes).sum();
        let map: BTreeMap<&str, &str> = self
            .places
            .iter()
            .map(|(name, place)| (name.as_str(), self.shards[place.shard].name.as_str()))
            .collect();
        let mut text =
            serde_json::to_vec_pretty(&json!({"metadata": {"total_size": total}, "weight_map": map}))
                .map_err(|e| broken("index", e.to_string()))?;
        text.push(b'\n');
        staging.write("model.safetensors.index.json", &text)
    }
}

/// Splits into files of at most so many bytes; at least one file.
fn fill(parts: Vec<Part>, shard_bytes: u64) -> Vec<Vec<Part>> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0_u64;
    for part in parts {
        let bytes = part.bytes();
        if filled > 0 && filled.saturating_add(bytes) > shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled = filled.saturating_add(bytes);
        if let Some(shard) = shards.last_mut() {
            shard.push(part);
        }
    }
    shards
}

/// Length and JSON, padded so that the data begins on a multiple of 8.
fn header(file: &str, parts: &[Part]) -> Result<Vec<u8>, CoordinatorError> {
    let mut entries = Map::new();
    // Loaders ask whose tensors these are; the layout is the same for all.
    entries.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0_u64;
    for part in parts {
        let end = offset.saturating_add(part.bytes());
        let dtype = stored_type_name(part.dtype)
            .ok_or_else(|| broken(&part.name, format!("safetensors has no type {}", part.dtype)))?;
        let entry = json!({"dtype": dtype, "shape": part.shape, "data_offsets": [offset, end]});
        entries.insert(part.name.clone(), entry);
        offset = end;
    }
    let mut json = serde_json::to_vec(&Value::from(entries)).map_err(|e| broken(file, e.to_string()))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    if json.len() as u64 > HEADER_BYTES_MAX {
        return Err(broken(
            file,
            format!("its header takes {} bytes, expected at most {HEADER_BYTES_MAX}", json.len()),
        ));
    }
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    Ok(header)
}

fn broken(subject: &str, what: impl Into<String>) -> CoordinatorError {
    CoordinatorError::ReadBack { subject: format!("tensor `{subject}`"), what: what.into() }
}
