//! What is quantized, an ONNX network or a language model: defaults that were measured on each, options that only one has.
//!
//! Not here: the other defaults (`config`), telling an unusable model from a good one (`coordinator`).

use std::path::Path;

use halfstep_agent::is_checkpoint;

use crate::exit::CliError;
use crate::options::JobOptions;

/// The kind of model a job is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    /// A file in ONNX.
    Network,
    /// A folder of a Hugging Face checkpoint.
    Language,
}

/// Defaults that depend on the subject; `docs/results.md` has the tables they were chosen from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Measured {
    pub(crate) iterations: u32,
    pub(crate) damping: f32,
    pub(crate) scale_fits: u32,
}

impl Subject {
    /// By what lies at `model`; whatever is no checkpoint will be read as ONNX.
    pub(crate) fn at(model: &Path) -> Self {
        if is_checkpoint(model) { Self::Language } else { Self::Network }
    }

    pub(crate) const fn defaults(self) -> Measured {
        match self {
            Self::Network => Measured { iterations: 300, damping: 0.01, scale_fits: 2 },
            Self::Language => Measured { iterations: 0, damping: 0.03, scale_fits: 4 },
        }
    }

    /// Refuses options that would have no effect.
    ///
    /// # Errors
    /// Bad configuration naming the first such option.
    pub(crate) fn check_options(self, options: &JobOptions) -> Result<(), CliError> {
        let given = match self {
            Self::Network => only_language(options),
            Self::Language => only_network(options),
        };
        let Some((name, _)) = given.into_iter().find(|(_, given)| *given) else { return Ok(()) };
        let (this, other) = match self {
            Self::Network => {
                ("an ONNX network", "language models (folders with config.json and safetensors)")
            }
            Self::Language => ("a language model", "ONNX networks"),
        };
        Err(CliError::configuration(format!("{name} is given but the model is {this}"))
            .hint(format!("{name} is for {other}; drop it")))
    }
}

fn only_language(options: &JobOptions) -> Vec<(&'static str, bool)> {
    vec![
        ("format", options.format.is_some()),
        ("sequence-length", options.sequence_length.is_some()),
        ("text-field", options.text_field.is_some()),
        ("tokenizer", options.tokenizer.is_some()),
        ("calibrate-all-experts", options.calibrate_all_experts),
        ("carries", options.carries.is_some()),
        ("file-size", options.file_size.is_some()),
    ]
}

/// `onnxruntime` is not among them: it is often set for all jobs, in the environment.
fn only_network(options: &JobOptions) -> Vec<(&'static str, bool)> {
    let data = &options.data;
    vec![
        ("encodings", !options.encodings.is_empty()),
        ("no-fold-batch-norm", options.no_fold_batch_norm),
        ("resize", data.resize.is_some()),
        ("crop", data.crop.is_some()),
        ("scale", data.scale.is_some()),
        ("mean", !data.mean.is_empty()),
        ("std", !data.std.is_empty()),
        ("layout", data.layout.is_some()),
        ("channels", data.channels.is_some()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{EncodingsVersion, OutputFormat};

    #[test]
    fn options_of_the_other_kind_are_refused_by_name() {
        let language = JobOptions { format: Some(OutputFormat::Gptq), ..JobOptions::default() };
        let error = Subject::Network.check_options(&language).unwrap_err().to_string();
        assert!(error.contains("format") && error.contains("ONNX network"), "{error}");
        Subject::Language.check_options(&language).unwrap();

        let network = JobOptions { encodings: vec![EncodingsVersion::V1_0_0], ..JobOptions::default() };
        let error = Subject::Language.check_options(&network).unwrap_err().to_string();
        assert!(error.contains("encodings") && error.contains("language model"), "{error}");
        Subject::Network.check_options(&network).unwrap();
    }

    #[test]
    fn what_is_no_checkpoint_is_a_network() {
        assert_eq!(Subject::at(Path::new("no/such/model.onnx")), Subject::Network);
    }
}
