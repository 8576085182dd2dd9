//! Documents from `.txt` and `.jsonl`.
//!
//! Text is taken as it is: no character is changed, a line break of a `.txt` is part of it. Not here: `.parquet`.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::Value;

use super::tokenizer::DocumentTokenizer;
use super::windows::Windows;
use crate::dataset::DatasetError;

/// Longest document: its characters and their places are in memory several times while it is tokenised.
const DOCUMENT_BYTES_MAX: usize = 64 << 20;
/// Bytes of text taken to make a token: more than any language needs on average.
const BYTES_PER_TOKEN: usize = 8;
/// Tokens that a cut through the text may have changed.
const TOKENS_AT_CUT: usize = 64;

/// The whole file is one document; of a larger one than is asked for, the beginning.
pub(super) fn read_file(
    path: &Path,
    tokenizer: &DocumentTokenizer,
    windows: &mut Windows,
) -> Result<(), DatasetError> {
    let io = |source| DatasetError::Io { path: path.into(), source };
    let wrong = |problem: String| DatasetError::Corrupt { path: path.into(), problem };
    let limit = windows
        .tokens_max()
        .map_or(DOCUMENT_BYTES_MAX, |tokens| tokens.saturating_mul(BYTES_PER_TOKEN).min(DOCUMENT_BYTES_MAX));
    let file = File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(io)?;
    let is_cut = bytes.len() > limit;
    if is_cut && windows.tokens_max().is_none() {
        return Err(wrong(format!(
            "is larger than {DOCUMENT_BYTES_MAX} bytes, expected a limit by --samples"
        )));
    }
    let text = match std::str::from_utf8(&bytes) {
        Ok(text) => text,
        // The cut may lie within a character.
        Err(error) if is_cut && error.error_len().is_none() => {
            std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default()
        }
        Err(error) => return Err(wrong(format!("is not UTF-8 text at byte {}", error.valid_up_to()))),
    };
    let mut ids = tokenizer.ids(text)?;
    if is_cut {
        ids.truncate(ids.len().saturating_sub(TOKENS_AT_CUT));
        windows.end_early();
    }
    windows.add(&ids).map_err(wrong)
}

/// Each line is a JSON object whose `field` is a document; empty lines are none.
pub(super) fn read_lines(
    path: &Path,
    field: &str,
    tokenizer: &DocumentTokenizer,
    windows: &mut Windows,
) -> Result<(), DatasetError> {
    let io = |source| DatasetError::Io { path: path.into(), source };
    let wrong = |problem: String| DatasetError::Corrupt { path: path.into(), problem };
    let mut reader = BufReader::new(File::open(path).map_err(io)?);
    let mut line = Vec::new();
    for number in 1usize.. {
        line.clear();
        let read = reader.by_ref().take(DOCUMENT_BYTES_MAX as u64 + 1).read_until(b'\n', &mut line);
        if read.map_err(io)? == 0 || windows.is_full() {
            break;
        }
        if line.len() > DOCUMENT_BYTES_MAX {
            return Err(wrong(format!("line {number} is longer than {DOCUMENT_BYTES_MAX} bytes")));
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let document = document(&line, field).map_err(|problem| wrong(format!("line {number} {problem}")))?;
        windows.add(&tokenizer.ids(&document)?).map_err(wrong)?;
    }
    Ok(())
}

fn document(line: &[u8], field: &str) -> Result<String, String> {
    let value: Value = serde_json::from_slice(line).map_err(|error| format!("is not JSON: {error}"))?;
    let Value::Object(mut object) = value else { return Err("is not a JSON object".into()) };
    match object.remove(field) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(format!("has a `{field}` that is not a string")),
        None => {
            let names: Vec<String> = object.keys().take(8).map(|name| format!("`{name}`")).collect();
            let names = if names.is_empty() { "none".into() } else { names.join(", ") };
            Err(format!("has no field `{field}`, it has {names}"))
        }
    }
}
