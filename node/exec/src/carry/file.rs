//! Carry files: one tensor each, checksummed.
//!
//! Layout, little-endian: magic `HSCARRY\n`, version u32, element type (ONNX number) u32, rank u32, dimensions u64
//! each, elements, BLAKE3 of all bytes before it. Tensors kept at half the bytes have the type bfloat16 and come back as
//! f32. A file appears under its name complete or not at all.
//! Not here: which tensors go to disk (`store`).

use super::packed::Carried;
use crate::error::ExecError;
use halfstep_model::{Data, Dtype, Tensor};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::sync::Arc;

const MAGIC: &[u8; 8] = b"HSCARRY\n";
const VERSION: u32 = 1;
/// Elements converted at a time: a file passes through 64 KiB or less of extra memory.
const CHUNK: usize = 8192;

/// Writes a tensor, as it is kept, to `path`, by way of a file beside it. On failure neither is left.
pub(super) fn write(path: &Path, kept: &Carried) -> Result<(), ExecError> {
    let staged = path.with_extension("part");
    let written = stage(&staged, kept).and_then(|()| std::fs::rename(&staged, path));
    written.map_err(|source| {
        // The first error is the one worth reporting; the file may not even exist.
        let _ = std::fs::remove_file(&staged);
        ExecError::Storage { path: path.to_path_buf(), action: "write carry file", source }
    })
}

fn stage(path: &Path, kept: &Carried) -> io::Result<()> {
    let mut out = Hashing { inner: BufWriter::new(File::create(path)?), hasher: blake3::Hasher::new() };
    out.put(MAGIC)?;
    out.put(&VERSION.to_le_bytes())?;
    out.put(&kept.dtype().to_onnx().to_le_bytes())?;
    out.put(&u32::try_from(kept.dims().len()).map_err(io::Error::other)?.to_le_bytes())?;
    for dim in kept.dims() {
        out.put(&(*dim as u64).to_le_bytes())?;
    }
    match kept {
        Carried::Whole(tensor) => out.all(&tensor.data),
        Carried::Halves(halves) => out.elements(&halves.values, |x| x.to_le_bytes()),
        Carried::OnDevice(_) => Err(io::Error::other("it is on a device")),
    }?;
    let hash = out.hasher.finalize();
    out.inner.write_all(hash.as_bytes())?;
    out.inner.flush()
}

/// Reads a tensor back. `expected`: what was written there.
///
/// # Errors
/// `Storage`; `Damaged` if anything differs from what was written.
pub(super) fn read(path: &Path, expected: &Shape) -> Result<Carried, ExecError> {
    let fault = |fault| match fault {
        Fault::Io(source) if source.kind() != io::ErrorKind::UnexpectedEof => {
            ExecError::Storage { path: path.to_path_buf(), action: "read carry file", source }
        }
        Fault::Io(_) => damaged(path, "it ends early".to_owned()),
        Fault::Damage(problem) => damaged(path, problem),
    };
    decode(path, expected).map_err(fault)
}

fn damaged(path: &Path, what: String) -> ExecError {
    ExecError::Damaged { path: path.to_path_buf(), what }
}

/// Type, as kept, and dimensions of a spilled tensor, kept in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shape {
    dtype: Dtype,
    dims: Vec<usize>,
    elements: usize,
}

impl Shape {
    pub(super) fn of(kept: &Carried) -> Self {
        Self { dtype: kept.dtype(), dims: kept.dims().to_vec(), elements: kept.elements() }
    }
}

