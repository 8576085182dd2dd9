//! The launch of the search for grids: `search.cu`.
//!
//! Not here: what is searched for (`quant`).

use super::{Kernel, Launch, Size, THREADS, Value, at_most};
use crate::cuda::search::GridSearch;

/// `runs`: of all rows. Addresses of weights and importance, then of scales and zero points.
pub(in crate::cuda) fn search_grids(
    size: Size,
    (rows, cols, width): (u32, u32, u32),
    runs: usize,
    search: GridSearch,
    (w, importance): (u64, u64),
    (scale, zero_point): (u64, u64),
) -> Launch<10> {
    Launch {
        kernel: Kernel::SearchGrids,
        grid: (at_most(runs, 64 * size.multiprocessors), 1),
        block: (THREADS, 1),
        arguments: [
            ("rows", Value::U32(rows)),
            ("cols", Value::U32(cols)),
            ("width", Value::U32(width)),
            ("qmin", Value::U32(search.qmin.cast_unsigned())),
            ("qmax", Value::U32(search.qmax.cast_unsigned())),
            ("symmetric", Value::U32(u32::from(search.symmetric))),
            ("w", Value::Read(w)),
            ("importance", Value::Read(importance)),
            ("scale", Value::Write(scale)),
            ("zero_point", Value::Write(zero_point)),
        ],
    }
}
