//! Launches of the kernels that objectives are made with: `objective.cu`.
//!
//! Not here: what rows are worth (`solver`).

use super::{Kernel, Launch, Size, THREADS, Value, at_most};

pub(in crate::cuda) fn rounding_errors(
    size: Size,
    len: usize,
    low: u64,
    delta: u64,
    up: u64,
    out: u64,
) -> Launch<5> {
    Launch {
        kernel: Kernel::RoundingErrors,
        grid: size.flat(len),
        block: (THREADS, 1),
        arguments: [
            ("len", Value::U64(len as u64)),
            ("low", Value::Read(low)),
            ("delta", Value::Read(delta)),
            ("up", Value::Read(up)),
            ("out", Value::Write(out)),
        ],
    }
}

/// `terms`: errors, product, target, roots, gaps.
pub(in crate::cuda) fn row_sums(size: Size, rows: u32, cols: u32, terms: [u64; 5], sums: u64) -> Launch<8> {
    Launch {
        kernel: Kernel::RowSums,
        grid: (at_most(rows as usize, 32 * size.multiprocessors), 1),
        block: (THREADS, 1),
        arguments: [
            ("rows", Value::U32(rows)),
            ("cols", Value::U32(cols)),
            ("errors", Value::Read(terms[0])),
            ("product", Value::Read(terms[1])),
            ("target", Value::Read(terms[2])),
            ("roots", Value::Read(terms[3])),
            ("gaps", Value::Read(terms[4])),
            ("sums", Value::Write(sums)),
        ],
    }
}
