//! Everything this crate refuses, one variant per reason, with the numbers a reader needs.
//!
//! Not here: exit codes and hints; the binary derives those from [`QuantError::kind`].

use crate::{Granularity, Scheme};

/// Whose mistake an error is; lets a caller choose an exit code or a retry without reading text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The wanted grid does not exist: an option has to change.
    Configuration,
    /// Weights or statistics cannot be quantized as they are.
    Data,
    /// A file or encoded value is malformed, or a format cannot hold what was asked.
    Format,
}

/// An error of grids, encodings, packing or encodings files.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// A bit width outside the supported set.
    #[error("bit width is {bits}, expected 2 to 8 or 16")]
    Bits {
        /// The width asked for.
        bits: u8,
    },
    /// A group of no columns.
    #[error("group size is {group_size}, expected at least 1")]
    GroupSize {
        /// The size asked for.
        group_size: usize,
    },
    /// A percentile that is not above the median and at most 100.
    #[error("percentile is {percentile}, expected above 50 and at most 100")]
    Percentile {
        /// The percentile asked for.
        percentile: f32,
    },
    /// A name that is none of the known ones.
    #[error("{what} is `{text}`, expected {expected}")]
    Parse {
        /// What was being read.
        what: &'static str,
        /// The text found.
        text: String,
        /// The accepted forms.
        expected: &'static str,
    },
    /// A matrix without elements.
    #[error("weight matrix is {rows} x {cols}, expected at least one row and one column")]
    Empty {
        /// Rows given.
        rows: usize,
        /// Columns given.
        cols: usize,
    },
    /// Groups that do not fill the columns, in a format that knows only whole ones.
    #[error("group size {group_size} does not divide the {cols} columns, expected groups of one size")]
    Groups {
        /// Columns per group.
        group_size: usize,
        /// Columns given.
        cols: usize,
    },
    /// A matrix that does not fill whole words of a format.
    #[error("weight matrix is {rows} x {cols}, expected multiples of {multiple}")]
    Multiple {
        /// Rows given.
        rows: usize,
        /// Columns given.
        cols: usize,
        /// What both must be multiples of.
        multiple: usize,
    },
    /// A matrix whose element count does not fit the address space.
    #[error("weight matrix of {rows} x {cols} has more elements than memory can address")]
    TooLarge {
        /// Rows given.
        rows: usize,
        /// Columns given.
        cols: usize,
    },
    /// A slice of the wrong length.
    #[error("{what} has {actual} elements, expected {expected}")]
    Length {
        /// The slice's subject.
        what: &'static str,
        /// Elements needed.
        expected: usize,
        /// Elements given.
        actual: usize,
    },
    /// A weight that is NaN or infinite.
    #[error("weight at row {row}, column {col} is {value}, expected a finite number")]
    NonFinite {
        /// Row of the first bad weight.
        row: usize,
        /// Column of the first bad weight.
        col: usize,
        /// The weight.
        value: f32,
    },
    /// An importance that is negative, NaN or infinite.
    #[error("importance of column {col} is {value}, expected a finite number of at least 0")]
    Importance {
        /// The first bad column.
        col: usize,
        /// Its importance.
        value: f32,
    },
    /// A scale that is not a positive normal number.
    #[error("scale {index} is {value}, expected a positive normal number")]
    Scale {
        /// Position in `scale`.
        index: usize,
        /// The scale.
        value: f32,
    },
    /// A zero point outside the grid (or not 0 in a symmetric grid).
    #[error("zero point {index} is {value}, expected {min} to {max}")]
    ZeroPoint {
        /// Position in `zero_point`.
        index: usize,
        /// The zero point.
        value: i32,
        /// Smallest allowed.
        min: i32,
        /// Largest allowed.
        max: i32,
    },
    /// An integer outside its grid or field.
    #[error("integer {index} is {value}, expected {min} to {max}")]
    OutOfRange {
        /// Position of the integer.
        index: usize,
        /// The integer.
        value: i64,
        /// Smallest allowed.
        min: i64,
        /// Largest allowed.
        max: i64,
    },
    /// Parts that do not belong together.
    #[error("part {index} has {what} {actual}, expected {expected} as in part 0")]
    Parts {
        /// Position of the part that differs.
        index: usize,
        /// The property that differs.
        what: &'static str,
        /// The property in part 0.
        expected: String,
        /// The property in this part.
        actual: String,
    },
    /// A grid that a file format has no words for.
    #[error("encodings of `{name}` cannot be written as {format}: {reason}")]
    NotExpressible {
        /// The tensor.
        name: String,
        /// The format and version.
        format: String,
        /// Why not.
        reason: String,
    },
    /// A grid that blocks of a format do not hold.
    #[error("{block} blocks hold no grid of {bits} bits {scheme} {granularity}")]
    Block {
        /// The type of blocks.
        block: String,
        /// Bit width of the grid.
        bits: u8,
        /// Its scheme.
        scheme: Scheme,
        /// Its granularity.
        granularity: Granularity,
    },
    /// A number that half precision would round.
    #[error("{what} of block {block} is {value}, expected a number that half precision holds")]
    NotHalf {
        /// Scale or minimum.
        what: &'static str,
        /// Position of the block.
        block: usize,
        /// The number.
        value: f32,
    },
    /// A malformed encodings file.
    #[error("{subject} is {actual}, expected {expected}")]
    Malformed {
        /// Which entry or key.
        subject: String,
        /// What was expected there.
        expected: String,
        /// What was found.
        actual: String,
    },
}

impl QuantError {
    /// Whose mistake this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Bits { .. } | Self::GroupSize { .. } | Self::Percentile { .. } | Self::Parse { .. } => {
                ErrorKind::Configuration
            }
            Self::NotExpressible { .. }
            | Self::Malformed { .. }
            | Self::Groups { .. }
            | Self::Block { .. }
            | Self::NotHalf { .. }
            | Self::Multiple { .. } => ErrorKind::Format,
            _ => ErrorKind::Data,
        }
    }
}
