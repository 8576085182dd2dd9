//! Launches of the kernels that objectives are made with: `objective.cu`, and of `rows.cu` and `dots.cu`.
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

/// Rows `indices`, `count` of them, of one matrix become those of the other.
pub(in crate::cuda) fn copy_rows(
    size: Size,
    (count, cols): (u32, u32),
    source: u64,
    indices: u64,
    out: u64,
) -> Launch<5> {
    let (grid, block) = size.rows(count, cols);
    Launch {
        kernel: Kernel::CopyRows,
        grid,
        block,
        arguments: [
            ("count", Value::U32(count)),
            ("width", Value::U32(cols)),
            ("source", Value::Read(source)),
            ("indices", Value::Read(indices)),
            ("out", Value::Write(out)),
        ],
    }
}

pub(in crate::cuda) fn scale_rows(
    size: Size,
    (rows, cols): (u32, u32),
    source: u64,
    by: u64,
    out: u64,
) -> Launch<5> {
    let (grid, block) = size.rows(rows, cols);
    Launch {
        kernel: Kernel::ScaleRows,
        grid,
        block,
        arguments: [
            ("rows", Value::U32(rows)),
            ("width", Value::U32(cols)),
            ("source", Value::Read(source)),
            ("by", Value::Read(by)),
            ("out", Value::Write(out)),
        ],
    }
}

/// `groups` runs of `width` columns of every row.
pub(in crate::cuda) fn run_dots(
    size: Size,
    (rows, cols): (u32, u32),
    (width, groups): (u32, u32),
    (a, b): (u64, u64),
    sums: u64,
) -> Launch<7> {
    Launch {
        kernel: Kernel::RunDots,
        grid: size.warps(rows.saturating_mul(groups)),
        block: (THREADS, 1),
        arguments: [
            ("rows", Value::U32(rows)),
            ("cols", Value::U32(cols)),
            ("width", Value::U32(width)),
            ("groups", Value::U32(groups)),
            ("a", Value::Read(a)),
            ("b", Value::Read(b)),
            ("sums", Value::Write(sums)),
        ],
    }
}
