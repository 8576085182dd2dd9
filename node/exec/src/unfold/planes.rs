//! Channel planes to rows: `[lead, groups * cols, cells]` transposed to `[lead * cells, cols]` per group.
//!
//! In squares of 16 by 16, so that both sides are read and written by whole cache lines.

use std::ops::Range;

const TILE: usize = 16;

/// Rows `range` of `group`; the caller has checked all sizes.
pub(super) fn block(
    x: &[f32],
    cells: usize,
    groups: usize,
    cols: usize,
    group: usize,
    range: Range<usize>,
    out: &mut [f32],
) {
    let (mut image, mut cell) = (range.start / cells, range.start % cells);
    let mut rest = out;
    let mut left = range.len();
    while left > 0 {
        let run = left.min(cells - cell);
        let (now, later) = rest.split_at_mut(run * cols);
        let plane = (image * groups + group) * cols * cells;
        transpose(&x[plane..plane + cols * cells], cells, cell, cols, now);
        (rest, left, image, cell) = (later, left - run, image + 1, 0);
    }
}

/// `out[r][c] = x[c][first + r]`; `x: [cols, cells]`, `out: [rows, cols]`.
fn transpose(x: &[f32], cells: usize, first: usize, cols: usize, out: &mut [f32]) {
    for (tile, rows) in out.chunks_mut(TILE * cols).enumerate() {
        let start = first + tile * TILE;
        let height = rows.len() / cols;
        for column in (0..cols).step_by(TILE) {
            let width = TILE.min(cols - column);
            square(&x[column * cells + start..], cells, &mut rows[column..], cols, height, width);
        }
    }
}

fn square(x: &[f32], cells: usize, out: &mut [f32], cols: usize, height: usize, width: usize) {
    if height == TILE && width == TILE {
        let mut tile = [[0.0f32; TILE]; TILE];
        for (column, values) in tile.iter_mut().zip(x.chunks(cells)) {
            column.copy_from_slice(&values[..TILE]);
        }
        for (row, values) in out.chunks_mut(cols).take(TILE).enumerate() {
            for (value, column) in values[..TILE].iter_mut().zip(&tile) {
                *value = column[row];
            }
        }
        return;
    }
    for (column, values) in x.chunks(cells).take(width).enumerate() {
        for (row, value) in values[..height].iter().enumerate() {
            out[row * cols + column] = *value;
        }
    }
}
