//! Cutting and extracting on hand-made and random graphs, against brute-force properties.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use std::collections::{BTreeMap, BTreeSet};

use halfstep_model::onnx::{AttributeProto, OperatorSetIdProto, ValueInfoProto};
use halfstep_model::{
    Activation, Cut, GraphProto, Layer, LayerUse, Model, ModelProto, NodeProto, Tensor, Unfold, WeightLayout,
    cut, extract,
};

/// `(op, inputs, output)`; inputs that start with `w` are 2 x 2 weights.
type Row<'a> = (&'a str, Vec<String>, String);

fn row<'a>(op: &'a str, inputs: &[&str], output: &str) -> Row<'a> {
    (op, inputs.iter().map(|s| (*s).into()).collect(), output.into())
}

fn info(name: &str) -> ValueInfoProto {
    ValueInfoProto { name: Some(name.into()), ..Default::default() }
}

fn model(rows: &[Row<'_>], inputs: &[&str]) -> Model {
    let weights: BTreeSet<&str> =
        rows.iter().flat_map(|r| &r.1).map(String::as_str).filter(|i| i.starts_with('w')).collect();
    let tensor = |n: &&str| Tensor::f32(vec![2, 2], vec![1.0; 4]).unwrap().to_proto(n);
    Model::from_proto(ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { domain: None, version: Some(17) }],
        graph: Some(GraphProto {
            node: rows
                .iter()
                .map(|(op, i, o)| NodeProto {
                    op_type: Some((*op).into()),
                    input: i.clone(),
                    output: vec![o.clone()],
                    ..Default::default()
                })
                .collect(),
            initializer: weights.iter().map(tensor).collect(),
            input: inputs.iter().map(|i| info(i)).collect(),
            output: vec![info(&rows.last().unwrap().2)],
            ..Default::default()
        }),
        ..Default::default()
    })
    .unwrap()
}

/// One layer per weight that a MatMul has on its right.
fn layers(model: &Model) -> Vec<Layer> {
    let mut layers: Vec<Layer> = Vec::new();
    for (i, n) in model.graph().node.iter().enumerate().filter(|(_, n)| n.op_type() == "MatMul") {
        let found = LayerUse {
            node: i,
            input: n.input[0].clone(),
            output: n.output[0].clone(),
            activation: Activation::Identity,
        };
        match layers.iter_mut().find(|l| l.weight == n.input[1]) {
            Some(layer) => layer.uses.push(found),
            None => layers.push(Layer {
                name: n.output[0].clone(),
                op_type: "MatMul".into(),
                weight: n.input[1].clone(),
                weight_shape: vec![2, 2],
                layout: WeightLayout::Transposed,
                rows: 2,
                cols: 2,
                groups: 1,
                unfold: Unfold::Rows,
                bias: None,
                bias_scale: 1.0,
                output_scale: 1.0,
                uses: vec![found],
            }),
        }
    }
    layers
}

/// Number of selected layer nodes on the longest path to the tensor, by plain recursion.
fn level(model: &Model, layer_nodes: &BTreeSet<usize>, tensor: &str) -> usize {
    let Some(i) = model.graph().node.iter().position(|n| n.output[0] == tensor) else { return 0 };
    let inputs = model.graph().node[i].input.iter();
    let longest = inputs.map(|t| level(model, layer_nodes, t)).max().unwrap_or(0);
    longest + usize::from(layer_nodes.contains(&i))
}

fn ancestors(model: &Model, tensor: &str, into: &mut BTreeSet<usize>) {
    if let Some(i) = model.graph().node.iter().position(|n| n.output[0] == tensor)
        && into.insert(i)
    {
        model.graph().node[i].input.iter().for_each(|t| ancestors(model, t, into));
    }
}

