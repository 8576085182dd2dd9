//! Files in and out: round trips, external data, and every kind of bad input.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use std::path::{Path, PathBuf};

use bytes::Bytes;
use halfstep_model::onnx::tensor_proto::DataLocation;
use halfstep_model::onnx::{OperatorSetIdProto, StringStringEntryProto, ValueInfoProto};
use halfstep_model::{
    GraphProto, Model, ModelError, ModelProto, NodeProto, Tensor, TensorProto, list_layers, normalize,
    skeleton,
};
use prost::Message;

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/fashion-mnist/model.onnx")
}

fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: Some(op.into()),
        name: Some(format!("n_{output}")),
        input: inputs.iter().map(|s| (*s).into()).collect(),
        output: vec![output.into()],
        ..Default::default()
    }
}

fn info(name: &str) -> ValueInfoProto {
    ValueInfoProto { name: Some(name.into()), ..Default::default() }
}

fn proto(nodes: Vec<NodeProto>, initializer: Vec<TensorProto>, output: &str) -> ModelProto {
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { domain: None, version: Some(17) }],
        graph: Some(GraphProto {
            node: nodes,
            initializer,
            input: vec![info("x")],
            output: vec![info(output)],
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn weight(name: &str, shape: &[usize]) -> TensorProto {
    let n: usize = shape.iter().product();
    Tensor::f32(shape.to_vec(), (0..n).map(|i| i as f32).collect()).unwrap().to_proto(name)
}

fn error(proto: ModelProto) -> String {
    Model::from_proto(proto).unwrap_err().to_string()
}

#[test]
fn example_reads_and_writes_back_equal_inline_and_external() {
    let model = Model::read(example()).unwrap();
    assert_eq!(model.inputs().len(), 1);
    let folder = tempfile::tempdir().unwrap();
    for limit in [u64::MAX, 0] {
        let path = folder.path().join("m.onnx");
        model.write_with_limit(&path, limit).unwrap();
        let data = path.with_file_name("m.onnx.data");
        assert_eq!(data.exists(), limit == 0);
        let back = Model::read(&path).unwrap();
        assert_eq!(back.graph().node, model.graph().node);
        for t in &model.graph().initializer {
            assert_eq!(back.tensor(t.name()).unwrap(), model.tensor(t.name()).unwrap());
        }
    }
    let raw = ModelProto::decode(Bytes::from(std::fs::read(folder.path().join("m.onnx")).unwrap())).unwrap();
    let mut external = 0;
    for t in raw.graph.unwrap().initializer {
        for e in t.external_data.iter().filter(|e| e.key() == "offset") {
            external += 1;
            assert_eq!(e.value().parse::<u64>().unwrap() % 4096, 0);
        }
    }
    assert!(external > 3);
}

#[test]
fn truncated_and_flipped_files_are_errors_or_models_but_never_panic() {
    let bytes = std::fs::read(example()).unwrap();
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed as usize
    };
    let mut failed = 0;
    for round in 0..600 {
        let mut bad = bytes.clone();
        // Most bytes are weights; half of the rounds aim at the start, where the structure is.
        let place = if round % 2 == 0 { next() % bad.len() } else { next() % 4096 };
        if round % 3 == 0 {
            bad.truncate(place);
        } else {
            bad[place] ^= 1 << (next() % 8);
        }
        match Model::from_bytes(Bytes::from(bad)) {
            Ok(mut model) => {
                normalize(&mut model);
                for t in model.graph().initializer.clone() {
                    let _ = model.tensor(t.name());
                }
                let _ = Model::from_bytes(skeleton(&model)).unwrap();
            }
            Err(_) => failed += 1,
        }
    }
    assert!(failed >= 150, "only {failed} of 600 were noticed");
}

#[test]
fn external_data_outside_the_folder_or_the_file_is_refused() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("in");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(outer.path().join("secret"), [0u8; 64]).unwrap();
    std::fs::write(folder.join("ok"), [0u8; 64]).unwrap();
    std::os::unix::fs::symlink(outer.path().join("secret"), folder.join("link")).unwrap();
    let absolute = outer.path().join("secret").display().to_string();
    let cases = [
        ("ok", "0", "16", None),
        ("./ok", "48", "16", None),
        ("../secret", "0", "16", Some("without `..`")),
        ("x/../../secret", "0", "16", Some("without `..`")),
        (absolute.as_str(), "0", "16", Some("inside the model's folder")),
        ("link", "0", "16", Some("symbolic link")),
        ("", "0", "16", Some("inside the model's folder")),
        ("gone", "0", "16", Some("cannot open")),
        (".", "0", "16", Some("regular file")),
        ("ok", "60", "16", Some("the file has 64")),
        ("ok", "18446744073709551615", "16", Some("the file has 64")),
        ("ok", "-1", "16", Some("whole number")),
        ("ok", "0", "12", Some("must hold 16 bytes")),
    ];
    for (location, offset, length, expect) in cases {
        let entry = |k: &str, v: &str| StringStringEntryProto { key: Some(k.into()), value: Some(v.into()) };
        let tensor = TensorProto {
            name: Some("w".into()),
            dims: vec![2, 2],
            data_type: Some(1),
            data_location: Some(DataLocation::External as i32),
            external_data: vec![
                entry("location", location),
                entry("offset", offset),
                entry("length", length),
            ],
            ..Default::default()
        };
        let p = proto(vec![node("MatMul", &["x", "w"], "y")], vec![tensor], "y");
        let path = folder.join("m.onnx");
        std::fs::write(&path, p.encode_to_vec()).unwrap();
        match (Model::read(&path), expect) {
            (Ok(_), None) => {}
            (Err(e), Some(words)) => {
                let text = e.to_string();
                assert!(text.contains(words) && text.contains("m.onnx"), "{location}: {text}");
            }
            (result, expect) => panic!("{location} {offset}: {result:?}, expected {expect:?}"),
        }
        assert!(Model::from_bytes(Bytes::from(p.encode_to_vec())).is_err());
    }
}

