//! Token ids for language models: from text, cut into windows, or from arrays of ids.
//!
//! In: `.txt` (the file is one document), `.jsonl` or `.parquet` (a document per row, in one string field), `.npy` or
//! `.npz` (ids). Out: a [`Dataset`] of one array `input_ids` i64 `[N, T]`, -1 behind the end of a shorter window.
//! Method: each document is tokenised on its own with the special tokens its tokenizer adds, and cut into windows that
//! never cross documents; of these as many as asked for are chosen, evenly over what was read.
//! Not here: what a -1 means to a network (`halfstep_model::decoder`), chat templates.

mod choice;
mod parquet;
mod stored;
#[cfg(test)]
mod tests;
mod text;
mod tokenizer;
mod windows;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::source::{extension, split_key};
use super::{Array, DType, Dataset, DatasetError};
use tokenizer::DocumentTokenizer;
use windows::Windows;

/// Name of the array, and of the input of every decoder.
const INPUT_IDS: &str = "input_ids";
/// Tokens of a window where none are given.
pub const SEQUENCE_LENGTH: usize = 512;
/// Longer windows are a typing mistake.
const SEQUENCE_LENGTH_MAX: usize = 1 << 20;
/// Windows read per sample asked for: reading a large file ends there.
pub const WINDOWS_PER_SAMPLE: usize = 4;

/// How token ids are made and which of them are used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenOptions {
    /// The model's `tokenizer.json`; text cannot be read without it, arrays of ids do not need it.
    pub tokenizer: Option<PathBuf>,
    /// Rows of the model's embedding: ids are below it.
    pub vocabulary: usize,
    /// Longest window the model can be given; any if absent.
    #[serde(default)]
    pub positions: Option<usize>,
    /// Tokens of a window, [`SEQUENCE_LENGTH`] (or what the model can be given, if that is less) if absent; rows of stored ids stay
    /// whole if absent.
    pub sequence_length: Option<usize>,
    /// Windows to choose, all if absent.
    pub samples: Option<usize>,
    /// Of the choice.
    pub seed: u64,
    /// Field of `.jsonl` and column of `.parquet` that holds the text.
    pub field: String,
}

/// Opens `path` (`.txt`, `.jsonl`, `.parquet`, `.npy`, `.npz` or `FILE.npz:KEY`) as windows of token ids.
///
/// A document is cut every `sequence_length` tokens; what is left at its end is used if it has at least 64 tokens or is
/// all there is. With `samples`, reading text ends after [`WINDOWS_PER_SAMPLE`] times as many windows, and the windows
/// used are one, by `seed`, from each of `samples` equal stretches of those read. [`Dataset::notes`] has the counts.
///
/// # Errors
/// `Corrupt` for a file that is not what its name says, ids outside the vocabulary, or no tokens at all;
/// `Tokenizer` for a missing or unreadable one; `Io`, `NoSuchArray`, `OutOfMemory`.
pub fn open(path: &Path, options: &TokenOptions) -> Result<Dataset, DatasetError> {
    let wrong = |problem: String| DatasetError::Corrupt { path: path.into(), problem };
    check(options).map_err(wrong)?;
    let (file, key) = split_key(path).map_or((path.to_path_buf(), None), |(file, key)| (file, Some(key)));
    let mut windows = Windows::new(options);
    match extension(&file).as_str() {
        "npy" | "npz" => stored::read(&file, key.as_deref(), options, &mut windows)?,
        kind @ ("txt" | "jsonl" | "parquet") => {
            let tokenizer = DocumentTokenizer::open(options.tokenizer.as_deref())?;
            match kind {
                "txt" => text::read_file(&file, &tokenizer, &mut windows)?,
                "jsonl" => text::read_lines(&file, &options.field, &tokenizer, &mut windows)?,
                _ => parquet::read(&file, &options.field, &tokenizer, &mut windows)?,
            }
        }
        _ => return Err(DatasetError::UnknownTokenKind { path: path.into() }),
    }
    if windows.count() == 0 {
        return Err(wrong(format!("has no tokens; documents: {}", windows.documents())));
    }
    let chosen = choice::choose(windows.count(), options.samples.unwrap_or(usize::MAX), options.seed);
    let (shape, bytes) = windows.take(&chosen);
    let array = Array::new(INPUT_IDS, shape, DType::I32, bytes)?.deliver_as(INPUT_IDS, DType::I64)?;
    Ok(Dataset::from_parts(vec![array], vec![file], windows.notes(options.samples, &chosen)))
}

/// Whether a path is text that needs a tokenizer.
pub fn is_text(path: &Path) -> bool {
    matches!(extension(path).as_str(), "txt" | "jsonl" | "parquet")
}

impl TokenOptions {
    /// Tokens of a window of text.
    fn window(&self) -> usize {
        let most = self.positions.unwrap_or(usize::MAX);
        self.sequence_length.unwrap_or(SEQUENCE_LENGTH.min(most))
    }
}

/// The file that somebody means who names a tokenizer by its file or its folder.
pub fn tokenizer_file(named: &Path) -> PathBuf {
    if named.is_dir() { named.join("tokenizer.json") } else { named.to_path_buf() }
}

/// Whether a file can be used as a tokenizer, before anything else is done.
///
/// # Errors
/// `Tokenizer` if it cannot.
pub fn check_tokenizer(file: &Path) -> Result<(), DatasetError> {
    DocumentTokenizer::open(Some(file)).map(drop)
}

fn check(options: &TokenOptions) -> Result<(), String> {
    if let Some(length) = options.sequence_length
        && !(2..=SEQUENCE_LENGTH_MAX).contains(&length)
    {
        return Err(format!("sequence length is {length}, expected 2 to {SEQUENCE_LENGTH_MAX}"));
    }
    if let (Some(length), Some(positions)) = (options.sequence_length, options.positions)
        && length > positions
    {
        return Err(format!(
            "sequence length is {length}, expected at most the {positions} positions of the model"
        ));
    }
    if options.samples == Some(0) {
        return Err("0 samples asked for, expected at least 1".into());
    }
    if options.vocabulary == 0 || i32::try_from(options.vocabulary).is_err() {
        return Err(format!("vocabulary of {} tokens, expected 1 to {}", options.vocabulary, i32::MAX));
    }
    Ok(())
}