/// Checks every property of a cut by simulating the carry.
fn check(model: &Model, inputs: &[&str], layers: &[Layer], selected: &[bool]) -> Cut {
    let result = cut(model, layers, selected).unwrap();
    let chosen: Vec<(usize, &Layer)> = layers.iter().enumerate().filter(|(i, _)| selected[*i]).collect();
    let layer_nodes: BTreeSet<usize> = chosen.iter().flat_map(|l| &l.1.uses).map(|u| u.node).collect();
    let mut expected = BTreeSet::new();
    chosen.iter().flat_map(|l| &l.1.uses).for_each(|u| ancestors(model, &u.input, &mut expected));
    let all: Vec<usize> = result.segments.iter().flat_map(|s| s.nodes.clone()).collect();
    assert_eq!(all.len(), expected.len(), "a node runs twice or is not needed");
    assert_eq!(all.into_iter().collect::<BTreeSet<_>>(), expected);

    let mut carry: BTreeSet<String> = inputs.iter().map(|s| (*s).into()).collect();
    let mut tapped = Vec::new();
    for (l, segment) in result.segments.iter().enumerate() {
        assert!(segment.inputs.iter().all(|t| carry.contains(t)), "stage {l}: an input is not carried");
        let mut present: BTreeSet<String> = segment.inputs.iter().cloned().collect();
        for n in &segment.nodes {
            let node = &model.graph().node[*n];
            assert_eq!(level(model, &layer_nodes, &node.output[0]), l);
            let here = |t: &&String| !t.starts_with('w') && !present.contains(*t);
            assert_eq!(node.input.iter().find(here), None, "stage {l}");
            present.insert(node.output[0].clone());
        }
        assert!(segment.outputs.iter().all(|t| present.contains(t)));
        carry.extend(segment.outputs.iter().cloned());
        for tap in &segment.taps {
            assert_eq!(level(model, &layer_nodes, &tap.tensor), l);
            assert!(carry.contains(&tap.tensor), "stage {l}: the tap is not there");
            tapped.push((tap.layer, tap.use_index));
        }
        let later: BTreeSet<String> =
            result.segments[l + 1..].iter().flat_map(|s| s.inputs.clone()).collect();
        let live: BTreeSet<String> = segment.live_after.iter().cloned().collect();
        // Needed later and already there: exactly what is kept.
        let keep: BTreeSet<String> = later.intersection(&carry).cloned().collect();
        assert_eq!(live, keep, "stage {l}");
        let useful = |t: &String| live.contains(t) || segment.taps.iter().any(|x| x.tensor == *t);
        assert!(segment.outputs.iter().all(useful));
        carry = live;
    }
    tapped.sort_unstable();
    let uses: Vec<_> = chosen.iter().flat_map(|(i, l)| (0..l.uses.len()).map(move |u| (*i, u))).collect();
    assert_eq!(tapped, uses);
    let mut decided: Vec<usize> = result.segments.iter().flat_map(|s| s.decided.clone()).collect();
    decided.sort_unstable();
    assert_eq!(decided, chosen.iter().map(|c| c.0).collect::<Vec<_>>());
    result
}

#[test]
fn hand_made_graphs() {
    // Diamond with branches of unequal length, a second input read late, a shared weight, a tail that never runs.
    let rows = [
        row("MatMul", &["x", "w1"], "a"),
        row("Relu", &["a"], "r"),
        row("MatMul", &["r", "w2"], "b"),
        row("MatMul", &["b", "w2"], "c"),
        row("Add", &["c", "r"], "d"),
        row("Add", &["d", "z"], "e"),
        row("MatMul", &["e", "w3"], "f"),
        row("Relu", &["f"], "y"),
    ];
    let m = model(&rows, &["x", "z"]);
    let l = layers(&m);
    let c = check(&m, &["x", "z"], &l, &[true; 3]);
    let nodes: Vec<_> = c.segments.iter().map(|s| s.nodes.clone()).collect();
    assert_eq!(nodes, [vec![], vec![0, 1], vec![2], vec![3, 4, 5]]);
    assert_eq!(c.segments[1].live_after, ["r", "z"]);
    let decided: Vec<_> = c.segments.iter().map(|s| s.decided.clone()).collect();
    assert_eq!(decided, [vec![0], vec![], vec![1], vec![2]]);
    let c = check(&m, &["x", "z"], &l, &[true, false, true]);
    assert_eq!(c.segments.len(), 2);
    assert!(check(&m, &["x", "z"], &l, &[false; 3]).segments.is_empty());
    assert!(cut(&m, &l, &[true]).is_err());
}

