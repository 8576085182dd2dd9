//! Engines: conversions, errors that name the operator, concurrent runs, counting. ONNX Runtime is tested when
//! `HALFSTEP_ONNXRUNTIME` names its library.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test may stop, and says what it skips"
)]

use bytes::Bytes;
use halfstep_exec::{CountingEngine, Engine, ExecError, OrtEngine, RtenEngine};
use halfstep_model::onnx::{
    AttributeProto, OperatorSetIdProto, TensorShapeProto, TypeProto, ValueInfoProto, attribute_proto,
    tensor_shape_proto, type_proto,
};
use halfstep_model::{
    Data, Dtype, GraphProto, Model, ModelProto, NodeProto, Tensor, extract, outline, skeleton,
};
use std::collections::BTreeMap;

fn info(name: &str, dtype: Dtype, rank: usize) -> ValueInfoProto {
    let dim = |i| tensor_shape_proto::Dimension {
        value: Some(tensor_shape_proto::dimension::Value::DimParam(format!("{name}{i}"))),
        ..Default::default()
    };
    let tensor = type_proto::Tensor {
        elem_type: Some(dtype.to_onnx()),
        shape: Some(TensorShapeProto { dim: (0..rank).map(dim).collect() }),
    };
    let value = type_proto::Value::TensorType(tensor);
    ValueInfoProto {
        name: Some(name.into()),
        r#type: Some(TypeProto { value: Some(value), ..Default::default() }),
        ..Default::default()
    }
}

fn node(name: &str, op: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        name: Some(name.into()),
        op_type: Some(op.into()),
        input: inputs.iter().map(|i| (*i).into()).collect(),
        output: vec![output.into()],
        ..Default::default()
    }
}

fn model(nodes: Vec<NodeProto>, inputs: &[(&str, Dtype)], output: (&str, Dtype)) -> Bytes {
    let model = Model::from_proto(ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { domain: None, version: Some(17) }],
        graph: Some(GraphProto {
            name: Some("g".into()),
            input: inputs.iter().map(|(name, dtype)| info(name, *dtype, 2)).collect(),
            output: vec![info(output.0, output.1, 2)],
            node: nodes,
            ..Default::default()
        }),
        ..Default::default()
    })
    .unwrap();
    let nodes: Vec<usize> = (0..model.graph().node.len()).collect();
    let inputs: Vec<String> = inputs.iter().map(|(name, _)| (*name).to_owned()).collect();
    extract(&model, &nodes, &inputs, &[output.0.to_owned()], &BTreeMap::new()).unwrap()
}

fn cast(to: Dtype) -> AttributeProto {
    AttributeProto {
        name: Some("to".into()),
        r#type: Some(attribute_proto::AttributeType::Int as i32),
        i: Some(i64::from(to.to_onnx())),
        ..Default::default()
    }
}

/// Runs `check` on rten, and on ONNX Runtime where there is one.
fn on_each(check: impl Fn(&dyn Engine)) {
    check(&RtenEngine::new());
    match std::env::var_os("HALFSTEP_ONNXRUNTIME") {
        Some(library) => check(&OrtEngine::open(library).unwrap_or_else(|e| panic!("{e}"))),
        None => eprintln!("skipped on ONNX Runtime: HALFSTEP_ONNXRUNTIME is not set"),
    }
}

fn tensor(shape: &[usize], data: Data) -> Tensor {
    Tensor::new(shape.to_vec(), data).unwrap()
}

#[test]
fn integers_and_doubles_pass_and_may_be_carried_on() {
    on_each(|engine| {
        let bytes = model(
            vec![node("n", "Add", &["a", "b"], "y")],
            &[("a", Dtype::I64), ("b", Dtype::I64)],
            ("y", Dtype::I64),
        );
        let session = engine.load(bytes).unwrap();
        let a = tensor(&[1, 2], Data::I64(vec![2_000_000, -5]));
        let sum = session.run(&[("a", &a), ("b", &a)], &["y"]).unwrap().remove(0);
        // A carry of this engine goes into the next segment, with a tensor of the declared type beside it.
        let again = session.run(&[("a", &sum), ("b", &a)], &["y"]).unwrap().remove(0);
        let wide: Vec<i64> = match again.data {
            Data::I64(v) => v,
            Data::I32(v) => v.iter().map(|x| i64::from(*x)).collect(),
            other => panic!("{other:?}"),
        };
        assert_eq!(wide, [6_000_000, -15]);
    });
}

#[test]
fn booleans_are_conditions() {
    on_each(|engine| {
        let nodes = vec![node("n", "Where", &["c", "a", "a2"], "y")];
        let bytes =
            model(nodes, &[("c", Dtype::Bool), ("a", Dtype::F32), ("a2", Dtype::F32)], ("y", Dtype::F32));
        let session = engine.load(bytes).unwrap();
        let c = tensor(&[1, 2], Data::Bool(vec![true, false]));
        let (a, b) = (tensor(&[1, 2], Data::F32(vec![1.0, 2.0])), tensor(&[1, 2], Data::F32(vec![3.0, 4.0])));
        let y = session.run(&[("c", &c), ("a", &a), ("a2", &b)], &["y"]).unwrap().remove(0);
        assert_eq!(y.as_f32().unwrap(), [1.0, 4.0]);
    });
}

#[test]
fn an_integer_beyond_32_bits_is_refused_not_wrapped() {
    let bytes = model(vec![node("n", "Neg", &["a"], "y")], &[("a", Dtype::I64)], ("y", Dtype::I64));
    let session = RtenEngine::new().load(bytes).unwrap();
    let a = tensor(&[1, 2], Data::I64(vec![1, i64::from(i32::MAX) + 1]));
    let error = session.run(&[("a", &a)], &["y"]).unwrap_err();
    assert!(matches!(&error, ExecError::IntegerRange { name, index: 1, .. } if name == "a"), "{error}");
}

