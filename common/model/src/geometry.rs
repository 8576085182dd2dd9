//! The geometry of convolutions: kernel, strides, dilations, padding, output size; and how a layer's input
//! becomes the rows of its matrix form.
//!
//! Method: ONNX Conv and ConvTranspose (opset 11 and later), for any number of spatial dimensions, all checked.
//! Not here: moving data (im2col is the executor's), reading attributes (`layers`).

use serde::{Deserialize, Serialize};

/// How padding is chosen, as ONNX `auto_pad` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AutoPad {
    /// The explicit `pads`.
    #[default]
    NotSet,
    /// `ceil(input / stride)` outputs, the odd cell of padding at the end.
    SameUpper,
    /// `ceil(input / stride)` outputs, the odd cell of padding at the beginning.
    SameLower,
    /// No padding.
    Valid,
}

/// A convolution's geometry. All vectors have one entry per spatial dimension.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Geometry {
    /// Kernel size, in cells; at least 1.
    pub kernel: Vec<usize>,
    /// Step between windows; at least 1.
    pub strides: Vec<usize>,
    /// Step between kernel cells; at least 1.
    pub dilations: Vec<usize>,
    /// Explicit padding before the first cell. Read through [`Geometry::pads`]: `auto_pad` may override it.
    pub pads_begin: Vec<usize>,
    /// Explicit padding after the last cell.
    pub pads_end: Vec<usize>,
    /// How padding is chosen.
    pub auto_pad: AutoPad,
    /// Channel groups; at least 1.
    pub groups: usize,
    /// ConvTranspose only: cells added at the end of each output dimension; zeros for Conv.
    pub output_padding: Vec<usize>,
}

/// How a layer's input tensor becomes rows `[positions, cols]` of its matrix form.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unfold {
    /// `x: [.., K]`: every leading index is a position (MatMul with the constant on the right, Gemm).
    Rows,
    /// `x: [.., K, P]`: every leading index and every column is a position (MatMul with the constant on the
    /// left, Gemm with a transposed input). An `x` of rank 1, `[K]`, is one position.
    Columns,
    /// `x: [N, C, spatial..]`: one position per output cell, one column per (channel in group, kernel cell).
    Conv(Geometry),
    /// `x: [N, C, spatial..]`: one position per *output* cell, one column per (channel in group, kernel cell):
    /// column `(c, k)` is the input cell that kernel cell `k` carries to this output, or 0 where there is none.
    ConvTranspose(Geometry),
}

/// Geometry that does not describe a convolution of this input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// A vector has the wrong number of entries.
    #[error("convolution {what} has {actual} entries, the kernel has {expected} spatial dimensions")]
    Rank {
        /// Which vector.
        what: &'static str,
        /// Spatial dimensions of the kernel.
        expected: usize,
        /// Entries found.
        actual: usize,
    },
    /// A size that must be at least 1 is 0.
    #[error("convolution {what} is 0 in spatial dimension {dimension}, expected at least 1")]
    Zero {
        /// Which vector.
        what: &'static str,
        /// Spatial dimension, from 0.
        dimension: usize,
    },
    /// The window does not fit into the padded input, or padding exceeds the transposed output.
    #[error(
        "convolution does not fit: spatial dimension {dimension} has input {input}, window {window}, padding {padding}"
    )]
    NoOutput {
        /// Spatial dimension, from 0.
        dimension: usize,
        /// Input size.
        input: usize,
        /// Dilated kernel size.
        window: usize,
        /// Padding on both sides together.
        padding: usize,
    },
    /// Sizes whose product or sum leaves the address space.
    #[error("convolution sizes overflow in spatial dimension {dimension}")]
    Overflow {
        /// Spatial dimension, from 0.
        dimension: usize,
    },
}

/// Padding and output size along one spatial dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Cells of padding before the first input cell (Conv), or cut before the first output cell (ConvTranspose).
    pub pad_begin: usize,
    /// The same at the end.
    pub pad_end: usize,
    /// Output cells; at least 1.
    pub output: usize,
}

