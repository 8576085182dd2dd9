//! What is not rounded, and what does not count as a layer's bias or activation, on hand-made graphs.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop")]

use halfstep_model::onnx::{AttributeProto, OperatorSetIdProto, ValueInfoProto};
use halfstep_model::{
    Activation, Data, GraphProto, Layer, Model, ModelProto, NodeProto, Tensor, Unsupported, fold_batch_norms,
    list_layers,
};

/// Builds small graphs: inputs `x`, `x2`; output `y`.
#[derive(Default, Clone)]
struct Builder {
    graph: GraphProto,
}

fn info(name: &str) -> ValueInfoProto {
    ValueInfoProto { name: Some(name.to_owned()), ..Default::default() }
}

fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: Some(op.to_owned()),
        name: Some(format!("{op}_{output}")),
        input: inputs.iter().map(|i| (*i).to_owned()).collect(),
        output: vec![output.to_owned()],
        ..Default::default()
    }
}

fn ints(name: &str, ints: &[i64]) -> AttributeProto {
    let (one, many) = if let [one] = ints { (Some(*one), vec![*one]) } else { (None, ints.to_vec()) };
    AttributeProto { name: Some(name.to_owned()), i: one, ints: many, ..Default::default() }
}

fn text(name: &str, value: &str) -> AttributeProto {
    AttributeProto { name: Some(name.to_owned()), s: Some(value.as_bytes().to_vec()), ..Default::default() }
}

fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto { name: Some(name.to_owned()), f: Some(value), ..Default::default() }
}

impl Builder {
    fn node(self, op: &str, inputs: &[&str], output: &str) -> Self {
        self.with(node(op, inputs, output), [])
    }

    fn with(mut self, mut node: NodeProto, attributes: impl IntoIterator<Item = AttributeProto>) -> Self {
        node.attribute.extend(attributes);
        self.graph.node.push(node);
        self
    }

    fn weight(self, name: &str, shape: &[usize]) -> Self {
        let values = (0..shape.iter().product::<usize>()).map(|i| i as f32 * 0.25 - 1.0).collect();
        self.constant(name, shape, values)
    }

    fn constant(mut self, name: &str, shape: &[usize], values: Vec<f32>) -> Self {
        self.graph.initializer.push(Tensor::f32(shape.to_vec(), values).unwrap().to_proto(name));
        self
    }

    fn model(mut self, outputs: &[&str]) -> Model {
        self.graph.input.extend(["x", "x2"].map(info));
        self.graph.output.extend(outputs.iter().map(|o| info(o)));
        Model::from_proto(ModelProto {
            ir_version: Some(8),
            opset_import: vec![OperatorSetIdProto { domain: None, version: Some(17) }],
            graph: Some(self.graph),
            ..Default::default()
        })
        .unwrap()
    }

    fn list(self) -> (Vec<Layer>, Vec<Unsupported>) {
        list_layers(&self.model(&["y"])).unwrap()
    }

    /// No layer, one refusal, whose reason contains all of `parts`.
    fn refused(self, parts: &[&str]) {
        let (layers, unsupported) = self.list();
        assert_eq!(layers, []);
        assert_eq!(unsupported.len(), 1, "{unsupported:?}");
        for part in parts {
            assert!(unsupported[0].reason.contains(part), "`{}` lacks `{part}`", unsupported[0].reason);
        }
    }

    /// One layer, nothing refused.
    fn layer(self) -> Layer {
        let (mut layers, unsupported) = self.list();
        assert_eq!(unsupported, []);
        assert_eq!(layers.len(), 1);
        layers.remove(0)
    }
}

fn build() -> Builder {
    Builder::default()
}

