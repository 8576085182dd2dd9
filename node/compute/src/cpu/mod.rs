//! The CPU reference: plain functions on slices, single-threaded, fixed instruction order.
//!
//! Callers parallelise over fixed chunks (row chunks, shards); no function here starts a thread, so results do
//! not depend on thread count. [`Cpu`] puts them behind the [`crate::Device`] interface. Not here: the interface itself.

pub mod attention;
mod device;
pub mod exact;
pub mod experts;
pub mod gate;
pub mod gram;
pub mod halves;
mod host;
pub mod isa;
mod lanes;
mod level;
pub(crate) mod math;
pub mod moments;
pub mod norm;
pub mod objective;
pub mod plane;
pub mod product;
pub mod refine;
pub mod rotary;
pub mod scaled;
pub mod step;

pub use attention::{Attention, AttentionScratch, attend, softcap};
pub use device::{Cpu, CpuBuffer};
pub use exact::add_product_f64;
pub use experts::{chosen, combine, gather, route};
pub use gate::{Rows, gate};
pub use gram::{cross_gram, gram_lower, mirror_lower, mirror_lower_by};
pub use halves::{narrow, widen};
pub use host::{Host, HostChoice, HostLane};
pub use isa::{Isa, isa};
pub use moments::{column_gaps, exact_differences, multiply_moments, normal_equations};
pub use norm::{layer_norm, rms_norm};
pub use objective::{rounding_errors, row_sums, run_dots};
pub use plane::{PLANE_BLOCK, factor_block, plane_block};
pub use product::{matmul, matmul_made, matmul_nt, matmul_tn};
pub use refine::{REFINE_BLOCK, refine_block, refine_rows};
pub use rotary::RotaryTable;
pub use scaled::{column_scales, row_scale, scaled_halves};
pub use step::{
    Gradient, StepArgs, adaround_step, harden, inverse_rectified_sigmoid, rectified_sigmoid, rounding_loss,
    soften,
};
