//! `.npz`: a zip of `.npy` files, one per array.
//!
//! Sizes in the directory are claims, the compressed ones too: a member cannot be larger than its file, and deflate
//! cannot expand more than 1032 times, so a claim beyond that is refused before memory is reserved.
//! Not here: the arrays' own format (`npy`).

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use zip::ZipArchive;

use super::{Array, DatasetError, npy};

/// Deflate's greatest expansion (zlib manual, "maximum compression factor").
const EXPANSION_MAX: u64 = 1032;

/// Reads all arrays of a file in the order stored, or the one named `key`.
pub(super) fn read(
    path: &Path,
    key: Option<&str>,
    samples: Option<usize>,
) -> Result<Vec<Array>, DatasetError> {
    let (mut zip, file_bytes) = open(path)?;
    let wanted = select(path, &members(&zip), key)?;
    wanted.iter().map(|member| read_member(&mut zip, member, path, file_bytes, samples)).collect()
}

/// Names of the arrays of a file.
pub(super) fn names(path: &Path) -> Result<Vec<String>, DatasetError> {
    let (zip, _) = open(path)?;
    Ok(members(&zip).iter().map(|member| array_name(member).to_string()).collect())
}

fn open(path: &Path) -> Result<(ZipArchive<BufReader<File>>, u64), DatasetError> {
    let io = |source| DatasetError::Io { path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    let file_bytes = file.metadata().map_err(io)?.len();
    let corrupt = |problem: String| DatasetError::Corrupt { path: path.into(), problem };
    let zip = ZipArchive::new(BufReader::new(file))
        .map_err(|e| corrupt(format!("is not a readable .npz (zip) file: {e}")))?;
    Ok((zip, file_bytes))
}

fn members(zip: &ZipArchive<BufReader<File>>) -> Vec<String> {
    let names = (0..zip.len()).filter_map(|index| zip.name_for_index(index).map(str::to_string));
    names.filter(|name| name.ends_with(".npy")).collect()
}

fn select(path: &Path, members: &[String], key: Option<&str>) -> Result<Vec<String>, DatasetError> {
    let Some(key) = key else { return Ok(members.to_vec()) };
    match members.iter().find(|member| array_name(member) == key) {
        Some(member) => Ok(vec![member.clone()]),
        None => {
            let found = members.iter().map(|member| array_name(member).to_string()).collect();
            Err(DatasetError::NoSuchArray { path: path.into(), key: key.into(), found })
        }
    }
}

fn array_name(member: &str) -> &str {
    member.strip_suffix(".npy").unwrap_or(member)
}

fn read_member(
    zip: &mut ZipArchive<BufReader<File>>,
    member: &str,
    path: &Path,
    file_bytes: u64,
    samples: Option<usize>,
) -> Result<Array, DatasetError> {
    let name = array_name(member);
    let place = format!("{}:{name}", path.display());
    let corrupt = |problem: String| DatasetError::Corrupt { path: place.clone().into(), problem };
    let entry = zip.by_name(member).map_err(|e| corrupt(format!("cannot be opened: {e}")))?;
    let stored = entry.compressed_size().min(file_bytes);
    let size_max = entry.size().min(stored.saturating_mul(EXPANSION_MAX));
    npy::read_from(entry, size_max, name, Path::new(&place), samples)
}
