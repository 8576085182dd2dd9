//! A decoder's layers, and how it is cut.
//!
//! Not here: the algorithm of the cut ([`crate::cut`]), how layers are found in ONNX graphs ([`crate::list_layers`]).

use super::{Decoder, DecoderNode, Linear, Op};
use crate::{Activation, Flow, Layer, LayerUse, Step, Unfold, Unsupported, WeightLayout};
use std::collections::BTreeSet;

/// Operator of every layer of a decoder.
const LINEAR: &str = "Linear";

impl Flow for Decoder {
    fn steps(&self) -> Vec<Step<'_>> {
        let steps = self.nodes.iter().map(|node| {
            let mut seen = BTreeSet::new();
            let reads = node.inputs.iter().map(String::as_str).filter(|name| seen.insert(*name)).collect();
            let constants = node.op.constants(self).into_iter().map(|(name, _)| name).collect();
            let writes = node.outputs.iter().map(String::as_str).collect();
            Step { reads, constants, writes, shared: matches!(node.op, Op::Route(_)) }
        });
        steps.collect()
    }
}

impl Decoder {
    /// The products that may be rounded, in the order they run, and the constant matrices that stay, with the reason.
    /// A layer has the name of its node.
    ///
    /// The decoder is valid ([`Decoder::validate`]); of one that is not, nodes without an input or output are left out.
    pub fn layers(&self) -> (Vec<Layer>, Vec<Unsupported>) {
        let (mut layers, mut kept) = (Vec::new(), Vec::new());
        for (index, node) in self.nodes.iter().enumerate() {
            match &node.op {
                Op::Linear(linear) => match &linear.kept {
                    None => layers.extend(layer(index, node, linear)),
                    Some(reason) => kept.push(stays(node, LINEAR, &linear.weight, reason)),
                },
                Op::Embed(embed) => {
                    kept.push(stays(node, "Embed", &embed.weight, "an embedding: rows are looked up"));
                    let positions = embed.positions.iter();
                    kept.extend(positions.map(|p| stays(node, "Embed", &p.weight, "learned positions")));
                }
                _ => {}
            }
        }
        (layers, kept)
    }
}

fn layer(index: usize, node: &DecoderNode, linear: &Linear) -> Option<Layer> {
    let one = LayerUse {
        node: index,
        input: node.inputs.first()?.clone(),
        output: node.outputs.first()?.clone(),
        activation: Activation::Identity,
    };
    Some(Layer {
        name: node.name.clone(),
        op_type: LINEAR.to_owned(),
        weight: linear.weight.clone(),
        weight_shape: linear.weight_shape(),
        layout: if linear.transposed { WeightLayout::Transposed } else { WeightLayout::AsIs },
        rows: linear.rows,
        cols: linear.cols,
        groups: 1,
        unfold: Unfold::Rows,
        bias: linear.bias.clone(),
        bias_scale: 1.0,
        output_scale: 1.0,
        uses: vec![one],
    })
}

fn stays(node: &DecoderNode, op_type: &str, weight: &str, reason: &str) -> Unsupported {
    Unsupported {
        name: node.name.clone(),
        op_type: op_type.to_owned(),
        weight: weight.to_owned(),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::{Embed, Gating, LENGTHS, Route, Select, TOKENS};

    fn node(name: &str, op: Op, inputs: &[&str], outputs: &[&str]) -> DecoderNode {
        let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        DecoderNode { name: name.into(), op, inputs: owned(inputs), outputs: owned(outputs) }
    }

    fn linear(name: &str, input: &str, output: &str, kept: Option<&str>) -> DecoderNode {
        let linear = Linear {
            weight: format!("{name}.weight"),
            bias: None,
            rows: 2,
            cols: 2,
            transposed: false,
            kept: kept.map(str::to_owned),
        };
        node(name, Op::Linear(linear), &[input], &[output])
    }

    /// One router and two experts of two layers each, then a head.
    fn routed() -> Decoder {
        let embed = Embed { weight: "wte".into(), scale: 1.0, positions: None };
        let select = |expert| Op::Select(Select { expert, all_tokens: false });
        let nodes = vec![
            node("embed", Op::Embed(embed), &[TOKENS], &["x", LENGTHS]),
            linear("router", "x", "scores", Some("router")),
            node(
                "route",
                Op::Route(Route { experts: 2, top_k: 1, normalise: true }),
                &["scores"],
                &["chosen"],
            ),
            node("select0", select(0), &["x", "chosen"], &["x0"]),
            linear("up0", "x0", "u0", None),
            node("act0", Op::Activate(Gating::Silu), &["u0"], &["a0"]),
            linear("down0", "a0", "d0", None),
            node("select1", select(1), &["x", "chosen"], &["x1"]),
            linear("up1", "x1", "u1", None),
            node("act1", Op::Activate(Gating::Silu), &["u1"], &["a1"]),
            linear("down1", "a1", "d1", None),
            node("combine", Op::Combine { all_tokens: false }, &["chosen", "d0", "d1"], &["moe"]),
            linear("last", "moe", "y", None),
            linear("head", "y", "logits", Some("output head, kept by default")),
        ];
        Decoder { family: "test".into(), hidden: 2, vocabulary: 3, positions: 8, nodes }
    }

    #[test]
    fn layers_are_those_that_may_be_rounded_and_the_rest_is_named() {
        let decoder = routed();
        decoder.validate().unwrap();
        let (layers, kept) = decoder.layers();
        let names: Vec<&str> = layers.iter().map(|l| l.name.as_str()).collect();
        assert_eq!(names, ["up0", "down0", "up1", "down1", "last"]);
        let kept: Vec<&str> = kept.iter().map(|k| k.weight.as_str()).collect();
        assert_eq!(kept, ["wte", "router.weight", "head.weight"]);
    }

    #[test]
    fn what_the_router_chose_is_shared_and_carried_to_its_last_reader() {
        let decoder = routed();
        let (layers, _) = decoder.layers();
        let cut = crate::cut(&decoder, &layers, &vec![true; layers.len()]).unwrap();
        let stages: Vec<Vec<&str>> = cut
            .segments
            .iter()
            .map(|s| s.taps.iter().map(|t| layers[t.layer].name.as_str()).collect())
            .collect();
        assert_eq!(stages, [vec!["up0", "up1"], vec!["down0", "down1"], vec!["last"]]);
        let shared: Vec<&[String]> = cut.segments.iter().map(|s| s.shared.as_slice()).collect();
        assert_eq!(shared, [&["chosen".to_owned()][..], &[], &[]]);
        assert!(cut.segments[0].outputs.contains(&"chosen".to_owned()));
        assert!(cut.segments[0].live_after.contains(&"chosen".to_owned()));
        assert!(cut.segments[1].live_after.contains(&"chosen".to_owned()), "combine reads it in segment 2");
        assert_eq!(cut.segments[2].inputs, ["a0", "a1", "chosen"]);
    }

    #[test]
    fn shared_tensors_are_outputs_even_if_no_later_segment_reads_them() {
        let decoder = routed();
        let (layers, _) = decoder.layers();
        let selected: Vec<bool> = layers.iter().map(|l| l.name.starts_with("up")).collect();
        let cut = crate::cut(&decoder, &layers, &selected).unwrap();
        assert_eq!(cut.segments[0].live_after, Vec::<String>::new());
        assert_eq!(cut.segments[0].outputs, ["chosen", "x0", "x1"]);
    }
}
