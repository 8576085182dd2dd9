//! The model's own tokenizer.
//!
//! A document gets the special tokens that the post-processor of `tokenizer.json` adds, as `tokenizer(text)` of
//! transformers does; truncation and padding that the file asks for are left out, as there. Not read, as there:
//! `add_bos_token` and `add_eos_token` of `tokenizer_config.json`.
//! Not here: cutting (`windows`).

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

use crate::dataset::DatasetError;

/// Larger files are no tokenizer.
const FILE_BYTES_MAX: u64 = 1 << 28;

/// Turns documents into ids.
pub(super) struct DocumentTokenizer {
    tokenizer: Tokenizer,
    path: PathBuf,
}

impl DocumentTokenizer {
    /// Opens a `tokenizer.json`.
    ///
    /// # Errors
    /// `Tokenizer` if none is named, or it cannot be read or understood.
    pub(super) fn open(path: Option<&Path>) -> Result<Self, DatasetError> {
        let none = || {
            wrong(
                Path::new("tokenizer.json"),
                "is missing, expected the model's, or another by --tokenizer, which text needs",
            )
        };
        let path = path.ok_or_else(none)?.to_path_buf();
        let json = read(&path)?;
        let tokenizer = guarded(|| {
            let mut tokenizer = Tokenizer::from_bytes(&json)?;
            tokenizer.with_padding(None);
            tokenizer.with_truncation(None)?;
            Ok(tokenizer)
        });
        let tokenizer =
            tokenizer.map_err(|e| wrong(&path, format!("is no tokenizer that can be used: {e}")))?;
        Ok(Self { tokenizer, path })
    }

    /// Ids of one document; none for an empty one, whatever the special tokens.
    ///
    /// # Errors
    /// `Tokenizer` with what it says.
    pub(super) fn ids(&self, document: &str) -> Result<Vec<i64>, DatasetError> {
        if document.is_empty() {
            return Ok(Vec::new());
        }
        let encoding = guarded(|| self.tokenizer.encode_fast(document, true));
        let encoding = encoding.map_err(|e| wrong(&self.path, format!("cannot tokenise a document: {e}")))?;
        Ok(encoding.get_ids().iter().copied().map(i64::from).collect())
    }
}

/// The library panics on some files that contradict themselves, such as a template with tokens that it does not list.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err("the file contradicts itself".into()))
}

fn read(path: &Path) -> Result<Vec<u8>, DatasetError> {
    let unreadable = |e: std::io::Error| wrong(path, format!("cannot be read: {e}"));
    let bytes = fs::metadata(path).map_err(unreadable)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(wrong(path, format!("has {bytes} bytes, expected at most {FILE_BYTES_MAX}")));
    }
    fs::read(path).map_err(unreadable)
}

fn wrong(path: &Path, problem: impl ToString) -> DatasetError {
    DatasetError::Tokenizer { path: path.into(), problem: problem.to_string() }
}
