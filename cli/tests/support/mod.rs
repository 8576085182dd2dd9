//! Tiny ONNX files and data files, written byte by byte so that they can also be wrong.
//!
//! Not here: anything about Halfstep's own types.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test file uses a part; a test may stop"
)]

use std::io::Write;
use std::path::{Path, PathBuf};

use halfstep_model::onnx::tensor_shape_proto::{Dimension, dimension};
use halfstep_model::onnx::{
    AttributeProto, OperatorSetIdProto, TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};
use halfstep_model::{Data, GraphProto, ModelProto, NodeProto, Tensor, TensorProto};
use prost::Message;

/// ONNX's number of float32.
pub const FLOAT: i32 = 1;
/// ONNX's number of int64.
pub const INT64: i32 = 7;

/// A graph under construction; opset 17.
#[derive(Default, Clone)]
pub struct Graph {
    pub proto: GraphProto,
    domains: Vec<String>,
}

/// `dims`: `None` is the free dimension `N`.
pub fn value(name: &str, kind: i32, dims: &[Option<i64>]) -> ValueInfoProto {
    let dim = |dim: &Option<i64>| Dimension {
        denotation: None,
        value: Some(dim.map_or_else(|| dimension::Value::DimParam("N".into()), dimension::Value::DimValue)),
    };
    let tensor = type_proto::Tensor {
        elem_type: Some(kind),
        shape: Some(TensorShapeProto { dim: dims.iter().map(dim).collect() }),
    };
    let r#type = TypeProto { denotation: None, value: Some(type_proto::Value::TensorType(tensor)) };
    ValueInfoProto { name: Some(name.into()), r#type: Some(r#type), ..Default::default() }
}

/// Values without pattern, in -0.5..0.5, the same for the same salt.
pub fn noise(len: usize, salt: u64) -> Vec<f32> {
    let mut state = salt.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..len).map(|_| next()).collect()
}

impl Graph {
    /// Float input.
    pub fn input(mut self, name: &str, dims: &[Option<i64>]) -> Self {
        self.proto.input.push(value(name, FLOAT, dims));
        self
    }

    /// Int64 input.
    pub fn indices(mut self, name: &str, dims: &[Option<i64>]) -> Self {
        self.proto.input.push(value(name, INT64, dims));
        self
    }

    /// Float output of unstated shape.
    pub fn output(mut self, name: &str) -> Self {
        self.proto.output.push(value(name, FLOAT, &[None]));
        self.proto.output.last_mut().unwrap().r#type = None;
        self
    }

    /// A node named after its output.
    pub fn node(mut self, op: &str, inputs: &[&str], output: &str) -> Self {
        self.proto.node.push(NodeProto {
            op_type: Some(op.into()),
            name: Some(format!("node_{output}")),
            input: inputs.iter().map(|i| (*i).into()).collect(),
            output: vec![output.into()],
            ..Default::default()
        });
        self
    }

    /// Moves the last node to another operator domain.
    pub fn in_domain(mut self, domain: &str) -> Self {
        self.proto.node.last_mut().unwrap().domain = Some(domain.into());
        self.domains.push(domain.into());
        self
    }

    /// Gives the last node an attribute of integers.
    pub fn ints(mut self, name: &str, ints: &[i64]) -> Self {
        let attribute = AttributeProto {
            name: Some(name.into()),
            r#type: Some(7),
            ints: ints.to_vec(),
            ..Default::default()
        };
        self.proto.node.last_mut().unwrap().attribute.push(attribute);
        self
    }

    /// A float constant of noise.
    pub fn weight(self, name: &str, shape: &[usize]) -> Self {
        let salt = name.bytes().map(u64::from).sum();
        self.constant(name, shape, noise(shape.iter().product(), salt))
    }

    /// A float constant.
    pub fn constant(mut self, name: &str, shape: &[usize], values: Vec<f32>) -> Self {
        let tensor = Tensor::new(shape.to_vec(), Data::F32(values)).unwrap();
        self.proto.initializer.push(tensor.to_proto(name));
        self
    }

    /// A constant as written.
    pub fn raw(mut self, tensor: TensorProto) -> Self {
        self.proto.initializer.push(tensor);
        self
    }

    /// The file's bytes; nothing is checked.
    pub fn bytes(self) -> Vec<u8> {
        let import = |domain: Option<String>, version| OperatorSetIdProto { domain, version: Some(version) };
        let mut opset_import = vec![import(None, 17)];
        opset_import.extend(self.domains.into_iter().map(|domain| import(Some(domain), 1)));
        let graph = GraphProto { name: Some("g".into()), ..self.proto };
        ModelProto { ir_version: Some(8), opset_import, graph: Some(graph), ..Default::default() }
            .encode_to_vec()
    }

    /// Writes the file.
    pub fn write(self, path: &Path) -> PathBuf {
        std::fs::write(path, self.bytes()).unwrap();
        path.into()
    }
}

/// A `.npy` file of any claim and any content.
pub fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    while (header.len() + 11) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

/// `(2, 3, )`
fn tuple(shape: &[usize]) -> String {
    format!("({})", shape.iter().map(|d| format!("{d}, ")).collect::<String>())
}

/// A float array.
pub fn floats(shape: &[usize], values: &[f32]) -> Vec<u8> {
    npy("<f4", &tuple(shape), &values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
}

/// An int64 array.
pub fn integers(shape: &[usize], values: &[i64]) -> Vec<u8> {
    npy("<i8", &tuple(shape), &values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
}

/// Writes arrays into one `.npz`.
pub fn write_npz(path: &Path, arrays: &[(&str, Vec<u8>)]) -> PathBuf {
    let mut zip = zip::ZipWriter::new(std::fs::File::create(path).unwrap());
    for (name, bytes) in arrays {
        zip.start_file(format!("{name}.npy"), zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
    path.into()
}
