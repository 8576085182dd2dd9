//! One shard's products of rows on a device, and exact sums of them over shards.
//!
//! Rows come in any pieces and are multiplied in blocks of [`BLOCK_ROWS`], in the order they came: what is computed follows from
//! the shape and the number of rows. Where there are two streams of rows (`q` the quantized model's, `x` the original's) there are
//! three matrices: `H = sum q q^T`, `C = sum x q^T`, `G = sum x x^T`; else `H = sum x x^T` alone. The triangle above the diagonal
//! of H and G is never read. Products are f32 and belong to nobody until they are added to sums, 64-bit integers as on the
//! CPU (`exec::fixed_gram`), which gives the same for the same products.
//!
//! Not here: exponents and what may be added (`exec`), unfolding.
#![expect(unsafe_code, reason = "products and copies on raw device addresses, checked here")]

use std::ops::Range;
use std::sync::Arc;

use super::blas::{RowDigits, RowShape, WORKSPACE_BYTES};
use super::column_major::int;
use super::device::{Cuda, CudaBuffer, count, offset};
use super::halves::CudaHalves;
use super::kernels::{self, Kept};
use super::staging::RowStaging;
use super::triangle::{self, Squares};
use crate::device::{Device, DeviceError};
use crate::shape::{area, length};

/// Rows that are multiplied at once: as many as a shard of a language model has.
const BLOCK_ROWS: usize = 2048;

/// The matrices of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GramShape {
    /// Side of each matrix.
    pub cols: usize,
    /// Matrices of a kind, one after the other.
    pub groups: usize,
    /// Whether there are C and G besides H.
    pub cross: bool,
}

impl GramShape {
    /// Whether the lower triangle alone counts, matrix by matrix: H, C, G.
    fn lower(self) -> &'static [bool] {
        if self.cross { &[true, false, true] } else { &[true] }
    }

    /// f32 of all groups' matrices of a kind.
    fn square(self) -> usize {
        area(area(self.cols, self.cols), self.groups)
    }
}

/// `2^exponent` of H, C and G; the last two are unused where there is H alone.
pub type Factors = [f64; 3];

/// Products of one shard, complete: readable from any lane of the device.
#[derive(Debug)]
pub struct CudaProducts {
    shape: GramShape,
    /// H, C, G: `[groups, cols, cols]` each.
    matrices: Vec<CudaBuffer>,
}

/// Products of one shard in the making.
pub struct ShardGrams<'a> {
    lane: &'a Cuda,
    staging: &'a mut RowStaging,
    shape: GramShape,
    digits: RowDigits,
    parts: usize,
    matrices: Vec<CudaBuffer>,
    /// A block of rows of each stream, the original's first; made when rows first come from the host.
    blocks: Vec<CudaBuffer<u16>>,
    /// 16-bit words of a block.
    block_words: usize,
    group: usize,
    /// Rows in the block.
    filled: usize,
    /// Whether the group's matrices have been written.
    begun: bool,
}

impl<'a> ShardGrams<'a> {
    /// Room for the products of a shard of `rows` rows at most.
    ///
    /// # Errors
    /// `OutOfMemory`, `Index` if a side is beyond 32 bits, `Failed`.
    pub fn new(
        lane: &'a Cuda,
        staging: &'a mut RowStaging,
        shape: GramShape,
        digits: RowDigits,
        rows: usize,
    ) -> Result<Self, DeviceError> {
        int("statistics columns", shape.cols)?;
        let matrices = shape.lower().iter().map(|_| lane.allocate(shape.square()));
        let matrices = matrices.collect::<Result<Vec<_>, _>>()?;
        let block_words = area(area(rows.min(BLOCK_ROWS), shape.cols), digits.bytes() / size_of::<u16>());
        let parts = triangle::parts(shape.cols);
        let (blocks, group, filled, begun) = (Vec::new(), 0, 0, false);
        Ok(Self { lane, staging, shape, digits, parts, matrices, blocks, block_words, group, filled, begun })
    }

    /// Another cut of triangles than the shape's own, for measuring; the last bits of products may differ.
    #[must_use]
    pub fn cut_into(self, parts: usize) -> Self {
        let parts = if parts > 0 && self.shape.cols.is_multiple_of(parts) { parts } else { self.parts };
        Self { parts, ..self }
    }

