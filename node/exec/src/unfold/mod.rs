//! Turns a layer's input tensor into the rows of its matrix form, `[positions, cols]`, block by block.
//!
//! Rows are in order of (leading index or image, output cell row-major); columns in the weight's order (channel in
//! group, kernel cell row-major). Blocks keep the extra memory small whatever the input; inner loops copy runs and
//! never divide. Up to three spatial dimensions.
//! Not here: padding and output sizes (`halfstep_model::Geometry`), what is done with the rows (`statistics`).

mod planes;
mod windows;

use crate::error::ExecError;
use halfstep_model::{Geometry, Tensor, Unfold};
use std::ops::Range;
use windows::Windows;

/// How the tensors of one shape unfold.
#[derive(Debug, Clone)]
pub struct Unfolder {
    cols: usize,
    groups: usize,
    positions: usize,
    elements: usize,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    /// The tensor is the matrix.
    Rows,
    /// `[lead, groups * cols, cells]`: 1x1 convolutions, and constants on the left.
    Planes { cells: usize },
    /// Any other convolution.
    Windows(Box<Windows>),
}

impl Unfolder {
    /// Prepares for a float tensor and all others of its shape. `name`: the tensor's, for messages.
    ///
    /// # Errors
    /// `Tensor` if it is not f32 or not the input of a layer of that many columns and groups; `Geometry`.
    pub fn new(
        name: &str,
        unfold: &Unfold,
        tensor: &Tensor,
        cols: usize,
        groups: usize,
    ) -> Result<Self, ExecError> {
        floats(name, tensor)?;
        Self::for_dims(name, unfold, &tensor.shape, cols, groups)
    }

    /// [`Self::new`] for float tensors of these dimensions.
    ///
    /// # Errors
    /// The same.
    pub fn for_dims(
        name: &str,
        unfold: &Unfold,
        dims: &[usize],
        cols: usize,
        groups: usize,
    ) -> Result<Self, ExecError> {
        Self::of_shape(unfold, dims, cols, groups).map_err(|error| match error {
            ExecError::Tensor { expected, actual, .. } => {
                ExecError::Tensor { name: name.to_owned(), expected, actual }
            }
            other => other,
        })
    }

    /// Whether the rows are those of the tensor as it lies.
    pub fn is_plain(&self) -> bool {
        matches!(self.kind, Kind::Rows)
    }

    fn of_shape(unfold: &Unfold, shape: &[usize], cols: usize, groups: usize) -> Result<Self, ExecError> {
        let elements = product(shape)?;
        if cols == 0 || groups == 0 {
            return Err(mismatch(shape, "a layer with columns and groups"));
        }
        let (positions, kind) = match unfold {
            Unfold::Rows => (rows(shape, cols, groups)?, Kind::Rows),
            Unfold::Columns => columns(shape, cols, groups)?,
            Unfold::Conv(geometry) => conv(geometry, shape, cols, groups)?,
            Unfold::ConvTranspose(geometry) => {
                let windows = Windows::conv_transpose(geometry, shape, cols, groups)?;
                (windows.positions(), Kind::Windows(Box::new(windows)))
            }
        };
        Ok(Self { cols, groups, positions, elements, kind })
    }

