//! Bytes of slices and sample rows, as nodes fetch them from each other.
//!
//! Layout, little-endian: magic 8 bytes, version u32, then the fields in the order they are written below; counts are
//! u32, row numbers and positions u64. Integers and floats follow their counts as they are. A reader knows what it asked
//! for and says so: every size is checked against that before anything is allocated.
//! Not here: checksums of transport (`proto`), what is asked of whom (`agent`).

use crate::error::ExecError;
use crate::slice::{MeanSlice, SumSlice, UseSlice, entries};
use crate::statistics::{Exponents, SampleRows, ShardSamples};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::ops::Range;

const SUMS: &[u8; 8] = b"HSSUMS\r\n";
const MEANS: &[u8; 8] = b"HSMEANS\n";
const SAMPLES: &[u8; 8] = b"HSSAMPL\n";
const VERSION: u32 = 1;
/// Exponents of f32 sums stay far inside; beyond it a power of two would not be a float.
const EXPONENT_MAX: i32 = 1022;

/// What a reader of a layer's blobs expects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceForm {
    /// Width of the matrices.
    pub cols: usize,
    /// Convolution groups.
    pub groups: usize,
    /// Uses of the layer.
    pub uses: usize,
    /// Whether the streams differ.
    pub differs: bool,
}

impl SliceForm {
    /// Bytes of one shard's products of one use, in f32; what is above the diagonal of H and G is not counted.
    pub fn product_bytes(&self) -> usize {
        entries(&(0..self.cols * self.groups), self.cols, self.differs).saturating_mul(size_of::<f32>())
    }

    /// The same with all of H and G, as a device holds them.
    pub fn square_product_bytes(&self) -> usize {
        let matrices = if self.differs { 3 } else { 1 };
        let square = self.cols.saturating_mul(self.cols).saturating_mul(self.groups);
        square.saturating_mul(matrices * size_of::<f32>())
    }
}

/// Bytes of a slice of sums; `None` stands for a layer whose inputs are not finite.
pub fn encode_sums(slice: Option<&SumSlice>) -> Bytes {
    let mut out = Writer::new(SUMS);
    out.u32(slice.map_or(0, |slice| slice.uses.len() as u32));
    for one in slice.iter().flat_map(|slice| &slice.uses) {
        out.u64(one.positions);
        out.i32(one.exponents.h);
        out.u32(u32::from(one.exponents.cross.is_some()));
        let (c, g) = one.exponents.cross.unwrap_or_default();
        out.i32(c);
        out.i32(g);
        one.sums.iter().for_each(|sum| out.0.extend_from_slice(&sum.to_le_bytes()));
    }
    out.0.into()
}

/// # Errors
/// `Format` for bytes that are no such slice of a layer of this form.
pub fn decode_sums(
    bytes: &[u8],
    form: &SliceForm,
    rows: Range<usize>,
) -> Result<Option<SumSlice>, ExecError> {
    let mut input = Reader::new("slice of sums", bytes, SUMS)?;
    let uses = input.u32()? as usize;
    if uses == 0 {
        input.end()?;
        return Ok(None);
    }
    input.expect("uses", form.uses, uses)?;
    let len = entries(&rows, form.cols, form.differs);
    let mut found = Vec::new();
    for _ in 0..uses {
        let positions = input.u64()?;
        let h = input.exponent()?;
        let differs = input.flag()?;
        input.expect("whether the streams differ", usize::from(form.differs), usize::from(differs))?;
        let (c, g) = (input.exponent()?, input.exponent()?);
        let exponents = Exponents { h, cross: differs.then_some((c, g)) };
        let sums = input.array(len, i64::from_le_bytes)?;
        found.push(UseSlice { positions, exponents, sums });
    }
    input.end()?;
    Ok(Some(SumSlice { cols: form.cols, rows, uses: found }))
}

/// Bytes of a slice of means.
pub fn encode_means(slice: &MeanSlice) -> Bytes {
    let mut out = Writer::new(MEANS);
    out.u64(slice.positions);
    out.u32(u32::from(slice.differs));
    slice.means.iter().for_each(|mean| out.0.extend_from_slice(&mean.to_le_bytes()));
    out.0.into()
}

/// # Errors
/// `Format` for bytes that are no such slice of a layer of this form.
pub fn decode_means(bytes: &[u8], form: &SliceForm, rows: Range<usize>) -> Result<MeanSlice, ExecError> {
    let mut input = Reader::new("slice of means", bytes, MEANS)?;
    let positions = input.u64()?;
    let differs = input.flag()?;
    input.expect("whether the streams differ", usize::from(form.differs), usize::from(differs))?;
    let means = input.array(entries(&rows, form.cols, differs), f32::from_le_bytes)?;
    input.end()?;
    Ok(MeanSlice { cols: form.cols, rows, positions, differs, means })
}

