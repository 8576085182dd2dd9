//! Launches of the kernels that AdaRound iterates with in half precision: `step.cu`.
//!
//! Not here: the same iteration in f32 (`kernels`), products (`blas`).

use super::{Argument, Kernel, Launch, NARROW, NARROW_WIDTH, Size, THREADS, Value, at_most, constants};
use crate::cpu::step::StepArgs;

/// Addresses of what an iteration reads and writes.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda) struct HalvesState {
    pub(in crate::cuda) product: u64,
    pub(in crate::cuda) target: u64,
    pub(in crate::cuda) lo: u64,
    pub(in crate::cuda) delta: u64,
    pub(in crate::cuda) by_row: u64,
    pub(in crate::cuda) by_column: u64,
    pub(in crate::cuda) v: u64,
    pub(in crate::cuda) m1: u64,
    pub(in crate::cuda) m2: u64,
    pub(in crate::cuda) errors: u64,
}

fn shape(rows: u32, cols: u32) -> [Argument; 2] {
    [("rows", Value::U32(rows)), ("cols", Value::U32(cols))]
}

pub(in crate::cuda) fn step_halves(
    size: Size,
    (rows, cols): (u32, u32),
    state: HalvesState,
    args: &StepArgs,
) -> Launch<21> {
    let block = if cols <= NARROW_WIDTH { NARROW } else { (THREADS, 1) };
    // Each thread takes four columns, of as many rows as it takes for all blocks to run at once.
    let along = at_most(cols.div_ceil(4 * block.0) as usize, 32 * size.multiprocessors);
    let down = at_most(rows.div_ceil(block.1) as usize, (16 * size.multiprocessors).div_ceil(along));
    let [first, second] = shape(rows, cols);
    let [rate, beta1, beta2, eps, bias1, bias2, lambda, beta, scale] = constants(args);
    Launch {
        kernel: Kernel::StepHalves,
        grid: (along, down),
        block,
        arguments: [
            first,
            second,
            ("product", Value::Read(state.product)),
            ("target", Value::Read(state.target)),
            ("lo", Value::Read(state.lo)),
            ("delta", Value::Read(state.delta)),
            ("by_row", Value::Read(state.by_row)),
            ("by_column", Value::Read(state.by_column)),
            ("v", Value::Write(state.v)),
            ("m1", Value::Write(state.m1)),
            ("m2", Value::Write(state.m2)),
            ("errors", Value::Write(state.errors)),
            rate,
            beta1,
            beta2,
            eps,
            bias1,
            bias2,
            lambda,
            beta,
            scale,
        ],
    }
}

pub(in crate::cuda) fn scaled_halves(
    size: Size,
    (rows, cols): (u32, u32),
    x: u64,
    (by_row, by_column): (u64, u64),
    out: u64,
) -> Launch<6> {
    let (grid, block) = size.rows(rows, cols);
    let [first, second] = shape(rows, cols);
    Launch {
        kernel: Kernel::ScaledHalves,
        grid,
        block,
        arguments: [
            first,
            second,
            ("x", Value::Read(x)),
            ("by_row", Value::Read(by_row)),
            ("by_column", Value::Read(by_column)),
            ("out", Value::Write(out)),
        ],
    }
}

pub(in crate::cuda) fn row_scales(
    size: Size,
    (rows, cols): (u32, u32),
    (lo, delta): (u64, u64),
    by_column: u64,
    out: u64,
) -> Launch<6> {
    let [first, second] = shape(rows, cols);
    Launch {
        kernel: Kernel::RowScales,
        grid: (at_most(rows as usize, 32 * size.multiprocessors), 1),
        block: (THREADS, 1),
        arguments: [
            first,
            second,
            ("lo", Value::Read(lo)),
            ("delta", Value::Read(delta)),
            ("by_column", Value::Read(by_column)),
            ("out", Value::Write(out)),
        ],
    }
}
