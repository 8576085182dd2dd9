//! The decoder's operators on one lane of a CUDA device: a checked launch each, products by cuBLAS.
//!
//! Linear layers read their factors with the digits of the lane's `Precision`, or as bfloat16 where their weights are kept so; sums are f32. Nothing waits for the device but
//! what brings numbers to the host: `copied`, `taken`, and `choose`, whose counts decide the sizes of what follows.
//!
//! Not here: argument order and grids (`kernels::decoder`), who lends lanes (`place`).
#![expect(unsafe_code, reason = "sends numbers to arrays made here, products on raw addresses")]

use std::sync::Arc;

use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};

use super::blas::{RowDigits, WORKSPACE_BYTES};
use super::column_major::ColumnMajor;
use super::device::{Cuda, CudaBuffer, count, offset};
use super::halves::{CudaHalves, StayRoom};
use super::interface::row_of_table;
use super::kernels::decoder::{self as launches, Angles, At, EmbedFrom, Function, HeadCounts};
use super::kernels::{self, Size};
use super::staging::RowStaging;
use crate::activation::Activation;
use crate::decoder::{EXPERTS_MAX, Embedding, HEAD_WIDTH_MAX, Heads, Lane, Linear, Strided, Turn};
use crate::device::{Device, DeviceError, MatMut, MatRef, Product};
use crate::shape::{area, length, row, span};

/// CUDA's limit of a grid along y and z.
const GRID_MAX: usize = 65535;

/// A lane that runs decoders.
pub struct CudaLane {
    pub(super) cuda: Cuda,
    staging: RowStaging,
    /// What may stay on the device, and by which lane it goes to the host.
    room: Arc<StayRoom>,
    home: Arc<Cuda>,
    /// Zeros: the row of every token in a table of one row.
    zeros: CudaSlice<u32>,
}

/// Where sequences begin, and where in them each token is.
pub struct CudaSequences {
    /// `[sequences + 1]`.
    starts: CudaSlice<u32>,
    /// `[tokens]`.
    positions: CudaSlice<u32>,
    lengths: Vec<usize>,
    tokens: usize,
}

/// Weights of a linear layer.
pub enum CudaFactor {
    /// Read with the digits of the lane's `Precision`.
    Full(CudaBuffer),
    /// bfloat16, as its inputs are read too.
    Halves(CudaBuffer<u16>),
}

/// Sine and cosine of positions.
pub struct CudaTable {
    pub(super) cos: CudaBuffer,
    pub(super) sin: CudaBuffer,
    pub(super) pairs: usize,
    pub(super) positions: usize,
}

/// Each expert's tokens.
pub struct CudaChoice {
    /// `[experts, tokens]`.
    lists: CudaSlice<u32>,
    counts: Vec<usize>,
    tokens: usize,
}

impl CudaLane {
    /// # Errors
    /// `OutOfMemory`, `Failed`.
    pub(super) fn new(home: &Arc<Cuda>, room: &Arc<StayRoom>) -> Result<Self, DeviceError> {
        let cuda = home.lane()?;
        let zeros = cuda.stream.alloc_zeros(1).map_err(|error| cuda.driver(error))?;
        let (room, home) = (Arc::clone(room), Arc::clone(home));
        Ok(Self { staging: cuda.staging()?, room, home, zeros, cuda })
    }

    fn size(&self) -> Size {
        self.cuda.opened.size
    }

    fn failed(&self, reason: String) -> DeviceError {
        self.cuda.opened.subject(0).failed(reason)
    }

    /// The host's numbers on the device.
    fn numbers(&self, host: &[u32]) -> Result<CudaSlice<u32>, DeviceError> {
        let asked = size_of_val(host);
        let subject = || self.cuda.opened.subject(asked);
        let mut slice =
            self.cuda.stream.alloc_zeros(host.len().max(1)).map_err(|error| subject().driver(error))?;
        if !host.is_empty() {
            // The host's memory is not pinned: it has been read when this returns.
            self.cuda.stream.memcpy_htod(host, &mut slice).map_err(|error| subject().driver(error))?;
        }
        Ok(slice)
    }