impl Geometry {
    /// Checks that all vectors have the kernel's rank and nothing that must be positive is 0.
    ///
    /// # Errors
    /// `Rank`, `Zero`.
    pub fn validate(&self) -> Result<(), GeometryError> {
        let expected = self.kernel.len();
        let vectors: [(&'static str, &[usize]); 5] = [
            ("strides", &self.strides),
            ("dilations", &self.dilations),
            ("pads_begin", &self.pads_begin),
            ("pads_end", &self.pads_end),
            ("output_padding", &self.output_padding),
        ];
        for (what, vector) in vectors {
            if vector.len() != expected {
                return Err(GeometryError::Rank { what, expected, actual: vector.len() });
            }
        }
        for (what, vector) in
            [("kernel", &self.kernel), ("stride", &self.strides), ("dilation", &self.dilations)]
        {
            if let Some(dimension) = vector.iter().position(|&v| v == 0) {
                return Err(GeometryError::Zero { what, dimension });
            }
        }
        if self.groups == 0 {
            return Err(GeometryError::Zero { what: "group count", dimension: 0 });
        }
        Ok(())
    }

    /// Kernel cells, all dimensions together.
    pub fn kernel_cells(&self) -> Option<usize> {
        self.kernel.iter().try_fold(1usize, |product, &k| product.checked_mul(k))
    }

    /// Padding and output size of a Conv. `input`: spatial sizes `[d1, d2, ..]`.
    ///
    /// # Errors
    /// `Rank`, `Zero`, `NoOutput`, `Overflow`.
    pub fn conv_extents(&self, input: &[usize]) -> Result<Vec<Extent>, GeometryError> {
        self.extents(input, Self::conv_extent)
    }

    /// Padding and output size of a ConvTranspose. `input`: spatial sizes `[d1, d2, ..]`.
    ///
    /// Output cell `o` receives kernel cell `k` of input cell `i` where
    /// `o + pad_begin = i * stride + k * dilation`.
    ///
    /// # Errors
    /// `Rank`, `Zero`, `NoOutput`, `Overflow`.
    pub fn conv_transpose_extents(&self, input: &[usize]) -> Result<Vec<Extent>, GeometryError> {
        self.extents(input, Self::conv_transpose_extent)
    }

    fn extents(
        &self,
        input: &[usize],
        extent: fn(&Self, usize, usize) -> Result<Extent, GeometryError>,
    ) -> Result<Vec<Extent>, GeometryError> {
        self.validate()?;
        if input.len() != self.kernel.len() {
            return Err(GeometryError::Rank {
                what: "input",
                expected: self.kernel.len(),
                actual: input.len(),
            });
        }
        input.iter().enumerate().map(|(dimension, &size)| extent(self, dimension, size)).collect()
    }

    /// `(kernel - 1) * dilation + 1`.
    fn window(&self, dimension: usize) -> Option<usize> {
        (self.kernel[dimension] - 1).checked_mul(self.dilations[dimension])?.checked_add(1)
    }

    fn conv_extent(&self, dimension: usize, input: usize) -> Result<Extent, GeometryError> {
        let overflow = GeometryError::Overflow { dimension };
        let stride = self.strides[dimension];
        let window = self.window(dimension).ok_or(overflow.clone())?;
        let (pad_begin, pad_end) = match self.auto_pad {
            AutoPad::NotSet => (self.pads_begin[dimension], self.pads_end[dimension]),
            AutoPad::Valid => (0, 0),
            AutoPad::SameUpper | AutoPad::SameLower => {
                let steps = input.div_ceil(stride).saturating_sub(1);
                let covered = steps.checked_mul(stride).and_then(|s| s.checked_add(window));
                self.split(covered.ok_or(overflow.clone())?.saturating_sub(input))
            }
        };
        let padding = pad_begin.checked_add(pad_end).ok_or(overflow.clone())?;
        let padded = input.checked_add(padding).ok_or(overflow)?;
        if input == 0 || padded < window {
            return Err(GeometryError::NoOutput { dimension, input, window, padding });
        }
        Ok(Extent { pad_begin, pad_end, output: (padded - window) / stride + 1 })
    }

    fn conv_transpose_extent(&self, dimension: usize, input: usize) -> Result<Extent, GeometryError> {
        let overflow = GeometryError::Overflow { dimension };
        let stride = self.strides[dimension];
        let window = self.window(dimension).ok_or(overflow.clone())?;
        let full = input
            .saturating_sub(1)
            .checked_mul(stride)
            .and_then(|s| s.checked_add(window))
            .and_then(|s| s.checked_add(self.output_padding[dimension]))
            .ok_or(overflow.clone())?;
        let (pad_begin, pad_end) = match self.auto_pad {
            AutoPad::NotSet => (self.pads_begin[dimension], self.pads_end[dimension]),
            AutoPad::Valid => (0, 0),
            AutoPad::SameUpper | AutoPad::SameLower => {
                let wanted = input.checked_mul(stride).ok_or(overflow.clone())?;
                self.split(full.saturating_sub(wanted))
            }
        };
        let padding = pad_begin.checked_add(pad_end).ok_or(overflow)?;
        if input == 0 || full <= padding {
            return Err(GeometryError::NoOutput { dimension, input, window, padding });
        }
        Ok(Extent { pad_begin, pad_end, output: full - padding })
    }

    /// Splits `SAME` padding; the odd cell goes where `auto_pad` says.
    fn split(&self, padding: usize) -> (usize, usize) {
        let (less, more) = (padding / 2, padding - padding / 2);
        if self.auto_pad == AutoPad::SameLower { (more, less) } else { (less, more) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(
        kernel: usize,
        stride: usize,
        dilation: usize,
        pads: (usize, usize),
        auto_pad: AutoPad,
    ) -> Geometry {
        Geometry {
            kernel: vec![kernel],
            strides: vec![stride],
            dilations: vec![dilation],
            pads_begin: vec![pads.0],
            pads_end: vec![pads.1],
            auto_pad,
            groups: 1,
            output_padding: vec![0],
        }
    }

    /// Counts windows by walking the padded line.
    fn windows(input: usize, geometry: &Geometry, pads: (usize, usize)) -> usize {
        let reach = (geometry.kernel[0] - 1) * geometry.dilations[0];
        (0..input + pads.0 + pads.1)
            .step_by(geometry.strides[0])
            .filter(|start| start + reach < input + pads.0 + pads.1)
            .count()
    }

    #[test]
    fn conv_output_counts_the_windows_that_fit() {
        for input in 1..9 {
            for (kernel, stride, dilation) in
                [(1, 1, 1), (2, 1, 1), (3, 2, 1), (3, 1, 2), (2, 3, 3), (1, 4, 1)]
            {
                for pads in [(0, 0), (1, 0), (2, 3)] {
                    let geometry = line(kernel, stride, dilation, pads, AutoPad::NotSet);
                    let expected = windows(input, &geometry, pads);
                    match geometry.conv_extents(&[input]) {
                        Ok(extents) => assert_eq!(extents[0].output, expected, "{geometry:?} on {input}"),
                        Err(_) => assert_eq!(expected, 0, "{geometry:?} on {input}"),
                    }
                }
            }
        }
    }

    #[test]
    fn same_padding_gives_one_output_per_stride() {
        for auto_pad in [AutoPad::SameUpper, AutoPad::SameLower] {
            for input in 1usize..12 {
                for (kernel, stride, dilation) in [(1, 1, 1), (2, 1, 1), (4, 2, 1), (3, 3, 2), (1, 3, 1)] {
                    let geometry = line(kernel, stride, dilation, (9, 9), auto_pad);
                    let extent = geometry.conv_extents(&[input]).unwrap()[0];
                    assert_eq!(extent.output, input.div_ceil(stride), "{geometry:?} on {input}");
                    let (first, second) = (extent.pad_begin, extent.pad_end);
                    let (less, more) =
                        if auto_pad == AutoPad::SameUpper { (first, second) } else { (second, first) };
                    assert!(more == less || more == less + 1);
                }
            }
        }
    }

    #[test]
    fn transposed_output_undoes_a_convolution_of_exact_fit() {
        for (kernel, stride, dilation, pads) in [(3, 2, 1, (1, 1)), (2, 3, 2, (0, 1)), (4, 1, 1, (2, 1))] {
            let geometry = line(kernel, stride, dilation, pads, AutoPad::NotSet);
            for small in 2..7 {
                let large = geometry.conv_transpose_extents(&[small]).unwrap()[0].output;
                assert_eq!(geometry.conv_extents(&[large]).unwrap()[0].output, small);
            }
        }
    }

    #[test]
    fn refuses_what_is_no_convolution() {
        let good = line(3, 1, 1, (0, 0), AutoPad::NotSet);
        let cases: [(Geometry, &[usize], &str); 6] = [
            (Geometry { strides: vec![0], ..good.clone() }, &[5], "stride is 0"),
            (Geometry { strides: vec![], ..good.clone() }, &[5], "strides has 0 entries"),
            (Geometry { groups: 0, ..good.clone() }, &[5], "group count is 0"),
            (good.clone(), &[5, 5], "input has 2 entries"),
            (good.clone(), &[2], "does not fit"),
            (Geometry { pads_begin: vec![usize::MAX], ..good.clone() }, &[5], "overflow"),
        ];
        for (geometry, input, message) in cases {
            let error = geometry.conv_extents(input).unwrap_err().to_string();
            assert!(error.contains(message), "{error} lacks {message}");
        }
        let huge = Geometry { dilations: vec![usize::MAX / 2], kernel: vec![4], ..good };
        assert!(huge.conv_extents(&[5]).is_err());
        assert!(huge.conv_transpose_extents(&[usize::MAX]).is_err());
    }
}
