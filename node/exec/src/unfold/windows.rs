//! Windows of a convolution as rows (im2col), for one to three spatial dimensions.
//!
//! Fewer dimensions are filled up to three with dimensions of size 1 in front. Per dimension a table says which input
//! cell each (output cell, kernel cell) reads, if any: padding, strides, dilations and the holes of a transposed
//! convolution are all in the tables. Along the last dimension, where the window lies inside the input without gaps,
//! its cells are copied as one run.

use super::mismatch;
use crate::error::ExecError;
use halfstep_model::{Extent, Geometry};
use std::ops::Range;

const DIMS: usize = 3;
/// Marks a cell outside of the input.
const NONE: u32 = u32::MAX;

/// One spatial dimension.
#[derive(Debug, Clone)]
struct Axis {
    input: usize,
    output: usize,
    kernel: usize,
    /// `[output, kernel]`: input cell, or `NONE`.
    source: Vec<u32>,
    /// Output cells whose window is a gapless run of input cells starting at `source[o][0]`.
    runs: Range<usize>,
}

#[derive(Debug, Clone)]
pub(super) struct Windows {
    images: usize,
    channels: usize,
    channels_per_group: usize,
    axes: [Axis; DIMS],
    cells: usize,
}

impl Windows {
    pub(super) fn conv(g: &Geometry, shape: &[usize], cols: usize, groups: usize) -> Result<Self, ExecError> {
        let spatial = spatial(shape)?;
        let axes = axes(g, spatial, &g.conv_extents(spatial)?, conv_source)?;
        Self::new(shape, axes, cols, groups)
    }

    pub(super) fn conv_transpose(
        g: &Geometry,
        shape: &[usize],
        cols: usize,
        groups: usize,
    ) -> Result<Self, ExecError> {
        let spatial = spatial(shape)?;
        let axes = axes(g, spatial, &g.conv_transpose_extents(spatial)?, conv_transpose_source)?;
        Self::new(shape, axes, cols, groups)
    }

    fn new(shape: &[usize], axes: [Axis; DIMS], cols: usize, groups: usize) -> Result<Self, ExecError> {
        let cells = axes.iter().try_fold(1usize, |n, axis| n.checked_mul(axis.kernel));
        let fits = cells.is_some_and(|cells| {
            shape[1].is_multiple_of(groups) && (shape[1] / groups).checked_mul(cells) == Some(cols)
        });
        let positions = axes.iter().try_fold(shape[0], |n, axis| n.checked_mul(axis.output));
        match (cells, fits, positions) {
            (Some(cells), true, Some(_)) => Ok(Self {
                images: shape[0],
                channels: shape[1],
                channels_per_group: shape[1] / groups,
                axes,
                cells,
            }),
            _ => {
                Err(mismatch(shape, format!("channels that give {cols} columns in each of {groups} groups")))
            }
        }
    }

    pub(super) fn positions(&self) -> usize {
        self.images * self.row_length() * self.axes[0].output * self.axes[1].output
    }

    fn row_length(&self) -> usize {
        self.axes[2].output
    }

    /// Rows `range` of `group`; the caller has checked all sizes.
    pub(super) fn block(&self, x: &[f32], group: usize, range: Range<usize>, out: &mut [f32]) {
        let cols = self.channels_per_group * self.cells;
        let width = self.row_length();
        let (mut line, mut start) = (range.start / width, range.start % width);
        let (mut rest, mut left) = (out, range.len());
        while left > 0 {
            let run = left.min(width - start);
            let (now, later) = rest.split_at_mut(run * cols);
            self.line(x, group, line, start..start + run, now);
            (rest, left, line, start) = (later, left - run, line + 1, 0);
        }
    }

    /// Part of one line of output cells: all positions that share image and all but the last coordinate.
    fn line(&self, x: &[f32], group: usize, line: usize, range: Range<usize>, out: &mut [f32]) {
        let [az, ay, ax] = &self.axes;
        let (image, cell) = (line / (az.output * ay.output), line % (az.output * ay.output));
        let (oz, oy) = (cell / ay.output, cell % ay.output);
        let plane = az.input * ay.input * ax.input;
        let first = (image * self.channels + group * self.channels_per_group) * plane;
        let cols = self.channels_per_group * self.cells;
        for channel in 0..self.channels_per_group {
            let x = &x[first + channel * plane..][..plane];
            for kz in 0..az.kernel {
                let z = az.source[oz * az.kernel + kz];
                for ky in 0..ay.kernel {
                    let y = ay.source[oy * ay.kernel + ky];
                    let column = channel * self.cells + (kz * ay.kernel + ky) * ax.kernel;
                    if z == NONE || y == NONE {
                        clear(out, cols, column, ax.kernel);
                    } else {
                        let start = (z as usize * ay.input + y as usize) * ax.input;
                        ax.copy(&x[start..start + ax.input], range.clone(), out, cols, column);
                    }
                }
            }
        }
    }
}

impl Axis {
    /// Columns `column..column + kernel` of every row, from one line of input.
    fn copy(&self, x: &[f32], range: Range<usize>, out: &mut [f32], cols: usize, column: usize) {
        let begin = self.runs.start.clamp(range.start, range.end);
        let end = self.runs.end.clamp(begin, range.end);
        let at = |o: usize| (o - range.start) * cols;
        self.pick(x, range.start..begin, &mut out[..at(begin)], cols, column);
        self.copy_runs(x, begin..end, &mut out[at(begin)..at(end)], cols, column);
        self.pick(x, end..range.end, &mut out[at(end)..], cols, column);
    }