#[test]
fn bad_graphs_and_tensors_are_named() {
    let ok = || proto(vec![node("MatMul", &["x", "w"], "y")], vec![weight("w", &[2, 2])], "y");
    assert!(Model::from_proto(ok()).is_ok());
    let check = |change: &dyn Fn(&mut ModelProto), words: &str| {
        let mut p = ok();
        change(&mut p);
        let text = error(p);
        assert!(text.contains(words), "{text}");
    };
    let g = |p: &mut ModelProto| p.graph.take().unwrap();
    check(&|p| drop(g(p)), "no graph");
    for version in [10, 29] {
        check(&|p| p.opset_import[0].version = Some(version), "expected 11 to 28");
    }
    check(&|p| p.opset_import.clear(), "found none");
    let graph = |f: &'static dyn Fn(&mut GraphProto)| move |p: &mut ModelProto| f(p.graph.as_mut().unwrap());
    check(&graph(&|g| g.initializer[0].dims = vec![1 << 60]), "2^48");
    check(&graph(&|g| g.initializer[0].dims = vec![0, 1 << 60]), "2^48");
    check(&graph(&|g| g.initializer[0].dims = vec![-1, 4]), "negative");
    check(
        &graph(&|g| g.initializer[0].dims = vec![2, 3]),
        "must hold 24 bytes for its shape and type, but holds 16",
    );
    check(&graph(&|g| g.initializer.push(g.initializer[0].clone())), "`w`: produced twice");
    check(&graph(&|g| g.node.push(g.node[0].clone())), "`y`: produced twice");
    check(&graph(&|g| g.node[0].input[0] = "q".into()), "node `n_y` reads tensor `q`");
    check(&graph(&|g| g.output[0].name = Some("q".into())), "output list reads tensor `q`");
    check(&graph(&|g| g.node[0].input[0] = "y".into()), "cycle");
}

#[test]
fn unsorted_nodes_are_sorted() {
    let nodes = vec![node("Relu", &["b"], "y"), node("Relu", &["a"], "b"), node("Relu", &["x"], "a")];
    let model = Model::from_proto(proto(nodes, vec![], "y")).unwrap();
    let order: Vec<_> = model.graph().node.iter().map(|n| n.output[0].as_str()).collect();
    assert_eq!(order, ["a", "b", "y"]);
}