#[test]
fn doubles_become_floats_in_rten() {
    let mut node = node("n", "Cast", &["a"], "y");
    node.attribute = vec![cast(Dtype::F32)];
    let session = RtenEngine::new().load(model(vec![node], &[("a", Dtype::F64)], ("y", Dtype::F32))).unwrap();
    let y = session.run(&[("a", &tensor(&[1, 1], Data::F64(vec![0.5])))], &["y"]).unwrap().remove(0);
    assert_eq!(y.as_f32().unwrap(), [0.5]);
}

#[test]
fn an_unknown_operator_is_named_with_its_node() {
    on_each(|engine| {
        let nodes = vec![node("fine", "Relu", &["a"], "b"), node("stranger", "Frobnicate", &["b"], "y")];
        let error = engine
            .load(model(nodes, &[("a", Dtype::F32)], ("y", Dtype::F32)))
            .err()
            .expect("no engine knows it");
        let message = error.to_string();
        assert!(message.contains("Frobnicate") && message.contains("stranger"), "{message}");
    });
}

#[test]
fn a_check_needs_no_weights_and_names_what_is_unknown() {
    on_each(|engine| {
        let graph = |last: &str| GraphProto {
            name: Some("g".into()),
            input: vec![info("x", Dtype::F32, 2)],
            output: vec![info("y", Dtype::F32, 2)],
            node: vec![node("product", "MatMul", &["x", "w"], "h"), node("last", last, &["h"], "y")],
            initializer: vec![Tensor::f32(vec![64, 64], vec![0.0; 4096]).unwrap().to_proto("w")],
            ..Default::default()
        };
        let check = |last: &str| {
            let model = Model::from_proto(ModelProto {
                ir_version: Some(8),
                opset_import: vec![OperatorSetIdProto { domain: None, version: Some(17) }],
                graph: Some(graph(last)),
                ..Default::default()
            })
            .unwrap();
            let bare = Model::from_bytes(skeleton(&model)).unwrap();
            engine.check(outline(&bare, &[0, 1]).unwrap())
        };
        check("Relu").unwrap();
        let message = check("Frobnicate").unwrap_err().to_string();
        assert!(message.contains("Frobnicate") && message.contains("last"), "{message}");
    });
}

#[test]
fn a_failing_operator_is_named_with_its_node() {
    on_each(|engine| {
        let bytes = model(
            vec![node("sum", "MatMul", &["a", "b"], "y")],
            &[("a", Dtype::F32), ("b", Dtype::F32)],
            ("y", Dtype::F32),
        );
        let session = engine.load(bytes).unwrap();
        let a = tensor(&[2, 3], Data::F32(vec![0.0; 6]));
        let error = session.run(&[("a", &a), ("b", &a)], &["y"]).unwrap_err();
        assert!(
            matches!(&error, ExecError::Run { node, op_type, .. } if node == "sum" && op_type == "MatMul"),
            "{error:?}"
        );
    });
}

#[test]
fn a_name_the_model_does_not_have_is_missing() {
    on_each(|engine| {
        let session = engine
            .load(model(vec![node("n", "Relu", &["a"], "y")], &[("a", Dtype::F32)], ("y", Dtype::F32)))
            .unwrap();
        let a = tensor(&[1, 1], Data::F32(vec![1.0]));
        let error = session.run(&[("a", &a)], &["z"]).unwrap_err();
        assert!(matches!(&error, ExecError::Missing { name } if name == "z"), "{error}");
    });
}

#[test]
fn concurrent_runs_give_the_same_bits() {
    on_each(|engine| {
        let bytes = model(
            vec![node("n", "MatMul", &["a", "a2"], "y")],
            &[("a", Dtype::F32), ("a2", Dtype::F32)],
            ("y", Dtype::F32),
        );
        let session = engine.load(bytes).unwrap();
        let a = tensor(&[130, 130], Data::F32((0..130 * 130).map(|i| (i as f32 * 0.37).sin()).collect()));
        let run = || session.run(&[("a", &a), ("a2", &a)], &["y"]).unwrap().remove(0);
        let expected = run();
        std::thread::scope(|scope| {
            let handles: Vec<_> = (0..6).map(|_| scope.spawn(run)).collect();
            handles.into_iter().for_each(|h| assert_eq!(h.join().unwrap(), expected));
        });
    });
}

#[test]
fn counting_adds_the_samples_of_every_run_to_each_node() {
    let (engine, counts) = CountingEngine::new(RtenEngine::new());
    let nodes = vec![node("n", "Relu", &["a"], "b"), node("m", "Neg", &["b"], "y")];
    let session = engine.load(model(nodes, &[("a", Dtype::F32)], ("y", Dtype::F32))).unwrap();
    for batch in [3, 2] {
        let a = tensor(&[batch, 1], Data::F32(vec![-1.0; batch]));
        session.run(&[("a", &a)], &["y"]).unwrap();
    }
    let found = counts.lock().unwrap().clone();
    assert_eq!(found, BTreeMap::from([("b".to_owned(), 5), ("y".to_owned(), 5)]));
}

#[test]
fn a_library_that_cannot_be_loaded_is_named() {
    let folder = std::env::temp_dir();
    for (path, what) in [(folder.join("no-such-onnxruntime.so"), "missing"), (file!().into(), "no library")] {
        let error = OrtEngine::open(&path).err().unwrap_or_else(|| panic!("{what}"));
        let text = error.to_string();
        assert!(
            matches!(error, ExecError::Library { .. }) && text.contains(path.to_str().unwrap()),
            "{text}"
        );
    }
}
