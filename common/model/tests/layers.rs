//! Layers, geometry, layouts, activations and folding against what ONNX Runtime computed (`goldens/make.py`).
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop")]

mod golden;

use golden::{activate, assert_close, cases, evaluate, load, only_layer};
use halfstep_model::{Activation, Unfold, WeightLayout, fold_batch_norms, list_layers};

#[test]
fn each_layer_in_matrix_form_computes_what_onnx_runtime_computes() {
    for case in cases(&["conv", "gemm", "matmul"]) {
        let (model, golden) = load(&case);
        let layer = only_layer(&model);
        assert_eq!(layer.uses[0].output, "y", "{case}");
        assert_eq!(layer.uses[0].input, "x", "{case}");
        assert_eq!(
            layer.uses[0].activation,
            Activation::Identity,
            "{case}: a graph output has no activation"
        );
        let expected_bias = model.has_initializer("b").then(|| "b".to_owned());
        assert_eq!(layer.bias, expected_bias, "{case}");
        assert_close(&evaluate(&model, &layer, &golden.inputs["x"]), &golden.outputs["y"], &case);
    }
}

#[test]
fn activations_are_recognised_and_compute_what_onnx_runtime_computes() {
    use Activation as A;
    let slope = |case: &str| load(case).0.tensor("s").unwrap().as_f32().unwrap().to_vec();
    let expected = |case: &str| match case.trim_start_matches("activation_") {
        "relu" => A::Relu,
        "relu6_clip" => A::Clip { min: 0.0, max: 6.0 },
        "clip_max_only" => A::Clip { min: f32::MIN, max: 0.5 },
        "leaky_relu" => A::LeakyRelu { slope: 0.2 },
        "prelu" | "prelu_scalar" => A::PRelu { slope: slope(case) },
        "sigmoid" => A::Sigmoid,
        "tanh" => A::Tanh,
        "silu" => A::Silu,
        "gelu_tanh" | "gelu_tanh_pattern" => A::GeluTanh,
        name if name.starts_with("hard_swish") => A::HardSwish,
        name if name.starts_with("gelu") => A::Gelu,
        other => panic!("no expectation for {other}"),
    };
    for case in cases(&["activation"]) {
        let (model, golden) = load(&case);
        let layer = only_layer(&model);
        let found = &layer.uses[0].activation;
        assert_eq!(*found, expected(&case), "{case}");
        assert_eq!(layer.uses[0].output, "c", "{case}");
        let c = evaluate(&model, &layer, &golden.inputs["x"]);
        assert_close(&activate(found, &c), &golden.outputs["y"], &case);
    }
}

#[test]
fn folding_keeps_what_onnx_runtime_computes() {
    for case in cases(&["bn_conv", "bn_gemm"]) {
        let (mut model, golden) = load(&case);
        let folded = fold_batch_norms(&mut model).unwrap();
        assert_eq!(folded.len(), 1, "{case}");
        assert_eq!(model.graph().node.len(), 1, "{case}");
        let mut left: Vec<&str> = model.graph().initializer.iter().map(|t| t.name()).collect();
        left.sort_unstable();
        let layer = only_layer(&model);
        let bias = layer.bias.clone().unwrap();
        let mut expected = [bias.as_str(), "w"];
        expected.sort_unstable();
        assert_eq!(left, expected, "{case}: parameters of the batch normalisation are gone");
        assert_eq!(layer.uses[0].output, "y", "{case}");
        assert_close(&evaluate(&model, &layer, &golden.inputs["x"]), &golden.outputs["y"], &case);
        assert!(fold_batch_norms(&mut model).unwrap().is_empty(), "{case}: folding again changes nothing");
    }
}

/// Also where the golden's own Add is in between: one Add of the bias stays.
#[test]
fn folding_into_a_matmul_keeps_what_onnx_runtime_computes() {
    for case in cases(&["bn_matmul"]) {
        let (mut model, golden) = load(&case);
        assert_eq!(fold_batch_norms(&mut model).unwrap().len(), 1, "{case}");
        let ops: Vec<&str> = model.graph().node.iter().map(|node| node.op_type()).collect();
        assert_eq!((ops, model.graph().initializer.len()), (vec!["MatMul", "Add"], 2), "{case}");
        let layer = only_layer(&model);
        assert_eq!((layer.uses[0].output.as_str(), layer.bias.is_some()), ("y", true), "{case}");
        assert_close(&evaluate(&model, &layer, &golden.inputs["x"]), &golden.outputs["y"], &case);
        assert!(fold_batch_norms(&mut model).unwrap().is_empty(), "{case}: folding again changes nothing");
    }
}

#[test]
fn a_batch_norm_along_another_dimension_is_not_folded() {
    let (mut model, _) = load("bn_along_a_sequence");
    assert!(fold_batch_norms(&mut model).unwrap().is_empty());
}

#[test]
fn a_shared_weight_is_not_folded_and_is_one_layer_with_two_uses() {
    let (mut model, _) = load("bn_shared_weight");
    let before = model.proto().clone();
    assert!(fold_batch_norms(&mut model).unwrap().is_empty());
    assert_eq!(*model.proto(), before);

    let (model, _) = load("shared_weight");
    let layer = only_layer(&model);
    let uses: Vec<_> = layer.uses.iter().map(|u| (u.node, u.input.as_str(), u.output.as_str())).collect();
    assert_eq!(uses, [(0, "x", "m"), (2, "r", "y")]);
    assert_eq!(layer.uses[0].activation, Activation::Relu);
    assert_eq!(layer.uses[1].activation, Activation::Identity);
    assert_eq!((layer.layout, &layer.unfold), (WeightLayout::Transposed, &Unfold::Rows));
}

#[test]
fn layers_come_in_graph_order() {
    let (model, _) = load("qdq_opset21");
    let (layers, unsupported) = list_layers(&model).unwrap();
    assert_eq!(unsupported, []);
    let names: Vec<&str> = layers.iter().map(|l| l.weight.as_str()).collect();
    assert_eq!(names, ["cw", "mw", "gw"]);
    assert_eq!(layers[0].uses[0].activation, Activation::Relu);
}