    /// `out = x * weight + beta * out`, factors of bfloat16; there are inputs where there are outputs.
    fn multiply_halves(
        &self,
        product: Product,
        x: &CudaBuffer<u16>,
        (weight, turned): (&CudaBuffer<u16>, bool),
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let Product { m, n, k, alpha, beta } = product;
        let second = self.cuda.read("linear x", x, area(m, k))?;
        let first = self.cuda.read("linear weight", weight, area(k, n))?;
        let to = self.cuda.written("linear out", out, area(m, n))?;
        if m == 0 || n == 0 {
            return Ok(());
        }
        let args = ColumnMajor::new(product, (k, false), (if turned { n } else { k }, !turned), n)?;
        let opened = &self.cuda.opened;
        opened.context.bind_to_thread().map_err(|error| self.cuda.driver(error))?;
        // SAFETY: lengths were checked above; `out` is borrowed mutably, and of another type than the factors.
        unsafe { self.cuda.blas.product_halves(&args, (alpha, beta), first, second, to) }
            .map_err(|error| opened.subject(WORKSPACE_BYTES).blas(error))
    }

    /// The first `len` numbers as bfloat16.
    fn narrowed(&self, array: &CudaBuffer, len: usize) -> Result<CudaBuffer<u16>, DeviceError> {
        let from = self.cuda.read("output", array, len)?;
        let mut halves = self.cuda.allocate::<u16>(len)?;
        let to = self.cuda.written("output", &mut halves, len)?;
        if len > 0 {
            self.cuda.launch(launches::to_bf16(self.size(), len, from, to))?;
        }
        Ok(halves)
    }

    /// bfloat16 as f32.
    fn widened(&self, halves: &CudaBuffer<u16>) -> Result<CudaBuffer, DeviceError> {
        let len = halves.len;
        let from = self.cuda.read("input", halves, len)?;
        let mut array = self.cuda.allocate(len)?;
        let out = self.cuda.written("input", &mut array, len)?;
        if len > 0 {
            self.cuda.launch(launches::from_bf16(self.size(), len, from, out))?;
        }
        Ok(array)
    }

    fn address(&self, numbers: &CudaSlice<u32>) -> u64 {
        numbers.device_ptr(&self.cuda.stream).0
    }

    /// `rows` rows of `width` inside an array.
    fn rows(
        &self,
        operand: &'static str,
        rows: Strided<'_, CudaBuffer>,
        count_of: usize,
        width: usize,
    ) -> Result<At, DeviceError> {
        let Strided { array, offset: start, stride } = rows;
        span(operand, array.len, start, stride, count_of, width)?;
        let address = offset(self.cuda.read(operand, array, 0)?, start);
        Ok(At { address, stride: count(operand, stride)? })
    }

    /// Both in the kernels' 32 bits.
    fn shape(&self, operand: &'static str, (rows, width): (usize, usize)) -> Result<(u32, u32), DeviceError> {
        Ok((count(operand, rows)?, count(operand, width)?))
    }

    /// Repeats a row of `width` in each of `rows` rows.
    fn repeat(
        &mut self,
        rows: usize,
        width: usize,
        from: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let source = self.cuda.read("bias", from, width)?;
        let out = self.cuda.written("linear out", out, area(rows, width))?;
        if self.zeros.len() < rows {
            let zeros = self.cuda.stream.alloc_zeros(rows.next_power_of_two());
            self.zeros = zeros.map_err(|error| self.cuda.driver(error))?;
        }
        let (rows, width) = self.shape("linear out", (rows, width))?;
        let zeros = self.address(&self.zeros);
        self.cuda.launch(kernels::gather_rows(self.size(), rows, width, source, zeros, out))
    }

    /// Heads that a kernel can take, in its numbers.
    fn counts(&self, heads: &Heads) -> Result<HeadCounts, DeviceError> {
        let Heads { heads: all, kv_heads, head_dim, window, .. } = *heads;
        let positive = all > 0 && kv_heads > 0 && head_dim > 0 && window != Some(0);
        if !positive || !all.is_multiple_of(kv_heads) {
            return Err(
                self.failed(format!("attention: {all} heads of {head_dim} on {kv_heads}, window {window:?}"))
            );
        }
        let limited = |operand, index: usize, most: usize| match index <= most {
            true => count(operand, index),
            false => Err(DeviceError::Index { operand, index, limit: most + 1 }),
        };
        Ok(HeadCounts {
            heads: count("attention heads", all)?,
            kv_heads: limited("attention key heads", kv_heads, GRID_MAX)?,
            head_dim: limited("attention head width", head_dim, HEAD_WIDTH_MAX)?,
            // A window of more positions than can be counted is none.
            window: window.map_or(0, |window| u32::try_from(window).unwrap_or(0)),
        })
    }

