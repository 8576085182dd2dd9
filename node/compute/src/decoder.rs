//! What running a decoder needs of a device: its operators over arrays of f32, and who shares what.
//!
//! A [`Lane`] is one thread's: it makes arrays, and what it queues is done in order. A [`Place`] has lanes to lend and keeps
//! what all of them read: weights and rotary tables, a copy on each of its devices. [`Host`](crate::Host) is the CPU's place
//! with the plain functions of `cpu`, [`CudaPlace`](crate::cuda::CudaPlace) that of CUDA devices.
//!
//! All shapes are in elements, all matrices row-major. Every method refuses arrays shorter than the shape it is given asks
//! for: the CPU by the asserts of its functions (a decoder's shapes are checked when it is loaded), others by an error.
//!
//! Not here: which operators a decoder has, in which order, when an array goes (`exec`).

use std::borrow::{Borrow, BorrowMut};
use std::ops::Range;

use crate::activation::Activation;
use crate::cuda::CudaHalves;
use crate::device::DeviceError;

/// Heads wider than this have no kernel on CUDA devices.
pub const HEAD_WIDTH_MAX: usize = 256;
/// More experts of a layer than this have no kernel on CUDA devices.
pub const EXPERTS_MAX: usize = 1024;

/// Causal attention with grouped queries.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`. Query head `h` reads key head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// `cap * tanh(score / cap)` before the softmax.
    pub softcap: Option<f32>,
    /// Position `t` sees `t - window + 1 ..= t`; all before it where absent.
    pub window: Option<usize>,
}

/// Rows inside an array: the first begins `offset` elements in, each `stride` after the one before.
#[derive(Debug)]
pub struct Strided<'a, A: ?Sized> {
    /// Where they are.
    pub array: &'a A,
    /// Elements before the first row.
    pub offset: usize,
    /// Elements from one row to the next.
    pub stride: usize,
}

impl<A: ?Sized> Clone for Strided<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A: ?Sized> Copy for Strided<'_, A> {}

/// A linear layer: `out = x * weight + bias`.
#[derive(Debug, Clone, Copy)]
pub struct Linear<'a, A: ?Sized, F> {
    /// `[cols, rows]` if `turned`, else `[rows, cols]`.
    pub weight: &'a F,
    /// Which of them.
    pub turned: bool,
    /// `[rows]`.
    pub bias: Option<&'a A>,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
}

/// Rows of a table for ids, and of another for positions.
#[derive(Debug, Clone, Copy)]
pub struct Embedding<'a, A: ?Sized> {
    /// `[_, width]`.
    pub weight: &'a A,
    /// Width of a row.
    pub width: usize,
    /// Factor of the rows of `weight`.
    pub scale: f32,
    /// One per token.
    pub ids: &'a [u32],
    /// A table `[_, width]` and the row of it that is added for each token.
    pub learned: Option<(&'a A, &'a [u32])>,
}

/// Sequences whose queries and keys turn by one table; it has a position for each of their tokens.
#[derive(Debug, Clone)]
pub struct Turn<'a, T> {
    /// Of the batch.
    pub sequences: Range<usize>,
    /// Sine and cosine.
    pub table: &'a T,
}

/// What queues or does the work of one thread on a device.
pub trait Lane {
    /// f32 on the device, as operators read them.
    type Array: ?Sized;
    /// What a host's numbers become for a run.
    type Given<'a>: Borrow<Self::Array>;
    /// An array that a run makes.
    type Owned: BorrowMut<Self::Array>;
    /// An array that all lanes of the place read.
    type Weights: Borrow<Self::Array> + Send + Sync;
    /// Weights of linear layers, which all lanes of the place read.
    type Factor: Send + Sync;
    /// Sine and cosine of positions, which all lanes of the place read.
    type Table: Send + Sync;
    /// Where the sequences of a batch begin, and where in them each token is.
    type Sequences;
    /// The tokens of each expert.
    type Choice;

    /// A run begins; `tokens`: of its batch, if known. What was kept for batches of another size may go.
    fn begin(&mut self, tokens: Option<usize>);

    /// A run is over: returns when everything queued is done.
    ///
    /// # Errors
    /// `Failed` if any of it failed.
    fn finish(&mut self) -> Result<(), DeviceError>;