#[test]
fn typed_fields_and_half_floats_decode() {
    let t = |data_type, f: &dyn Fn(&mut TensorProto)| {
        let mut t = TensorProto { dims: vec![2], data_type: Some(data_type), ..Default::default() };
        f(&mut t);
        Tensor::from_proto(&t).unwrap()
    };
    let half = t(10, &|t| t.int32_data = vec![0x3c00, 0x8001]);
    assert_eq!(half.as_f32().unwrap(), [1.0, -(2f32.powi(-24))]);
    let half = t(10, &|t| t.int32_data = vec![0x7bff, 0xfc00]);
    assert_eq!(half.as_f32().unwrap(), [65504.0, f32::NEG_INFINITY]);
    let brain = t(16, &|t| t.raw_data = Some(Bytes::from_static(&[0x80, 0x3f, 0, 0xc0])));
    assert_eq!(brain.as_f32().unwrap(), [1.0, -2.0]);
    assert_eq!(t(7, &|t| t.int64_data = vec![-1, 5]).as_i64().unwrap(), [-1, 5]);
    let int8 = t(3, &|t| t.int32_data = vec![-3, 7]);
    assert_eq!(int8.data, halfstep_model::Data::I8(vec![-3, 7]));
}

#[test]
fn constants_behind_identity_transpose_reshape_become_initializers() {
    let mut constant = node("Constant", &[], "s");
    constant.attribute.push(halfstep_model::onnx::AttributeProto {
        name: Some("value_ints".into()),
        ints: vec![0, -1],
        ..Default::default()
    });
    let nodes = vec![
        constant,
        node("Identity", &["w"], "i"),
        node("Transpose", &["i"], "t"),
        node("Reshape", &["t", "s"], "r"),
        node("MatMul", &["x", "r"], "y"),
    ];
    let mut model = Model::from_proto(proto(nodes, vec![weight("w", &[2, 3, 2])], "y")).unwrap();
    normalize(&mut model);
    model.recheck().unwrap();
    let names: Vec<_> = model.graph().initializer.iter().map(|t| t.name()).collect();
    assert_eq!((model.graph().node.len(), names), (1, vec!["r"]));
    let r = model.tensor("r").unwrap();
    assert_eq!(r.shape, [2, 6]);
    // numpy: np.arange(12).reshape(2, 3, 2).T.reshape(2, 6)
    let expect = [0., 6., 2., 8., 4., 10., 1., 7., 3., 9., 5., 11.];
    assert_eq!(r.as_f32().unwrap(), expect);
    let again = model.proto().clone();
    normalize(&mut model);
    assert_eq!(*model.proto(), again);
}

#[test]
fn skeleton_keeps_shapes_and_refuses_data() {
    let p = proto(vec![node("MatMul", &["x", "w"], "y")], vec![weight("w", &[40, 40])], "y");
    let bytes = skeleton(&Model::from_proto(p).unwrap());
    assert!(bytes.len() < 1000);
    let model = Model::from_bytes(bytes).unwrap();
    assert_eq!(model.tensor_shape("w").unwrap(), [40, 40]);
    assert!(matches!(model.tensor("w"), Err(ModelError::DataLength { .. })));
}

/// Files of IR version 3 had to list every initializer as an input; from 4 on, one that is listed is a default that a
/// caller may replace.
#[test]
fn listed_initializers_are_constants_before_ir_version_4_and_defaults_from_then_on() {
    for (ir_version, constant) in [(3, true), (4, false), (8, false)] {
        let mut listed = proto(vec![node("MatMul", &["x", "w"], "y")], vec![weight("w", &[2, 3])], "y");
        listed.ir_version = Some(ir_version);
        listed.graph.as_mut().unwrap().input.push(info("w"));
        let model = Model::from_proto(listed).unwrap();
        let (layers, kept) = list_layers(&model).unwrap();
        assert_eq!(
            (layers.len(), kept.len()),
            if constant { (1, 0) } else { (0, 1) },
            "{ir_version}: {kept:?}"
        );
        assert_eq!(model.graph().input.len(), if constant { 1 } else { 2 }, "{ir_version}");
        assert_eq!(model.proto().ir_version(), ir_version.max(4));
    }
}
