//! Blobs of named tensors: safetensors files.
//!
//! The order of the tensors is kept, in the metadata of the file, because safetensors sorts what it stores by type and
//! name. The same tensors give the same bytes. Every offset, shape and size is checked by the `safetensors` crate
//! before a byte is used; the tensors returned are views of the blob.

use crate::{BlobHash, WireError};
use bytes::Bytes;
use halfstep_work::{InputTensor, ScalarKind};
use safetensors::{Dtype, SafeTensors, View};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

/// Key of the metadata entry that lists the names in order, as a JSON array.
const ORDER: &str = "order";

/// Writes the tensors.
///
/// # Errors
/// Two tensors of one name; elements that are not as many as the shape says.
pub fn encode(tensors: &[InputTensor]) -> Result<Bytes, WireError> {
    let mut names = BTreeMap::new();
    for tensor in tensors {
        check(tensor)?;
        if names.insert(&tensor.name, ()).is_some() {
            return Err(WireError::new(subject(&tensor.name), "is there twice"));
        }
    }
    let order: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    let views = tensors.iter().map(|tensor| (tensor.name.as_str(), Stored(tensor)));
    serialize(views, &order).map(Bytes::from)
}

fn serialize<'a>(
    views: impl IntoIterator<Item = (&'a str, impl View)>,
    order: &[&str],
) -> Result<Vec<u8>, WireError> {
    let order =
        serde_json::to_string(order).map_err(|e| WireError::new("names of tensors", e.to_string()))?;
    let metadata = HashMap::from([(ORDER.to_owned(), order)]);
    safetensors::serialize(views, Some(metadata))
        .map_err(|error| WireError::new("tensors", error.to_string()))
}

/// The hash of what [`encode`] would write of one tensor, without writing it.
///
/// # Errors
/// As [`encode`].
pub fn hash(tensor: &InputTensor) -> Result<BlobHash, WireError> {
    check(tensor)?;
    let header = serialize([(tensor.name.as_str(), Unwritten(tensor))], &[tensor.name.as_str()])?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header).update(&tensor.bytes);
    Ok(hasher.finalize().into())
}

/// Reads tensors back, in the order they were written.
///
/// # Errors
/// Anything that is not such a blob.
pub fn decode(blob: &Bytes) -> Result<Vec<InputTensor>, WireError> {
    let damaged = |error: String| WireError::new("blob of tensors", error);
    let (_, metadata) = SafeTensors::read_metadata(blob).map_err(|e| damaged(e.to_string()))?;
    let file = SafeTensors::deserialize(blob).map_err(|e| damaged(e.to_string()))?;
    let order = metadata.metadata().as_ref().and_then(|entries| entries.get(ORDER));
    let order = order.ok_or_else(|| damaged(format!("metadata entry `{ORDER}` is missing")))?;
    let names: Vec<String> = serde_json::from_str(order).map_err(|e| damaged(e.to_string()))?;
    if names.len() != file.len() {
        return Err(damaged(format!("{} names for {} tensors", names.len(), file.len())));
    }
    let mut seen = BTreeMap::new();
    names
        .into_iter()
        .map(|name| {
            if seen.insert(name.clone(), ()).is_some() {
                return Err(WireError::new(subject(&name), "is there twice"));
            }
            read(blob, &file, name)
        })
        .collect()
}

fn read(blob: &Bytes, file: &SafeTensors<'_>, name: String) -> Result<InputTensor, WireError> {
    let view = file.tensor(&name).map_err(|error| WireError::new(subject(&name), error.to_string()))?;
    let kind = scalar(view.dtype())
        .ok_or_else(|| WireError::new(subject(&name), format!("{:?} is no type of ours", view.dtype())))?;
    let tensor = InputTensor { kind, shape: view.shape().to_vec(), bytes: blob.slice_ref(view.data()), name };
    check(&tensor)?;
    Ok(tensor)
}

fn subject(name: &str) -> String {
    format!("tensor `{name}`")
}

fn check(tensor: &InputTensor) -> Result<(), WireError> {
    let wrong = |problem: String| WireError::new(subject(&tensor.name), problem);
    let size = tensor.shape.iter().try_fold(tensor.kind.size(), |size, dim| size.checked_mul(*dim));
    let expected = size.ok_or_else(|| wrong(format!("shape {:?} is too large", tensor.shape)))?;
    if tensor.bytes.len() != expected {
        let (shape, actual) = (&tensor.shape, tensor.bytes.len());
        return Err(wrong(format!("shape {shape:?} needs {expected} bytes, found {actual}")));
    }
    if tensor.kind == ScalarKind::Bool
        && let Some(byte) = tensor.bytes.iter().find(|byte| **byte > 1)
    {
        return Err(wrong(format!("a bool is 0 or 1, found {byte}")));
    }
    Ok(())
}