/// Bytes of the kept rows of a layer's uses.
pub fn encode_samples(uses: &[BTreeMap<u32, ShardSamples>]) -> Bytes {
    let mut out = Writer::new(SAMPLES);
    out.u32(uses.len() as u32);
    for one in uses {
        out.u32(one.len() as u32);
        for (shard, groups) in one {
            out.u32(*shard);
            for rows in groups {
                out.u64(rows.x_q.len() as u64);
                let all = rows.x_q.iter().chain(&rows.x_fp);
                all.for_each(|x| out.0.extend_from_slice(&x.to_le_bytes()));
            }
        }
    }
    out.0.into()
}

/// Kept rows of exactly these shards, for each use.
///
/// # Errors
/// `Format` for bytes that are no such rows of a layer of this form.
pub fn decode_samples(
    bytes: &[u8],
    form: &SliceForm,
    shards: &[u32],
) -> Result<Vec<BTreeMap<u32, ShardSamples>>, ExecError> {
    let mut input = Reader::new("sample rows", bytes, SAMPLES)?;
    let uses = input.u32()? as usize;
    input.expect("uses", form.uses, uses)?;
    let mut found = Vec::new();
    for _ in 0..uses {
        let count = input.u32()? as usize;
        input.expect("shards", shards.len(), count)?;
        let mut kept = BTreeMap::new();
        for shard in shards {
            let named = input.u32()?;
            input.expect("shard", *shard as usize, named as usize)?;
            let groups: Result<ShardSamples, ExecError> =
                (0..form.groups).map(|_| input.rows(form.cols)).collect();
            kept.insert(*shard, groups?);
        }
        found.push(kept);
    }
    input.end()?;
    Ok(found)
}

struct Writer(Vec<u8>);

impl Writer {
    fn new(magic: &[u8; 8]) -> Self {
        let mut out = Self(magic.to_vec());
        out.u32(VERSION);
        out
    }

    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn i32(&mut self, value: i32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }
}

struct Reader<'a> {
    subject: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn new(subject: &'static str, bytes: &'a [u8], magic: &[u8; 8]) -> Result<Self, ExecError> {
        let mut input = Self { subject, rest: bytes };
        let found = input.take::<8>()?;
        if found != *magic {
            return Err(input.wrong(format!("begins with {found:?}, expected {magic:?}")));
        }
        let version = input.u32()?;
        input.expect("version", VERSION as usize, version as usize)?;
        Ok(input)
    }

    fn wrong(&self, problem: String) -> ExecError {
        ExecError::Format { subject: self.subject, problem }
    }

    fn expect(&self, what: &str, expected: usize, actual: usize) -> Result<(), ExecError> {
        if expected == actual {
            return Ok(());
        }
        Err(self.wrong(format!("{what}: expected {expected}, found {actual}")))
    }

    fn bytes(&mut self, len: usize) -> Result<&'a [u8], ExecError> {
        let Some((taken, rest)) = self.rest.split_at_checked(len) else {
            return Err(self.wrong(format!("{len} more bytes expected, found {}", self.rest.len())));
        };
        self.rest = rest;
        Ok(taken)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], ExecError> {
        let mut out = [0; N];
        out.copy_from_slice(self.bytes(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, ExecError> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, ExecError> {
        self.take().map(u64::from_le_bytes)
    }

    fn exponent(&mut self) -> Result<i32, ExecError> {
        let exponent = i32::from_le_bytes(self.take()?);
        if exponent.checked_abs().is_none_or(|e| e > EXPONENT_MAX) {
            return Err(
                self.wrong(format!("exponent {exponent}, expected at most {EXPONENT_MAX} either way"))
            );
        }
        Ok(exponent)
    }

    fn flag(&mut self) -> Result<bool, ExecError> {
        match self.u32()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.wrong(format!("a flag is 0 or 1, found {other}"))),
        }
    }

    fn array<T, const N: usize>(
        &mut self,
        len: usize,
        value: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, ExecError> {
        let size = len.checked_mul(N).ok_or_else(|| self.wrong(format!("{len} numbers are too many")))?;
        let (numbers, _) = self.bytes(size)?.as_chunks::<N>();
        Ok(numbers.iter().map(|bytes| value(*bytes)).collect())
    }

    /// Rows of one group of one shard, both streams.
    fn rows(&mut self, cols: usize) -> Result<SampleRows, ExecError> {
        let len = self.u64()?;
        let len = usize::try_from(len).map_err(|_| self.wrong(format!("{len} numbers are too many")))?;
        if !len.is_multiple_of(cols.max(1)) {
            return Err(self.wrong(format!("{len} numbers are no whole rows of {cols}")));
        }
        let x_q = self.array(len, f32::from_le_bytes)?;
        Ok(SampleRows { x_q, x_fp: self.array(len, f32::from_le_bytes)? })
    }

    fn end(&self) -> Result<(), ExecError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(self.wrong(format!("{} bytes follow its end", self.rest.len())))
    }
}
