//! A checked ONNX model: its interface, its initializers, and how to change them.
//!
//! Not here: files (`read`, `write`), what was checked (`validate`), layers (`layers`).

use std::path::Path;

use bytes::Bytes;

use crate::onnx::tensor_shape_proto::dimension;
use crate::onnx::type_proto;
use crate::onnx::{GraphProto, ModelProto, TensorProto, ValueInfoProto};
use crate::{Dtype, GraphIndex, ModelError, Tensor, read, tensor, validate, write};

/// Oldest opset understood.
pub const OPSET_MIN: i64 = 11;
/// Newest opset understood.
pub const OPSET_MAX: i64 = 28;

/// One dimension of an interface tensor.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dim {
    /// Fixed by the model.
    Known(usize),
    /// Named; equal names are equal sizes.
    Symbol(String),
    /// Not stated.
    Unknown,
}

/// A tensor of the model's interface.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ValueInfo {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions; empty for a scalar and where the model states no shape.
    pub dims: Vec<Dim>,
}

/// An ONNX model that passed every check of [`Model::read`].
///
/// Cloning is cheap: tensor data is shared. The graph's nodes are in topological order.
#[derive(Clone)]
pub struct Model {
    proto: ModelProto,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("graph", &self.graph().name())
            .field("nodes", &self.graph().node.len())
            .field("initializers", &self.graph().initializer.len())
            .finish()
    }
}

impl Model {
    /// Reads a model file and the external data files beside it. Tensor data stays in the mapped files, which
    /// must not change while the model lives.
    ///
    /// # Errors
    /// `InFile` with the file and the fault: not ONNX, an opset outside 11 to 28, a graph that is not well formed,
    /// a tensor whose data does not fit its shape, external data outside the model's folder; `Io`.
    pub fn read(path: impl AsRef<Path>) -> Result<Model, ModelError> {
        read::model(path.as_ref())
    }

    /// Decodes a model from memory; tensor data stays in `bytes`. External data is refused.
    ///
    /// # Errors
    /// As [`Model::read`], without `InFile`.
    pub fn from_bytes(bytes: Bytes) -> Result<Model, ModelError> {
        Model::from_proto(read::decode(bytes)?)
    }

    /// Checks a model and sorts its nodes topologically.
    ///
    /// # Errors
    /// As [`Model::from_bytes`].
    pub fn from_proto(mut proto: ModelProto) -> Result<Model, ModelError> {
        validate::model(&mut proto)?;
        Ok(Model { proto })
    }

