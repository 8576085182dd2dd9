//! Token ids that were made elsewhere: `.npy` and `.npz` of integers, `[N, T]` or `[T]`.
//!
//! A row may end in -1, which is no token. Not here: the array formats (`npy`, `npz`).

use std::path::{Path, PathBuf};

use super::windows::Windows;
use super::{INPUT_IDS, TokenOptions};
use crate::dataset::{Array, DType, DatasetError, npy, npz};

/// Every row is a document; rows stay whole unless a sequence length is given.
pub(super) fn read(
    path: &Path,
    key: Option<&str>,
    options: &TokenOptions,
    windows: &mut Windows,
) -> Result<(), DatasetError> {
    let array = array(path, key)?;
    let place = key.map_or(path.to_path_buf(), |key| PathBuf::from(format!("{}:{key}", path.display())));
    let wrong = |problem: String| DatasetError::Corrupt { path: place.clone(), problem };
    if !matches!(array.dtype, DType::I64 | DType::I32 | DType::U8 | DType::I8) {
        return Err(wrong(format!("is of {}, expected token ids, integers", array.dtype)));
    }
    let (rows, width) = match array.shape[..] {
        [width] => (1, width),
        [rows, width] => (rows, width),
        _ => return Err(wrong(format!("has shape {:?}, expected [N, T] or [T]", array.shape))),
    };
    let whole = if array.shape.len() == 1 { options.window() } else { width };
    let length = options.sequence_length.unwrap_or(whole).min(width.max(1));
    windows.of_all(length);
    let per_slice = array.samples() / rows.max(1);
    let array = array.deliver_as(INPUT_IDS, DType::I64)?;
    for row in 0..rows {
        let slice = array.slice(row * per_slice..(row + 1) * per_slice)?;
        let ids: Vec<i64> = slice.bytes.as_chunks().0.iter().map(|id| i64::from_le_bytes(*id)).collect();
        let tokens = ids.iter().rposition(|id| *id != -1).map_or(0, |last| last + 1);
        if let Some(positions) = options.positions.filter(|positions| tokens.min(length) > *positions) {
            return Err(wrong(format!(
                "row {row} has {tokens} ids, expected at most the {positions} positions of the model; a sequence length of \
                 {positions} cuts rows"
            )));
        }
        windows.add(&ids[..tokens]).map_err(wrong)?;
    }
    Ok(())
}

fn array(path: &Path, key: Option<&str>) -> Result<Array, DatasetError> {
    if path.extension().is_some_and(|end| end.eq_ignore_ascii_case("npy")) {
        return npy::read(path, None);
    }
    if key.is_none() {
        let names = npz::names(path)?;
        if names.len() != 1 {
            return Err(DatasetError::WhichArray { path: path.into(), found: names });
        }
    }
    let none = || DatasetError::WhichArray { path: path.into(), found: Vec::new() };
    npz::read(path, key, None)?.pop().ok_or_else(none)
}