    /// Rows of the unfolded matrix; the same for every group.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// The rows `range` of `group`, if they lie in `x` as they are.
    pub fn borrow<'a>(&self, x: &'a [f32], range: Range<usize>) -> Option<&'a [f32]> {
        match self.kind {
            Kind::Rows => x.get(range.start.checked_mul(self.cols)?..range.end.checked_mul(self.cols)?),
            _ => None,
        }
    }

    /// Writes the rows `range` of `group` to `out: [range.len(), cols]`.
    ///
    /// # Errors
    /// `Internal` if `x` is not of the shape prepared for, or the range, the group or `out` do not fit.
    pub fn block(
        &self,
        x: &[f32],
        group: usize,
        range: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), ExecError> {
        self.check(x, group, range.len(), out)?;
        if range.start > range.end || range.end > self.positions {
            return Err(ExecError::Internal(format!("unfold: positions {range:?} of {}", self.positions)));
        }
        if range.is_empty() {
            return Ok(());
        }
        let out = &mut out[..range.len() * self.cols];
        match &self.kind {
            Kind::Rows => out.copy_from_slice(&x[range.start * self.cols..range.end * self.cols]),
            Kind::Planes { cells } => planes::block(x, *cells, self.groups, self.cols, group, range, out),
            Kind::Windows(windows) => windows.block(x, group, range, out),
        }
        Ok(())
    }

    /// Writes the rows at `positions` of `group`, any order, to `out: [positions.len(), cols]`.
    ///
    /// # Errors
    /// As [`Unfolder::block`].
    pub fn gather(
        &self,
        x: &[f32],
        group: usize,
        positions: &[usize],
        out: &mut [f32],
    ) -> Result<(), ExecError> {
        self.check(x, group, positions.len(), out)?;
        for (position, row) in positions.iter().zip(out.chunks_exact_mut(self.cols)) {
            self.block(x, group, *position..*position + 1, row)?;
        }
        Ok(())
    }

    fn check(&self, x: &[f32], group: usize, rows: usize, out: &[f32]) -> Result<(), ExecError> {
        let fits = rows.checked_mul(self.cols).is_some_and(|needed| needed <= out.len());
        if x.len() == self.elements && group < self.groups && fits {
            return Ok(());
        }
        Err(ExecError::Internal(format!(
            "unfold: expected {} elements, a group below {} and room for {rows} rows of {}, found {} elements, group {group} and room for {} elements",
            self.elements,
            self.groups,
            self.cols,
            x.len(),
            out.len()
        )))
    }
}

fn product(shape: &[usize]) -> Result<usize, ExecError> {
    let product = shape.iter().try_fold(1usize, |product, d| product.checked_mul(*d));
    product.ok_or_else(|| mismatch(shape, "a size within the address space"))
}

pub(crate) fn mismatch(shape: &[usize], expected: impl Into<String>) -> ExecError {
    ExecError::Tensor { name: String::new(), expected: expected.into(), actual: format!("shape {shape:?}") }
}

fn rows(shape: &[usize], cols: usize, groups: usize) -> Result<usize, ExecError> {
    match shape.split_last() {
        Some((last, lead)) if *last == cols && groups == 1 => product(lead),
        _ => Err(mismatch(shape, format!("[.., {cols}] in one group"))),
    }
}

fn columns(shape: &[usize], cols: usize, groups: usize) -> Result<(usize, Kind), ExecError> {
    match shape {
        [lead @ .., channels, cells] if *channels == cols && groups == 1 => {
            let positions = product(lead)?.checked_mul(*cells);
            let positions = positions.ok_or_else(|| mismatch(shape, "a size within the address space"))?;
            Ok((positions, Kind::Planes { cells: *cells }))
        }
        // A vector is a matrix of one column, as ONNX MatMul has it.
        [channels] if *channels == cols && groups == 1 => Ok((1, Kind::Planes { cells: 1 })),
        _ => Err(mismatch(shape, format!("[.., {cols}, positions] in one group"))),
    }
}

fn conv(
    geometry: &Geometry,
    shape: &[usize],
    cols: usize,
    groups: usize,
) -> Result<(usize, Kind), ExecError> {
    let windows = Windows::conv(geometry, shape, cols, groups)?;
    let positions = windows.positions();
    let pointwise = geometry.kernel.iter().all(|k| *k == 1) && geometry.strides.iter().all(|s| *s == 1);
    let cells = product(&shape[2..])?;
    // Without padding every input cell is an output cell.
    if pointwise && positions == shape[0] * cells {
        return Ok((positions, Kind::Planes { cells }));
    }
    Ok((positions, Kind::Windows(Box::new(windows))))
}

/// The elements of a float tensor.
pub(crate) fn floats<'a>(name: &str, tensor: &'a Tensor) -> Result<&'a [f32], ExecError> {
    tensor.as_f32().ok_or_else(|| ExecError::Tensor {
        name: name.to_owned(),
        expected: "32-bit floats as a layer's input".into(),
        actual: tensor.dtype().to_string(),
    })
}