#[test]
fn products_of_another_form_are_refused_with_the_reason() {
    let conv = |shape: &[usize], attribute: AttributeProto| {
        build().with(node("Conv", &["x", "w"], "y"), [attribute]).weight("w", shape)
    };
    build().node("MatMul", &["x", "w"], "y").weight("w", &[4]).refused(&["[4]", "rank 2"]);
    build().node("MatMul", &["x", "w"], "y").weight("w", &[2, 3, 4]).refused(&["[2, 3, 4]", "rank 2"]);
    build().node("MatMul", &["x", "w"], "y").weight("w", &[0, 4]).refused(&["no elements", "[0, 4]"]);
    build().node("Conv", &["x", "w"], "y").weight("w", &[2, 3]).refused(&["1 to 3 spatial"]);
    build().node("Conv", &["x", "w"], "y").weight("w", &[1; 6]).refused(&["1 to 3 spatial"]);
    conv(&[4, 2, 3], ints("strides", &[1, 1])).refused(&["strides", "[1, 1]", "expected 1"]);
    conv(&[4, 2, 3], ints("pads", &[-1, 0])).refused(&["pads", "[-1, 0]"]);
    conv(&[4, 2, 3], ints("strides", &[0])).refused(&["stride is 0"]);
    conv(&[4, 2, 3], ints("kernel_shape", &[5])).refused(&["kernel_shape", "[5]", "[3]"]);
    conv(&[4, 2, 3], ints("group", &[3])).refused(&["4 output channels", "3 groups"]);
    conv(&[4, 2, 3], ints("group", &[0])).refused(&["group count is 0"]);
    conv(&[4, 2, 3], text("auto_pad", "SAME")).refused(&["auto_pad is `SAME`"]);
    build()
        .with(node("ConvTranspose", &["x", "w"], "y"), [ints("output_shape", &[9])])
        .weight("w", &[2, 3, 4])
        .refused(&["output_shape"]);
    build()
        .with(node("Gemm", &["x", "w"], "y"), [float("alpha", 0.0)])
        .weight("w", &[2, 3])
        .refused(&["alpha is 0"]);
}

#[test]
fn other_operators_with_weights_are_refused_and_arithmetic_constants_are_not_mentioned() {
    build().node("Gather", &["w", "x"], "y").weight("w", &[4, 2]).refused(&["looks rows up"]);
    build()
        .node("Einsum", &["x", "w"], "y")
        .weight("w", &[4, 2])
        .refused(&["operator Einsum is not supported"]);
    let gru = node("GRU", &["x", "w"], "y");
    build().with(gru, []).weight("w", &[1, 4, 2]).refused(&["recurrent", "GRU"]);
    let lstm = build().node("LSTM", &["x", "w", "r"], "y");
    lstm.weight("w", &[1, 8, 2]).weight("r", &[1, 8, 2]).refused(&["recurrent", "LSTM"]);
    let mut fused = node("FusedMatMul", &["x", "w"], "y");
    fused.domain = Some("com.microsoft".to_owned());
    build().with(fused, []).weight("w", &[4, 2]).refused(&["FusedMatMul", "com.microsoft"]);
    let twice = build().node("LSTM", &["x", "w", "r"], "h").node("LSTM", &["h", "w", "s"], "y");
    let (_, unsupported) =
        ["w", "r", "s"].iter().fold(twice, |graph, name| graph.weight(name, &[1, 8, 2])).list();
    assert_eq!(unsupported.iter().map(|u| &u.name).collect::<Vec<_>>(), ["LSTM_h", "LSTM_y"]);
    let (layers, unsupported) =
        build().node("Mul", &["x", "w"], "m").node("Add", &["m", "w"], "y").weight("w", &[4, 2]).list();
    assert_eq!((layers, unsupported), (vec![], vec![]));
}

#[test]
fn weights_of_other_types_and_weights_others_can_see_are_refused() {
    let matmul = build().node("MatMul", &["x", "w"], "y");
    let mut double = matmul.clone();
    let tensor = Tensor::new(vec![2, 2], Data::F64(vec![0.5; 4])).unwrap();
    double.graph.initializer.push(tensor.to_proto("w"));
    double.refused(&["double", "only float32"]);

    let mut replaceable = matmul.clone().weight("w", &[2, 2]);
    replaceable.graph.input.push(info("w"));
    replaceable.refused(&["`w` is also a graph input"]);

    let (layers, unsupported) = list_layers(&matmul.weight("w", &[2, 2]).model(&["y", "w"])).unwrap();
    assert_eq!(layers, []);
    assert!(unsupported[0].reason.contains("`w` is also a graph output"));
}

