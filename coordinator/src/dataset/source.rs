//! Opening a data set: which reader, concatenation, the checks every data set passes.
//!
//! Not here: the formats themselves (`npy`, `npz`, `images`).

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::inputs::{LABELS, match_inputs};
use super::{Array, DatasetError, ImageOptions, Labels, ModelInput, SampleSlice, images, npy, npz};

/// How data is read.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetOptions {
    /// Read this many samples at most, the first ones.
    pub samples: Option<usize>,
    /// Preparation of image files; arrays are taken as they are.
    pub images: ImageOptions,
}

/// Named arrays with one sample count.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// The arrays, in file order (or model input order after [`Dataset::for_inputs`]).
    pub arrays: Vec<Array>,
    files: Vec<PathBuf>,
    notes: Vec<String>,
}

impl Dataset {
    /// Opens `path`: `.npy`, `.npz`, `FILE.npz:KEY`, or a folder of arrays or of images, in name order.
    ///
    /// # Errors
    /// Any [`DatasetError`] about files: unreadable, corrupted, empty, non-finite, or of differing sample counts.
    pub fn open(path: &Path, options: &DatasetOptions) -> Result<Self, DatasetError> {
        options.images.validate()?;
        let (mut arrays, files) = read(path, options)?;
        if let Some(samples) = options.samples {
            arrays.iter_mut().for_each(|array| array.truncate(samples));
        }
        check(path, &arrays)?;
        Ok(Self::from_parts(arrays, files, Vec::new()))
    }

    /// Arrays that were checked elsewhere.
    pub(super) fn from_parts(arrays: Vec<Array>, files: Vec<PathBuf>, notes: Vec<String>) -> Self {
        Self { arrays, files, notes }
    }

    /// What was read and what of it is used, where that is a matter of choice: sentences for a person.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Number of samples.
    pub fn samples(&self) -> usize {
        self.arrays.first().map_or(0, Array::samples)
    }

    /// Bytes held in memory by all arrays.
    pub fn bytes_held(&self) -> usize {
        self.arrays.iter().map(Array::bytes_held).sum()
    }

    /// Files the data came from, in the order read; for a manifest.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Samples `range` of every array.
    ///
    /// # Errors
    /// `Range` if it does not lie within the data.
    pub fn slice(&self, range: Range<usize>) -> Result<Vec<SampleSlice>, DatasetError> {
        self.arrays.iter().map(|array| array.slice(range.clone())).collect()
    }

    /// Takes the labels (array `y`) out, if there are any.
    ///
    /// # Errors
    /// `Labels` if `y` is neither class ids nor a Boolean matrix.
    pub fn take_labels(&mut self) -> Result<Option<Labels>, DatasetError> {
        let index = self.arrays.iter().position(|array| array.name == LABELS);
        index.map(|index| Labels::from_array(self.arrays.remove(index))).transpose()
    }

    /// The data as the model wants it: arrays in input order, renamed, delivered in the inputs' dtypes.
    ///
    /// # Errors
    /// `Unmatched`, `Shape` or `DType`.
    pub fn for_inputs(self, inputs: &[ModelInput]) -> Result<Self, DatasetError> {
        Ok(Self { arrays: match_inputs(self.arrays, inputs)?, ..self })
    }
}

/// Where data lies: what has to travel when it is read on another machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFiles {
    /// The folder as given, or the folder of the one file.
    pub root: PathBuf,
    /// Whether a folder was given.
    pub is_folder: bool,
    /// Of `FILE.npz:KEY`.
    pub key: Option<String>,
    /// Inside the root, in the order read.
    pub files: Vec<PathBuf>,
}

impl DataFiles {
    /// Lists what `Dataset::open` would read at most; no file is opened.
    ///
    /// # Errors
    /// `Io` or `Folder` as `Dataset::open`.
    pub fn list(path: &Path, samples: Option<usize>) -> Result<Self, DatasetError> {
        let (file, key) = split_key(path).map_or((path.to_path_buf(), None), |(file, key)| (file, Some(key)));
        let kind = fs::metadata(&file).map_err(|source| DatasetError::Io { path: file.clone(), source })?;
        if !kind.is_dir() {
            let root = file.parent().map(Path::to_path_buf).unwrap_or_default();
            return Ok(Self { root, is_folder: false, key, files: vec![file] });
        }
        let mut files = list(&file)?;
        if files.iter().all(|file| images::EXTENSIONS.contains(&extension(file).as_str())) {
            files.truncate(samples.unwrap_or(usize::MAX));
        }
        Ok(Self { root: file, is_folder: true, key: None, files })
    }
}

type Read = (Vec<Array>, Vec<PathBuf>);

