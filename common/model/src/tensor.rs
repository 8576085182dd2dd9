//! Tensors in memory, and their two ONNX encodings: `raw_data` and the typed fields.
//!
//! Not here: where the bytes come from (`read`), sparse and string tensors (kept as they are, never decoded).

use bytes::Bytes;

use crate::ModelError;
use crate::onnx::TensorProto;

/// More elements than this in one tensor are taken for a corrupt header.
const ELEMENTS_MAX: u64 = 1 << 48;

/// An ONNX element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the names are the types")]
pub enum Dtype {
    F32,
    F64,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
    /// Any other, by its number in `onnx.proto` (strings, complex, 8-bit floats, 4-bit and 2-bit types).
    Other(i32),
}

/// Number in `onnx.proto`, type, bytes per element, name in ONNX.
const DTYPES: [(i32, Dtype, usize, &str); 13] = [
    (1, Dtype::F32, 4, "float"),
    (2, Dtype::U8, 1, "uint8"),
    (3, Dtype::I8, 1, "int8"),
    (4, Dtype::U16, 2, "uint16"),
    (5, Dtype::I16, 2, "int16"),
    (6, Dtype::I32, 4, "int32"),
    (7, Dtype::I64, 8, "int64"),
    (9, Dtype::Bool, 1, "bool"),
    (10, Dtype::F16, 2, "float16"),
    (11, Dtype::F64, 8, "double"),
    (12, Dtype::U32, 4, "uint32"),
    (13, Dtype::U64, 8, "uint64"),
    (16, Dtype::Bf16, 2, "bfloat16"),
];

impl Dtype {
    /// From `TensorProto.DataType`.
    pub fn from_onnx(number: i32) -> Dtype {
        let known = DTYPES.iter().find(|d| d.0 == number);
        known.map_or(Dtype::Other(number), |d| d.1)
    }

    /// As `TensorProto.DataType`.
    pub fn to_onnx(self) -> i32 {
        match self {
            Dtype::Other(number) => number,
            known => DTYPES.iter().find(|d| d.1 == known).map_or(0, |d| d.0),
        }
    }

    /// Bytes per element; `None` where elements are not whole bytes or the type is not known here.
    pub fn size(self) -> Option<usize> {
        DTYPES.iter().find(|d| d.1 == self).map(|d| d.2)
    }

    /// Whether it is one of the plain floating-point types.
    pub fn is_float(self) -> bool {
        matches!(self, Dtype::F32 | Dtype::F64 | Dtype::F16 | Dtype::Bf16)
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match DTYPES.iter().find(|d| d.1 == *self) {
            Some(known) => f.write_str(known.3),
            None => write!(f, "ONNX data type {}", self.to_onnx()),
        }
    }
}

/// Elements of a tensor, row-major.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the names are the types")]
pub enum Data {
    F32(Vec<f32>),
    F64(Vec<f64>),
    I64(Vec<i64>),
    I32(Vec<i32>),
    U8(Vec<u8>),
    I8(Vec<i8>),
    Bool(Vec<bool>),
}

/// Calls `$body` with `$v` bound to the vector inside.
macro_rules! each {
    ($data:expr, $v:ident => $body:expr) => {
        match $data {
            Data::F32($v) => $body,
            Data::F64($v) => $body,
            Data::I64($v) => $body,
            Data::I32($v) => $body,
            Data::U8($v) => $body,
            Data::I8($v) => $body,
            Data::Bool($v) => $body,
        }
    };
}

