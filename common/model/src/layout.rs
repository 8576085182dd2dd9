//! Where the entries of a layer's matrix `[rows, cols]` lie in the model's weight tensor.
//!
//! Rows are output channels, group-major; columns are (input channel in group, kernel cell).
//! Not here: which layout a node has (`layers`), grids and integers (`halfstep_quant`).

use serde::{Deserialize, Serialize};

/// How a weight tensor holds the matrix `[rows, cols]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WeightLayout {
    /// `[rows, ..cols]`, flattened: Conv `[O, I/g, k..]`, Gemm with `transB`, MatMul with the constant on the left.
    AsIs,
    /// `[cols, rows]`: MatMul with the constant on the right, Gemm without `transB`.
    Transposed,
    /// `[C, M/g, k..]`: row `(g, m)`, column `(c in g, k)` lies at `[g * C/g + c, m, k]`.
    ConvTranspose {
        /// Channel groups.
        groups: usize,
    },
}

/// A weight whose size does not fit its layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The shape cannot be this layout's.
    #[error("weight of shape {shape:?} does not fit layout {layout:?}: {expected}")]
    Shape {
        /// Shape of the tensor.
        shape: Vec<usize>,
        /// The layout.
        layout: WeightLayout,
        /// What the layout needs.
        expected: &'static str,
    },
    /// The number of values differs from the shape's.
    #[error("weight of shape {shape:?} has {actual} values, expected {expected}")]
    Length {
        /// Shape of the tensor.
        shape: Vec<usize>,
        /// Product of the shape.
        expected: usize,
        /// Values given.
        actual: usize,
    },
}

/// The size of a layer's matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatrixShape {
    /// Output channels, all groups together; at least 1.
    pub rows: usize,
    /// Inputs per group times kernel cells; at least 1.
    pub cols: usize,
}

impl WeightLayout {
    /// Size of the matrix that a tensor of `shape` holds.
    ///
    /// # Errors
    /// `Shape` for a rank below 2, a size of 0, a product beyond the address space, channels that `groups` does
    /// not divide.
    pub fn matrix_shape(&self, shape: &[usize]) -> Result<MatrixShape, LayoutError> {
        let refuse = |expected| LayoutError::Shape { shape: shape.to_vec(), layout: *self, expected };
        if shape.len() < 2 {
            return Err(refuse("at least 2 dimensions"));
        }
        if shape.contains(&0) {
            return Err(refuse("no dimension of size 0"));
        }
        let total = shape.iter().try_fold(1usize, |product, &d| product.checked_mul(d));
        let total = total.ok_or_else(|| refuse("a size within the address space"))?;
        let rows = match *self {
            Self::AsIs => shape[0],
            Self::Transposed if shape.len() == 2 => shape[1],
            Self::Transposed => return Err(refuse("exactly 2 dimensions")),
            Self::ConvTranspose { groups } => {
                if groups == 0 || !shape[0].is_multiple_of(groups) {
                    return Err(refuse("input channels divisible by a positive group count"));
                }
                shape[1].checked_mul(groups).ok_or_else(|| refuse("a size within the address space"))?
            }
        };
        // Rows divide the total: they are a factor of it in each of the layouts above.
        Ok(MatrixShape { rows, cols: total / rows })
    }

    /// The tensor's dimension along which output channels lie. For a grouped ConvTranspose it holds the channels
    /// of one group only: see [`WeightLayout::channel_axis_is_complete`].
    pub fn channel_axis(&self) -> usize {
        match self {
            Self::AsIs => 0,
            Self::Transposed | Self::ConvTranspose { .. } => 1,
        }
    }

    /// Whether one index along [`WeightLayout::channel_axis`] is one row of the matrix.
    pub fn channel_axis_is_complete(&self) -> bool {
        !matches!(self, Self::ConvTranspose { groups } if *groups > 1)
    }

    /// The tensor's dimension along which the columns of one row lie, if it is a single one.
    pub fn column_axis(&self, shape: &[usize]) -> Option<usize> {
        match self {
            Self::AsIs if shape.len() == 2 => Some(1),
            Self::Transposed => Some(0),
            _ => None,
        }
    }

    /// Values in matrix order `[rows, cols]`, from tensor order.
    ///
    /// # Errors
    /// `Shape`, `Length`.
    pub fn to_matrix<T: Copy>(&self, shape: &[usize], values: &[T]) -> Result<Vec<T>, LayoutError> {
        let matrix = self.check(shape, values.len())?;
        if *self == Self::AsIs {
            return Ok(values.to_vec());
        }
        Ok(self.permutation(shape, matrix).map(|tensor| values[tensor]).collect())
    }