fn read(path: &Path, options: &DatasetOptions) -> Result<Read, DatasetError> {
    if let Some((file, key)) = split_key(path) {
        return Ok((npz::read(&file, Some(&key), options.samples)?, vec![file]));
    }
    let kind = fs::metadata(path).map_err(|source| DatasetError::Io { path: path.into(), source })?;
    if kind.is_dir() {
        return read_folder(path, options);
    }
    Ok((read_file(path, options)?, vec![path.into()]))
}

/// `FILE.npz:KEY`, unless a file of that very name exists.
pub(super) fn split_key(path: &Path) -> Option<(PathBuf, String)> {
    let (file, key) = path.to_str()?.rsplit_once(':')?;
    (!path.exists() && extension(Path::new(file)) == "npz").then(|| (file.into(), key.into()))
}

fn read_file(path: &Path, options: &DatasetOptions) -> Result<Vec<Array>, DatasetError> {
    match extension(path).as_str() {
        "npz" => npz::read(path, None, options.samples),
        "npy" => Ok(vec![npy::read(path, options.samples)?]),
        _ => Err(DatasetError::UnknownKind { path: path.into() }),
    }
}

fn read_folder(path: &Path, options: &DatasetOptions) -> Result<Read, DatasetError> {
    let mut files = list(path)?;
    let (arrays, pictures): (Vec<_>, Vec<_>) =
        files.drain(..).partition(|file| matches!(extension(file).as_str(), "npz" | "npy"));
    match (arrays.is_empty(), pictures.is_empty()) {
        (true, true) => Err(DatasetError::Folder {
            path: path.into(),
            problem: "has no .npy, .npz or image files".into(),
        }),
        (false, false) => Err(DatasetError::Folder {
            path: path.into(),
            problem: format!("mixes {} array files and {} images", arrays.len(), pictures.len()),
        }),
        (true, false) => read_images(pictures, options),
        (false, true) => concatenate(arrays, options),
    }
}

/// Array and image files of a folder by name; others and hidden ones are no data.
fn list(path: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    let io = |source| DatasetError::Io { path: path.into(), source };
    let mut files = Vec::new();
    for entry in fs::read_dir(path).map_err(io)? {
        let file = entry.map_err(io)?.path();
        let hidden = file.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        let kind = extension(&file);
        if !hidden && (matches!(kind.as_str(), "npz" | "npy") || images::EXTENSIONS.contains(&kind.as_str()))
        {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

fn read_images(mut files: Vec<PathBuf>, options: &DatasetOptions) -> Result<Read, DatasetError> {
    files.truncate(options.samples.unwrap_or(usize::MAX));
    Ok((vec![images::read(&files, &options.images)?], files))
}

/// A .npy file's array is named after the file; in a folder of parts all are the one array `x`.
fn concatenate(files: Vec<PathBuf>, options: &DatasetOptions) -> Result<Read, DatasetError> {
    let mut all: Vec<Array> = Vec::new();
    let mut used = Vec::new();
    for file in files {
        let have = all.first().map_or(0, Array::samples);
        let left = options.samples.map(|samples| samples.saturating_sub(have));
        if left == Some(0) {
            break;
        }
        let part = read_file(&file, &DatasetOptions { samples: left, images: options.images.clone() })?;
        if used.is_empty() {
            all = part;
        } else {
            append(&mut all, part, &file)?;
        }
        used.push(file);
    }
    Ok((all, used))
}

fn append(all: &mut [Array], part: Vec<Array>, file: &Path) -> Result<(), DatasetError> {
    let misfit = |array: &str, problem: String| DatasetError::Concatenation {
        path: file.into(),
        array: array.into(),
        problem,
    };
    if part.len() != all.len() {
        let problem = format!("{} arrays where the files before have {}", part.len(), all.len());
        return Err(misfit(&part.first().map_or(String::new(), |array| array.name.clone()), problem));
    }
    for next in part {
        let name = next.name.clone();
        let into = all.iter_mut().find(|array| array.name == name);
        let into = into.ok_or_else(|| misfit(&name, "is not in the files before".into()))?;
        into.append(next).map_err(|problem| misfit(&name, problem))?;
    }
    Ok(())
}

fn check(path: &Path, arrays: &[Array]) -> Result<(), DatasetError> {
    if arrays.is_empty() {
        return Err(DatasetError::Corrupt { path: path.into(), problem: "holds no arrays".into() });
    }
    for array in arrays {
        if array.shape.contains(&0) {
            let (array, shape) = (array.name.clone(), array.shape.clone());
            return Err(DatasetError::Empty { path: path.into(), array, shape });
        }
        array.check_finite()?;
    }
    if arrays.iter().any(|array| array.samples() != arrays[0].samples()) {
        let found = arrays.iter().map(|array| (array.name.clone(), array.samples())).collect();
        return Err(DatasetError::SampleCounts { path: path.into(), found });
    }
    Ok(())
}

pub(super) fn extension(path: &Path) -> String {
    path.extension().map(|end| end.to_string_lossy().to_lowercase()).unwrap_or_default()
}