impl Data {
    /// Elements.
    pub fn len(&self) -> usize {
        each!(self, v => v.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        match self {
            Data::F32(_) => Dtype::F32,
            Data::F64(_) => Dtype::F64,
            Data::I64(_) => Dtype::I64,
            Data::I32(_) => Dtype::I32,
            Data::U8(_) => Dtype::U8,
            Data::I8(_) => Dtype::I8,
            Data::Bool(_) => Dtype::Bool,
        }
    }

    /// Bytes the elements take in memory.
    pub fn bytes(&self) -> usize {
        each!(self, v => std::mem::size_of_val(v.as_slice()))
    }

    /// The elements as ONNX `raw_data`: little-endian, row-major.
    pub fn to_le_bytes(&self) -> Vec<u8> {
        match self {
            Data::F32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::F64(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::I64(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::I32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::U8(v) => v.clone(),
            Data::I8(v) => v.iter().map(|x| x.cast_unsigned()).collect(),
            Data::Bool(v) => v.iter().map(|x| u8::from(*x)).collect(),
        }
    }
}

/// A dense tensor, row-major. `shape` of rank 0 is a scalar.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Dimensions.
    pub shape: Vec<usize>,
    /// `shape.product()` elements.
    pub data: Data,
}

impl Tensor {
    /// A tensor of that shape.
    ///
    /// # Errors
    /// `DataLength` if `data` does not have `shape.product()` elements; `Dims` if that product overflows.
    pub fn new(shape: Vec<usize>, data: Data) -> Result<Tensor, ModelError> {
        let expected = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        let expected = expected.ok_or_else(|| ModelError::Dims {
            tensor: String::new(),
            dims: shape.iter().map(|d| i64::try_from(*d).unwrap_or(i64::MAX)).collect(),
            problem: "have a product that overflows",
        })?;
        if expected != data.len() {
            return Err(ModelError::DataLength {
                tensor: String::new(),
                field: "data",
                unit: "elements",
                expected: expected as u64,
                actual: data.len() as u64,
            });
        }
        Ok(Tensor { shape, data })
    }

    /// A float tensor. Errors as [`Tensor::new`].
    pub fn f32(shape: Vec<usize>, data: Vec<f32>) -> Result<Tensor, ModelError> {
        Tensor::new(shape, Data::F32(data))
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.data.dtype()
    }

    /// Bytes the elements take in memory.
    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }

    /// The elements, if they are f32.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match &self.data {
            Data::F32(v) => Some(v),
            _ => None,
        }
    }

    /// The elements, if they are i64.
    pub fn as_i64(&self) -> Option<&[i64]> {
        match &self.data {
            Data::I64(v) => Some(v),
            _ => None,
        }
    }

    /// As an ONNX tensor of that name, in `raw_data`.
    pub fn to_proto(&self, name: &str) -> TensorProto {
        TensorProto {
            dims: self.shape.iter().map(|d| *d as i64).collect(),
            data_type: Some(self.dtype().to_onnx()),
            name: Some(name.to_owned()),
            raw_data: Some(Bytes::from(self.data.to_le_bytes())),
            ..Default::default()
        }
    }

    /// Decodes an ONNX tensor whose data is present. Half-width floats become f32.
    ///
    /// # Errors
    /// `Dims`, `DataLength`: the tensor is not well formed; `Dtype`: not one of float, float16, bfloat16, double,
    /// int64, int32, uint8, int8, bool.
    pub fn from_proto(proto: &TensorProto) -> Result<Tensor, ModelError> {
        check(proto)?;
        let data = decode(proto, &raw_bytes(proto)?)?;
        Ok(Tensor { shape: shape(proto)?, data })
    }
}

/// The dimensions, checked: none negative, at most 2^48 elements.
pub(crate) fn shape(proto: &TensorProto) -> Result<Vec<usize>, ModelError> {
    let wrong =
        |problem| ModelError::Dims { tensor: proto.name().to_owned(), dims: proto.dims.clone(), problem };
    let mut product = 1u64;
    let mut shape = Vec::with_capacity(proto.dims.len());
    for dim in &proto.dims {
        let dim = u64::try_from(*dim).map_err(|_| wrong("include a negative one"))?;
        // A zero elsewhere must not hide an absurd dimension.
        product = product.saturating_mul(dim.max(1));
        if product > ELEMENTS_MAX {
            return Err(wrong("claim more than 2^48 elements"));
        }
        shape.push(usize::try_from(dim).map_err(|_| wrong("do not fit this machine"))?);
    }
    Ok(shape)
}

/// Number of elements by the shape.
pub(crate) fn elements(proto: &TensorProto) -> Result<usize, ModelError> {
    Ok(shape(proto)?.iter().product())
}

/// Checks shape and data length. Types whose size is not known here pass with their shape alone.
pub(crate) fn check(proto: &TensorProto) -> Result<(), ModelError> {
    let expected = elements(proto)?;
    let Some(size) = Dtype::from_onnx(proto.data_type()).size() else {
        return Ok(());
    };
    let (field, unit, expected, actual) = match &proto.raw_data {
        Some(raw) => ("raw_data", "bytes", expected.saturating_mul(size), raw.len()),
        None => {
            let (field, actual) = typed_field(proto);
            (field, "elements", expected, actual)
        }
    };
    if expected != actual {
        return Err(ModelError::DataLength {
            tensor: proto.name().to_owned(),
            field,
            unit,
            expected: expected as u64,
            actual: actual as u64,
        });
    }
    Ok(())
}

