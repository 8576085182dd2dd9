//! What every reader of a decoder relies on, checked once.
//!
//! Not here: whether a checkpoint has the tensors (`Decoder::bind`), widths along the graph (the executor knows them).

use super::graph::{Attend, Decoder, Embed, Linear, Norm, Op, Rotary, Rotation, Route, TOKENS};
use std::collections::BTreeSet;

/// A decoder that cannot be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("decoder node `{node}`: {problem}")]
pub struct DecoderError {
    /// The node.
    pub node: String,
    /// What is wrong, expected and actual.
    pub problem: String,
}

impl Decoder {
    /// Checks what every reader relies on: unique names, reads of what was written before, sizes that are not 0 and
    /// whose products can be counted, numbers that are finite.
    ///
    /// # Errors
    /// The first node that breaks a rule.
    pub fn validate(&self) -> Result<(), DecoderError> {
        let mut written: BTreeSet<&str> = BTreeSet::from([TOKENS]);
        let mut names = BTreeSet::new();
        for node in &self.nodes {
            let wrong = |problem: String| DecoderError { node: node.name.clone(), problem };
            if !names.insert(node.name.as_str()) {
                return Err(wrong("another node has the same name".into()));
            }
            if let Some(input) = node.inputs.iter().find(|input| !written.contains(input.as_str())) {
                return Err(wrong(format!("reads `{input}`, which no node before it writes")));
            }
            node.op.check(node.inputs.len(), node.outputs.len()).map_err(wrong)?;
            if let Some(output) = node.outputs.iter().find(|output| !written.insert(output.as_str())) {
                return Err(wrong(format!("writes `{output}`, which is there already")));
            }
        }
        Ok(())
    }
}

impl Op {
    fn check(&self, inputs: usize, outputs: usize) -> Result<(), String> {
        let fits = match self {
            Self::Embed(_) => (inputs, outputs) == (1, 2),
            Self::Attend(_) => matches!(inputs, 2 | 4) && outputs == 1,
            Self::Gate(_) => matches!(inputs, 1 | 2) && outputs == 1,
            Self::Add | Self::Select(_) => (inputs, outputs) == (2, 1),
            Self::Combine { .. } => inputs >= 2 && outputs == 1,
            _ => (inputs, outputs) == (1, 1),
        };
        if !fits {
            return Err(format!("{inputs} inputs and {outputs} outputs do not fit its operator"));
        }
        match self {
            Self::Embed(Embed { scale, .. }) => finite("scale", [*scale]),
            Self::Norm(norm) => norm.check(),
            Self::Linear(linear) => linear.check(),
            Self::Attend(attend) => attend.check(),
            Self::Softcap { cap } => finite("cap", [*cap]),
            Self::Route(route) => route.check(),
            _ => Ok(()),
        }
    }
}

fn positive(what: &str, value: usize) -> Result<(), String> {
    if value == 0 { Err(format!("{what} is 0, expected at least 1")) } else { Ok(()) }
}

fn finite(what: &str, values: impl IntoIterator<Item = f32>) -> Result<(), String> {
    match values.into_iter().find(|value| !value.is_finite()) {
        Some(value) => Err(format!("{what} is {value}, expected a finite number")),
        None => Ok(()),
    }
}

impl Norm {
    fn check(&self) -> Result<(), String> {
        positive("width", self.width)?;
        finite("epsilon", [self.epsilon])
    }
}

impl Linear {
    fn check(&self) -> Result<(), String> {
        positive("rows", self.rows)?;
        positive("cols", self.cols)?;
        let counted = self.rows.checked_mul(self.cols).map(|_| ());
        counted.ok_or_else(|| {
            format!("{} by {} weights, expected a number in the address space", self.rows, self.cols)
        })
    }
}

impl Route {
    fn check(&self) -> Result<(), String> {
        match (1..=self.experts).contains(&self.top_k) {
            true => Ok(()),
            false => Err(format!("top_k is {}, expected 1 to {}", self.top_k, self.experts)),
        }
    }
}

impl Attend {
    fn check(&self) -> Result<(), String> {
        let Self { heads, kv_heads, head_dim, .. } = *self;
        // Queries, keys and values side by side: at most three times the queries.
        let counted = heads.checked_mul(head_dim).and_then(|width| width.checked_mul(3)).is_some();
        if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) || head_dim == 0 || !counted {
            return Err(format!(
                "{heads} heads of {head_dim} on {kv_heads} key heads: expected positive sizes and a multiple"
            ));
        }
        if let Some(window) = self.window {
            positive("window", window)?;
        }
        finite("scale", [self.scale])?;
        finite("softcap", self.softcap)?;
        self.rotary.as_ref().map_or(Ok(()), |rotary| rotary.check(head_dim))
    }
}