enum Fault {
    Io(io::Error),
    Damage(String),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn decode(path: &Path, expected: &Shape) -> Result<Carried, Fault> {
    let mut input = Hashing { inner: BufReader::new(File::open(path)?), hasher: blake3::Hasher::new() };
    input.header(expected)?;
    let read = input.tensor(expected)?;
    let actual = *input.hasher.finalize().as_bytes();
    let mut written = [0u8; 32];
    input.inner.read_exact(&mut written)?;
    if actual != written {
        return Err(Fault::Damage("its checksum does not match its content".into()));
    }
    if input.inner.read(&mut [0u8; 1])? != 0 {
        return Err(Fault::Damage("it goes on after its checksum".into()));
    }
    Ok(read)
}

/// A reader or writer that hashes what passes.
struct Hashing<T> {
    inner: T,
    hasher: blake3::Hasher,
}

impl<W: Write> Hashing<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.inner.write_all(bytes)
    }

    fn all(&mut self, data: &Data) -> io::Result<()> {
        match data {
            Data::F32(v) => self.elements(v, |x| x.to_le_bytes()),
            Data::F64(v) => self.elements(v, |x| x.to_le_bytes()),
            Data::I64(v) => self.elements(v, |x| x.to_le_bytes()),
            Data::I32(v) => self.elements(v, |x| x.to_le_bytes()),
            Data::U8(v) => self.elements(v, |x| [x]),
            Data::I8(v) => self.elements(v, |x| x.to_le_bytes()),
            Data::Bool(v) => self.elements(v, |x| [u8::from(x)]),
        }
    }

    fn elements<T: Copy, const N: usize>(
        &mut self,
        values: &[T],
        bytes: impl Fn(T) -> [u8; N],
    ) -> io::Result<()> {
        let mut buffer = Vec::with_capacity(CHUNK * N);
        for chunk in values.chunks(CHUNK) {
            buffer.clear();
            chunk.iter().for_each(|x| buffer.extend_from_slice(&bytes(*x)));
            self.put(&buffer)?;
        }
        Ok(())
    }
}

impl<R: Read> Hashing<R> {
    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0u8; N];
        self.inner.read_exact(&mut bytes)?;
        self.hasher.update(&bytes);
        Ok(bytes)
    }

    fn header(&mut self, expected: &Shape) -> Result<(), Fault> {
        let magic = self.take::<8>()?;
        let version = u32::from_le_bytes(self.take()?);
        if &magic != MAGIC || version != VERSION {
            return Err(Fault::Damage(format!(
                "its first bytes are {magic:?} version {version}, expected {MAGIC:?} version {VERSION}"
            )));
        }
        let dtype = i32::from_le_bytes(self.take()?);
        let rank = u32::from_le_bytes(self.take()?) as usize;
        if dtype != expected.dtype.to_onnx() || rank != expected.dims.len() {
            return Err(Fault::Damage(format!(
                "it holds element type {dtype}, rank {rank}, expected {}, rank {}",
                expected.dtype.to_onnx(),
                expected.dims.len()
            )));
        }
        for (axis, dim) in expected.dims.iter().enumerate() {
            let found = u64::from_le_bytes(self.take()?);
            if found != *dim as u64 {
                return Err(Fault::Damage(format!("dimension {axis} is {found}, expected {dim}")));
            }
        }
        Ok(())
    }

    /// The number of elements is the store's own, never the file's: a damaged file cannot make us allocate.
    fn tensor(&mut self, expected: &Shape) -> Result<Carried, Fault> {
        let count = expected.elements;
        let data = match expected.dtype {
            Dtype::Bf16 => {
                let values = self.values(count, u16::from_le_bytes)?;
                return Ok(Carried::halves(expected.dims.clone(), values));
            }
            Dtype::F32 => Data::F32(self.values(count, f32::from_le_bytes)?),
            Dtype::F64 => Data::F64(self.values(count, f64::from_le_bytes)?),
            Dtype::I64 => Data::I64(self.values(count, i64::from_le_bytes)?),
            Dtype::I32 => Data::I32(self.values(count, i32::from_le_bytes)?),
            Dtype::U8 => Data::U8(self.values(count, u8::from_le_bytes)?),
            Dtype::I8 => Data::I8(self.values(count, i8::from_le_bytes)?),
            Dtype::Bool => Data::Bool(self.values(count, |b: [u8; 1]| b[0] != 0)?),
            other => return Err(Fault::Damage(format!("element type {other} is never written"))),
        };
        let tensor = Tensor::new(expected.dims.clone(), data);
        Ok(Carried::Whole(Arc::new(tensor.map_err(|error| Fault::Damage(error.to_string()))?)))
    }

    fn values<T, const N: usize>(
        &mut self,
        count: usize,
        value: impl Fn([u8; N]) -> T,
    ) -> io::Result<Vec<T>> {
        let mut values = Vec::with_capacity(count);
        let mut buffer = vec![0u8; CHUNK.min(count) * N];
        while values.len() < count {
            let bytes = &mut buffer[..(count - values.len()).min(CHUNK) * N];
            self.inner.read_exact(bytes)?;
            self.hasher.update(bytes);
            values.extend(bytes.as_chunks::<N>().0.iter().map(|chunk| value(*chunk)));
        }
        Ok(values)
    }
}