/// The typed field that holds this element type (`onnx.proto`, TensorProto), and how many entries it has.
fn typed_field(proto: &TensorProto) -> (&'static str, usize) {
    match Dtype::from_onnx(proto.data_type()) {
        Dtype::F32 => ("float_data", proto.float_data.len()),
        Dtype::F64 => ("double_data", proto.double_data.len()),
        Dtype::I64 => ("int64_data", proto.int64_data.len()),
        Dtype::U64 | Dtype::U32 => ("uint64_data", proto.uint64_data.len()),
        _ => ("int32_data", proto.int32_data.len()),
    }
}

/// Whether the tensor carries any data at all.
pub(crate) fn has_data(proto: &TensorProto) -> bool {
    proto.raw_data.is_some() || typed_field(proto).1 > 0 || !proto.string_data.is_empty()
}

/// The elements as `raw_data` has them, converted from the typed field where they are there. Checked by the caller.
pub(crate) fn raw_bytes(proto: &TensorProto) -> Result<Bytes, ModelError> {
    if let Some(raw) = &proto.raw_data {
        return Ok(raw.clone());
    }
    let dtype = Dtype::from_onnx(proto.data_type());
    let low = |bytes: usize| -> Vec<u8> {
        let words = proto.int32_data.iter();
        // The low bytes of each entry are the element, whatever its signedness (`onnx.proto`).
        words.flat_map(|x| x.to_le_bytes().into_iter().take(bytes)).collect()
    };
    let bytes = match dtype {
        Dtype::F32 => proto.float_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::F64 => proto.double_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::I64 => proto.int64_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::U64 => proto.uint64_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::U32 => {
            let words = proto.uint64_data.iter();
            words.flat_map(|x| x.to_le_bytes().into_iter().take(4)).collect()
        }
        Dtype::I32 => low(4),
        Dtype::I16 | Dtype::U16 | Dtype::F16 | Dtype::Bf16 => low(2),
        Dtype::I8 | Dtype::U8 | Dtype::Bool => low(1),
        Dtype::Other(_) => return Err(unusable(proto)),
    };
    Ok(Bytes::from(bytes))
}

fn unusable(proto: &TensorProto) -> ModelError {
    ModelError::Dtype {
        tensor: proto.name().to_owned(),
        expected: "float, float16, bfloat16, double, int64, int32, uint8, int8 or bool",
        actual: Dtype::from_onnx(proto.data_type()).to_string(),
    }
}

fn decode(proto: &TensorProto, raw: &[u8]) -> Result<Data, ModelError> {
    Ok(match Dtype::from_onnx(proto.data_type()) {
        Dtype::F32 => Data::F32(words(raw).map(f32::from_le_bytes).collect()),
        Dtype::F64 => Data::F64(words(raw).map(f64::from_le_bytes).collect()),
        Dtype::F16 => Data::F32(words(raw).map(|b| f16_to_f32(u16::from_le_bytes(b))).collect()),
        Dtype::Bf16 => Data::F32(words(raw).map(|b| bf16_to_f32(u16::from_le_bytes(b))).collect()),
        Dtype::I64 => Data::I64(words(raw).map(i64::from_le_bytes).collect()),
        Dtype::I32 => Data::I32(words(raw).map(i32::from_le_bytes).collect()),
        Dtype::U8 => Data::U8(raw.to_vec()),
        Dtype::I8 => Data::I8(raw.iter().map(|b| b.cast_signed()).collect()),
        Dtype::Bool => Data::Bool(raw.iter().map(|b| *b != 0).collect()),
        _ => return Err(unusable(proto)),
    })
}

fn words<const N: usize>(raw: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    raw.as_chunks::<N>().0.iter().copied()
}

fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// IEEE 754 binary16 to binary32, exact; NaN payloads keep their leading bits.
fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let exponent = u32::from(bits >> 10) & 0x1f;
    let fraction = u32::from(bits & 0x3ff);
    match exponent {
        0 => {
            // Subnormal: fraction * 2^-24, exact in f32.
            let value = fraction as f32 / 16_777_216.0;
            f32::from_bits(value.to_bits() | sign)
        }
        0x1f => f32::from_bits(sign | 0x7f80_0000 | (fraction << 13)),
        _ => f32::from_bits(sign | ((exponent + 112) << 23) | (fraction << 13)),
    }
}