    /// Writes the model to `path`, and its weights to `<path>.data` where the whole would pass 2 GiB. Files are
    /// synced to disk. The caller names a path nobody reads yet (a staging folder).
    ///
    /// # Errors
    /// `Io`; `TooLarge`.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), ModelError> {
        write::model(&self.proto, path.as_ref(), write::INLINE_BYTES_MAX)
    }

    /// [`Model::write`] with another limit, in bytes, for a file without external data.
    ///
    /// # Errors
    /// As [`Model::write`]; `TooLarge` does not depend on `inline_bytes_max`.
    pub fn write_with_limit(&self, path: impl AsRef<Path>, inline_bytes_max: u64) -> Result<(), ModelError> {
        write::model(&self.proto, path.as_ref(), inline_bytes_max)
    }

    /// The whole message.
    pub fn proto(&self) -> &ModelProto {
        &self.proto
    }

    /// The main graph.
    pub fn graph(&self) -> &GraphProto {
        let graph = self.proto.graph.as_ref();
        graph.expect("a model without a graph does not pass validation, and none is ever removed")
    }

    /// The main graph, to be changed with care: call [`Model::recheck`] afterwards.
    pub fn graph_mut(&mut self) -> &mut GraphProto {
        let graph = self.proto.graph.as_mut();
        graph.expect("a model without a graph does not pass validation, and none is ever removed")
    }

    /// The whole message, for rewrites that touch opset imports. The graph must stay.
    pub(crate) fn proto_mut(&mut self) -> &mut ModelProto {
        &mut self.proto
    }

    /// Checks the model again after a rewrite, and sorts it.
    ///
    /// # Errors
    /// As [`Model::from_bytes`].
    pub fn recheck(&mut self) -> Result<(), ModelError> {
        validate::model(&mut self.proto)
    }

    /// Who produces and who reads each tensor.
    pub fn index(&self) -> GraphIndex<'_> {
        GraphIndex::new(self.graph())
    }

    /// The tensors a caller must supply, in order: graph inputs that no initializer backs.
    pub fn inputs(&self) -> Vec<ValueInfo> {
        let inputs = self.graph().input.iter();
        inputs.filter(|i| !self.has_initializer(i.name())).map(value_info).collect()
    }

    /// The tensors the model computes, in order.
    pub fn outputs(&self) -> Vec<ValueInfo> {
        self.graph().output.iter().map(value_info).collect()
    }

    /// Version of the standard operators.
    pub fn opset(&self) -> i64 {
        validate::opset(&self.proto).unwrap_or(OPSET_MIN)
    }

    /// Whether the model is a skeleton: made by [`crate::skeleton`], large weights left out.
    pub fn is_skeleton(&self) -> bool {
        validate::is_skeleton(&self.proto)
    }

    /// Whether an initializer has that name.
    pub fn has_initializer(&self, name: &str) -> bool {
        self.initializer(name).is_some()
    }

    /// The initializer of that name, as stored.
    pub fn initializer(&self, name: &str) -> Option<&TensorProto> {
        let initializers = &self.graph().initializer;
        initializers.iter().find(|t| t.name() == name)
    }

    /// Shape of an initializer; its data is not looked at.
    ///
    /// # Errors
    /// `NoInitializer`.
    pub fn tensor_shape(&self, name: &str) -> Result<Vec<usize>, ModelError> {
        tensor::shape(self.stored(name)?)
    }

    /// An initializer, decoded. Half-width floats become f32.
    ///
    /// # Errors
    /// `NoInitializer`; `Dtype` for types [`crate::Data`] cannot hold; `DataLength` in a skeleton.
    pub fn tensor(&self, name: &str) -> Result<Tensor, ModelError> {
        Tensor::from_proto(self.stored(name)?)
    }

    fn stored(&self, name: &str) -> Result<&TensorProto, ModelError> {
        self.initializer(name).ok_or_else(|| ModelError::NoInitializer { tensor: name.to_owned() })
    }

    /// Replaces an initializer, or adds one. The element type becomes float.
    ///
    /// # Errors
    /// `DataLength`, `Dims` if `data` does not fit `shape`.
    pub fn set_f32(&mut self, name: &str, shape: &[usize], data: Vec<f32>) -> Result<(), ModelError> {
        self.set_tensor(name, &Tensor::f32(shape.to_vec(), data)?);
        Ok(())
    }

    /// Replaces an initializer, or adds one.
    pub fn set_tensor(&mut self, name: &str, tensor: &Tensor) {
        self.set_initializer(tensor.to_proto(name));
    }

    /// Replaces the initializer of the same name, or adds it.
    pub fn set_initializer(&mut self, tensor: TensorProto) {
        // Before IR version 4 every initializer had to be a graph input as well.
        self.proto.ir_version = Some(self.proto.ir_version().max(4));
        let initializers = &mut self.graph_mut().initializer;
        match initializers.iter_mut().find(|t| t.name() == tensor.name()) {
            Some(slot) => *slot = tensor,
            None => initializers.push(tensor),
        }
    }
}

fn value_info(info: &ValueInfoProto) -> ValueInfo {
    let tensor_type = match info.r#type.as_ref().and_then(|t| t.value.as_ref()) {
        Some(type_proto::Value::TensorType(tensor)) => Some(tensor),
        _ => None,
    };
    let shape = tensor_type.and_then(|t| t.shape.as_ref());
    ValueInfo {
        name: info.name().to_owned(),
        dtype: Dtype::from_onnx(tensor_type.map_or(0, |t| t.elem_type())),
        dims: shape.map_or(Vec::new(), |s| s.dim.iter().map(|d| dim(d.value.as_ref())).collect()),
    }
}

fn dim(value: Option<&dimension::Value>) -> Dim {
    match value {
        Some(dimension::Value::DimValue(v)) => usize::try_from(*v).map_or(Dim::Unknown, Dim::Known),
        Some(dimension::Value::DimParam(name)) if !name.is_empty() => Dim::Symbol(name.clone()),
        _ => Dim::Unknown,
    }
}