    /// Rows of `heads` heads, turned, in an array of their own.
    fn turned(
        &mut self,
        (heads, head_dim): (usize, usize),
        turns: &[Turn<'_, CudaTable>],
        sequences: &CudaSequences,
        x: Strided<'_, CudaBuffer>,
    ) -> Result<CudaBuffer, DeviceError> {
        let width = area(heads, head_dim);
        self.rows("rotary x", x, sequences.tokens, width)?;
        let mut out = self.array(area(sequences.tokens, width))?;
        let (mut done, mut start) = (0, 0);
        for Turn { sequences: range, table } in turns {
            let lengths = sequences.lengths.get(range.clone()).filter(|_| range.start == done);
            let lengths = lengths.ok_or_else(|| {
                self.failed(format!(
                    "rotary: sequences {range:?} after {done} of {}",
                    sequences.lengths.len()
                ))
            })?;
            let (tokens, longest) = (lengths.iter().sum::<usize>(), lengths.iter().max().copied());
            length("rotary positions", table.positions, longest.unwrap_or(0))?;
            length("rotary head width", head_dim, 2 * table.pairs)?;
            let entries = area(table.positions, table.pairs);
            let angles = Angles {
                positions: self.address(&sequences.positions) + (start * size_of::<u32>()) as u64,
                cos: self.cuda.read("rotary cos", &table.cos, entries)?,
                sin: self.cuda.read("rotary sin", &table.sin, entries)?,
                pairs: count("rotary pairs", table.pairs)?,
            };
            let from = Strided { offset: x.offset + start * x.stride, ..x };
            let from = self.rows("rotary x", from, tokens, width)?;
            let to = self.cuda.written("rotary out", &mut out, area(sequences.tokens, width))?;
            let to = At { address: offset(to, start * width), stride: count("rotary out", width)? };
            let (all, head_dim) = self.shape("rotary heads", (heads, head_dim))?;
            if tokens > 0 {
                let shape = (count("rotary tokens", tokens)?, all, head_dim);
                self.cuda.launch(launches::rotate(self.size(), shape, angles, from, to))?;
            }
            (done, start) = (range.end, start + tokens);
        }
        match done == sequences.lengths.len() {
            true => Ok(out),
            false => {
                Err(self
                    .failed(format!("rotary: {done} of {} sequences have a table", sequences.lengths.len())))
            }
        }
    }

    /// Attention of queries and keys that are turned already.
    fn attend_turned(
        &mut self,
        heads: &Heads,
        sequences: &CudaSequences,
        [q, k, v]: [Strided<'_, CudaBuffer>; 3],
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let counts = self.counts(heads)?;
        let (q_width, kv_width) = (area(heads.heads, heads.head_dim), area(heads.kv_heads, heads.head_dim));
        let tokens = sequences.tokens;
        let qkv = [
            self.rows("attention q", q, tokens, q_width)?,
            self.rows("attention k", k, tokens, kv_width)?,
            self.rows("attention v", v, tokens, kv_width)?,
        ];
        let out = self.cuda.written("attention out", out, area(tokens, q_width))?;
        let longest = sequences.lengths.iter().max().copied().unwrap_or(0);
        if longest == 0 {
            return Ok(());
        }
        if self.attends_by_products(&sequences.lengths) {
            return self.attend_by_products(heads, &sequences.lengths, qkv, out);
        }
        let launch = launches::attention(heads, counts, longest, self.address(&sequences.starts), qkv, out);
        self.cuda.launch_deep(launch, count("sequences", sequences.lengths.len())?)
    }
}

fn function(f: Activation) -> Function {
    let [kind, a, b, _] = row_of_table(f, 0.0);
    (kind as u32, a, b)
}

impl Lane for CudaLane {
    type Array = CudaBuffer;
    type Given<'a> = CudaBuffer;
    type Owned = CudaBuffer;
    type Weights = CudaBuffer;
    type Factor = CudaFactor;
    type Table = CudaTable;
    type Sequences = CudaSequences;
    type Choice = CudaChoice;

    /// What is freed stays with the device.
    fn begin(&mut self, _tokens: Option<usize>) {}

    fn finish(&mut self) -> Result<(), DeviceError> {
        self.cuda.synchronize()
    }

    fn given(&mut self, host: &[f32]) -> Result<CudaBuffer, DeviceError> {
        let mut array = self.cuda.allocate(host.len())?;
        let to = self.cuda.written("input", &mut array, host.len())?;
        // SAFETY: the array is this lane's and as long.
        unsafe { self.staging.send(&self.cuda, host, RowDigits::F32, to) }?;
        Ok(array)
    }

    fn given_halves(&mut self, host: &[u16]) -> Result<CudaBuffer, DeviceError> {
        let mut halves = self.cuda.allocate::<u16>(host.len())?;
        let to = self.cuda.written("input", &mut halves, host.len())?;
        // SAFETY: the array is this lane's and as long.
        unsafe { self.staging.send_halves(&self.cuda, host, to) }?;
        self.widened(&halves)
    }

    fn given_staying(&mut self, halves: &CudaHalves) -> Result<CudaBuffer, DeviceError> {
        match halves.on(&self.cuda) {
            Some(halves) => self.widened(halves),
            None => self.given_halves(&halves.download()?),
        }
    }

    fn stay(&mut self, array: &CudaBuffer, len: usize) -> Result<Option<CudaHalves>, DeviceError> {
        CudaHalves::of(&self.cuda, &self.home, &self.room, array, len)
    }

    fn array(&mut self, len: usize) -> Result<CudaBuffer, DeviceError> {
        self.cuda.allocate(len)
    }

    fn give_back(&mut self, _rows: usize, array: CudaBuffer) {
        drop(array);
    }

    fn copied(&mut self, array: &CudaBuffer, len: usize) -> Result<Vec<f32>, DeviceError> {
        self.cuda.bring("output", array, 0..len)
    }

    fn copied_halves(&mut self, array: &CudaBuffer, len: usize) -> Result<Vec<u16>, DeviceError> {
        self.cuda.bring("output", &self.narrowed(array, len)?, 0..len)
    }

    fn taken(&mut self, array: CudaBuffer, len: usize) -> Result<Vec<f32>, DeviceError> {
        self.copied(&array, len)
    }

    fn embed(
        &mut self,
        embedding: Embedding<'_, CudaBuffer>,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let Embedding { weight, width, scale, ids, learned } = embedding;
        let limit = weight.len.checked_div(width).unwrap_or(0);
        ids.iter().try_for_each(|id| row("embedding ids", *id, limit).map(drop))?;
        let to = self.cuda.written("embedding out", out, area(ids.len(), width))?;
        let shape = self.shape("embedding", (ids.len(), width))?;
        let ids_there = self.numbers(ids)?;
        let mut from = EmbedFrom {
            ids: self.address(&ids_there),
            weight: self.cuda.read("embedding", weight, 0)?,
            places: 0,
            learned: 0,
        };
        let mut places_there = None;
        if let Some((table, places)) = learned {
            length("embedding positions", places.len(), ids.len())?;
            let limit = table.len.checked_div(width).unwrap_or(0);
            places.iter().try_for_each(|place| row("embedding positions", *place, limit).map(drop))?;
            let there = places_there.insert(self.numbers(places)?);
            from.places = self.address(there);
            from.learned = self.cuda.read("learned positions", table, 0)?;
        }
        match ids.is_empty() || width == 0 {
            true => Ok(()),
            false => self.cuda.launch(launches::embed(self.size(), shape, scale, from, to)),
        }
    }

    fn rms_norm(
        &mut self,
        shape: (usize, usize),
        epsilon: f32,
        x: &CudaBuffer,
        weight: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let len = area(shape.0, shape.1);
        let from = (self.cuda.read("norm x", x, len)?, self.cuda.read("norm weight", weight, shape.1)?);
        let to = self.cuda.written("norm out", out, len)?;
        let shape = self.shape("norm", shape)?;
        match len {
            0 => Ok(()),
            _ => self.cuda.launch(launches::rms_norm(self.size(), shape, epsilon, from, to)),
        }
    }

    fn layer_norm(
        &mut self,
        shape: (usize, usize),
        epsilon: f32,
        x: &CudaBuffer,
        (weight, bias): (&CudaBuffer, &CudaBuffer),
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let len = area(shape.0, shape.1);
        let from = (
            self.cuda.read("norm x", x, len)?,
            self.cuda.read("norm weight", weight, shape.1)?,
            self.cuda.read("norm bias", bias, shape.1)?,
        );
        let to = self.cuda.written("norm out", out, len)?;
        let shape = self.shape("norm", shape)?;
        match len {
            0 => Ok(()),
            _ => self.cuda.launch(launches::layer_norm(self.size(), shape, epsilon, from, to)),
        }
    }

    fn linear(
        &mut self,
        tokens: usize,
        linear: Linear<'_, CudaBuffer, CudaFactor>,
        x: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let Linear { weight, turned, bias, rows, cols } = linear;
        let mut product = Product::new(tokens, rows, cols);
        if let Some(bias) = bias.filter(|_| tokens > 0 && rows > 0) {
            self.repeat(tokens, rows, bias, out)?;
            product.beta = 1.0;
        }
        match weight {
            CudaFactor::Full(weight) => {
                let weight =
                    if turned { MatRef::new(weight, rows) } else { MatRef::transposed(weight, cols) };
                self.cuda.matmul_rough(product, MatRef::new(x, cols), weight, MatMut::new(out, rows))
            }
            CudaFactor::Halves(weight) => {
                let x = self.narrowed(x, area(tokens, cols))?;
                self.multiply_halves(product, &x, (weight, turned), out)
            }
        }
    }

    fn sequences(&mut self, lengths: &[usize]) -> Result<CudaSequences, DeviceError> {
        if lengths.len() > GRID_MAX {
            let (operand, limit) = ("sequences", GRID_MAX + 1);
            return Err(DeviceError::Index { operand, index: lengths.len(), limit });
        }
        let (mut starts, mut positions) = (vec![0u32], Vec::new());
        for one in lengths {
            positions.extend(0..count("sequence length", *one)?);
            starts.push(count("tokens", positions.len())?);
        }
        Ok(CudaSequences {
            starts: self.numbers(&starts)?,
            positions: self.numbers(&positions)?,
            lengths: lengths.to_vec(),
            tokens: positions.len(),
        })
    }

    fn attend(
        &mut self,
        heads: &Heads,
        turns: &[Turn<'_, CudaTable>],
        sequences: &CudaSequences,
        [q, k, v]: [Strided<'_, CudaBuffer>; 3],
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        if turns.is_empty() {
            return self.attend_turned(heads, sequences, [q, k, v], out);
        }
        let Heads { heads: all, kv_heads, head_dim, .. } = *heads;
        let turned_q = self.turned((all, head_dim), turns, sequences, q)?;
        let turned_k = self.turned((kv_heads, head_dim), turns, sequences, k)?;
        let q = Strided { array: &turned_q, offset: 0, stride: area(all, head_dim) };
        let k = Strided { array: &turned_k, offset: 0, stride: area(kv_heads, head_dim) };
        self.attend_turned(heads, sequences, [q, k, v], out)
    }

    fn gate(
        &mut self,
        f: Activation,
        (rows, width): (usize, usize),
        gate: Strided<'_, CudaBuffer>,
        up: Strided<'_, CudaBuffer>,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let gate = self.rows("gate", gate, rows, width)?;
        let up = self.rows("gate up", up, rows, width)?;
        let to = self.cuda.written("gate out", out, area(rows, width))?;
        let shape = self.shape("gate", (rows, width))?;
        match area(rows, width) {
            0 => Ok(()),
            _ => self.cuda.launch(launches::gate(self.size(), shape, function(f), gate, up, to)),
        }
    }

    fn activate(
        &mut self,
        f: Activation,
        shape: (usize, usize),
        x: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let len = area(shape.0, shape.1);
        let from = self.cuda.read("activation x", x, len)?;
        let to = self.cuda.written("activation out", out, len)?;
        let shape = self.shape("activation", shape)?;
        match len {
            0 => Ok(()),
            _ => self.cuda.launch(launches::activate(self.size(), shape, function(f), from, to)),
        }
    }

    fn add(
        &mut self,
        len: usize,
        a: &CudaBuffer,
        b: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let (a, b) = (self.cuda.read("add a", a, len)?, self.cuda.read("add b", b, len)?);
        let to = self.cuda.written("add out", out, len)?;
        match len {
            0 => Ok(()),
            _ => self.cuda.launch(launches::add(self.size(), len, a, b, to)),
        }
    }

    fn softcap(
        &mut self,
        len: usize,
        cap: f32,
        x: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        self.cuda.read("softcap x", x, len)?;
        self.cuda.copy(x, out)?;
        let to = self.cuda.written("softcap out", out, len)?;
        match len {
            0 => Ok(()),
            _ => self.cuda.launch(launches::softcap(self.size(), len, cap, to)),
        }
    }

    fn route(
        &mut self,
        (tokens, experts): (usize, usize),
        (top_k, normalise): (usize, bool),
        logits: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        if experts > EXPERTS_MAX || !(1..=experts).contains(&top_k) {
            return Err(self.failed(format!(
                "route: top {top_k} of {experts}, expected 1 or more of at most {EXPERTS_MAX}"
            )));
        }
        let len = area(tokens, experts);
        let from = self.cuda.read("route logits", logits, len)?;
        let to = self.cuda.written("route weights", out, len)?;
        let shape = self.shape("route", (tokens, experts))?;
        let top = (count("route", top_k)?, normalise);
        match tokens {
            0 => Ok(()),
            _ => self.cuda.launch(launches::route(self.size(), shape, top, from, to)),
        }
    }

    /// Waits: the counts are the host's.
    fn choose(
        &mut self,
        (tokens, experts): (usize, usize),
        all_tokens: bool,
        weights: &CudaBuffer,
    ) -> Result<CudaChoice, DeviceError> {
        let from = self.cuda.read("expert weights", weights, area(tokens, experts))?;
        let shape = self.shape("experts", (tokens, experts))?;
        let stream = &self.cuda.stream;
        let asked = area(tokens, experts).saturating_mul(size_of::<u32>());
        let out = |error| self.cuda.opened.subject(asked).driver(error);
        let mut lists = stream.alloc_zeros::<u32>(area(tokens, experts).max(1)).map_err(out)?;
        let mut counts = stream.alloc_zeros::<u32>(experts.max(1)).map_err(out)?;
        let mut host = vec![0u32; counts.len()];
        if tokens > 0 && experts > 0 {
            let to = (lists.device_ptr_mut(stream).0, counts.device_ptr_mut(stream).0);
            self.cuda.launch(launches::chosen(shape, all_tokens, from, to.0, to.1))?;
            stream.memcpy_dtoh(&counts, &mut host).map_err(out)?;
            self.cuda.synchronize()?;
        }
        host.truncate(experts);
        let counts: Vec<usize> = host.into_iter().map(|count| (count as usize).min(tokens)).collect();
        Ok(CudaChoice { lists, counts, tokens })
    }

    fn chosen(choice: &CudaChoice, expert: usize) -> usize {
        choice.counts.get(expert).copied().unwrap_or(0)
    }

    fn select(
        &mut self,
        choice: &CudaChoice,
        expert: usize,
        width: usize,
        x: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let rows = Self::chosen(choice, expert);
        let from = self.cuda.read("select x", x, area(choice.tokens, width))?;
        let to = self.cuda.written("select out", out, area(rows, width))?;
        if area(rows, width) == 0 {
            return Ok(());
        }
        let (rows, width) = self.shape("select", (rows, width))?;
        let list = self.list(choice, expert);
        self.cuda.launch(kernels::gather_rows(self.size(), rows, width, from, list, to))
    }

    fn combine(
        &mut self,
        choice: &CudaChoice,
        width: usize,
        weights: &CudaBuffer,
        x: &[&CudaBuffer],
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let experts = choice.counts.len();
        if x.len() != experts {
            return Err(self.failed(format!("combine: {} experts, expected {experts}", x.len())));
        }
        let from = self.cuda.read("combine weights", weights, area(choice.tokens, experts))?;
        let to = self.cuda.written("combine out", out, area(choice.tokens, width))?;
        let zeroed = self.cuda.stream.memset_zeros(&mut out.slice);
        zeroed.map_err(|error| self.cuda.driver(error))?;
        for (expert, x) in x.iter().enumerate() {
            let rows = choice.counts[expert];
            let x = self.cuda.read("combine x", x, area(rows, width))?;
            if area(rows, width) > 0 {
                let shape = self.shape("combine", (rows, width))?;
                let of = (count("combine experts", experts)?, count("combine expert", expert)?);
                let list = self.list(choice, expert);
                self.cuda.launch(launches::combine(self.size(), shape, of, [from, list, x], to))?;
            }
        }
        Ok(())
    }
}

impl CudaLane {
    /// Of an expert that `choice` has.
    fn list(&self, choice: &CudaChoice, expert: usize) -> u64 {
        self.address(&choice.lists) + (expert * choice.tokens * size_of::<u32>()) as u64
    }
}