    /// Multiplies what the block holds as if it were `rows` new rows, for measuring.
    ///
    /// # Errors
    /// `Length` if there is no room for so many, `Failed`.
    pub fn multiply_again(&mut self, rows: usize) -> Result<(), DeviceError> {
        let words = self.digits.bytes() / size_of::<u16>();
        let needed = area(area(rows, self.shape.cols), words);
        self.blocks.iter().try_for_each(|block| length("statistics block", block.len, needed))?;
        self.filled = rows;
        self.multiply()
    }

    /// More rows of the group, `[n, cols]` of each stream; they have been read when this returns.
    ///
    /// # Errors
    /// `Length` if the streams differ, are not whole rows or there are more than there is room for; `Failed`.
    pub fn add(&mut self, x: &[f32], q: Option<&[f32]>) -> Result<(), DeviceError> {
        self.add_as(x, q, Self::send)
    }

    /// [`Self::add`] of bfloat16.
    ///
    /// # Errors
    /// The same; `Failed` where rows are not multiplied as bfloat16.
    pub fn add_halves(&mut self, x: &[u16], q: Option<&[u16]>) -> Result<(), DeviceError> {
        if self.digits != RowDigits::Bf16 {
            let reason = format!("statistics: rows of bfloat16, expected {:?}", self.digits);
            return Err(self.lane.opened.subject(0).failed(reason));
        }
        self.add_as(x, q, Self::send_halves)
    }

    /// The whole of a group's rows, in bfloat16 that stayed on the lane's device: multiplied where they lie.
    ///
    /// # Errors
    /// The same; `Failed` where they are on another device, or rows of the group came before.
    pub fn add_staying(&mut self, x: &CudaHalves, q: Option<&CudaHalves>) -> Result<(), DeviceError> {
        let streams: Option<Vec<_>> =
            [Some(x), q].into_iter().flatten().map(|stream| stream.on(self.lane)).collect();
        let fits = self.digits == RowDigits::Bf16 && self.filled == 0 && !self.begun;
        let Some(streams) = streams.filter(|streams| fits && streams.len() == self.streams()) else {
            let reason = "statistics: expected a group's rows in bfloat16, on this device, of every stream";
            return Err(self.lane.opened.subject(0).failed(reason.into()));
        };
        let cols = self.shape.cols.max(1);
        let rows = x.len() / cols;
        for stream in &streams {
            length("statistics rows", stream.len, area(rows, cols))?;
            length("statistics rows", area(rows, cols), stream.len)?;
        }
        for first in (0..rows).step_by(BLOCK_ROWS) {
            let start = (first * cols * size_of::<u16>()) as u64;
            let at = |stream: &&CudaBuffer<u16>| {
                Ok::<_, DeviceError>(self.lane.read("statistics rows", stream, 0)? + start)
            };
            let at = streams.iter().map(at).collect::<Result<Vec<_>, _>>()?;
            self.filled = BLOCK_ROWS.min(rows - first);
            self.multiply_at(&at)?;
        }
        Ok(())
    }

    fn streams(&self) -> usize {
        if self.shape.cross { 2 } else { 1 }
    }

    fn add_as<T>(
        &mut self,
        x: &[T],
        q: Option<&[T]>,
        send: fn(&mut Self, usize, &[T]) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let cols = self.shape.cols.max(1);
        let (given, expected) = (1 + usize::from(q.is_some()), self.streams());
        if given != expected {
            let reason = format!("statistics: rows of {given} streams, expected {expected}");
            return Err(self.lane.opened.subject(0).failed(reason));
        }
        let whole = x.len() / cols * cols;
        if let Some(stream) = [Some(x), q].into_iter().flatten().find(|stream| stream.len() != whole) {
            let operand = "statistics rows";
            return Err(DeviceError::Length { operand, expected: whole, actual: stream.len() });
        }
        let mut at = 0;
        while at < x.len() {
            let end = x.len().min(at + (BLOCK_ROWS - self.filled) * cols);
            send(self, 0, &x[at..end])?;
            if let Some(q) = q {
                send(self, 1, &q[at..end])?;
            }
            self.filled += (end - at) / cols;
            at = end;
            if self.filled == BLOCK_ROWS {
                self.multiply()?;
            }
        }
        Ok(())
    }

