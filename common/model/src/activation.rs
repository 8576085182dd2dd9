//! The element-wise activation that directly follows a layer: which one, found by which graph pattern.
//!
//! Method: single operators by name; SiLU, HardSwish and GELU also as the small subgraphs exporters write: any
//! chain of element-wise operators on the layer's output and scalars is evaluated at fixed points and compared,
//! so that the order and algebra of the operators do not matter. A pattern counts only if nothing else reads any
//! tensor inside it, the layer's output included.
//! Not here: evaluating activations (the solver does).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::node::attribute;
use crate::onnx::{GraphProto, NodeProto};
use crate::{Data, GraphIndex, Tensor};

/// An element-wise activation. In: the layer's output; out: the same shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// None, or one that cannot be attributed to this layer alone.
    Identity,
    /// `max(x, 0)`.
    Relu,
    /// `min(max(x, min), max)`; a missing bound is `f32::MIN` or `f32::MAX` (so ONNX; JSON has no infinity).
    Clip {
        /// Lower bound.
        min: f32,
        /// Upper bound.
        max: f32,
    },
    /// `x` where `x >= 0`, else `slope * x`.
    LeakyRelu {
        /// Factor below zero.
        slope: f32,
    },
    /// `x` where `x >= 0`, else `slope * x`, the slope per output channel.
    PRelu {
        /// One entry, or one per row of the layer.
        slope: Vec<f32>,
    },
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// Hyperbolic tangent.
    Tanh,
    /// `x * min(max(x + 3, 0), 6) / 6`.
    HardSwish,
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * (1 + erf(x / sqrt 2)) / 2`.
    Gelu,
    /// `x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2`.
    GeluTanh,
}

/// Probe points of pattern detection: both tails, the knees of HardSwish, and 0.
const PROBES: [f64; 19] = [
    -9.0, -6.1, -4.0, -3.2, -3.0, -2.6, -1.9, -1.0, -0.45, 0.0, 0.3, 0.75, 1.3, 2.0, 2.9, 3.0, 3.7, 5.5, 8.0,
];
/// A pattern is an activation if no probe differs by more. Above the rounding of f32 constants such as 1/6;
/// below the 5e-4 that part GELU from its tanh form.
const PROBE_TOLERANCE: f64 = 2e-5;
/// Longest pattern followed, in nodes: the tanh form of GELU has 8.
const PATTERN_NODES_MAX: usize = 10;

/// Where the channels of a layer's output lie, to attribute per-channel constants to rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OutputChannels {
    /// Output channels.
    pub(crate) rows: usize,
    /// Dimensions of the output after the channel's.
    pub(crate) trailing: usize,
}

impl OutputChannels {
    /// Whether a constant of `shape` broadcasts to the output with one value per channel, or one for all.
    pub(crate) fn fits(&self, shape: &[usize]) -> bool {
        let shape = &shape[shape.iter().take_while(|&&d| d == 1).count()..];
        shape.is_empty()
            || (shape.len() == self.trailing + 1
                && shape[0] == self.rows
                && shape[1..].iter().all(|&d| d == 1))
    }
}

/// The activation that follows the tensor `output`, if it alone reads it.
pub(crate) fn following(
    graph: &GraphProto,
    index: &GraphIndex<'_>,
    output: &str,
    channels: OutputChannels,
) -> Activation {
    if index.is_output(output) {
        return Activation::Identity;
    }
    let single = match index.consumers(output) {
        [only] => operator(&graph.node[*only], index, output, channels),
        _ => None,
    };
    single.or_else(|| pattern(graph, index, output)).unwrap_or(Activation::Identity)
}

/// An activation that is one operator.
fn operator(
    node: &NodeProto,
    index: &GraphIndex<'_>,
    input: &str,
    channels: OutputChannels,
) -> Option<Activation> {
    if !matches!(node.domain(), "" | "ai.onnx") || node.input.first().map(String::as_str) != Some(input) {
        return None;
    }
    match node.op_type() {
        "Relu" => Some(Activation::Relu),
        "LeakyRelu" => Some(Activation::LeakyRelu { slope: float(node, "alpha", 0.01) }),
        "Sigmoid" => Some(Activation::Sigmoid),
        "Tanh" => Some(Activation::Tanh),
        "HardSwish" => Some(Activation::HardSwish),
        "Swish" if float(node, "alpha", 1.0) == 1.0 => Some(Activation::Silu),
        "Gelu" => match attribute(node, "approximate").map(|a| a.s()) {
            None | Some(b"none") => Some(Activation::Gelu),
            Some(b"tanh") => Some(Activation::GeluTanh),
            Some(_) => None,
        },
        "Clip" => {
            let (min, max) = clip_bounds(node, index)?;
            Some(Activation::Clip { min, max })
        }
        "PRelu" => prelu_slope(node, index, channels).map(|slope| Activation::PRelu { slope }),
        _ => None,
    }
}

/// Bounds of a Clip, opset 11 and later: inputs 1 and 2, either may be missing. `None` if one is no constant.
fn clip_bounds(node: &NodeProto, index: &GraphIndex<'_>) -> Option<(f32, f32)> {
    let bound = |i: usize, missing: f32| match node.input.get(i).map(String::as_str) {
        None | Some("") => Some(missing),
        Some(name) => scalar(index, name).map(|v| v as f32),
    };
    let (min, max) = (bound(1, f32::MIN)?, bound(2, f32::MAX)?);
    (min <= max).then(|| (min.max(f32::MIN), max.min(f32::MAX)))
}

fn prelu_slope(node: &NodeProto, index: &GraphIndex<'_>, channels: OutputChannels) -> Option<Vec<f32>> {
    let name = node.input.get(1)?;
    let slope = constant(index, name)?;
    if !channels.fits(&slope.shape) {
        return None;
    }
    slope.as_f32().filter(|s| s.iter().all(|v| v.is_finite())).map(<[f32]>::to_vec)
}

/// An activation written as several element-wise operators: SiLU, HardSwish, GELU.
///
/// Follows the tensors that depend on `input` and one-element constants alone, evaluates them at [`PROBES`], and
/// compares whenever a single one of them is read from outside.
fn pattern(graph: &GraphProto, index: &GraphIndex<'_>, input: &str) -> Option<Activation> {
    let mut known: BTreeMap<&str, Vec<f64>> = BTreeMap::from([(input, PROBES.to_vec())]);
    let mut inside: BTreeSet<usize> = BTreeSet::new();
    let mut waiting: BTreeSet<usize> = index.consumers(input).iter().copied().collect();
    while inside.len() < PATTERN_NODES_MAX {
        // Nodes are in topological order: the first one waiting has all its inputs, or never will.
        let i = waiting.pop_first()?;
        let node = &graph.node[i];
        let values = evaluate(node, index, &known)?;
        let output = node.output.first()?.as_str();
        known.insert(output, values);
        inside.insert(i);
        waiting.extend(index.consumers(output));
        let read_outside =
            |name: &&&str| index.is_output(name) || index.consumers(name).iter().any(|c| !inside.contains(c));
        let mut frontier = known.keys().filter(|name| read_outside(name) || index.consumers(name).is_empty());
        if let (Some(&only), None) = (frontier.next(), frontier.next())
            && let Some(found) = recognise(&known[only])
        {
            return Some(found);
        }
    }
    None
}

/// Values of an element-wise operator at the probes; `None` for any other operator or an unknown operand.
fn evaluate(node: &NodeProto, index: &GraphIndex<'_>, known: &BTreeMap<&str, Vec<f64>>) -> Option<Vec<f64>> {
    if !matches!(node.domain(), "" | "ai.onnx") || node.output.len() != 1 {
        return None;
    }
    let operand = |i: usize| -> Option<Vec<f64>> {
        let name = node.input.get(i)?;
        match known.get(name.as_str()) {
            Some(values) => Some(values.clone()),
            None => scalar(index, name).map(|v| vec![v; PROBES.len()]),
        }
    };
    let unary = |f: &dyn Fn(f64) -> f64| operand(0).map(|x| x.into_iter().map(f).collect());
    let binary = |f: &dyn Fn(f64, f64) -> f64| -> Option<Vec<f64>> {
        (node.input.len() == 2).then_some(())?;
        Some(operand(0)?.into_iter().zip(operand(1)?).map(|(a, b)| f(a, b)).collect())
    };
    match node.op_type() {
        "Add" => binary(&|a, b| a + b),
        "Sub" => binary(&|a, b| a - b),
        "Mul" => binary(&|a, b| a * b),
        "Div" => binary(&|a, b| a / b),
        "Pow" => binary(&f64::powf),
        "Neg" => unary(&|x| -x),
        "Exp" => unary(&f64::exp),
        "Reciprocal" => unary(&f64::recip),
        "Identity" => unary(&|x| x),
        "Erf" => unary(&erf),
        "Tanh" => unary(&f64::tanh),
        "Sigmoid" => unary(&sigmoid),
        "Relu" => unary(&|x| x.max(0.0)),
        "HardSigmoid" => {
            let (alpha, beta) = (float(node, "alpha", 0.2), float(node, "beta", 0.5));
            unary(&|x| (f64::from(alpha) * x + f64::from(beta)).clamp(0.0, 1.0))
        }
        "Clip" => {
            let (min, max) = clip_bounds(node, index)?;
            unary(&|x| x.clamp(f64::from(min), f64::from(max)))
        }
        _ => None,
    }
}

fn recognise(values: &[f64]) -> Option<Activation> {
    let tanh_inner = |x: f64| (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
    let is = |f: &dyn Fn(f64) -> f64| {
        // A NaN compares as different.
        PROBES.iter().zip(values).all(|(&x, &v)| (f(x) - v).abs() <= PROBE_TOLERANCE)
    };
    if is(&|x| x * sigmoid(x)) {
        return Some(Activation::Silu);
    }
    if is(&|x| x * (x + 3.0).clamp(0.0, 6.0) / 6.0) {
        return Some(Activation::HardSwish);
    }
    if is(&|x| 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2))) {
        return Some(Activation::Gelu);
    }
    is(&|x| 0.5 * x * (1.0 + tanh_inner(x).tanh())).then_some(Activation::GeluTanh)
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Error function, absolute error below 1.5e-7 (Abramowitz and Stegun 7.1.26).
fn erf(x: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.327_591_1 * x.abs());
    let poly = [1.061_405_429, -1.453_152_027, 1.421_413_741, -0.284_496_736, 0.254_829_592]
        .iter()
        .fold(0.0, |sum, a| (sum + a) * t);
    (1.0 - poly * (-x * x).exp()).copysign(x)
}

/// An initializer that no caller can replace, decoded; `None` if it is none or its data is not here (skeletons).
pub(crate) fn constant(index: &GraphIndex<'_>, name: &str) -> Option<Tensor> {
    if index.is_overridable(name) {
        return None;
    }
    Tensor::from_proto(index.initializer(name)?).ok()
}

/// The value of a one-element constant.
fn scalar(index: &GraphIndex<'_>, name: &str) -> Option<f64> {
    let proto = index.initializer(name)?;
    if proto.dims.iter().any(|&d| d != 1) {
        return None;
    }
    let value = match constant(index, name)?.data {
        Data::F32(v) => v.first().copied().map(f64::from),
        Data::F64(v) => v.first().copied(),
        Data::I64(v) => v.first().map(|&v| v as f64),
        Data::I32(v) => v.first().copied().map(f64::from),
        _ => None,
    };
    value.filter(|v| !v.is_nan())
}

/// A float attribute, or `default`.
pub(crate) fn float(node: &NodeProto, name: &str, default: f32) -> f32 {
    attribute(node, name).and_then(|a| a.f).unwrap_or(default)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_matches_published_values() {
        // Abramowitz and Stegun, table 7.1.
        for (x, expected) in
            [(0.0, 0.0), (0.5, 0.520_499_877_8), (1.0, 0.842_700_792_9), (2.0, 0.995_322_265_0)]
        {
            assert!((erf(x) - expected).abs() < 2e-7, "erf({x})");
            assert!((erf(-x) + expected).abs() < 2e-7, "erf(-{x})");
        }
    }

    #[test]
    fn per_channel_constants_must_lie_along_the_channels() {
        let image = OutputChannels { rows: 3, trailing: 2 };
        for (shape, fits) in [
            (&[][..], true),
            (&[1], true),
            (&[3, 1, 1], true),
            (&[1, 3, 1, 1], true),
            (&[1, 1, 1], true),
            (&[3], false),
            (&[1, 3], false),
            (&[3, 1], false),
            (&[3, 1, 2], false),
            (&[2, 1, 1], false),
        ] {
            assert_eq!(image.fits(shape), fits, "{shape:?}");
        }
    }
}
