//! One named array of samples, and the exact conversions between element types.
//!
//! Bytes are little-endian, row-major, sample dimension first. A conversion happens when a slice is taken, so a data
//! set of u8 images stays a quarter of its f32 size in memory.
//! Not here: reading files (`npy`, `npz`, `images`).

use std::fmt;
use std::ops::Range;

use super::DatasetError;

/// Element type of an array. Narrower integers and f16 are widened exactly while reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 64-bit float.
    F64,
    /// 64-bit signed integer.
    I64,
    /// 32-bit signed integer.
    I32,
    /// 8-bit signed integer.
    I8,
    /// 8-bit unsigned integer.
    U8,
    /// One byte, 0 or 1.
    Bool,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// Whether every value of this type that data may hold has the same value in `to`.
    ///
    /// Deviation: f64 -> f32 counts as exact although it rounds; NumPy makes f64 by default and networks compute in
    /// f32. i64 -> f32 and i64 -> i32 do not: there the values are ids or counts.
    pub fn converts_to(self, to: Self) -> bool {
        use DType::{Bool, F32, F64, I8, I32, I64, U8};
        self == to
            || matches!(
                (self, to),
                (F64, F32)
                    | (F32 | I32, F64)
                    | (I32, I64)
                    | (U8 | I8, F32 | F64 | I32 | I64)
                    | (Bool, F32 | F64 | I32 | I64 | U8 | I8)
            )
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::I64 => "int64",
            Self::I32 => "int32",
            Self::I8 => "int8",
            Self::U8 => "uint8",
            Self::Bool => "bool",
        })
    }
}

/// Consecutive samples of one array: `shape[0]` of them, `bytes` little-endian row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampleSlice {
    /// Array name; after [`super::Dataset::for_inputs`] the model input's name.
    pub name: String,
    /// Shape, sample dimension first.
    pub shape: Vec<usize>,
    /// Element type of `bytes`.
    pub dtype: DType,
    /// Little-endian elements.
    pub bytes: Vec<u8>,
}

/// A named array of samples.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    /// Name in the file, or the model input it was matched to.
    pub name: String,
    /// Shape, sample dimension first.
    pub shape: Vec<usize>,
    /// Element type that slices are delivered in.
    pub dtype: DType,
    stored: DType,
    bytes: Vec<u8>,
}

impl Array {
    /// An array from its parts.
    ///
    /// # Errors
    /// `Corrupt` if `bytes` is not as long as `shape` and `dtype` say, or the shape has no sample dimension.
    pub fn new(name: &str, shape: Vec<usize>, dtype: DType, bytes: Vec<u8>) -> Result<Self, DatasetError> {
        let corrupt = |problem: String| DatasetError::Corrupt { path: name.into(), problem };
        if shape.is_empty() {
            return Err(corrupt("is a single number, expected a first dimension that counts samples".into()));
        }
        let expected =
            byte_len(&shape, dtype).ok_or_else(|| corrupt(format!("shape {shape:?} overflows")))?;
        if bytes.len() != expected {
            return Err(corrupt(format!(
                "shape {shape:?} of {dtype} needs {expected} bytes, has {}",
                bytes.len()
            )));
        }
        Ok(Self { name: name.into(), shape, dtype, stored: dtype, bytes })
    }

    /// Samples, i.e. the first dimension.
    pub fn samples(&self) -> usize {
        self.shape.first().copied().unwrap_or(0)
    }

    /// Bytes held in memory.
    pub fn bytes_held(&self) -> usize {
        self.bytes.len()
    }

    /// The samples `range` as the delivered dtype.
    ///
    /// # Errors
    /// `Range` if `range` is not within the array.
    pub fn slice(&self, range: Range<usize>) -> Result<SampleSlice, DatasetError> {
        let samples = self.samples();
        if range.start > range.end || range.end > samples {
            return Err(DatasetError::Range { start: range.start, end: range.end, samples });
        }
        let per_sample = self.bytes.len() / samples.max(1);
        let stored = &self.bytes[range.start * per_sample..range.end * per_sample];
        let mut shape = self.shape.clone();
        shape[0] = range.len();
        let bytes = convert(stored, self.stored, self.dtype);
        Ok(SampleSlice { name: self.name.clone(), shape, dtype: self.dtype, bytes })
    }

