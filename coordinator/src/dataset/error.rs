//! Everything that can be wrong with calibration or evaluation data.
//!
//! Every variant names the file or array, what is wrong, and expected and actual where both exist.
//! Not here: exit codes (the binary maps all of these to "bad input").

use std::path::PathBuf;

/// Why data could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// The file system refused.
    #[error("data `{}`: cannot be read: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Neither a known file kind nor a folder.
    #[error("data `{}`: unknown kind, expected .npz, .npy, or a folder of those or of images", path.display())]
    UnknownKind {
        /// The path as given.
        path: PathBuf,
    },
    /// No kind that text or token ids come in.
    #[error("data `{}`: unknown kind, expected .txt, .jsonl, .parquet, .npy, .npz or FILE.npz:ARRAY", path.display())]
    UnknownTokenKind {
        /// The path as given.
        path: PathBuf,
    },
    /// A tokenizer that is missing or cannot be used.
    #[error("tokenizer `{}`: {problem}", path.display())]
    Tokenizer {
        /// Its file.
        path: PathBuf,
        /// What is wrong, expected and actual.
        problem: String,
    },
    /// An .npz of several arrays where one is needed and none was named.
    #[error("data `{}`: expected one array, as FILE.npz:ARRAY, it has {}", path.display(), list(found))]
    WhichArray {
        /// The .npz file.
        path: PathBuf,
        /// The names it has.
        found: Vec<String>,
    },
    /// The file is not what its name says, or is damaged.
    #[error("data `{}`: {problem}", path.display())]
    Corrupt {
        /// The file, with `:KEY` for a member of an .npz.
        path: PathBuf,
        /// What is wrong, expected and actual.
        problem: String,
    },
    /// `FILE.npz:KEY` names an array the file does not have.
    #[error("data `{}`: no array `{key}`, it has {}", path.display(), list(found))]
    NoSuchArray {
        /// The .npz file.
        path: PathBuf,
        /// The name asked for.
        key: String,
        /// The names it has.
        found: Vec<String>,
    },
    /// A folder mixes images and arrays, or has neither.
    #[error("data `{}`: {problem}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// No samples at all.
    #[error("data `{}`: array `{array}` holds no samples, its shape is {shape:?}", path.display())]
    Empty {
        /// The file or folder.
        path: PathBuf,
        /// The array.
        array: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Arrays of one data set must have one sample count.
    #[error("data `{}`: arrays differ in sample count: {}", path.display(), counts(found))]
    SampleCounts {
        /// The file or folder.
        path: PathBuf,
        /// Name and first dimension of each array.
        found: Vec<(String, usize)>,
    },
    /// Files of a folder do not fit together.
    #[error("data `{}`: array `{array}`: {problem}", path.display())]
    Concatenation {
        /// The file that does not fit those before it.
        path: PathBuf,
        /// The array.
        array: String,
        /// Expected and actual.
        problem: String,
    },
    /// A NaN or infinity.
    #[error("array `{array}`: element {index:?} is {value}, expected finite numbers")]
    NonFinite {
        /// The array.
        array: String,
        /// Position of the first such element, sample first.
        index: Vec<usize>,
        /// NaN, inf or -inf.
        value: f64,
    },
    /// No way to say which array feeds which model input.
    #[error("model inputs {} have no array of that name: the data has {}", list(missing), list(arrays))]
    Unmatched {
        /// Inputs without data.
        missing: Vec<String>,
        /// Names the data has.
        arrays: Vec<String>,
    },
    /// An array cannot feed an input exactly.
    #[error(
        "array `{array}` is {actual}, model input `{input}` needs {expected}: only exact conversions are made"
    )]
    DType {
        /// The array.
        array: String,
        /// Its dtype.
        actual: super::DType,
        /// The model input.
        input: String,
        /// Its dtype.
        expected: super::DType,
    },
    /// An array's dimensions are not those of the input.
    #[error("array `{array}` has shape {actual:?}, model input `{input}` needs {expected}")]
    Shape {
        /// The array.
        array: String,
        /// Its shape.
        actual: Vec<usize>,
        /// The model input.
        input: String,
        /// Its dimensions as text, `?` for a free one.
        expected: String,
    },
    /// Labels that are neither class ids nor a Boolean matrix.
    #[error("labels `{array}`: {problem}")]
    Labels {
        /// The array.
        array: String,
        /// Expected and actual.
        problem: String,
    },
    /// A slice past the end.
    #[error("samples {start}..{end} asked for, the data has {samples}")]
    Range {
        /// First sample.
        start: usize,
        /// One past the last.
        end: usize,
        /// Samples there are.
        samples: usize,
    },
    /// Image preparation that makes no sense.
    #[error("image option {option}: {problem}")]
    ImageOption {
        /// The option, as on the command line.
        option: &'static str,
        /// Expected and actual.
        problem: String,
    },
    /// The data does not fit the machine.
    #[error("array `{array}`: {bytes} bytes do not fit in memory")]
    OutOfMemory {
        /// The array.
        array: String,
        /// Bytes asked for.
        bytes: usize,
    },
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        return "none".into();
    }
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

fn counts(found: &[(String, usize)]) -> String {
    found.iter().map(|(name, samples)| format!("`{name}` has {samples}")).collect::<Vec<_>>().join(", ")
}
