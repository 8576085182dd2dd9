//! The CPU reference: plain functions on slices, single-threaded, fixed instruction order.
//!
//! Callers parallelise over fixed chunks (row chunks, shards); no function here starts a thread, so results do
//! not depend on thread count. Not here: the [`crate::Device`] interface itself.

pub mod gram;
pub mod isa;
mod lanes;
pub(crate) mod math;
pub mod product;
pub mod refine;
pub mod step;

pub use gram::{cross_gram, gram_lower, mirror_lower};
pub use isa::{Isa, isa};
pub use product::{matmul, matmul_nt, matmul_tn};
pub use refine::{REFINE_BLOCK, refine_block};
pub use step::{
    Gradient, StepArgs, adaround_step, harden, inverse_rectified_sigmoid, rectified_sigmoid, rounding_loss,
    soften,
};
