//! The container: a header of named values and tensor descriptions, then the tensors, each on a multiple of 32 bytes.
//!
//! Version 3, little-endian, as ggml's documentation of GGUF has it. What is read here is a file that was just written: any
//! other length, type or order than the writer's is a fault. Not here: which values and tensors there are.

use crate::CoordinatorError;
use halfstep_quant::blocks::BlockType;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
const ALIGNMENT: u64 = 32;

/// A value of the header.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    /// A count, a length or the index of a token.
    Count(u32),
    /// A number.
    Number(f32),
    /// A choice.
    Flag(bool),
    /// A text.
    Text(String),
    /// Texts, such as the tokens.
    Texts(Vec<String>),
    /// Integers, such as the kinds of tokens.
    Integers(Vec<i32>),
}

/// How the elements of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Blocks along the last dimension.
    Blocks(BlockType),
}

impl Kind {
    /// Number of the type in a file.
    fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Blocks(BlockType::Q4_0) => 2,
            Self::Blocks(BlockType::Q4_1) => 3,
            Self::Blocks(BlockType::Q8_0) => 8,
            Self::Bf16 => 30,
        }
    }

    /// Number of a model most of whose matrices have this type.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Blocks(BlockType::Q4_0) => 2,
            Self::Blocks(BlockType::Q4_1) => 3,
            Self::Blocks(BlockType::Q8_0) => 7,
            Self::Bf16 => 32,
        }
    }

    fn bytes(self, elements: u64) -> u64 {
        match self {
            Self::F32 => elements.saturating_mul(4),
            Self::F16 | Self::Bf16 => elements.saturating_mul(2),
            Self::Blocks(block) => {
                (elements / halfstep_quant::blocks::BLOCK as u64).saturating_mul(block.bytes() as u64)
            }
        }
    }
}

/// A tensor as the header describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Described {
    /// Its name in the file.
    pub(super) name: String,
    /// Its element type.
    pub(super) kind: Kind,
    /// `[rows, cols]` or `[n]`: the file has the dimensions in the opposite order.
    pub(super) shape: Vec<usize>,
}

impl Described {
    /// Bytes of its elements.
    pub(super) fn bytes(&self) -> u64 {
        self.kind.bytes(self.shape.iter().fold(1, |n, dim| n.saturating_mul(*dim as u64)))
    }
}

/// The bytes before the first tensor, and where each tensor begins in the file.
pub(super) fn lay_out(entries: &[(String, Value)], tensors: &[Described]) -> (Vec<u8>, Vec<u64>) {
    let mut header = MAGIC.to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((entries.len() as u64).to_le_bytes());
    for (key, value) in entries {
        put_text(&mut header, key);
        put_value(&mut header, value);
    }
    let (mut offsets, mut offset) = (Vec::with_capacity(tensors.len()), 0_u64);
    for tensor in tensors {
        put_text(&mut header, &tensor.name);
        header.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|dim| header.extend((*dim as u64).to_le_bytes()));
        header.extend(tensor.kind.number().to_le_bytes());
        header.extend(offset.to_le_bytes());
        offsets.push(offset);
        offset = offset.saturating_add(tensor.bytes().next_multiple_of(ALIGNMENT));
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
    let start = header.len() as u64;
    (header, offsets.into_iter().map(|offset| start.saturating_add(offset)).collect())
}