    /// Cell by cell, through the table.
    fn pick(&self, x: &[f32], range: Range<usize>, out: &mut [f32], cols: usize, column: usize) {
        let sources =
            self.source[range.start * self.kernel..range.end * self.kernel].chunks_exact(self.kernel);
        for (row, sources) in out.chunks_exact_mut(cols).zip(sources) {
            for (value, source) in row[column..column + self.kernel].iter_mut().zip(sources) {
                *value = x.get(*source as usize).copied().unwrap_or(0.0);
            }
        }
    }

    fn copy_runs(&self, x: &[f32], range: Range<usize>, out: &mut [f32], cols: usize, column: usize) {
        match self.kernel {
            1 => self.copy_runs_of::<1>(x, range, out, cols, column),
            3 => self.copy_runs_of::<3>(x, range, out, cols, column),
            5 => self.copy_runs_of::<5>(x, range, out, cols, column),
            7 => self.copy_runs_of::<7>(x, range, out, cols, column),
            _ => self.pick(x, range, out, cols, column),
        }
    }

    /// Runs of a width known to the compiler; between runs the input advances by the stride.
    fn copy_runs_of<const K: usize>(
        &self,
        x: &[f32],
        range: Range<usize>,
        out: &mut [f32],
        cols: usize,
        column: usize,
    ) {
        if range.is_empty() {
            return;
        }
        let first = self.source[range.start * K] as usize;
        let stride = match range.len() {
            1 => 1,
            _ => self.source[(range.start + 1) * K] as usize - first,
        };
        for (row, values) in out.chunks_exact_mut(cols).zip(x[first..].windows(K).step_by(stride)) {
            row[column..column + K].copy_from_slice(values);
        }
    }
}

fn clear(out: &mut [f32], cols: usize, column: usize, width: usize) {
    for row in out.chunks_exact_mut(cols) {
        row[column..column + width].fill(0.0);
    }
}

fn spatial(shape: &[usize]) -> Result<&[usize], ExecError> {
    match shape {
        [_, _, spatial @ ..] if (1..=DIMS).contains(&spatial.len()) => Ok(spatial),
        _ => Err(mismatch(shape, "[images, channels, 1 to 3 spatial dimensions]")),
    }
}

/// Input cell of (output cell, kernel cell) along one dimension.
type Source = fn(o: usize, k: usize, stride: usize, dilation: usize, pad: usize) -> Option<usize>;

fn conv_source(o: usize, k: usize, stride: usize, dilation: usize, pad: usize) -> Option<usize> {
    (o * stride + k * dilation).checked_sub(pad)
}

fn conv_transpose_source(o: usize, k: usize, stride: usize, dilation: usize, pad: usize) -> Option<usize> {
    let reached = (o + pad).checked_sub(k * dilation)?;
    reached.is_multiple_of(stride).then(|| reached / stride)
}

fn axes(
    geometry: &Geometry,
    spatial: &[usize],
    extents: &[Extent],
    source: Source,
) -> Result<[Axis; DIMS], ExecError> {
    let mut axes = [(); DIMS].map(|()| Axis::unit());
    for (dimension, (input, extent)) in spatial.iter().zip(extents).enumerate() {
        axes[DIMS - spatial.len() + dimension] = axis(geometry, dimension, *input, extent, source)?;
    }
    Ok(axes)
}

impl Axis {
    /// A dimension that is not there.
    fn unit() -> Self {
        Self { input: 1, output: 1, kernel: 1, source: vec![0], runs: 0..1 }
    }
}

fn axis(
    geometry: &Geometry,
    dimension: usize,
    input: usize,
    extent: &Extent,
    source: Source,
) -> Result<Axis, ExecError> {
    let kernel = geometry.kernel[dimension];
    let entries = kernel.checked_mul(extent.output).filter(|_| u32::try_from(input).is_ok());
    let entries = entries.ok_or_else(|| mismatch(&[input], "a convolution within the address space"))?;
    let (stride, dilation) = (geometry.strides[dimension], geometry.dilations[dimension]);
    let mut table = Vec::with_capacity(entries);
    for o in 0..extent.output {
        for k in 0..kernel {
            let cell = source(o, k, stride, dilation, extent.pad_begin).filter(|cell| *cell < input);
            table.push(cell.map_or(NONE, |cell| cell as u32));
        }
    }
    let runs = runs(&table, kernel, extent.output);
    Ok(Axis { input, output: extent.output, kernel, source: table, runs })
}

/// The longest stretch from the first output cell whose window is a gapless run, with a constant step from one to
/// the next.
fn runs(table: &[u32], kernel: usize, output: usize) -> Range<usize> {
    let window = |o: usize| &table[o * kernel..(o + 1) * kernel];
    let gapless = |o: usize| {
        let window = window(o);
        window[0] != NONE
            && window.iter().enumerate().all(|(k, cell)| u64::from(*cell) == u64::from(window[0]) + k as u64)
    };
    let Some(start) = (0..output).find(|o| gapless(*o)) else { return 0..0 };
    let step = |o: usize| i64::from(window(o)[0]) - i64::from(window(o - 1)[0]);
    let mut end = start + 1;
    while end < output && gapless(end) && step(end) > 0 && step(end) == step(start + 1) {
        end += 1;
    }
    start..end
}