#[test]
fn a_weight_shared_in_different_ways_is_refused_naming_both_readers() {
    build()
        .node("Gather", &["w", "x2"], "e")
        .node("MatMul", &["e", "w"], "y")
        .weight("w", &[4, 4])
        .refused(&["MatMul `MatMul_y`", "Gather `Gather_e`", "shared"]);
    build()
        .node("MatMul", &["x", "w"], "a")
        .node("MatMul", &["w", "a"], "y")
        .weight("w", &[4, 4])
        .refused(&["MatMul_a", "MatMul_y", "different ways"]);
    build()
        .with(node("Gemm", &["x", "w"], "a"), [float("alpha", 2.0)])
        .node("Gemm", &["a", "w"], "y")
        .weight("w", &[4, 4])
        .refused(&["Gemm_a", "Gemm_y", "different ways"]);
}

#[test]
fn weights_inside_subgraphs_are_refused_and_so_are_weights_they_capture() {
    let holder = |weight_outside: bool| {
        let tensor = Tensor::f32(vec![2, 2], vec![1.0; 4]).unwrap().to_proto("w");
        let body = GraphProto {
            node: vec![node("MatMul", &["x", "w"], "inner")],
            initializer: if weight_outside { vec![] } else { vec![tensor] },
            output: vec![info("inner")],
            ..Default::default()
        };
        let branch = |name: &str| AttributeProto {
            name: Some(name.to_owned()),
            g: Some(GraphProto { ..body.clone() }),
            ..Default::default()
        };
        build().with(node("If", &["x2"], "y"), [branch("then_branch")])
    };
    holder(false).refused(&["inside a subgraph of If `If_y`"]);
    holder(true).weight("w", &[2, 2]).refused(&["inside a subgraph of If `If_y`"]);
    let mut both = holder(true).weight("w", &[2, 2]);
    both.graph.node[0].output[0] = "z".to_owned();
    both.node("MatMul", &["z", "w"], "y").refused(&["MatMul `MatMul_y`", "If `If_y`"]);
}

#[test]
fn a_bias_or_activation_counts_only_for_its_sole_reader() {
    let matmul = || build().node("MatMul", &["x", "w"], "m").weight("w", &[4, 2]).weight("b", &[2]);
    let found = |layer: &Layer| {
        let only = &layer.uses[0];
        (layer.bias.clone(), only.output.clone(), only.activation.clone())
    };
    let biased = || matmul().node("Add", &["b", "m"], "a");
    let b = Some("b".to_owned());
    assert_eq!(found(&biased().node("Relu", &["a"], "y").layer()), (b.clone(), "a".into(), Activation::Relu));
    let twice = biased().node("Relu", &["a"], "r").node("Sub", &["r", "a"], "y");
    assert_eq!(found(&twice.layer()), (b, "a".into(), Activation::Identity));
    let branches = biased().node("Sub", &["a", "m"], "y");
    assert_eq!(found(&branches.layer()), (None, "m".into(), Activation::Identity));
    let exposed = matmul().node("Relu", &["m"], "y").model(&["y", "m"]);
    assert_eq!(list_layers(&exposed).unwrap().0[0].uses[0].activation, Activation::Identity);
}

#[test]
fn a_bias_that_is_computed_or_differs_between_positions_or_uses_leaves_no_activation() {
    let gemm = |bias: &str| {
        build().node("Gemm", &["x", "w", bias], "g").node("Relu", &["g"], "y").weight("w", &[4, 2])
    };
    let found = |layer: Layer| (layer.bias, layer.uses[0].activation.clone());
    assert_eq!(found(gemm("x2").layer()), (None, Activation::Identity));
    assert_eq!(found(gemm("b").weight("b", &[3, 2]).layer()), (None, Activation::Identity));
    assert_eq!(found(gemm("b").weight("b", &[1]).layer()), (Some("b".into()), Activation::Relu));
    let two = build()
        .node("Gemm", &["x", "w", "b1"], "g1")
        .node("Relu", &["g1"], "r")
        .node("Gemm", &["r", "w", "b2"], "g2")
        .node("Relu", &["g2"], "y");
    let two = two.weight("w", &[2, 2]).weight("b1", &[2]).weight("b2", &[2]).layer();
    assert_eq!(two.bias, None);
    assert!(two.uses.iter().all(|u| u.activation == Activation::Identity));
    assert_eq!(two.uses[1].output, "g2");
}