/// Length of the file: the last tensor is filled up like the others.
pub(super) fn length(offsets: &[u64], tensors: &[Described], header: u64) -> u64 {
    let last = offsets.last().zip(tensors.last());
    last.map_or(header, |(offset, tensor)| offset.saturating_add(tensor.bytes()).next_multiple_of(ALIGNMENT))
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Type numbers of values.
const COUNT: u32 = 4;
const INTEGER: u32 = 5;
const NUMBER: u32 = 6;
const FLAG: u32 = 7;
const TEXT: u32 = 8;
const LIST: u32 = 9;

fn put_value(out: &mut Vec<u8>, value: &Value) {
    let list = |out: &mut Vec<u8>, kind: u32, length: usize| {
        [LIST, kind].iter().for_each(|number| out.extend(number.to_le_bytes()));
        out.extend((length as u64).to_le_bytes());
    };
    match value {
        Value::Count(count) => [COUNT, *count].iter().for_each(|number| out.extend(number.to_le_bytes())),
        Value::Number(number) => {
            out.extend(NUMBER.to_le_bytes());
            out.extend(number.to_le_bytes());
        }
        Value::Flag(flag) => {
            out.extend(FLAG.to_le_bytes());
            out.push(u8::from(*flag));
        }
        Value::Text(text) => {
            out.extend(TEXT.to_le_bytes());
            put_text(out, text);
        }
        Value::Texts(texts) => {
            list(out, TEXT, texts.len());
            texts.iter().for_each(|text| put_text(out, text));
        }
        Value::Integers(integers) => {
            list(out, INTEGER, integers.len());
            integers.iter().for_each(|integer| out.extend(integer.to_le_bytes()));
        }
    }
}

/// The tensors of a file, and where they begin, after checking that its header says `entries` and nothing else.
///
/// # Errors
/// `Storage`; `ReadBack` with what is different.
pub(super) fn read_header(
    path: &Path,
    entries: &[(String, Value)],
) -> Result<Vec<(Described, u64)>, CoordinatorError> {
    let file = File::open(path).map_err(|e| CoordinatorError::storage(path, "open", e))?;
    let bytes = file.metadata().map_err(|e| CoordinatorError::storage(path, "read", e))?.len();
    let mut reader = Reader { file: BufReader::new(file), path, at: 0, bytes };
    let (magic, version) = (reader.array::<4>()?, reader.number()?);
    if &magic != MAGIC || version != VERSION {
        return Err(reader.broken(format!("it begins with {magic:?} {version}")));
    }
    let (tensors, values) = (reader.length()?, reader.length()?);
    if values != entries.len() as u64 {
        return Err(reader.broken(format!("it has {values} values, expected {}", entries.len())));
    }
    for (key, value) in entries {
        let (found_key, found) = (reader.text()?, reader.value()?);
        if found_key != *key || found != *value {
            return Err(reader.broken(format!("value `{found_key}` is not the `{key}` that was written")));
        }
    }
    let found = (0..tensors).map(|_| reader.tensor()).collect::<Result<Vec<_>, _>>()?;
    let start = reader.at.next_multiple_of(ALIGNMENT);
    Ok(found.into_iter().map(|(tensor, offset)| (tensor, start.saturating_add(offset))).collect())
}

struct Reader<'a> {
    file: BufReader<File>,
    path: &'a Path,
    at: u64,
    bytes: u64,
}