    /// Values in tensor order, from matrix order `[rows, cols]`.
    ///
    /// # Errors
    /// `Shape`, `Length`.
    pub fn from_matrix<T: Copy>(&self, shape: &[usize], values: &[T]) -> Result<Vec<T>, LayoutError> {
        let matrix = self.check(shape, values.len())?;
        let mut out = values.to_vec();
        if *self == Self::AsIs {
            return Ok(out);
        }
        for (&value, tensor) in values.iter().zip(self.permutation(shape, matrix)) {
            out[tensor] = value;
        }
        Ok(out)
    }

    fn check(&self, shape: &[usize], actual: usize) -> Result<MatrixShape, LayoutError> {
        let matrix = self.matrix_shape(shape)?;
        let expected = matrix.rows * matrix.cols;
        if actual != expected {
            return Err(LayoutError::Length { shape: shape.to_vec(), expected, actual });
        }
        Ok(matrix)
    }

    /// The tensor index of every matrix entry, in matrix order. `shape` fits: see `matrix_shape`.
    fn permutation(&self, shape: &[usize], matrix: MatrixShape) -> impl Iterator<Item = usize> + use<> {
        let MatrixShape { rows, cols } = matrix;
        // Tensor index of entry (r, c): r and c each split into an outer and an inner part.
        let (row_inner, row_outer_step, row_inner_step, col_inner, col_outer_step) = match *self {
            Self::AsIs => (1, cols, 0, cols, 0),
            Self::Transposed => (1, 1, 0, 1, rows),
            Self::ConvTranspose { groups } => {
                let kernel: usize = shape[2..].iter().product();
                let (channels, outputs) = (shape[0] / groups, shape[1]);
                (outputs, channels * outputs * kernel, kernel, kernel, outputs * kernel)
            }
        };
        (0..rows).flat_map(move |r| {
            let row = (r / row_inner) * row_outer_step + (r % row_inner) * row_inner_step;
            (0..cols).map(move |c| row + (c / col_inner) * col_outer_step + c % col_inner)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrix_and_tensor_order_undo_each_other_and_put_each_entry_where_the_layout_says() {
        let cases: [(WeightLayout, &[usize]); 6] = [
            (WeightLayout::AsIs, &[3, 2, 2]),
            (WeightLayout::AsIs, &[1, 7]),
            (WeightLayout::Transposed, &[3, 5]),
            (WeightLayout::ConvTranspose { groups: 1 }, &[2, 3, 2, 2]),
            (WeightLayout::ConvTranspose { groups: 2 }, &[4, 3, 5]),
            (WeightLayout::ConvTranspose { groups: 3 }, &[3, 1, 1]),
        ];
        for (layout, shape) in cases {
            let tensor: Vec<usize> = (0..shape.iter().product()).collect();
            let matrix = layout.to_matrix(shape, &tensor).unwrap();
            assert_eq!(layout.from_matrix(shape, &matrix).unwrap(), tensor, "{layout:?} {shape:?}");
            let MatrixShape { rows, cols } = layout.matrix_shape(shape).unwrap();
            for r in 0..rows {
                for c in 0..cols {
                    assert_eq!(
                        matrix[r * cols + c],
                        place(layout, shape, r, c),
                        "{layout:?} {shape:?} {r} {c}"
                    );
                }
            }
        }
    }

    /// The definition in the doc comments, index by index.
    fn place(layout: WeightLayout, shape: &[usize], r: usize, c: usize) -> usize {
        match layout {
            WeightLayout::AsIs => r * shape[1..].iter().product::<usize>() + c,
            WeightLayout::Transposed => c * shape[1] + r,
            WeightLayout::ConvTranspose { groups } => {
                let kernel: usize = shape[2..].iter().product();
                let (group, output) = (r / shape[1], r % shape[1]);
                let (channel, cell) = (c / kernel, c % kernel);
                ((group * (shape[0] / groups) + channel) * shape[1] + output) * kernel + cell
            }
        }
    }

    #[test]
    fn refuses_shapes_that_do_not_fit() {
        let cases: [(WeightLayout, &[usize]); 6] = [
            (WeightLayout::AsIs, &[3]),
            (WeightLayout::AsIs, &[0, 4]),
            (WeightLayout::AsIs, &[1 << 40, 1 << 40]),
            (WeightLayout::Transposed, &[2, 2, 2]),
            (WeightLayout::ConvTranspose { groups: 2 }, &[3, 1, 1]),
            (WeightLayout::ConvTranspose { groups: 0 }, &[3, 1, 1]),
        ];
        for (layout, shape) in cases {
            assert!(layout.matrix_shape(shape).is_err(), "{layout:?} {shape:?}");
        }
        assert!(WeightLayout::AsIs.to_matrix(&[2, 2], &[1.0]).is_err());
    }
}
