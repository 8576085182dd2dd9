//! Turns a layer's input tensor into the rows `[positions, cols]` of its matrix form (im2col), a block at a time.
//!
//! Columns are (input channel in group, kernel cell), zero where the kernel reads padding. Method: where a kernel cell
//! lands is tabulated once per position and shared by all channels. Not here: sums over rows (`statistics`).

use crate::ExecError;
use halfstep_model::{Extent, Geometry, Tensor, Unfold};

/// An offset that means padding.
const OUTSIDE: u32 = u32::MAX;

/// How one input tensor unfolds; built once per tensor.
pub struct Unfolder<'a> {
    x: &'a [f32],
    kind: Kind,
    cols: usize,
    groups: usize,
    positions: usize,
}

enum Kind {
    /// Rows of `cols` elements, one after the other.
    Rows,
    /// `[.., cols, columns]`.
    Columns { columns: usize },
    /// Windows over an image.
    Windows(Windows),
}

struct Windows {
    channels_per_group: usize,
    channels: usize,
    /// Input cells per channel.
    cells: usize,
    /// Output cells per image.
    outputs: usize,
    /// Kernel cells.
    kernel: usize,
    /// `[outputs, kernel]`: cell within a channel, or `OUTSIDE`; empty when it is the identity (1x1, stride 1).
    table: Vec<u32>,
}

impl<'a> Unfolder<'a> {
    /// Checks the tensor against the layer.
    ///
    /// # Errors
    /// `Tensor` if type, rank, channels or sizes do not fit.
    pub fn new(
        name: &str,
        unfold: &Unfold,
        tensor: &'a Tensor,
        cols: usize,
        groups: usize,
    ) -> Result<Self, ExecError> {
        let wrong = |expected: String| ExecError::Tensor {
            name: name.into(),
            expected,
            actual: format!("{:?} {:?}", tensor.dtype(), tensor.shape),
        };
        let x = tensor.as_f32().ok_or_else(|| wrong("a tensor of f32".into()))?;
        let shape = &tensor.shape;
        let (kind, positions) = match unfold {
            Unfold::Rows => {
                if shape.last() != Some(&cols) || cols == 0 {
                    return Err(wrong(format!("a last dimension of {cols}")));
                }
                (Kind::Rows, x.len() / cols)
            }
            Unfold::Columns => {
                let rank = shape.len();
                if rank < 2 || shape[rank - 2] != cols || cols == 0 {
                    return Err(wrong(format!("a last dimension but one of {cols}")));
                }
                (Kind::Columns { columns: shape[rank - 1] }, x.len() / cols)
            }
            Unfold::Conv(g) | Unfold::ConvTranspose(g) => {
                let transposed = matches!(unfold, Unfold::ConvTranspose(_));
                let windows = windows(g, shape, cols, transposed).map_err(wrong)?;
                let positions = shape[0] * windows.outputs;
                (Kind::Windows(windows), positions)
            }
        };
        Ok(Self { x, kind, cols, groups, positions })
    }

    /// Rows of the matrix form.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Writes the rows of `positions` for one group: `out[i, :]` is row `positions[i]`; every entry of
    /// `out[..positions.len() * cols]` is written.
    ///
    /// Positions must be less than `positions()`, the group less than the layer's groups.
    pub fn fill(&self, group: usize, positions: &[usize], out: &mut [f32]) {
        debug_assert!(group < self.groups);
        match &self.kind {
            Kind::Rows => {
                for (row, p) in out.chunks_exact_mut(self.cols).zip(positions) {
                    row.copy_from_slice(&self.x[p * self.cols..][..self.cols]);
                }
            }
            Kind::Columns { columns } => {
                for (row, p) in out.chunks_exact_mut(self.cols).zip(positions) {
                    let base = p / columns * self.cols * columns + p % columns;
                    row.iter_mut().enumerate().for_each(|(c, v)| *v = self.x[base + c * columns]);
                }
            }
            Kind::Windows(w) if w.table.is_empty() => self.fill_pointwise(w, group, positions, out),
            Kind::Windows(w) => self.fill_windows(w, group, positions, out),
        }
    }

    /// 1x1 windows: a transposition, read along cells.
    fn fill_pointwise(&self, w: &Windows, group: usize, positions: &[usize], out: &mut [f32]) {
        let mut start = 0;
        while start < positions.len() {
            let image = positions[start] / w.outputs;
            let run = positions[start..].iter().take_while(|p| *p / w.outputs == image).count();
            let base = (image * w.channels + group * w.channels_per_group) * w.cells;
            let cells = &positions[start..start + run];
            // Sixteen rows at a time: their output lines stay in the first-level cache while channels pass by.
            for (block, cells) in cells.chunks(16).enumerate() {
                let first = start + block * 16;
                for c in 0..w.channels_per_group {
                    let channel = &self.x[base + c * w.cells..][..w.cells];
                    for (i, p) in cells.iter().enumerate() {
                        out[(first + i) * self.cols + c] = channel[p - image * w.outputs];
                    }
                }
            }
            start += run;
        }
    }

