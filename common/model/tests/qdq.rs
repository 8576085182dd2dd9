//! Writing rounded weights: what DequantizeLinear makes of the integers is exactly the on-grid weight.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop")]

#[expect(dead_code, reason = "other tests need the rest")]
mod golden;

use golden::{evaluate, load, only_layer};
use halfstep_model::qdq::{RoundedLayer, set_on_grid, to_qdq};
use halfstep_model::{Layer, Model, ModelProto, NodeProto, list_layers, onnx::TensorProto};
use halfstep_quant::{Encodings, Granularity, GridSpec, RangeEstimator, Scheme, estimate};

fn round(
    model: &Model,
    layer: &Layer,
    bits: u8,
    scheme: Scheme,
    granularity: Granularity,
) -> (Encodings, Vec<i32>) {
    let weight = model.tensor(&layer.weight).unwrap();
    let w = layer.layout.to_matrix(&layer.weight_shape, weight.as_f32().unwrap()).unwrap();
    let spec = GridSpec { bits, scheme, granularity, range: RangeEstimator::MinMax };
    let encodings = estimate(&spec, &w, layer.rows, layer.cols, None).unwrap();
    let q = encodings.quantize_nearest(&w);
    (encodings, q)
}

fn with_opset(model: &Model, version: i64) -> Model {
    let mut proto: ModelProto = model.proto().clone();
    proto.opset_import[0].version = Some(version);
    Model::from_proto(proto).unwrap()
}

fn integers(tensor: &TensorProto) -> Vec<i64> {
    let raw = tensor.raw_data.as_ref().unwrap();
    let count: i64 = tensor.dims.iter().product();
    let nibble = |i: i64| i64::from(raw[(i / 2) as usize] >> (4 * (i % 2)) & 15);
    let pair = |i: i64| [raw[2 * i as usize], raw[2 * i as usize + 1]];
    let one = |i: i64| match tensor.data_type() {
        2 => i64::from(raw[i as usize]),
        3 => i64::from(raw[i as usize].cast_signed()),
        4 => i64::from(u16::from_le_bytes(pair(i))),
        5 => i64::from(i16::from_le_bytes(pair(i))),
        21 => nibble(i),
        22 => nibble(i) - if nibble(i) >= 8 { 16 } else { 0 },
        other => panic!("data type {other}"),
    };
    (0..count).map(one).collect()
}

/// DequantizeLinear as the ONNX operator text defines it.
fn dequantize(model: &Model, node: &NodeProto) -> Vec<f32> {
    let stored = |i: usize| model.initializer(&node.input[i]).unwrap();
    let attribute = |name: &str| node.attribute.iter().find(|a| a.name() == name).map(|a| a.i() as usize);
    let (x, zero_point) = (stored(0), integers(stored(2)));
    let scale = model.tensor(&node.input[1]).unwrap();
    assert_eq!(stored(0).data_type(), stored(2).data_type());
    let shape: Vec<usize> = x.dims.iter().map(|&d| d as usize).collect();
    let entry = |mut i: usize| {
        let mut place = vec![0; shape.len()];
        for d in (0..shape.len()).rev() {
            (place[d], i) = (i % shape[d], i / shape[d]);
        }
        match (attribute("axis"), attribute("block_size")) {
            (None, None) => 0,
            (Some(axis), None) => place[axis],
            (Some(axis), Some(block)) => {
                place[axis] /= block;
                place.iter().zip(&scale.shape).fold(0, |index, (p, d)| index * d + p)
            }
            (None, Some(_)) => panic!("blocks need an axis"),
        }
    };
    let scales = scale.as_f32().unwrap();
    let values = integers(x);
    (0..values.len()).map(|i| (values[i] - zero_point[entry(i)]) as f32 * scales[entry(i)]).collect()
}

