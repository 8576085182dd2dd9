//! Which engine runs ONNX graphs, and on how many cores.

use std::path::Path;

use halfstep_agent::{Engine, OrtEngine, RtenEngine};

use crate::exit::CliError;

/// The embedded engine, or ONNX Runtime from the library named.
///
/// # Errors
/// Bad input if the library cannot be used.
pub(crate) fn open(onnxruntime: Option<&Path>) -> Result<Box<dyn Engine>, CliError> {
    match onnxruntime {
        None => Ok(Box::new(RtenEngine::default())),
        Some(path) => Ok(Box::new(OrtEngine::open(path).map_err(|error| {
            CliError::bad_input(error).hint("name the shared library itself, libonnxruntime.so.1.x")
        })?)),
    }
}

/// Cores this process may use.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