#[test]
fn patterns_that_resemble_an_activation_are_not_taken_for_it() {
    let conv = || build().node("MatMul", &["x", "w"], "c").weight("w", &[4, 2]);
    let scaled = conv()
        .constant("k", &[], vec![1.702])
        .node("Mul", &["c", "k"], "s")
        .node("Sigmoid", &["s"], "g")
        .node("Mul", &["c", "g"], "y");
    assert_eq!(scaled.layer().uses[0].activation, Activation::Identity);
    let leaking =
        conv().node("Sigmoid", &["c"], "s").node("Mul", &["c", "s"], "p").node("Sub", &["p", "s"], "y");
    assert_eq!(leaking.layer().uses[0].activation, Activation::Identity);
    let other = conv().node("Sigmoid", &["c"], "s").node("Mul", &["x2", "s"], "y");
    assert_eq!(
        other.layer().uses[0].activation,
        Activation::Sigmoid,
        "the Mul with another tensor is no SiLU"
    );
    let computed_bound = conv().node("Clip", &["c", "x2"], "y");
    assert_eq!(computed_bound.layer().uses[0].activation, Activation::Identity);
    let per_column = conv().weight("slope", &[3, 1]).node("PRelu", &["c", "slope"], "y");
    assert_eq!(per_column.layer().uses[0].activation, Activation::Identity);
}

#[test]
fn layer_names_are_unique() {
    let mut graph = build();
    for (input, weight, output) in [("x", "w1", "a"), ("a", "w2", "b"), ("b", "w3", "y")] {
        let mut same = node("MatMul", &[input, weight], output);
        same.name = Some("b".to_owned());
        graph = graph.with(same, []).weight(weight, &[2, 2]);
    }
    let (layers, _) = graph.list();
    let names: Vec<&str> = layers.iter().map(|l| l.name.as_str()).collect();
    assert_eq!(names, ["b", "b#2", "y"]);
}

#[test]
fn batch_norms_that_something_else_depends_on_stay() {
    let parameters = |b: Builder, variance: f32| {
        b.constant("g", &[2], vec![1.0; 2])
            .constant("o", &[2], vec![0.5; 2])
            .constant("m", &[2], vec![0.1; 2])
            .constant("v", &[2], vec![1.0, variance])
    };
    let norm = || node("BatchNormalization", &["c", "g", "o", "m", "v"], "y");
    let base =
        |variance: f32| parameters(build().node("Conv", &["x", "w"], "c").weight("w", &[2, 1, 1]), variance);
    let folds = |mut model: Model| fold_batch_norms(&mut model).unwrap().len();
    assert_eq!(folds(base(1.0).with(norm(), []).model(&["y"])), 1);
    assert_eq!(folds(base(1.0).with(norm(), []).model(&["y", "c"])), 0);
    assert_eq!(folds(base(1.0).with(norm(), [ints("training_mode", &[1])]).model(&["y"])), 0);
    assert_eq!(folds(base(1.0).with(norm(), []).node("Relu", &["c"], "r").model(&["y", "r"])), 0);
    let mut replaceable = base(1.0).with(norm(), []);
    replaceable.graph.input.push(info("v"));
    assert_eq!(folds(replaceable.model(&["y"])), 0);
    let mut broken = base(-1.0).with(norm(), []).model(&["y"]);
    let error = fold_batch_norms(&mut broken).unwrap_err().to_string();
    assert!(error.contains("channel 1") && error.contains("variance -1"), "{error}");
}
