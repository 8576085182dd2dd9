//! What can go wrong in a solve, and whose fault it is.
//!
//! Not here: retries (`work`), device failures' causes (`compute`).

use halfstep_compute::DeviceError;
use halfstep_quant::QuantError;

/// Whose fault a failed solve is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The caller's shapes do not fit together: a bug, not worth a retry.
    Caller,
    /// A setting is out of range.
    Settings,
    /// The data (weights, statistics, samples) cannot be used.
    Data,
    /// The device has no room; the same may succeed with less beside it, or on another node.
    Memory,
    /// The device failed; another node may succeed.
    Device,
}

/// A failed solve.
#[derive(Debug, thiserror::Error)]
pub enum SolveError {
    /// An array does not have the length its shape says.
    #[error("{what}: expected {expected} elements, actual {actual}")]
    Length {
        /// Which array.
        what: &'static str,
        /// Elements the shape needs (`usize::MAX` if that overflows).
        expected: usize,
        /// Elements given.
        actual: usize,
    },
    /// An entry is NaN or infinite.
    #[error("{what}: entry [{row}, {col}] is {value}, expected a finite number")]
    NonFinite {
        /// Which matrix.
        what: &'static str,
        /// Row of the first such entry (of the whole layer, for weights).
        row: usize,
        /// Its column.
        col: usize,
        /// The value.
        value: f32,
    },
    /// A diagonal entry of H is negative: not a mean of squares.
    #[error("{what}: diagonal entry {index} is {value}, expected >= 0")]
    NegativeDiagonal {
        /// Which matrix.
        what: &'static str,
        /// Which entry.
        index: usize,
        /// The value.
        value: f32,
    },
    /// Intermediate results overflow f32: the statistics or weights are absurdly large.
    #[error(
        "{what} of row {row} is {value}, expected a finite number: statistics or weights are too large for f32"
    )]
    Overflow {
        /// What overflowed.
        what: &'static str,
        /// Row of the whole layer.
        row: usize,
        /// The value.
        value: f64,
    },
    /// Statistics without a single sample.
    #[error("{what}: no samples, expected at least 1")]
    NoSamples {
        /// Which statistics.
        what: &'static str,
    },
    /// A setting is out of range.
    #[error("setting `{name}`: {value} is not allowed, expected {expected}")]
    Setting {
        /// Its name.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// An activation follows the layer but the Gram objective cannot see it.
    #[error("activation {activation}: the gram objective only knows identity; expected samples")]
    ActivationNeedsSamples {
        /// The activation.
        activation: String,
    },
    /// The statistics on the device are not the problem's.
    #[error("statistics: expected those that were prepared")]
    Unprepared,
    /// The encodings are not usable.
    #[error("encodings of rows from {first_row}: {source}")]
    Encodings {
        /// First row of the chunk in the layer.
        first_row: usize,
        /// What is wrong.
        source: QuantError,
    },
    /// The device failed.
    #[error("device: {0}")]
    Device(#[from] DeviceError),
}

impl SolveError {
    /// Whose fault it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Length { .. } | Self::ActivationNeedsSamples { .. } | Self::Unprepared => ErrorKind::Caller,
            Self::Setting { .. } => ErrorKind::Settings,
            Self::NonFinite { .. }
            | Self::NegativeDiagonal { .. }
            | Self::Overflow { .. }
            | Self::NoSamples { .. }
            | Self::Encodings { .. } => ErrorKind::Data,
            Self::Device(DeviceError::OutOfMemory { .. }) => ErrorKind::Memory,
            Self::Device(_) => ErrorKind::Device,
        }
    }
}
