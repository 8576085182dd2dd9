//! One operator, with its weights by number.
//!
//! Not here: running it (`operators`), where weights are (`compute`).

use super::check::{describe, wrong};
use crate::ExecError;
use halfstep_compute::Activation;
use halfstep_model::decoder::{Attend, Decoder, DecoderNode, Gating, NormKind, Op, Rotary, Route, Select};
use halfstep_model::{Data, Tensor};
use std::collections::HashMap;

/// An array of weights, by its number in the session; several operators may share it.
pub(super) type Weights = usize;

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
    Rms { weight: Weights, epsilon: f32, width: usize },
    Layer { weight: Weights, bias: Weights, epsilon: f32, width: usize },
    Linear(Matrix),
    Attend { attend: Attend, rotation: usize },
    Gate(Activation),
    Activate(Activation),
    Add,
    Softcap(f32),
    Route(Route),
    Select(Select),
    Combine { all_tokens: bool },
}

/// A linear layer.
#[derive(Debug)]
pub(super) struct Matrix {
    /// `[cols, rows]` if `turned`, else `[rows, cols]`.
    pub(super) weight: Weights,
    pub(super) turned: bool,
    pub(super) bias: Option<Weights>,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// Learned positions.
#[derive(Debug)]
pub(super) struct Learned {
    pub(super) weight: Weights,
    pub(super) offset: usize,
    /// Positions there are.
    pub(super) count: usize,
}

/// How a constant is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Form {
    AsStored,
    Transposed,
    /// One added to each.
    PlusOne,
    /// No constant: as many zeros.
    Zeros(usize),
}

/// What reads a constant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Role {
    /// Kernels.
    Array,
    /// A linear layer's product.
    Factor,
}

/// Where weights come from; what several operators read in the same form is kept once.
pub(super) struct Loader<'a> {
    pub(super) decoder: &'a Decoder,
    pub(super) constants: &'a mut dyn FnMut(&str) -> Result<Tensor, ExecError>,
    /// Puts an array where the session's operators find it; they are numbered in the order of the calls.
    pub(super) keep: &'a mut dyn FnMut(Vec<f32>, Role) -> Result<(), ExecError>,
    /// Whether linear layers take their weights `[cols, rows]`, however the checkpoint has them.
    pub(super) turned: bool,
    pub(super) known: Known,
    /// Different rotations of the segment.
    pub(super) rotations: Vec<Rotary>,
}

/// What has been kept so far.
#[derive(Debug, Default)]
pub(super) struct Known {
    numbers: HashMap<(String, Form, Role), Weights>,
    /// Elements of each.
    lengths: Vec<usize>,
}

impl Known {
    /// Memory of all arrays.
    pub(super) fn bytes(&self) -> usize {
        self.lengths.iter().sum::<usize>() * size_of::<f32>()
    }
}

impl Loader<'_> {
    /// The operator of a node.
    pub(super) fn ready(&mut self, node: &DecoderNode) -> Result<Ready, ExecError> {
        let mut weights = Vec::new();
        for (index, (name, shape)) in node.op.constants(self.decoder).into_iter().enumerate() {
            let form = match &node.op {
                Op::Linear(linear) if self.turned && !linear.transposed && shape.len() == 2 => {
                    Form::Transposed
                }
                Op::Norm(norm) if norm.kind == NormKind::RmsUnitOffset => Form::PlusOne,
                _ => Form::AsStored,
            };
            let role = match &node.op {
                Op::Linear(_) if index == 0 => Role::Factor,
                _ => Role::Array,
            };
            weights.push(self.weights(name, &shape, form, role)?);
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
                let width = norm.width;
                match norm.kind {
                    NormKind::Rms | NormKind::RmsUnitOffset => Ready::Rms { weight, epsilon, width },
                    NormKind::Layer => {
                        let bias = bias.map_or_else(
                            || self.weights("", &[width], Form::Zeros(width), Role::Array),
                            Ok,
                        )?;
                        Ready::Layer { weight, bias, epsilon, width }
                    }
                }
            }
            Op::Linear(linear) => Ready::Linear(Matrix {
                weight: next()?,
                turned: self.turned || linear.transposed,
                bias: linear.bias.as_ref().map(|_| next()).transpose()?,
                rows: linear.rows,
                cols: linear.cols,
            }),
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

    /// The number of a constant, checked and kept.
    fn weights(&mut self, name: &str, shape: &[usize], form: Form, role: Role) -> Result<Weights, ExecError> {
        let key = (name.to_owned(), form, role);
        if let Some(number) = self.known.numbers.get(&key) {
            let held = self.known.lengths[*number];
            return match shape.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim)) {
                Some(n) if n == held => Ok(*number),
                _ => Err(wrong(name, format!("float {shape:?}"), format!("{held} elements"))),
            };
        }
        let values = match form {
            Form::Zeros(width) => vec![0.0; width],
            _ => values(name, shape, (self.constants)(name)?)?,
        };
        let values = match (form, shape) {
            (Form::Transposed, [rows, cols]) => transposed(&values, *rows, *cols),
            (Form::PlusOne, _) => values.iter().map(|w| 1.0 + w).collect(),
            _ => values,
        };
        let number = self.known.lengths.len();
        self.known.lengths.push(values.len());
        (self.keep)(values, role)?;
        self.known.numbers.insert(key, number);
        Ok(number)
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

fn values(name: &str, shape: &[usize], tensor: Tensor) -> Result<Vec<f32>, ExecError> {
    let actual = describe(&tensor);
    let elements = shape.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
    let fits = tensor.shape == shape && Some(tensor.len()) == elements;
    match tensor.data {
        Data::F32(values) if fits => Ok(values),
        _ => Err(wrong(name, format!("float {shape:?}"), actual)),
    }
}

/// `[rows, cols]` as `[cols, rows]`, tile by tile.
fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    const TILE: usize = 32;
    let mut out = vec![0.0; values.len()];
    for row in (0..rows).step_by(TILE) {
        for col in (0..cols).step_by(TILE) {
            for i in row..rows.min(row + TILE) {
                for j in col..cols.min(col + TILE) {
                    out[j * rows + i] = values[i * cols + j];
                }
            }
        }
    }
    out
}

fn activation(gating: Gating) -> Activation {
    match gating {
        Gating::Silu => Activation::Silu,
        Gating::Gelu => Activation::Gelu,
        Gating::GeluTanh => Activation::GeluTanh,
        Gating::Relu => Activation::Relu,
    }
}
