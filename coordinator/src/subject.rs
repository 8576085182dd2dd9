//! What is quantized, as planning and fetching see it: an ONNX network, or a language model's checkpoint.
//!
//! A checkpoint stays a map of its files: what a node asks for is read then. Not here: reading either (`model`).

use crate::checkpoint::scale_type;
use crate::dataset::{DType, ModelInput};
use crate::source::transit;
use crate::{CoordinatorError, LanguageConfig};
use bytes::Bytes;
use halfstep_model::checkpoint::Checkpoint;
use halfstep_model::decoder::{CarryPrecision, Decoder, DecoderProgram, DescribeOptions, describe};
use halfstep_model::{Cut, Dim, Dtype, Layer, Model, Unsupported, cut, list_layers, skeleton};
use halfstep_work::{FailureClass, InputTensor, ScalarKind, SourceError};
use std::path::Path;

/// See the module.
pub enum Subject {
    /// Normalised, batch norms folded.
    Onnx(Box<Model>),
    /// A decoder-only language model.
    Language(Box<LanguageModel>),
}

/// A checkpoint and what is run of it.
pub struct LanguageModel {
    /// The files.
    pub checkpoint: Checkpoint,
    /// What nodes are told.
    pub program: DecoderProgram,
    program_bytes: Bytes,
}

impl LanguageModel {
    /// Reads the configuration and checks that the weights it speaks of are there.
    ///
    /// # Errors
    /// `Model` or `BadInput` for a folder that is not such a checkpoint, `Configuration` for a model that is quantized
    /// already.
    pub fn open(folder: &Path, config: &LanguageConfig) -> Result<Self, CoordinatorError> {
        let checkpoint = Checkpoint::open(folder)?;
        let options = DescribeOptions { calibrate_all_experts: config.all_experts };
        let shape = |name: &str| checkpoint.info(name).map(|info| info.shape.clone());
        let decoder = describe(checkpoint.config(), options)
            .and_then(|decoder| decoder.bind(shape))
            .map_err(|e| CoordinatorError::BadInput(format!("{}: {e}", folder.display())))?;
        check_constants(&checkpoint, &decoder)?;
        let scales = scale_type(&checkpoint, config.format);
        // A model that is stored in bfloat16 is run in it.
        let factors = match checkpoint.dtype() {
            Dtype::Bf16 => config.carries,
            _ => CarryPrecision::F32,
        };
        let program = DecoderProgram { decoder, carries: config.carries, factors, scales };
        let program_bytes = program.to_bytes().map_err(|e| CoordinatorError::BadInput(e.to_string()))?;
        Ok(Self { checkpoint, program, program_bytes })
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.program.decoder
    }
}

/// Whether no number of a float tensor has the exponent of infinities and NaN.
fn is_finite(kind: ScalarKind, bytes: &[u8]) -> bool {
    let half = |mask: u16| bytes.as_chunks::<2>().0.iter().all(|b| u16::from_le_bytes(*b) & mask != mask);
    match kind {
        ScalarKind::F16 => half(0x7c00),
        ScalarKind::Bf16 => half(0x7f80),
        _ => bytes.as_chunks::<4>().0.iter().all(|b| u32::from_le_bytes(*b) & 0x7f80_0000 != 0x7f80_0000),
    }
}

fn check_constants(checkpoint: &Checkpoint, decoder: &Decoder) -> Result<(), CoordinatorError> {
    let expected: Vec<_> = decoder.nodes.iter().flat_map(|node| node.op.constants(decoder)).collect();
    Ok(checkpoint.check(&expected)?)
}

impl Subject {
    /// What nodes are told of it.
    pub fn program(&self) -> Bytes {
        match self {
            Self::Onnx(model) => skeleton(model),
            Self::Language(model) => model.program_bytes.clone(),
        }
    }

    /// One constant, as it is stored.
    ///
    /// # Errors
    /// `BadInput` if there is none of that name or its elements cannot be used.
    pub fn constant(&self, name: &str) -> Result<InputTensor, SourceError> {
        let bad = |e: halfstep_model::ModelError| SourceError::new(FailureClass::BadInput, e);
        match self {
            Self::Onnx(model) => Ok(transit(name, &model.tensor(name).map_err(bad)?)),
            Self::Language(model) => {
                let (dtype, shape, bytes) = model.checkpoint.stored(name).map_err(bad)?;
                let kind = match dtype {
                    Dtype::F32 => ScalarKind::F32,
                    Dtype::F16 => ScalarKind::F16,
                    Dtype::Bf16 => ScalarKind::Bf16,
                    // Doubles become floats here: nobody computes with them.
                    _ => return Ok(transit(name, &model.checkpoint.tensor(name).map_err(bad)?)),
                };
                if !is_finite(kind, &bytes) {
                    // Says which element of which file it is.
                    return Ok(transit(name, &model.checkpoint.tensor(name).map_err(bad)?));
                }
                Ok(InputTensor { name: name.to_owned(), kind, shape, bytes })
            }
        }
    }

    /// Its layers, and what is none and why.
    ///
    /// # Errors
    /// `Model` for a weight whose shape cannot be.
    pub fn layers(&self) -> Result<(Vec<Layer>, Vec<Unsupported>), CoordinatorError> {
        match self {
            Self::Onnx(model) => Ok(list_layers(model)?),
            Self::Language(model) => Ok(model.decoder().layers()),
        }
    }

    /// Its segments, all `layers` quantized.
    ///
    /// # Errors
    /// `Model` if a layer does not fit.
    pub fn cut(&self, layers: &[Layer]) -> Result<Cut, CoordinatorError> {
        let all = vec![true; layers.len()];
        match self {
            Self::Onnx(model) => Ok(cut(model.as_ref(), layers, &all)?),
            Self::Language(model) => Ok(cut(model.decoder(), layers, &all)?),
        }
    }

    /// The ONNX network, if it is one.
    pub fn onnx(&self) -> Option<&Model> {
        match self {
            Self::Onnx(model) => Some(model),
            Self::Language(_) => None,
        }
    }
}

/// What a model asks of data, in the data set's words.
///
/// # Errors
/// `BadInput` for an input type that no data set has.
pub fn model_inputs(model: &Model) -> Result<Vec<ModelInput>, CoordinatorError> {
    model
        .inputs()
        .into_iter()
        .filter(|input| !model.has_initializer(&input.name))
        .map(|input| {
            let dtype = match input.dtype {
                Dtype::F32 => DType::F32,
                Dtype::F64 => DType::F64,
                Dtype::I64 => DType::I64,
                Dtype::I32 => DType::I32,
                Dtype::I8 => DType::I8,
                Dtype::U8 => DType::U8,
                Dtype::Bool => DType::Bool,
                other => {
                    return Err(CoordinatorError::BadInput(format!(
                        "model input `{}`: type {other:?} is not supported, expected float32 or an integer type",
                        input.name
                    )));
                }
            };
            let size = |dim: Dim| if let Dim::Known(size) = dim { Some(size) } else { None };
            Ok(ModelInput { name: input.name, dtype, dims: input.dims.into_iter().map(size).collect() })
        })
        .collect()
}
