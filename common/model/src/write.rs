//! Writes a model file, with its weights in a second file where one protobuf message cannot hold them.
//!
//! External tensors start at multiples of 4 KiB so that readers can map them. Both files are synced to disk.
//! Not here: replacing a finished file (callers write into a staging folder and rename).

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message;

use crate::onnx::tensor_proto::DataLocation;
use crate::onnx::{ModelProto, StringStringEntryProto, TensorProto};
use crate::{Dtype, ModelError, tensor};

/// Protobuf messages end at 2 GiB; some room is left for readers that count differently.
pub(crate) const INLINE_BYTES_MAX: u64 = (2 << 30) - (1 << 20);
/// Smaller tensors stay in the model file.
const EXTERNAL_BYTES_MIN: usize = 1024;
/// Alignment of external tensors: the page size that ONNX recommends for mapping.
const ALIGNMENT: u64 = 4096;

/// Writes `path`, and `<path>.data` if the message would take more than `inline_bytes_max` bytes.
pub(crate) fn model(proto: &ModelProto, path: &Path, inline_bytes_max: u64) -> Result<(), ModelError> {
    if proto.encoded_len() as u64 <= inline_bytes_max {
        return message(proto, path);
    }
    let mut small = proto.clone();
    let blobs = externalize(&mut small, &data_name(path)?)?;
    let actual = small.encoded_len() as u64;
    if actual > INLINE_BYTES_MAX {
        return Err(ModelError::TooLarge { actual, limit: INLINE_BYTES_MAX });
    }
    data(&blobs, &data_path(path)?)?;
    message(&small, path)
}

fn data_name(path: &Path) -> Result<String, ModelError> {
    let name = path.file_name().and_then(|n| n.to_str());
    let name = name.ok_or_else(|| ModelError::Request {
        subject: path.display().to_string(),
        problem: "expected a file name in UTF-8".to_owned(),
    })?;
    Ok(format!("{name}.data"))
}

fn data_path(path: &Path) -> Result<PathBuf, ModelError> {
    Ok(path.with_file_name(data_name(path)?))
}

/// Moves large initializers out of the message. Returns their bytes with their offsets, ascending.
fn externalize(proto: &mut ModelProto, location: &str) -> Result<Vec<(u64, Bytes)>, ModelError> {
    let mut blobs = Vec::new();
    let mut end = 0u64;
    let initializers = proto.graph.iter_mut().flat_map(|g| &mut g.initializer);
    for initializer in initializers {
        let known = Dtype::from_onnx(initializer.data_type()).size().is_some();
        if !known && initializer.raw_data.is_none() || !tensor::has_data(initializer) {
            continue;
        }
        let raw = tensor::raw_bytes(initializer)?;
        if raw.len() < EXTERNAL_BYTES_MIN {
            continue;
        }
        let offset = end.next_multiple_of(ALIGNMENT);
        end = offset + raw.len() as u64;
        refer(initializer, location, offset, raw.len());
        blobs.push((offset, raw));
    }
    Ok(blobs)
}

/// Replaces the tensor's data by a reference.
fn refer(proto: &mut TensorProto, location: &str, offset: u64, length: usize) {
    let entry =
        |key: &str, value: String| StringStringEntryProto { key: Some(key.to_owned()), value: Some(value) };
    let external_data = vec![
        entry("location", location.to_owned()),
        entry("offset", offset.to_string()),
        entry("length", length.to_string()),
    ];
    *proto = TensorProto {
        dims: std::mem::take(&mut proto.dims),
        data_type: proto.data_type,
        name: proto.name.take(),
        doc_string: proto.doc_string.take(),
        metadata_props: std::mem::take(&mut proto.metadata_props),
        external_data,
        data_location: Some(DataLocation::External as i32),
        ..Default::default()
    };
}

fn data(blobs: &[(u64, Bytes)], path: &Path) -> Result<(), ModelError> {
    let fill = |out: &mut BufWriter<File>| {
        let padding = [0u8; ALIGNMENT as usize];
        let mut at = 0u64;
        for (offset, bytes) in blobs {
            // Offsets are the next multiple of the alignment, so the gap is shorter than it.
            out.write_all(&padding[..(offset - at) as usize])?;
            out.write_all(bytes)?;
            at = offset + bytes.len() as u64;
        }
        Ok(())
    };
    synced(path, fill)
}

fn message(proto: &ModelProto, path: &Path) -> Result<(), ModelError> {
    synced(path, |out| out.write_all(&proto.encode_to_vec()))
}

/// Creates `path`, lets `fill` write it, and syncs it.
fn synced(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
) -> Result<(), ModelError> {
    let write = || {
        let mut out = BufWriter::new(File::create(path)?);
        fill(&mut out)?;
        let file = out.into_inner().map_err(|e| e.into_error())?;
        file.sync_all()
    };
    write().map_err(|source| ModelError::Io { path: path.to_owned(), action: "write", source })
}
