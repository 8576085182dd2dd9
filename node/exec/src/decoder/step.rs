//! One operator with its weights at hand.
//!
//! Not here: running it (`operators`).

use super::check::{describe, wrong};
use crate::ExecError;
use halfstep_compute::Activation;
use halfstep_model::decoder::{Attend, Decoder, DecoderNode, Gating, NormKind, Op, Rotary, Route, Select};
use halfstep_model::{Data, Tensor};
use std::collections::HashMap;
use std::sync::Arc;

/// Numbers that several operators may share.
pub(super) type Weights = Arc<Vec<f32>>;

/// An operator ready to run.
#[derive(Debug)]
pub(super) struct Step {
    /// The node's name.
    pub(super) name: String,
    pub(super) op: Ready,
    /// Slots it reads.
    pub(super) reads: Vec<usize>,
    /// Slots it writes.
    pub(super) writes: Vec<usize>,
}

/// [`Op`] with weights.
#[derive(Debug)]
pub(super) enum Ready {
    Embed { weight: Weights, scale: f32, positions: Option<Learned>, width: usize },
    Rms { weight: Weights, epsilon: f32 },
    Layer { weight: Weights, bias: Weights, epsilon: f32 },
    Linear { weight: Weights, bias: Option<Weights>, rows: usize, cols: usize, transposed: bool },
    Attend { attend: Attend, rotation: usize },
    Gate(Activation),
    Activate(Activation),
    Add,
    Softcap(f32),
    Route(Route),
    Select(Select),
    Combine { all_tokens: bool },
}

/// Learned positions.
#[derive(Debug)]
pub(super) struct Learned {
    pub(super) weight: Weights,
    pub(super) offset: usize,
    /// Positions there are.
    pub(super) count: usize,
}

/// Where weights come from, each read once.
pub(super) struct Loader<'a> {
    pub(super) decoder: &'a Decoder,
    pub(super) constants: &'a mut dyn FnMut(&str) -> Result<Tensor, ExecError>,
    pub(super) held: HashMap<String, Weights>,
    /// Different rotations of the segment.
    pub(super) rotations: Vec<Rotary>,
}

impl Loader<'_> {
    /// The operator of a node.
    pub(super) fn ready(&mut self, node: &DecoderNode) -> Result<Ready, ExecError> {
        let mut weights = Vec::new();
        for (name, shape) in node.op.constants(self.decoder) {
            weights.push(self.weights(name, &shape)?);
        }
        // In the order of `Op::constants`.
        let mut weights = weights.into_iter();
        let mut next =
            || weights.next().ok_or_else(|| ExecError::Internal("decoder: a constant too few".into()));
        Ok(match &node.op {
            Op::Embed(embed) => Ready::Embed {
                weight: next()?,
                scale: embed.scale,
                positions: match &embed.positions {
                    Some(p) => {
                        Some(Learned { weight: next()?, offset: p.offset, count: self.decoder.positions })
                    }
                    None => None,
                },
                width: self.decoder.hidden,
            },
            Op::Norm(norm) => {
                let (weight, epsilon) = (next()?, norm.epsilon);
                let bias = norm.bias.as_ref().map(|_| next()).transpose()?;
                match norm.kind {
                    NormKind::Rms => Ready::Rms { weight, epsilon },
                    NormKind::RmsUnitOffset => {
                        Ready::Rms { weight: Arc::new(weight.iter().map(|w| 1.0 + w).collect()), epsilon }
                    }
                    NormKind::Layer => {
                        let bias = bias.unwrap_or_else(|| Arc::new(vec![0.0; weight.len()]));
                        Ready::Layer { weight, bias, epsilon }
                    }
                }
            }
            Op::Linear(linear) => Ready::Linear {
                weight: next()?,
                bias: linear.bias.as_ref().map(|_| next()).transpose()?,
                rows: linear.rows,
                cols: linear.cols,
                transposed: linear.transposed,
            },
            Op::Attend(attend) => Ready::Attend { rotation: self.rotation(attend), attend: attend.clone() },
            Op::Gate(f) => Ready::Gate(activation(*f)),
            Op::Activate(f) => Ready::Activate(activation(*f)),
            Op::Add => Ready::Add,
            Op::Softcap { cap } => Ready::Softcap(*cap),
            Op::Route(route) => Ready::Route(route.clone()),
            Op::Select(select) => Ready::Select(select.clone()),
            Op::Combine { all_tokens } => Ready::Combine { all_tokens: *all_tokens },
        })
    }

    /// A constant, checked; the same for every operator that names it.
    fn weights(&mut self, name: &str, shape: &[usize]) -> Result<Weights, ExecError> {
        let elements = shape.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
        if let Some(held) = self.held.get(name) {
            return match elements {
                Some(n) if n == held.len() => Ok(Arc::clone(held)),
                _ => Err(wrong(name, format!("{shape:?}"), format!("{} elements", held.len()))),
            };
        }
        let tensor = (self.constants)(name)?;
        let actual = describe(&tensor);
        let fits = tensor.shape == shape && Some(tensor.len()) == elements;
        let values = match tensor.data {
            Data::F32(values) if fits => Arc::new(values),
            _ => return Err(wrong(name, format!("float {shape:?}"), actual)),
        };
        self.held.insert(name.to_owned(), Arc::clone(&values));
        Ok(values)
    }

    /// Index of the layer's rotation among the segment's; 0, which nobody reads, if it has none.
    fn rotation(&mut self, attend: &Attend) -> usize {
        let Some(rotary) = &attend.rotary else { return 0 };
        self.rotations.iter().position(|known| known == rotary).unwrap_or_else(|| {
            self.rotations.push(rotary.clone());
            self.rotations.len() - 1
        })
    }
}

fn activation(gating: Gating) -> Activation {
    match gating {
        Gating::Silu => Activation::Silu,
        Gating::Gelu => Activation::Gelu,
        Gating::GeluTanh => Activation::GeluTanh,
        Gating::Relu => Activation::Relu,
    }
}