    /// The same samples under an input's name and dtype.
    ///
    /// # Errors
    /// `DType` if the conversion is not exact; `NonFinite` if a f64 is beyond f32.
    pub(super) fn deliver_as(mut self, input: &str, dtype: DType) -> Result<Self, DatasetError> {
        if !self.stored.converts_to(dtype) {
            let (array, actual, input) = (self.name, self.stored, input.into());
            return Err(DatasetError::DType { array, actual, input, expected: dtype });
        }
        if (self.stored, dtype) == (DType::F64, DType::F32) {
            let bad = first_bad::<8>(&self.bytes, |b| f64::from(f64::from_le_bytes(b) as f32));
            if let Some((flat, value)) = bad {
                let index = unravel(flat, &self.shape);
                return Err(DatasetError::NonFinite { array: self.name, index, value });
            }
        }
        self.name = input.into();
        self.dtype = dtype;
        Ok(self)
    }

    /// Appends the samples of `next`, whose other dimensions and dtype must be the same.
    pub(super) fn append(&mut self, next: Self) -> Result<(), String> {
        if next.stored != self.stored {
            return Err(format!("dtype {} where the files before have {}", next.stored, self.stored));
        }
        if next.shape[1..] != self.shape[1..] {
            return Err(format!("shape {:?} where the files before have {:?}", next.shape, self.shape));
        }
        self.shape[0] =
            self.shape[0].checked_add(next.shape[0]).ok_or_else(|| "sample count overflows".to_string())?;
        self.bytes.extend_from_slice(&next.bytes);
        Ok(())
    }

    /// Keeps the first `samples` samples.
    pub(super) fn truncate(&mut self, samples: usize) {
        if samples < self.samples() {
            self.bytes.truncate(self.bytes.len() / self.samples() * samples);
            self.shape[0] = samples;
        }
    }

    /// Refuses NaN and infinities, naming the first one's index.
    pub(super) fn check_finite(&self) -> Result<(), DatasetError> {
        let bad = match self.stored {
            DType::F32 => first_bad::<4>(&self.bytes, |b| f64::from(f32::from_le_bytes(b))),
            DType::F64 => first_bad::<8>(&self.bytes, f64::from_le_bytes),
            _ => None,
        };
        match bad {
            None => Ok(()),
            Some((flat, value)) => {
                let index = unravel(flat, &self.shape);
                Err(DatasetError::NonFinite { array: self.name.clone(), index, value })
            }
        }
    }
}

/// Bytes of an array, `None` on overflow.
pub(super) fn byte_len(shape: &[usize], dtype: DType) -> Option<usize> {
    shape.iter().try_fold(dtype.size(), |bytes, &dim| bytes.checked_mul(dim))
}

fn first_bad<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f64) -> Option<(usize, f64)> {
    let values = bytes.as_chunks::<N>().0.iter().map(|chunk| value(*chunk));
    values.enumerate().find(|(_, value)| !value.is_finite())
}

/// Index of the `flat`-th element, row-major.
fn unravel(mut flat: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (position, &dim) in index.iter_mut().zip(shape).rev() {
        *position = flat % dim.max(1);
        flat /= dim.max(1);
    }
    index
}

/// Converts elements; the pair was checked by `converts_to`.
fn convert(bytes: &[u8], from: DType, to: DType) -> Vec<u8> {
    if from == to {
        return bytes.to_vec();
    }
    match from {
        DType::F32 => widen::<4>(bytes, to, |b| Value::Float(f64::from(f32::from_le_bytes(b)))),
        DType::F64 => widen::<8>(bytes, to, |b| Value::Float(f64::from_le_bytes(b))),
        DType::I64 => widen::<8>(bytes, to, |b| Value::Integer(i64::from_le_bytes(b))),
        DType::I32 => widen::<4>(bytes, to, |b| Value::Integer(i64::from(i32::from_le_bytes(b)))),
        DType::I8 => widen::<1>(bytes, to, |[b]| Value::Integer(i64::from(b.cast_signed()))),
        DType::U8 | DType::Bool => widen::<1>(bytes, to, |[b]| Value::Integer(i64::from(b))),
    }
}

