//! Launches of the kernels of second moments: `moments.cu`, `dots.cu`.
//!
//! Not here: which of them make a product or a comparison (`cuda::moments`).

use super::{Kernel, Launch, Size, THREADS, Value, at_most};

/// Threads of a block that takes a column each: few, so that columns spread over the device.
const COLUMNS: u32 = 64;

/// Part of a matrix whose rows are `stride` apart.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda) struct Tile {
    pub(in crate::cuda) rows: u32,
    pub(in crate::cuda) width: u32,
    /// Its first row and column.
    pub(in crate::cuda) top: u32,
    pub(in crate::cuda) left: u32,
    pub(in crate::cuda) stride: u32,
}

/// What a tile is made of: `plus + factor * minus`. Addresses; 0 for none of the last two.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda) struct Source {
    pub(in crate::cuda) plus: u64,
    /// Of `plus`.
    pub(in crate::cuda) diagonal: u64,
    pub(in crate::cuda) minus: u64,
    pub(in crate::cuda) factor: f64,
}

pub(in crate::cuda) fn widen(size: Size, tile: Tile, source: Source, out: u64) -> Launch<10> {
    let (grid, block) = size.rows(tile.rows, tile.width);
    Launch {
        kernel: Kernel::Widen,
        grid,
        block,
        arguments: [
            ("rows", Value::U32(tile.rows)),
            ("width", Value::U32(tile.width)),
            ("top", Value::U32(tile.top)),
            ("left", Value::U32(tile.left)),
            ("stride", Value::U64(u64::from(tile.stride))),
            ("plus", Value::Read(source.plus)),
            ("diagonal", Value::Read(source.diagonal)),
            ("minus", Value::Read(source.minus)),
            ("factor", Value::F64(source.factor)),
            ("out", Value::Write(out)),
        ],
    }
}

/// Whole rows: those of `tile`, of `stride` columns. What is subtracted is subtracted, whatever the factor.
pub(in crate::cuda) fn subtract_rows(size: Size, tile: Tile, source: Source, out: u64) -> Launch<7> {
    let (grid, block) = size.rows(tile.rows, tile.stride);
    Launch {
        kernel: Kernel::SubtractRows,
        grid,
        block,
        arguments: [
            ("rows", Value::U32(tile.rows)),
            ("cols", Value::U32(tile.stride)),
            ("top", Value::U32(tile.top)),
            ("plus", Value::Read(source.plus)),
            ("diagonal", Value::Read(source.diagonal)),
            ("minus", Value::Read(source.minus)),
            ("out", Value::Write(out)),
        ],
    }
}

pub(in crate::cuda) fn set_diagonal(size: Size, n: u32, diagonal: u64, matrix: u64) -> Launch<3> {
    Launch {
        kernel: Kernel::SetDiagonal,
        grid: size.flat(n as usize),
        block: (THREADS, 1),
        arguments: [
            ("n", Value::U32(n)),
            ("diagonal", Value::Read(diagonal)),
            ("matrix", Value::Write(matrix)),
        ],
    }
}

pub(in crate::cuda) fn column_gaps(cols: u32, a: u64, b: u64, squares: u64, differing: u64) -> Launch<5> {
    Launch {
        kernel: Kernel::ColumnGaps,
        grid: (cols.div_ceil(COLUMNS).max(1), 1),
        block: (COLUMNS, 1),
        arguments: [
            ("cols", Value::U32(cols)),
            ("a", Value::Read(a)),
            ("b", Value::Read(b)),
            ("squares", Value::Write(squares)),
            ("differing", Value::Write(differing)),
        ],
    }
}

/// Columns of `tile` in all of its rows.
pub(in crate::cuda) fn difference_dots(
    size: Size,
    tile: Tile,
    (first, second): (u64, u64),
    slope: u64,
    sums: u64,
) -> Launch<8> {
    Launch {
        kernel: Kernel::DifferenceDots,
        grid: size.warps(tile.rows),
        block: (THREADS, 1),
        arguments: [
            ("rows", Value::U32(tile.rows)),
            ("width", Value::U32(tile.width)),
            ("left", Value::U32(tile.left)),
            ("stride", Value::U64(u64::from(tile.stride))),
            ("first", Value::Read(first)),
            ("second", Value::Read(second)),
            ("slope", Value::Read(slope)),
            ("sums", Value::Write(sums)),
        ],
    }
}

/// A group of columns whose normal equations are made, and where it ends.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda) struct Groups {
    pub(in crate::cuda) rows: u32,
    pub(in crate::cuda) cols: u32,
    /// Columns of a group.
    pub(in crate::cuda) width: u32,
    pub(in crate::cuda) groups: u32,
    pub(in crate::cuda) group: u32,
    pub(in crate::cuda) end: u32,
}

pub(in crate::cuda) fn group_dots(
    size: Size,
    shape: Groups,
    product: u64,
    levels: u64,
    normal: u64,
) -> Launch<9> {
    let entries = (shape.rows as usize).saturating_mul(shape.group as usize + 1);
    Launch {
        kernel: Kernel::GroupDots,
        grid: (at_most(entries.div_ceil(THREADS as usize / 32), 32 * size.multiprocessors), 1),
        block: (THREADS, 1),
        arguments: [
            ("rows", Value::U32(shape.rows)),
            ("cols", Value::U32(shape.cols)),
            ("width", Value::U32(shape.width)),
            ("groups", Value::U32(shape.groups)),
            ("group", Value::U32(shape.group)),
            ("end", Value::U32(shape.end)),
            ("product", Value::Read(product)),
            ("levels", Value::Read(levels)),
            ("normal", Value::Write(normal)),
        ],
    }
}