fn dtype(kind: ScalarKind) -> Dtype {
    match kind {
        ScalarKind::F32 => Dtype::F32,
        ScalarKind::F64 => Dtype::F64,
        ScalarKind::F16 => Dtype::F16,
        ScalarKind::Bf16 => Dtype::BF16,
        ScalarKind::I64 => Dtype::I64,
        ScalarKind::I32 => Dtype::I32,
        ScalarKind::I8 => Dtype::I8,
        ScalarKind::U8 => Dtype::U8,
        ScalarKind::Bool => Dtype::BOOL,
    }
}

fn scalar(dtype: Dtype) -> Option<ScalarKind> {
    Some(match dtype {
        Dtype::F32 => ScalarKind::F32,
        Dtype::F64 => ScalarKind::F64,
        Dtype::F16 => ScalarKind::F16,
        Dtype::BF16 => ScalarKind::Bf16,
        Dtype::I64 => ScalarKind::I64,
        Dtype::I32 => ScalarKind::I32,
        Dtype::I8 => ScalarKind::I8,
        Dtype::U8 => ScalarKind::U8,
        Dtype::BOOL => ScalarKind::Bool,
        _ => return None,
    })
}

struct Stored<'a>(&'a InputTensor);

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        dtype(self.0.kind)
    }

    fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.0.bytes)
    }

    fn data_len(&self) -> usize {
        self.0.bytes.len()
    }
}

/// A tensor of which only the header is written.
struct Unwritten<'a>(&'a InputTensor);

impl View for Unwritten<'_> {
    fn dtype(&self) -> Dtype {
        dtype(self.0.kind)
    }

    fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&[])
    }

    fn data_len(&self) -> usize {
        self.0.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KINDS: [ScalarKind; 9] = [
        ScalarKind::F32,
        ScalarKind::F64,
        ScalarKind::F16,
        ScalarKind::Bf16,
        ScalarKind::I64,
        ScalarKind::I32,
        ScalarKind::I8,
        ScalarKind::U8,
        ScalarKind::Bool,
    ];

    fn tensor(name: &str, kind: ScalarKind, shape: &[usize]) -> InputTensor {
        let size = shape.iter().product::<usize>() * kind.size();
        let bytes = (0..size).map(|i| (i % 2) as u8).collect::<Vec<_>>().into();
        InputTensor { name: name.into(), kind, shape: shape.to_vec(), bytes }
    }

    #[test]
    fn every_kind_and_the_order_come_back() {
        let names = ["z", "a/b", "m", "ü", "", "b", "c"];
        let shapes: [&[usize]; 7] = [&[2, 3], &[], &[0, 5], &[7], &[1, 1, 1, 1], &[3], &[4]];
        let tensors: Vec<_> = (0..7).map(|i| tensor(names[i], KINDS[i], shapes[i])).collect();
        let blob = encode(&tensors).unwrap();
        assert_eq!(decode(&blob).unwrap(), tensors);
        assert_eq!(encode(&tensors).unwrap(), blob);
        for one in &tensors {
            let blob = encode(std::slice::from_ref(one)).unwrap();
            assert_eq!(hash(one).unwrap(), BlobHash::of(&blob), "{}", one.name);
        }
        assert_eq!(decode(&encode(&[]).unwrap()).unwrap(), []);
    }

    #[test]
    fn contradictions_are_refused() {
        let short = InputTensor { bytes: Bytes::new(), ..tensor("x", ScalarKind::F32, &[2]) };
        let error = encode(&[short]).unwrap_err();
        assert_eq!(error.to_string(), "tensor `x`: shape [2] needs 8 bytes, found 0");
        let short = InputTensor { bytes: Bytes::new(), ..tensor("x", ScalarKind::F32, &[2]) };
        assert_eq!(hash(&short).unwrap_err().to_string(), error.to_string());
        let x = tensor("x", ScalarKind::U8, &[2]);
        assert_eq!(encode(&[x.clone(), x.clone()]).unwrap_err().to_string(), "tensor `x`: is there twice");
        let vast = InputTensor { shape: vec![usize::MAX, 2], ..x.clone() };
        assert!(encode(&[vast]).unwrap_err().to_string().contains("too large"));
        let odd = InputTensor { kind: ScalarKind::Bool, bytes: Bytes::from_static(&[1, 2]), ..x };
        assert!(encode(&[odd]).unwrap_err().to_string().contains("a bool is 0 or 1"));
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&Bytes::from(bytes));
        }

        #[test]
        fn changed_bytes_never_panic_and_never_outgrow_the_blob(at in 0usize..400, to in any::<u8>()) {
            let tensors = [tensor("a", ScalarKind::F32, &[4, 3]), tensor("b", ScalarKind::I64, &[2])];
            let mut blob = encode(&tensors).unwrap().to_vec();
            let at = at % blob.len();
            blob[at] = to;
            if let Ok(read) = decode(&Bytes::from(blob.clone())) {
                prop_assert!(read.iter().map(|t| t.bytes.len()).sum::<usize>() <= blob.len());
            }
        }
    }
}
