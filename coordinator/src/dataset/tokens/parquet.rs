//! Documents from one string column of a `.parquet` file.
//!
//! Only that column is read, row group by row group. Not here: nested columns (refused).

use std::fs::File;
use std::path::Path;

use parquet::basic::Type as Physical;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::SchemaDescriptor;

use super::tokenizer::DocumentTokenizer;
use super::windows::Windows;
use crate::dataset::DatasetError;

/// Rows decoded at once.
const ROWS: usize = 64;

/// Each row is a document; rows without a value are none.
pub(super) fn read(
    path: &Path,
    field: &str,
    tokenizer: &DocumentTokenizer,
    windows: &mut Windows,
) -> Result<(), DatasetError> {
    let wrong = |problem: String| DatasetError::Corrupt { path: path.into(), problem };
    let unreadable = |error: ParquetError| wrong(format!("is not a readable parquet file: {error}"));
    let file = File::open(path).map_err(|source| DatasetError::Io { path: path.into(), source })?;
    let reader = SerializedFileReader::new(file).map_err(unreadable)?;
    let column = column(reader.metadata().file_metadata().schema_descr(), field).map_err(wrong)?;
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group).map_err(unreadable)?;
        let ColumnReader::ByteArrayColumnReader(mut rows) =
            group.get_column_reader(column).map_err(unreadable)?
        else {
            return Err(wrong(format!("column `{field}` is not one of strings")));
        };
        while !windows.is_full() {
            let texts = next(&mut rows).map_err(unreadable)?;
            if texts.is_empty() {
                break;
            }
            for text in texts.into_iter().flatten() {
                let text = text.as_utf8().map_err(unreadable)?;
                windows.add(&tokenizer.ids(text)?).map_err(wrong)?;
            }
        }
    }
    Ok(())
}

/// Index of the string column `field`.
fn column(schema: &SchemaDescriptor, field: &str) -> Result<usize, String> {
    let index = schema.columns().iter().position(|column| column.path().parts() == [field]);
    let Some(index) = index else {
        let names: Vec<String> =
            schema.columns().iter().take(8).map(|column| format!("`{}`", column.path().string())).collect();
        return Err(format!("has no column `{field}`, it has {}", names.join(", ")));
    };
    let column = schema.column(index);
    match (column.physical_type(), column.max_rep_level()) {
        (Physical::BYTE_ARRAY, 0) => Ok(index),
        (kind, _) => Err(format!("column `{field}` is of {kind}, expected strings")),
    }
}

/// The next rows, a slot each; none at the end.
fn next(rows: &mut ColumnReaderImpl<ByteArrayType>) -> Result<Vec<Option<ByteArray>>, ParquetError> {
    let (mut present, mut values) = (Vec::new(), Vec::new());
    let (records, ..) = rows.read_records(ROWS, Some(&mut present), None, &mut values)?;
    let mut values = values.into_iter();
    // Level 0 is null; a column that cannot be null has no levels.
    let slots = (0..records).map(|row| match present.get(row) {
        Some(0) => None,
        _ => values.next(),
    });
    Ok(slots.collect())
}