    /// The group has no more rows; those that follow are the next one's.
    ///
    /// # Errors
    /// `Index` if there is no such group, `Failed`.
    pub fn end_group(&mut self) -> Result<(), DeviceError> {
        if self.filled > 0 {
            self.multiply()?;
        }
        if !self.begun {
            self.clear()?;
        }
        (self.group, self.begun) = (self.group + 1, false);
        Ok(())
    }

    /// The products, and their largest magnitude once multiplied by its factor: NaN if any is. Waits for all of it.
    ///
    /// # Errors
    /// `Index` if groups are missing, `OutOfMemory`, `Failed`.
    pub fn finish(self, factors: &Factors) -> Result<(CudaProducts, f64), DeviceError> {
        if self.group != self.shape.groups {
            let (index, limit) = (self.group, self.shape.groups.saturating_add(1));
            return Err(DeviceError::Index { operand: "statistics groups", index, limit });
        }
        let worst = self.worst(factors)?;
        let Self { lane, mut matrices, shape, .. } = self;
        matrices.iter_mut().try_for_each(|matrix| lane.share(matrix))?;
        Ok((CudaProducts { shape, matrices }, worst))
    }

    /// To the end of a stream's block.
    fn send(&mut self, stream: usize, values: &[f32]) -> Result<(), DeviceError> {
        let to = self.end_of_block(stream, values.len())?;
        // SAFETY: `end_of_block` has seen the room; it is this lane's, as everything that uses it.
        unsafe { self.staging.send(self.lane, values, self.digits, to) }
    }

    fn send_halves(&mut self, stream: usize, halves: &[u16]) -> Result<(), DeviceError> {
        let to = self.end_of_block(stream, halves.len())?;
        // SAFETY: as above; rows are multiplied as bfloat16, which `add_halves` has seen.
        unsafe { self.staging.send_halves(self.lane, halves, to) }
    }

    /// Where the next rows go, once it is seen that there is room for `len` numbers.
    fn end_of_block(&mut self, stream: usize, len: usize) -> Result<u64, DeviceError> {
        while self.blocks.len() < self.streams() {
            self.blocks.push(self.lane.allocate(self.block_words)?);
        }
        let words = self.digits.bytes() / size_of::<u16>();
        let start = area(area(self.filled, self.shape.cols), words);
        let end = start.saturating_add(area(len, words));
        let first = self.lane.written("statistics block", &mut self.blocks[stream], end)?;
        Ok(first + (start * size_of::<u16>()) as u64)
    }

    /// Adds the products of the block's rows to the group's matrices.
    fn multiply(&mut self) -> Result<(), DeviceError> {
        let at = |block| self.lane.read("statistics block", block, 0);
        let at = self.blocks.iter().map(at).collect::<Result<Vec<_>, _>>()?;
        self.multiply_at(&at)
    }

    /// The same of `filled` rows of each stream at these addresses.
    fn multiply_at(&mut self, streams: &[u64]) -> Result<(), DeviceError> {
        let cols = self.shape.cols;
        let beta = if self.begun { 1.0 } else { 0.0 };
        let pairs = match *streams {
            [x, q] => vec![(q, q), (x, q), (x, x)],
            [x] => vec![(x, x)],
            _ => Vec::new(),
        };
        for (number, (left, right)) in pairs.into_iter().enumerate() {
            let out = self.matrix(number)?;
            match self.shape.lower()[number] {
                true => triangle::lower(cols, self.parts)
                    .try_for_each(|squares| self.products(squares, (left, right), beta, out))?,
                false => self.products(Squares::whole(cols), (left, right), beta, out)?,
            }
        }
        (self.filled, self.begun) = (0, true);
        Ok(())
    }