    /// The host's numbers as an operator's input.
    ///
    /// # Errors
    /// `OutOfMemory`, `Failed`.
    fn given<'a>(&mut self, host: &'a [f32]) -> Result<Self::Given<'a>, DeviceError>;

    /// Numbers of which the host has the upper halves, the others being 0, as an operator's input.
    ///
    /// # Errors
    /// `OutOfMemory`, `Failed`.
    fn given_halves<'a>(&mut self, host: &'a [u16]) -> Result<Self::Given<'a>, DeviceError>;

    /// Numbers that stayed on a device, as an operator's input.
    ///
    /// # Errors
    /// `OutOfMemory`, `Failed`.
    fn given_staying<'a>(&mut self, halves: &'a CudaHalves) -> Result<Self::Given<'a>, DeviceError>;

    /// The first `len` numbers rounded to bfloat16, left on the device; nothing where there is no such place or no room: then
    /// [`Lane::copied_halves`] has them.
    ///
    /// # Errors
    /// As [`Lane::copied`].
    fn stay(&mut self, array: &Self::Array, len: usize) -> Result<Option<CudaHalves>, DeviceError> {
        let _ = (array, len);
        Ok(None)
    }

    /// Memory for `len` numbers; what it holds is not said.
    ///
    /// # Errors
    /// `OutOfMemory`, `Failed`.
    fn array(&mut self, len: usize) -> Result<Self::Owned, DeviceError>;

    /// Takes back an array of `rows` rows that nothing reads any more.
    fn give_back(&mut self, rows: usize, array: Self::Owned);

    /// The host's copy of the first `len` numbers.
    ///
    /// # Errors
    /// `Failed` if what made them failed.
    fn copied(&mut self, array: &Self::Array, len: usize) -> Result<Vec<f32>, DeviceError>;

    /// The first `len` numbers rounded to bfloat16 (ties to even; a NaN stays one).
    ///
    /// # Errors
    /// As [`Lane::copied`].
    fn copied_halves(&mut self, array: &Self::Array, len: usize) -> Result<Vec<u16>, DeviceError>;

    /// The `len` numbers of an array that is not needed any more.
    ///
    /// # Errors
    /// As [`Lane::copied`].
    fn taken(&mut self, array: Self::Owned, len: usize) -> Result<Vec<f32>, DeviceError>;

    /// `out[t] = weight[ids[t]] * scale + learned[places[t]]`, `[tokens, width]`.
    ///
    /// # Errors
    /// Those of a shape that does not fit, an id or place past its table's end; the device's.
    fn embed(
        &mut self,
        embedding: Embedding<'_, Self::Array>,
        out: &mut Self::Array,
    ) -> Result<(), DeviceError>;

    /// `out = x / sqrt(mean(x^2) + epsilon) * weight`, for each run of numbers; `shape`: runs, and the width of one.
    ///
    /// # Errors
    /// Those of a shape that does not fit; the device's.
    fn rms_norm(
        &mut self,
        shape: (usize, usize),
        epsilon: f32,
        x: &Self::Array,
        weight: &Self::Array,
        out: &mut Self::Array,
    ) -> Result<(), DeviceError>;

    /// `out = (x - mean) / sqrt(variance + epsilon) * weight + bias`, for each run of numbers; `shape`: runs, and the width of one.
    ///
    /// # Errors
    /// Those of a shape that does not fit; the device's.
    fn layer_norm(
        &mut self,
        shape: (usize, usize),
        epsilon: f32,
        x: &Self::Array,
        weights: (&Self::Array, &Self::Array),
        out: &mut Self::Array,
    ) -> Result<(), DeviceError>;

    /// A linear layer of `tokens` rows; `x`: `[tokens, cols]`, `out`: `[tokens, rows]`. With a weight of bfloat16, `x` is read so too.
    ///
    /// # Errors
    /// Those of a shape that does not fit; the device's.
    fn linear(
        &mut self,
        tokens: usize,
        linear: Linear<'_, Self::Array, Self::Factor>,
        x: &Self::Array,
        out: &mut Self::Array,
    ) -> Result<(), DeviceError>;

    /// Sequences of these many tokens, one after the other.
    ///
    /// # Errors
    /// `Index` if there are too many; the device's.
    fn sequences(&mut self, lengths: &[usize]) -> Result<Self::Sequences, DeviceError>;

    /// Attention of each sequence by itself, queries and keys turned by the table of its [`Turn`]: none or every sequence
    /// has one. `q`: rows of `heads * head_dim`, `k`, `v`: of `kv_heads * head_dim`, `out`: `[tokens, heads * head_dim]`. A
    /// row of scores that is not finite becomes NaN.
    ///
    /// # Errors
    /// Those of a shape that does not fit or heads without a kernel; the device's.
    fn attend(
        &mut self,
        heads: &Heads,
        turns: &[Turn<'_, Self::Table>],
        sequences: &Self::Sequences,
        qkv: [Strided<'_, Self::Array>; 3],
        out: &mut Self::Array,
    ) -> Result<(), DeviceError>;

    /// `out = f(gate) * up`; `shape`: rows and width of `out`.
    ///
    /// # Errors
    /// Those of a shape that does not fit; the device's.
    fn gate(
        &mut self,
        f: Activation,
        shape: (usize, usize),
        gate: Strided<'_, Self::Array>,
        up: Strided<'_, Self::Array>,
        out: &mut Self::Array,
    ) -> Result<(), DeviceError>;

    /// `out = f(x)`; `shape`: rows and width.
    ///
    /// # Errors
    /// Those of a shape that does not fit; the device's.
    fn activate(
        &mut self,
        f: Activation,
        shape: (usize, usize),
        x: &Self::Array,
        out: &mut Self::Array,
    ) -> Result<(), DeviceError>;

    /// `out = a + b`, all `[len]`.
    ///
    /// # Errors
    /// Those of a shape that does not fit; the device's.
    fn add(
        &mut self,
        len: usize,
        a: &Self::Array,
        b: &Self::Array,
        out: &mut Self::Array,
    ) -> Result<(), DeviceError>;

    /// `out = cap * tanh(x / cap)`, `[len]`.
    ///
    /// # Errors
    /// Those of a shape that does not fit; the device's.
    fn softcap(
        &mut self,
        len: usize,
        cap: f32,
        x: &Self::Array,
        out: &mut Self::Array,
    ) -> Result<(), DeviceError>;

    /// Weights of the experts, `shape`: tokens and experts; `top`: how many are chosen, and whether their weights are made to
    /// sum to 1. See [`crate::cpu::route`].
    ///
    /// # Errors
    /// Those of a shape that does not fit, more experts than there is a kernel for; the device's.
    fn route(
        &mut self,
        shape: (usize, usize),
        top: (usize, bool),
        logits: &Self::Array,
        out: &mut Self::Array,
    ) -> Result<(), DeviceError>;

    /// The tokens that have a weight for each expert, or all. `shape` of `weights`: tokens and experts.
    ///
    /// # Errors
    /// Those of a shape that does not fit; the device's.
    fn choose(
        &mut self,
        shape: (usize, usize),
        all_tokens: bool,
        weights: &Self::Array,
    ) -> Result<Self::Choice, DeviceError>;

    /// How many tokens an expert has; 0 if there is no such expert.
    fn chosen(choice: &Self::Choice, expert: usize) -> usize;

    /// The rows of an expert's tokens: `x`: `[_, width]`, `out`: `[chosen, width]`.
    ///
    /// # Errors
    /// Those of a shape that does not fit; the device's.
    fn select(
        &mut self,
        choice: &Self::Choice,
        expert: usize,
        width: usize,
        x: &Self::Array,
        out: &mut Self::Array,
    ) -> Result<(), DeviceError>;

    /// `out[token] += weight * x[i]` for the `i`th token of each expert, expert by expert, from 0. `weights`: `[tokens,
    /// experts]`, `x`: `[chosen, width]` per expert, `out`: `[tokens, width]`.
    ///
    /// # Errors
    /// Those of a shape that does not fit; the device's.
    fn combine(
        &mut self,
        choice: &Self::Choice,
        width: usize,
        weights: &Self::Array,
        x: &[&Self::Array],
        out: &mut Self::Array,
    ) -> Result<(), DeviceError>;
}

/// Devices of one kind that run decoders.
pub trait Place: Send + Sync {
    /// What threads work with.
    type Lane: Lane;

    /// How many devices.
    fn devices(&self) -> usize;

    /// Whether linear layers are faster with weights `[inputs, outputs]`.
    fn wants_turned_weights(&self) -> bool;

    /// Weights on every device, in order.
    ///
    /// # Errors
    /// `OutOfMemory`, `Failed`.
    fn keep(&self, values: Vec<f32>) -> Result<Vec<WeightsOf<Self>>, DeviceError>;

    /// Weights of a linear layer on every device, in order; `halves`: it may be read, and its inputs with it, as bfloat16 where that
    /// is faster.
    ///
    /// # Errors
    /// `OutOfMemory`, `Failed`.
    fn keep_factor(&self, values: Vec<f32>, halves: bool) -> Result<Vec<FactorOf<Self>>, DeviceError>;

    /// Sine and cosine of positions `0..positions` on a device; see [`crate::cpu::RotaryTable::new`].
    ///
    /// # Errors
    /// `OutOfMemory`, `Failed`, `Index` if there is no such device.
    fn table(
        &self,
        device: usize,
        frequencies: &[f32],
        factor: f32,
        positions: usize,
    ) -> Result<TableOf<Self>, DeviceError>;

    /// Runs `work` with a lane of one of the devices, whose number it is told. It waits for a lane where a device has no
    /// room for more.
    ///
    /// # Errors
    /// What `work` says; `OutOfMemory` or `Failed` for a lane that could not be made.
    fn with<T, E: From<DeviceError>>(
        &self,
        work: impl FnOnce(usize, &mut Self::Lane) -> Result<T, E>,
    ) -> Result<T, E>;
}

/// What a place keeps of weights.
pub type WeightsOf<P> = <<P as Place>::Lane as Lane>::Weights;
/// What a place keeps of linear layers' weights.
pub type FactorOf<P> = <<P as Place>::Lane as Lane>::Factor;
/// What a place keeps of rotations.
pub type TableOf<P> = <<P as Place>::Lane as Lane>::Table;