    fn fill_windows(&self, w: &Windows, group: usize, positions: &[usize], out: &mut [f32]) {
        for (row, p) in out.chunks_exact_mut(self.cols).zip(positions) {
            let (image, output) = (p / w.outputs, p % w.outputs);
            let base = (image * w.channels + group * w.channels_per_group) * w.cells;
            let offsets = &w.table[output * w.kernel..][..w.kernel];
            let inside = offsets.iter().all(|o| *o != OUTSIDE);
            let channels = self.x[base..base + w.channels_per_group * w.cells].chunks_exact(w.cells);
            for (cells, channel) in row.chunks_exact_mut(w.kernel).zip(channels) {
                if inside {
                    cells.iter_mut().zip(offsets).for_each(|(v, o)| *v = channel[*o as usize]);
                } else {
                    for (v, o) in cells.iter_mut().zip(offsets) {
                        *v = if *o == OUTSIDE { 0.0 } else { channel[*o as usize] };
                    }
                }
            }
        }
    }
}

fn windows(g: &Geometry, shape: &[usize], cols: usize, transposed: bool) -> Result<Windows, String> {
    let rank = g.kernel.len();
    if shape.len() != rank + 2 {
        return Err(format!("rank {}", rank + 2));
    }
    let spatial = &shape[2..];
    let extents = if transposed { g.conv_transpose_extents(spatial) } else { g.conv_extents(spatial) };
    let extents = extents.map_err(|e| e.to_string())?;
    let kernel = g.kernel_cells().filter(|k| *k > 0).ok_or("a kernel that fits memory")?;
    let channels = shape[1];
    let channels_per_group = channels / g.groups.max(1);
    if channels_per_group * g.groups != channels || channels_per_group * kernel != cols {
        return Err(format!("{} channels", cols / kernel * g.groups));
    }
    let cells: usize = spatial.iter().product();
    let outputs: usize = extents.iter().map(|e| e.output).product();
    if cells >= OUTSIDE as usize || outputs.checked_mul(kernel).is_none_or(|n| n > 1 << 33) {
        return Err("an image of less than 2^32 cells".into());
    }
    let identity = kernel == 1
        && !transposed
        && g.strides.iter().all(|s| *s == 1)
        && extents.iter().all(|e| e.pad_begin == 0 && e.pad_end == 0);
    let table = if identity { Vec::new() } else { table(g, spatial, &extents, transposed) };
    Ok(Windows { channels_per_group, channels, cells, outputs, kernel, table })
}

/// For every output cell and kernel cell, the input cell it reads.
fn table(g: &Geometry, spatial: &[usize], extents: &[Extent], transposed: bool) -> Vec<u32> {
    let output: Vec<usize> = extents.iter().map(|e| e.output).collect();
    let mut table = Vec::with_capacity(output.iter().product::<usize>() * g.kernel.iter().product::<usize>());
    for_each_index(&output, |o| {
        for_each_index(&g.kernel, |k| {
            let mut cell = Some(0usize);
            for d in 0..spatial.len() {
                let at = if transposed {
                    source_of_transposed(o[d] + extents[d].pad_begin, k[d] * g.dilations[d], g.strides[d])
                } else {
                    (o[d] * g.strides[d] + k[d] * g.dilations[d]).checked_sub(extents[d].pad_begin)
                };
                cell = match (cell, at) {
                    (Some(cell), Some(at)) if at < spatial[d] => Some(cell * spatial[d] + at),
                    _ => None,
                };
            }
            table.push(cell.map_or(OUTSIDE, |c| c as u32));
        });
    });
    table
}

/// `out = in * stride + tap` has an integer solution only for some outputs.
fn source_of_transposed(out: usize, tap: usize, stride: usize) -> Option<usize> {
    let distance = out.checked_sub(tap)?;
    (distance % stride == 0).then_some(distance / stride)
}

fn for_each_index(shape: &[usize], mut f: impl FnMut(&[usize])) {
    let mut index = vec![0; shape.len()];
    let total: usize = shape.iter().product();
    for _ in 0..total {
        f(&index);
        for d in (0..shape.len()).rev() {
            index[d] += 1;
            if index[d] < shape[d] {
                break;
            }
            index[d] = 0;
        }
    }
}