impl Reader<'_> {
    fn broken(&self, what: String) -> CoordinatorError {
        CoordinatorError::ReadBack { subject: self.path.display().to_string(), what }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], CoordinatorError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), CoordinatorError> {
        self.file.read_exact(bytes).map_err(|e| CoordinatorError::storage(self.path, "read", e))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn number(&mut self) -> Result<u32, CoordinatorError> {
        self.array().map(u32::from_le_bytes)
    }

    /// Of a list or text, each element of which takes at least a byte of the file.
    fn length(&mut self) -> Result<u64, CoordinatorError> {
        let length = self.array().map(u64::from_le_bytes)?;
        match length <= self.bytes - self.at {
            true => Ok(length),
            false => Err(self.broken(format!("a length is {length}, more than the file has"))),
        }
    }

    fn text(&mut self) -> Result<String, CoordinatorError> {
        let mut bytes = vec![0; self.length()? as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|e| self.broken(format!("a text is none: {e}")))
    }

    fn value(&mut self) -> Result<Value, CoordinatorError> {
        Ok(match self.number()? {
            COUNT => Value::Count(self.number()?),
            NUMBER => Value::Number(self.array().map(f32::from_le_bytes)?),
            FLAG => Value::Flag(self.array::<1>()? == [1]),
            TEXT => Value::Text(self.text()?),
            LIST => match (self.number()?, self.length()?) {
                (TEXT, length) => Value::Texts((0..length).map(|_| self.text()).collect::<Result<_, _>>()?),
                (INTEGER, length) => {
                    let integer = |_| self.array().map(i32::from_le_bytes);
                    Value::Integers((0..length).map(integer).collect::<Result<_, _>>()?)
                }
                (other, _) => return Err(self.broken(format!("a list holds values of type {other}"))),
            },
            other => return Err(self.broken(format!("a value has type {other}"))),
        })
    }

    fn tensor(&mut self) -> Result<(Described, u64), CoordinatorError> {
        const KINDS: [Kind; 6] = [
            Kind::F32,
            Kind::F16,
            Kind::Bf16,
            Kind::Blocks(BlockType::Q4_0),
            Kind::Blocks(BlockType::Q4_1),
            Kind::Blocks(BlockType::Q8_0),
        ];
        let name = self.text()?;
        let dims = self.number()?;
        let mut shape = Vec::new();
        for _ in 0..dims {
            shape.push(self.array().map(u64::from_le_bytes)? as usize);
        }
        shape.reverse();
        let number = self.number()?;
        let kind = KINDS.into_iter().find(|kind| kind.number() == number);
        let kind = kind.ok_or_else(|| self.broken(format!("tensor `{name}` has type {number}")))?;
        let offset = self.array().map(u64::from_le_bytes)?;
        Ok((Described { name, kind, shape }, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries() -> Vec<(String, Value)> {
        [
            ("general.architecture", Value::Text("llama".into())),
            ("a.count", Value::Count(7)),
            ("a.number", Value::Number(0.5)),
            ("a.flag", Value::Flag(true)),
            ("a.texts", Value::Texts(vec!["".into(), "Ġé".into()])),
            ("a.integers", Value::Integers(vec![1, -3])),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .to_vec()
    }

    fn tensors() -> Vec<Described> {
        let tensor =
            |name: &str, kind, shape: &[usize]| Described { name: name.into(), kind, shape: shape.into() };
        vec![
            tensor("w", Kind::Blocks(BlockType::Q4_0), &[3, 64]),
            tensor("norm", Kind::F32, &[5]),
            tensor("e", Kind::Bf16, &[2, 3]),
        ]
    }

    #[test]
    fn the_header_is_the_formats_to_the_byte() {
        let (header, _) = lay_out(&[("k".into(), Value::Count(7))], &tensors()[1..2]);
        let mut expected = b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0".to_vec();
        expected.extend(b"\x01\0\0\0\0\0\0\0k\x04\0\0\0\x07\0\0\0");
        expected.extend(b"\x04\0\0\0\0\0\0\0norm\x01\0\0\0\x05\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        expected.resize(96, 0);
        assert_eq!(header, expected);
    }

    #[test]
    fn a_header_comes_back_and_tensors_lie_on_multiples_of_32() {
        let (header, offsets) = lay_out(&entries(), &tensors());
        let sizes: Vec<u64> = tensors().iter().map(Described::bytes).collect();
        assert_eq!(sizes, [3 * 2 * 18, 20, 12]);
        let start = header.len() as u64;
        assert_eq!(offsets, [start, start + 128, start + 160]);
        assert!(start.is_multiple_of(32));
        assert_eq!(length(&offsets, &tensors(), start), start + 192);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        std::fs::write(&path, &header).unwrap();
        let found = read_header(&path, &entries()).unwrap();
        assert_eq!(found, tensors().into_iter().zip(offsets).collect::<Vec<_>>());
    }

    /// Every bit of the header matters, and none makes the reader do more than say so.
    #[test]
    fn a_header_that_was_damaged_is_found() {
        let (header, offsets) = lay_out(&entries(), &tensors());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let good: Vec<_> = tensors().into_iter().zip(offsets).collect();
        let last = header.iter().rposition(|byte| *byte != 0).unwrap();
        for at in 0..=last {
            let mut damaged = header.clone();
            damaged[at] ^= 1 << (at % 8);
            std::fs::write(&path, &damaged).unwrap();
            assert_ne!(read_header(&path, &entries()).ok(), Some(good.clone()), "byte {at}");
            std::fs::write(&path, &header[..at]).unwrap();
            assert!(read_header(&path, &entries()).is_err(), "cut at {at}");
        }
    }
}
