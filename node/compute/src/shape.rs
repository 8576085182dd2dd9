//! What every device checks before it touches memory: lengths, strides, indices.
//!
//! Works on numbers alone, so that all devices refuse the same arguments with the same words.
//! Not here: what is done with the arrays (`cpu`, `cuda`).

use std::ops::Range;

use crate::activation::Activation;
use crate::cpu;
use crate::device::{DeviceError, RefineShape};

/// `rows * cols`, saturating: a shape that overflows fits no buffer.
pub(crate) fn area(rows: usize, cols: usize) -> usize {
    rows.saturating_mul(cols)
}

/// Refuses an operand of `actual` elements that has to have `expected`.
pub(crate) fn length(operand: &'static str, actual: usize, expected: usize) -> Result<(), DeviceError> {
    match expected <= actual {
        true => Ok(()),
        false => Err(DeviceError::Length { operand, expected, actual }),
    }
}

/// Checks a stored matrix of `rows` by `cols` and returns the elements it spans.
pub(crate) fn span(
    operand: &'static str,
    len: usize,
    offset: usize,
    stride: usize,
    rows: usize,
    cols: usize,
) -> Result<Range<usize>, DeviceError> {
    if rows > 1 && stride < cols {
        return Err(DeviceError::Stride { operand, stride, columns: cols });
    }
    let end = match rows.checked_sub(1) {
        Some(before) => {
            before.checked_mul(stride).and_then(|n| n.checked_add(cols)).and_then(|n| n.checked_add(offset))
        }
        None => Some(offset),
    };
    let expected = end.unwrap_or(usize::MAX);
    length(operand, len, expected)?;
    Ok(offset..expected)
}

/// Refuses blocks outside the columns or longer than a kernel takes.
pub(crate) fn refine_block(shape: &RefineShape) -> Result<(), DeviceError> {
    let RefineShape { cols, ref block, .. } = *shape;
    if block.end > cols || block.start > block.end {
        let limit = cols.saturating_add(1);
        return Err(DeviceError::Index { operand: "refine block", index: block.end, limit });
    }
    if block.len() > cpu::REFINE_BLOCK {
        let (index, limit) = (block.len(), cpu::REFINE_BLOCK + 1);
        return Err(DeviceError::Index { operand: "refine block length", index, limit });
    }
    Ok(())
}

/// Refuses blocks outside of `n` columns or longer than [`cpu::PLANE_BLOCK`].
pub(crate) fn plane_block(n: usize, block: &Range<usize>) -> Result<(), DeviceError> {
    if block.end > n || block.start > block.end {
        let limit = n.saturating_add(1);
        return Err(DeviceError::Index { operand: "plane block", index: block.end, limit });
    }
    if block.len() > cpu::PLANE_BLOCK {
        let (index, limit) = (block.len(), cpu::PLANE_BLOCK + 1);
        return Err(DeviceError::Index { operand: "plane block length", index, limit });
    }
    Ok(())
}

/// Refuses activations or a bias that are neither shared nor one per row.
pub(crate) fn per_row(activations: &[Activation], bias: &[f32], rows: usize) -> Result<(), DeviceError> {
    let wrong = |operand, actual| Err(DeviceError::Length { operand, expected: rows, actual });
    if activations.len() != 1 && activations.len() != rows {
        return wrong("activations", activations.len());
    }
    if !bias.is_empty() && bias.len() != rows {
        return wrong("activation bias", bias.len());
    }
    Ok(())
}

/// Refuses a row index past the end of `limit` rows.
pub(crate) fn row(operand: &'static str, index: u32, limit: usize) -> Result<usize, DeviceError> {
    let index = index as usize;
    match index < limit {
        true => Ok(index),
        false => Err(DeviceError::Index { operand, index, limit }),
    }
}
