//! A layer's weights where it is solved.
//!
//! Not here: how tensors travel (`transit`), grids (`layer_problem`).

use crate::{failure, transit};
use halfstep_model::{Data, Layer, WeightLayout};
use halfstep_work::{Failure, InputTensor};
use std::borrow::Cow;
use std::ops::Range;

/// A layer's weights, `[rows, cols]`.
pub(crate) enum Weights {
    /// Stored row by row: each chunk reads its own.
    Stored(InputTensor),
    Matrix(Vec<f32>),
}

impl Weights {
    /// Of the layer, as they are stored.
    ///
    /// # Errors
    /// `Internal` if they are not the layer's.
    pub(crate) fn read(layer: &Layer, stored: InputTensor) -> Result<Self, Failure> {
        let shape = layer.layout.matrix_shape(&stored.shape);
        let fits = shape.is_ok_and(|shape| (shape.rows, shape.cols) == (layer.rows, layer.cols));
        let row_by_row = layer.layout == WeightLayout::AsIs && fits;
        let size = stored.kind.size();
        let whole =
            stored.bytes.len().is_multiple_of(size) && stored.bytes.len() / size == layer.rows * layer.cols;
        if row_by_row && whole && transit::rows(&stored, layer.cols, 0..0).is_some() {
            return Ok(Self::Stored(stored));
        }
        let matrix = layer
            .layout
            .to_matrix(&layer.weight_shape, &floats(&stored)?)
            .map_err(|e| failure::internal(format!("layer `{}`: {e}", layer.name)))?;
        Ok(Self::Matrix(matrix))
    }

    /// Some rows, `[rows.len(), cols]`.
    ///
    /// # Errors
    /// `Internal` if there are no such rows.
    pub(crate) fn rows(&self, layer: &Layer, rows: Range<usize>) -> Result<Cow<'_, [f32]>, Failure> {
        let found = match self {
            Self::Stored(stored) => transit::rows(stored, layer.cols, rows.clone()).map(Cow::Owned),
            Self::Matrix(matrix) => {
                matrix.get(rows.start * layer.cols..rows.end * layer.cols).map(Cow::Borrowed)
            }
        };
        found.ok_or_else(|| {
            let (name, all) = (&layer.name, layer.rows);
            failure::internal(format!("layer `{name}`: rows {rows:?} were asked for, it has {all}"))
        })
    }
}

/// The numbers of a constant.
///
/// # Errors
/// `Internal` if they are none.
pub(crate) fn floats(stored: &InputTensor) -> Result<Vec<f32>, Failure> {
    match transit::tensor(stored)?.data {
        Data::F32(values) => Ok(values),
        _ => Err(failure::internal(format!("constant `{}`: expected f32", stored.name))),
    }
}