    fn products(
        &self,
        squares: Squares,
        factors: (u64, u64),
        beta: f32,
        out: u64,
    ) -> Result<(), DeviceError> {
        let (rows, cols) =
            (int("statistics rows", self.filled)?, int("statistics columns", self.shape.cols)?);
        let shape = RowShape { rows, cols, digits: self.digits };
        let opened = &self.lane.opened;
        opened.context.bind_to_thread().map_err(|error| self.lane.driver(error))?;
        // SAFETY: blocks, or rows that stayed, hold `filled` rows of `cols`, which `send` and `add_staying` checked; `out` is a whole
        // matrix of the group, which `matrix` checked, and an array of its own; squares lie within the matrix.
        unsafe { self.lane.blas.row_products(shape, squares, factors, beta, out) }
            .map_err(|error| opened.subject(WORKSPACE_BYTES).blas(error))
    }

    /// The address of the group's matrix of a kind.
    fn matrix(&mut self, number: usize) -> Result<u64, DeviceError> {
        let GramShape { cols, groups, .. } = self.shape;
        if self.group >= groups {
            return Err(DeviceError::Index { operand: "statistics group", index: self.group, limit: groups });
        }
        let all =
            self.lane.written("statistics products", &mut self.matrices[number], self.shape.square())?;
        Ok(offset(all, self.group * cols * cols))
    }

    /// Zeros for a group without rows.
    fn clear(&mut self) -> Result<(), DeviceError> {
        let bytes = area(self.shape.cols, self.shape.cols) * size_of::<f32>();
        for number in 0..self.matrices.len() {
            let at = self.matrix(number)?;
            let driver = |error| self.lane.driver(error);
            self.lane.opened.context.bind_to_thread().map_err(driver)?;
            // SAFETY: `matrix` checked that the array holds the group's matrix.
            unsafe { cudarc::driver::result::memset_d8_async(at, 0, bytes, self.lane.stream.cu_stream()) }
                .map_err(driver)?;
        }
        Ok(())
    }

    fn worst(&self, factors: &Factors) -> Result<f64, DeviceError> {
        let (lane, GramShape { cols, groups, .. }) = (self.lane, self.shape);
        let k = count("statistics columns", cols)?;
        let blocks = kernels::worst_blocks(lane.opened.size, k);
        let all = area(area(blocks as usize, groups), self.matrices.len());
        if all == 0 || cols == 0 {
            return Ok(0.0);
        }
        let mut partial = lane.allocate::<u64>(all)?;
        let mut at = lane.written("statistics worst", &mut partial, all)?;
        for kept in self.kept(k, factors) {
            let (kept, matrix) = kept?;
            lane.launch(kernels::fixed_worst(lane.opened.size, kept, matrix, at))?;
            at += u64::from(blocks) * size_of::<u64>() as u64;
        }
        let mut largest = lane.allocate::<u64>(1)?;
        let (values, out) =
            (lane.read("statistics worst", &partial, all)?, lane.written("worst", &mut largest, 1)?);
        lane.launch(kernels::max_u64(count("statistics worst", all)?, values, out))?;
        Ok(f64::from_bits(lane.bring("worst", &largest, 0..1)?[0]))
    }

    fn kept(&self, k: u32, factors: &Factors) -> impl Iterator<Item = Result<(Kept, u64), DeviceError>> {
        kept(self.lane, self.shape, k, &self.matrices, *factors)
    }
}

/// Every matrix of every group, with what is kept of it.
fn kept(
    lane: &Cuda,
    shape: GramShape,
    k: u32,
    matrices: &[CudaBuffer],
    factors: Factors,
) -> impl Iterator<Item = Result<(Kept, u64), DeviceError>> {
    let kinds = shape.lower().iter().zip(factors).zip(matrices);
    kinds.flat_map(move |((lower, factor), matrix)| {
        (0..shape.groups).map(move |group| {
            let first = lane.read("statistics products", matrix, shape.square())?;
            let at = offset(first, group * shape.cols * shape.cols);
            Ok((Kept { k, lower: *lower, factor }, at))
        })
    })
}

impl CudaProducts {
    /// What they are products of.
    pub fn shape(&self) -> GramShape {
        self.shape
    }