impl Rotary {
    fn check(&self, head_dim: usize) -> Result<(), String> {
        let Self { width, rotation } = self;
        let counts = match rotation {
            Rotation::Fixed { frequencies, .. } => vec![frequencies.len()],
            Rotation::ByLength { short, long, .. } => vec![short.len(), long.len()],
            Rotation::Dynamic { after, .. } if *after == 0 || *width <= 2 => {
                return Err(format!("dynamic rotation after {after} positions of width {width}"));
            }
            Rotation::Dynamic { .. } => vec![width / 2],
        };
        if *width % 2 != 0 || *width > head_dim || counts.iter().any(|count| *count != width / 2) {
            return Err(format!(
                "rotary width {width} with {counts:?} frequencies, expected an even width up to {head_dim} and half as many"
            ));
        }
        rotation.numbers().try_for_each(|number| finite("frequency or factor", [number]))
    }
}

impl Rotation {
    fn numbers(&self) -> impl Iterator<Item = f32> {
        let (first, second, others): (&[f32], &[f32], [f32; 2]) = match self {
            Self::Fixed { frequencies, factor } => (frequencies, &[], [*factor; 2]),
            Self::ByLength { short, long, factor, .. } => (short, long, [*factor; 2]),
            Self::Dynamic { base, scaling, .. } => (&[], &[], [*base, *scaling]),
        };
        first.iter().chain(second).copied().chain(others)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::{DescribeOptions, describe};
    use serde_json::json;

    fn valid() -> Decoder {
        let config = json!({
            "model_type": "mixtral", "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 5, "max_position_embeddings": 16,
            "num_local_experts": 2, "num_experts_per_tok": 1,
        });
        describe(&config, DescribeOptions::default()).unwrap()
    }

    /// Changes the first operator that `change` accepts.
    fn broken(change: impl Fn(&mut Op) -> Option<()>) -> String {
        let mut decoder = valid();
        decoder.nodes.iter_mut().find_map(|node| change(&mut node.op)).unwrap();
        decoder.validate().unwrap_err().to_string()
    }

    fn attend(op: &mut Op) -> Option<&mut Attend> {
        if let Op::Attend(attend) = op { Some(attend) } else { None }
    }

    #[test]
    fn numbers_that_nobody_can_use_are_refused() {
        let linear = |rows| {
            broken(|op| match op {
                Op::Linear(linear) => {
                    linear.rows = rows;
                    Some(())
                }
                _ => None,
            })
        };
        assert!(linear(0).ends_with("rows is 0, expected at least 1"));
        assert!(linear(usize::MAX).contains("expected a number in the address space"));
        let heads = broken(|op| attend(op).map(|attend| attend.heads = usize::MAX - 1));
        assert!(heads.contains("expected positive sizes and a multiple"), "{heads}");
        let window = broken(|op| attend(op).map(|attend| attend.window = Some(0)));
        assert!(window.ends_with("window is 0, expected at least 1"));
        let scale = broken(|op| attend(op).map(|attend| attend.scale = f32::NAN));
        assert!(scale.ends_with("scale is NaN, expected a finite number"));
        let frequencies = broken(|op| {
            let rotary = attend(op)?.rotary.as_mut()?;
            rotary.rotation = Rotation::Fixed { frequencies: vec![1.0, f32::INFINITY], factor: 1.0 };
            Some(())
        });
        assert!(
            frequencies.ends_with("frequency or factor is inf, expected a finite number"),
            "{frequencies}"
        );
        let few = broken(|op| attend(op)?.rotary.as_mut().map(|rotary| rotary.width = 2));
        assert!(few.contains("rotary width 2 with [2] frequencies"), "{few}");
        let route = broken(|op| match op {
            Op::Route(route) => {
                route.top_k = 3;
                Some(())
            }
            _ => None,
        });
        assert!(route.ends_with("top_k is 3, expected 1 to 2"));
    }

    #[test]
    fn names_are_unique_and_tensors_written_before_they_are_read() {
        let refused = |change: fn(&mut Decoder)| {
            let mut decoder = valid();
            change(&mut decoder);
            decoder.validate().unwrap_err().problem
        };
        assert_eq!(refused(|d| d.nodes[2].name = d.nodes[1].name.clone()), "another node has the same name");
        assert!(refused(|d| d.nodes.swap(1, 2)).starts_with("reads `model.layers.0.input_layernorm`"));
        assert!(
            refused(|d| d.nodes[2].outputs = d.nodes[1].outputs.clone()).ends_with("which is there already")
        );
        assert_eq!(refused(|d| d.nodes[1].inputs.clear()), "0 inputs and 1 outputs do not fit its operator");
    }
}