/// Expected: the container's data type, or a part of the note that says why weights stay float.
enum Expect {
    Stored(i32),
    Float(&'static str),
}

fn check(
    case: &str,
    opset: i64,
    weight: &str,
    bits: u8,
    scheme: Scheme,
    granularity: Granularity,
    expect: Expect,
) {
    let about = format!("{case} opset {opset} {weight} {bits} {scheme} {granularity:?}");
    let model = with_opset(&load(case).0, opset);
    let layers = list_layers(&model).unwrap().0;
    let layer = layers.iter().find(|l| l.weight == weight).unwrap();
    let (encodings, q) = round(&model, layer, bits, scheme, granularity);
    let mut on_grid = model.clone();
    set_on_grid(&mut on_grid, layer, &q, &encodings).unwrap();
    let rounded = on_grid.tensor(weight).unwrap();
    let (written, notes) = to_qdq(&model, &[RoundedLayer { layer, encodings: &encodings, q: &q }]).unwrap();
    match expect {
        Expect::Float(reason) => {
            assert!(notes.len() == 1 && notes[0].contains(reason), "{about}: {notes:?}");
            assert_eq!(written.tensor(weight).unwrap(), rounded, "{about}");
            assert_eq!(written.graph().node.len(), model.graph().node.len(), "{about}");
        }
        Expect::Stored(data_type) => {
            let node = &written.graph().node[0];
            assert_eq!((node.op_type(), node.output[0].as_str()), ("DequantizeLinear", weight), "{about}");
            assert_eq!(written.initializer(&node.input[0]).unwrap().data_type(), data_type, "{about}");
            assert!(!written.has_initializer(weight), "{about}");
            assert_eq!(dequantize(&written, node), rounded.as_f32().unwrap(), "{about}");
            let narrow = matches!((data_type, bits), (21 | 22, 4) | (2 | 3, 8) | (4 | 5, 16));
            assert_eq!(notes.is_empty(), narrow, "{about}: {notes:?}");
        }
    }
}

#[test]
fn integers_dequantize_to_the_on_grid_weights_or_a_note_says_why_they_are_not_written() {
    use Expect::{Float, Stored};
    use Granularity::{PerChannel, PerGroup, PerTensor};
    use Scheme::{Asymmetric, Symmetric, SymmetricStrict};
    let network = "qdq_opset21";
    let groups = PerGroup { group_size: 5 };
    for (weight, opset, bits, scheme, granularity, expect) in [
        ("cw", 21, 4, Symmetric, PerChannel, Stored(22)),
        ("cw", 21, 4, Asymmetric, PerChannel, Stored(21)),
        ("cw", 21, 3, SymmetricStrict, PerTensor, Stored(22)),
        ("cw", 17, 4, Symmetric, PerChannel, Stored(3)),
        ("cw", 13, 8, Asymmetric, PerChannel, Stored(2)),
        ("cw", 11, 8, Symmetric, PerTensor, Stored(3)),
        ("cw", 11, 8, Symmetric, PerChannel, Float("needs opset 13")),
        ("cw", 21, 16, Symmetric, PerChannel, Stored(5)),
        ("cw", 21, 16, Asymmetric, PerTensor, Stored(4)),
        ("cw", 17, 16, Symmetric, PerChannel, Float("16 bits need opset 21")),
        ("cw", 21, 4, Symmetric, groups, Float("convolution")),
        ("cw", 21, 4, Symmetric, PerGroup { group_size: 64 }, Stored(22)),
        ("mw", 21, 4, Symmetric, PerChannel, Stored(22)),
        ("mw", 21, 4, Asymmetric, groups, Stored(21)),
        ("mw", 21, 6, Symmetric, PerGroup { group_size: 4 }, Stored(3)),
        ("mw", 17, 4, Symmetric, groups, Float("need opset 21")),
        ("gw", 21, 4, Symmetric, PerGroup { group_size: 8 }, Stored(22)),
        ("gw", 21, 8, Asymmetric, groups, Stored(2)),
    ] {
        check(network, opset, weight, bits, scheme, granularity, expect);
    }
    check("conv_transpose1d", 17, "w", 8, Symmetric, PerChannel, Stored(3));
    check("conv_transpose2d_grouped", 17, "w", 8, Symmetric, PerTensor, Stored(3));
    check("conv_transpose2d_grouped", 17, "w", 8, Symmetric, PerChannel, Float("no single axis"));
}

#[test]
fn on_grid_weights_are_in_tensor_order() {
    for case in
        ["conv2d_grouped", "conv_transpose2d_grouped", "gemm", "gemm_alpha_beta_trans_b", "matmul_left"]
    {
        let (model, golden) = load(case);
        let layer = only_layer(&model);
        let (encodings, q) = round(&model, &layer, 16, Scheme::Symmetric, Granularity::PerChannel);
        let mut out = model.clone();
        set_on_grid(&mut out, &layer, &q, &encodings).unwrap();
        assert_ne!(out.tensor("w").unwrap(), model.tensor("w").unwrap(), "{case}: 16 bits are not float");
        let (actual, expected) = (evaluate(&out, &layer, &golden.inputs["x"]), &golden.outputs["y"]);
        for (a, e) in actual.data.iter().zip(&expected.data) {
            // 32768 steps per row: far above what a permuted weight would give.
            assert!((a - e).abs() < 5e-3, "{case}: {a} and {e}");
        }
    }
}

#[test]
fn a_shared_weight_is_dequantized_once_and_all_layers_are_written() {
    let model = load("shared_weight").0;
    let layer = only_layer(&model);
    let (encodings, q) = round(&model, &layer, 8, Scheme::Symmetric, Granularity::PerChannel);
    let (written, _) =
        to_qdq(&model, &[RoundedLayer { layer: &layer, encodings: &encodings, q: &q }]).unwrap();
    let dequantized = written.graph().node.iter().filter(|n| n.op_type() == "DequantizeLinear").count();
    assert_eq!(dequantized, 1);
    assert_eq!(written.graph().node.len(), model.graph().node.len() + 1);

    let model = load("qdq_opset21").0;
    let layers = list_layers(&model).unwrap().0;
    let solved: Vec<_> =
        layers.iter().map(|l| round(&model, l, 4, Scheme::Symmetric, Granularity::PerChannel)).collect();
    let rounded: Vec<_> = layers
        .iter()
        .zip(&solved)
        .map(|(layer, (encodings, q))| RoundedLayer { layer, encodings, q })
        .collect();
    let (written, notes) = to_qdq(&model, &rounded).unwrap();
    assert_eq!(notes, Vec::<String>::new());
    assert_eq!(written.graph().node[..3].iter().filter(|n| n.op_type() == "DequantizeLinear").count(), 3);
    assert!(written.proto().ir_version() >= 10);
}

#[test]
fn integers_that_do_not_fit_are_refused() {
    let model = load("gemm").0;
    let layer = only_layer(&model);
    let (encodings, q) = round(&model, &layer, 4, Scheme::Symmetric, Granularity::PerChannel);
    let refused = |encodings: &Encodings, q: &[i32], part: &str| {
        let error = set_on_grid(&mut model.clone(), &layer, q, encodings).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert!(to_qdq(&model, &[RoundedLayer { layer: &layer, encodings, q }]).is_err());
    };
    refused(&encodings, &q[1..], "23 integers");
    let mut wide = q.clone();
    wide[5] = 8;
    refused(&encodings, &wide, "integer 5 is 8, expected -8 to 7");
    refused(&encodings.slice_rows(0..2), &q, "[2, 6]");
}