#[test]
fn random_graphs() {
    for seed in 1..300u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = |n: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 20) as usize % n
        };
        let mut tensors = vec!["x".to_owned(), "z".to_owned()];
        let mut rows = Vec::new();
        for i in 0..2 + next(12) {
            let mut any = || tensors[next(tensors.len())].clone();
            let (a, b) = (any(), any());
            let inputs_and_op = match next(3) {
                0 => ("MatMul", vec![a, format!("w{}", next(6))]),
                1 => ("Add", vec![a, b]),
                _ => ("Relu", vec![a]),
            };
            rows.push((inputs_and_op.0, inputs_and_op.1, format!("t{i}")));
            tensors.push(format!("t{i}"));
        }
        let m = model(&rows, &["x", "z"]);
        let l = layers(&m);
        let selected: Vec<bool> = l.iter().map(|_| next(4) > 0).collect();
        let c = check(&m, &["x", "z"], &l, &selected);
        for s in c.segments.iter().filter(|s| !s.nodes.is_empty()) {
            let part = extract(&m, &s.nodes, &s.inputs, &s.outputs, &BTreeMap::new()).unwrap();
            let part = Model::from_bytes(part).unwrap();
            assert_eq!(part.graph().node.len(), s.nodes.len(), "seed {seed}");
        }
    }
}

#[test]
fn extract_takes_only_what_it_needs_and_replaces() {
    let rows = [row("MatMul", &["x", "w1"], "a"), row("MatMul", &["a", "w2"], "b"), row("Relu", &["b"], "y")];
    let m = model(&rows, &["x"]);
    let names = |s: &[&str]| s.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
    let new = Tensor::f32(vec![2, 2], vec![7.0; 4]).unwrap();
    let replace = BTreeMap::from([("w2".to_owned(), new.clone()), ("w1".to_owned(), new.clone())]);
    let bytes = extract(&m, &[1, 2], &names(&["a"]), &names(&["y"]), &replace).unwrap();
    let part = Model::from_bytes(bytes).unwrap();
    assert_eq!(part.graph().initializer.len(), 1);
    assert_eq!(part.tensor("w2").unwrap(), new);
    let none = BTreeMap::new();
    let e = extract(&m, &[1], &[], &names(&["b"]), &none).unwrap_err();
    assert!(e.to_string().contains("reads tensor `a`"), "{e}");
    assert!(extract(&m, &[1], &names(&["a"]), &names(&["y"]), &none).is_err());
    assert!(extract(&m, &[9], &[], &[], &none).is_err());
}

#[test]
fn tensors_captured_by_a_branch_are_inputs_of_the_node() {
    let branch = |name: &str| AttributeProto {
        name: Some(name.into()),
        g: Some(GraphProto {
            node: vec![NodeProto {
                op_type: Some("MatMul".into()),
                input: vec!["a".into(), "w2".into()],
                output: vec![format!("{name}_out")],
                ..Default::default()
            }],
            output: vec![info(&format!("{name}_out"))],
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut m = model(
        &[
            row("Relu", &["x"], "a"),
            row("If", &["z"], "y"),
            row("MatMul", &["y", "w1"], "q"),
            row("MatMul", &["z", "w2"], "u"),
        ],
        &["x", "z"],
    );
    m.graph_mut().node[1].attribute = vec![branch("then_branch"), branch("else_branch")];
    m.recheck().unwrap();
    assert_eq!(m.index().reads(1), ["z", "a", "w2"]);
    assert_eq!(m.index().consumers("a"), [1]);
    let names = |s: &[&str]| s.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
    let bytes = extract(&m, &[1], &names(&["a", "z"]), &names(&["y"]), &BTreeMap::new()).unwrap();
    assert!(Model::from_bytes(bytes).unwrap().has_initializer("w2"));
    assert!(extract(&m, &[1], &names(&["z"]), &names(&["y"]), &BTreeMap::new()).is_err());
}