    /// H, C and G on the host, `[groups, cols, cols]` each; above the diagonals of H and G stands anything.
    ///
    /// # Errors
    /// `Failed`, also for a lane of another device.
    pub fn download(&self, lane: &Cuda) -> Result<Vec<Vec<f32>>, DeviceError> {
        let one = |matrix: &CudaBuffer| lane.bring("statistics products", matrix, 0..matrix.len);
        self.matrices.iter().map(one).collect()
    }
}

/// Exact sums over shards, on one device.
#[derive(Debug)]
pub struct CudaSums {
    lane: Arc<Cuda>,
    shape: GramShape,
    /// H, C, G: the kept entries of each group, one after the other.
    matrices: Vec<CudaBuffer<i64>>,
}

/// Kept entries in the rows before `row` of one matrix.
fn before(row: usize, cols: usize, lower: bool) -> usize {
    if lower { row * (row + 1) / 2 } else { row * cols }
}

impl CudaSums {
    /// Zeros; everything is done on `lane`.
    ///
    /// # Errors
    /// `OutOfMemory`, `Failed`.
    pub fn new(lane: Arc<Cuda>, shape: GramShape) -> Result<Self, DeviceError> {
        let zeros = |lower: &bool| {
            let len = area(before(shape.cols, shape.cols, *lower), shape.groups);
            let mut sums = lane.allocate::<i64>(len)?;
            lane.stream.memset_zeros(&mut sums.slice).map_err(|error| lane.driver(error))?;
            Ok(sums)
        };
        let matrices = shape.lower().iter().map(zeros).collect::<Result<Vec<_>, DeviceError>>()?;
        Ok(Self { lane, shape, matrices })
    }

    /// Whether products on that device can be added.
    pub fn is_on(&self, lane: &Cuda) -> bool {
        self.lane.opened.context.ordinal() == lane.opened.context.ordinal()
    }

    /// Adds a shard's products, which were found to fit. Waits for it: after an error the sums are worth nothing.
    ///
    /// # Errors
    /// `Length` if they are of another shape, `Failed`.
    pub fn add(&mut self, products: &CudaProducts, factors: &Factors) -> Result<(), DeviceError> {
        if products.shape != self.shape {
            let (expected, actual) = (self.shape.square(), products.shape.square());
            return Err(DeviceError::Length { operand: "statistics products", expected, actual });
        }
        let GramShape { cols, groups, .. } = self.shape;
        let (lane, k) = (&self.lane, count("statistics columns", cols)?);
        let each = self.shape.lower().iter().flat_map(|lower| (0..groups).map(move |group| (*lower, group)));
        for (number, ((lower, group), kept)) in
            each.zip(kept(lane, self.shape, k, &products.matrices, *factors)).enumerate()
        {
            let (kept, matrix) = kept?;
            let entries = before(cols, cols, lower);
            let sums = &mut self.matrices[number / groups];
            let at = lane.written("statistics sums", sums, area(entries, groups))?;
            let at = at + (group * entries * size_of::<i64>()) as u64;
            lane.launch(kernels::fixed_add(lane.opened.size, kept, matrix, at))?;
        }
        // The products are freed on their own lane, which knows nothing of this one.
        lane.synchronize()
    }

    /// Gives `take`, some at a time, the kept entries of some rows, counted over the matrices of all groups: those of H,
    /// then of C and of G.
    ///
    /// # Errors
    /// `Length` if there are no such rows, `Failed`.
    pub fn rows(&self, rows: Range<usize>, take: &mut dyn FnMut(&[i64])) -> Result<(), DeviceError> {
        let GramShape { cols, groups, .. } = self.shape;
        length("statistics rows", area(cols, groups), rows.end)?;
        length("statistics rows", rows.end, rows.start)?;
        for (sums, lower) in self.matrices.iter().zip(self.shape.lower()) {
            let at = |row: usize| match cols {
                0 => 0,
                _ => row / cols * before(cols, cols, *lower) + before(row % cols, cols, *lower),
            };
            let range = at(rows.start)..at(rows.end);
            self.lane.bring_parts("statistics sums", sums, range, take)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_begin_after_the_entries_that_are_kept() {
        assert_eq!([0, 1, 2, 3].map(|row| before(row, 3, true)), [0, 1, 3, 6]);
        assert_eq!([0, 1, 3].map(|row| before(row, 3, false)), [0, 3, 9]);
    }
}