#[derive(Clone, Copy)]
enum Value {
    Float(f64),
    Integer(i64),
}

impl Value {
    fn as_f64(self) -> f64 {
        match self {
            Self::Float(value) => value,
            Self::Integer(value) => value as f64,
        }
    }

    fn as_i64(self) -> i64 {
        match self {
            Self::Float(value) => value as i64,
            Self::Integer(value) => value,
        }
    }
}

fn widen<const N: usize>(bytes: &[u8], to: DType, read: impl Fn([u8; N]) -> Value) -> Vec<u8> {
    let values = bytes.as_chunks::<N>().0.iter().map(|chunk| read(*chunk));
    match to {
        DType::F32 => values.flat_map(|v| (v.as_f64() as f32).to_le_bytes()).collect(),
        DType::F64 => values.flat_map(|v| v.as_f64().to_le_bytes()).collect(),
        DType::I64 => values.flat_map(|v| v.as_i64().to_le_bytes()).collect(),
        DType::I32 => values.flat_map(|v| (v.as_i64() as i32).to_le_bytes()).collect(),
        DType::I8 | DType::U8 | DType::Bool => values.map(|v| v.as_i64() as u8).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(dtype: DType, shape: &[usize], bytes: Vec<u8>) -> Array {
        Array::new("x", shape.to_vec(), dtype, bytes).unwrap()
    }

    #[test]
    fn slices_are_the_samples_asked_for() {
        let a = array(DType::U8, &[4, 2], (0..8).collect());
        let slice = a.slice(1..3).unwrap();
        assert_eq!((slice.shape, slice.bytes), (vec![2, 2], vec![2, 3, 4, 5]));
        assert!(matches!(a.slice(3..5), Err(DatasetError::Range { end: 5, samples: 4, .. })));
    }

    #[test]
    fn exact_conversions_keep_every_value() {
        for (from, bytes, values) in [
            (DType::U8, vec![0, 127, 255], [0.0, 127.0, 255.0]),
            (DType::I8, vec![0x80, 0, 0x7f], [-128.0, 0.0, 127.0]),
            (
                DType::F64,
                [-1.5f64, 0.0, 3.25].iter().flat_map(|v| v.to_le_bytes()).collect(),
                [-1.5, 0.0, 3.25],
            ),
        ] {
            let a = array(from, &[3], bytes).deliver_as("input", DType::F32).unwrap();
            let expect: Vec<u8> = values.iter().flat_map(|v: &f32| v.to_le_bytes()).collect();
            assert_eq!(a.slice(0..3).unwrap().bytes, expect, "{from}");
        }
        let a = array(DType::I32, &[1], (-7i32).to_le_bytes().to_vec()).deliver_as("i", DType::I64).unwrap();
        assert_eq!(a.slice(0..1).unwrap().bytes, (-7i64).to_le_bytes());
    }

    #[test]
    fn inexact_conversions_are_refused() {
        for (from, to) in [
            (DType::I64, DType::I32),
            (DType::I64, DType::F32),
            (DType::I32, DType::F32),
            (DType::F32, DType::I64),
            (DType::F32, DType::U8),
            (DType::U8, DType::I8),
            (DType::I8, DType::U8),
        ] {
            assert!(!from.converts_to(to), "{from} -> {to}");
        }
    }

    #[test]
    fn a_nan_is_named_by_array_and_index() {
        let mut values = [0.0f32; 12];
        values[7] = f32::NAN;
        let a = array(DType::F32, &[2, 3, 2], values.iter().flat_map(|v| v.to_le_bytes()).collect());
        let error = a.check_finite().unwrap_err().to_string();
        assert_eq!(error, "array `x`: element [1, 0, 1] is NaN, expected finite numbers");
    }

    #[test]
    fn a_wrong_byte_count_is_refused() {
        assert!(Array::new("x", vec![2, 2], DType::F32, vec![0; 15]).is_err());
        assert!(Array::new("x", vec![usize::MAX, 2], DType::F32, vec![]).is_err());
        assert!(Array::new("x", vec![], DType::F32, vec![0; 4]).is_err());
    }
}
