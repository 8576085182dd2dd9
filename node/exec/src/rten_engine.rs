//! The embedded engine: rten, pure Rust.
//!
//! Every run has a thread pool of one thread, so a result never depends on the machine's core count; callers run
//! shards side by side instead. rten computes with f32 and i32: f64 becomes f32, i64 and bool become i32 (an i64 that
//! does not fit is an error, not a wrapped number).
//! Not here: other engines, batching (`segment`).

use crate::engine::{Engine, NodeNames, Session};
use crate::error::ExecError;
use crate::rten_repair::repaired;
use bytes::Bytes;
use halfstep_model::{Data, Model, Tensor};
use rten::{ModelOptions, RunOptions, ThreadPool, Value, ValueOrView, ValueView};
use std::sync::{Arc, Mutex, PoisonError};

const NAME: &str = "rten 0.27";

/// rten, with all its operators.
#[derive(Debug, Clone)]
pub struct RtenEngine {
    optimize: bool,
    pools: Arc<Pools>,
}

impl Default for RtenEngine {
    fn default() -> Self {
        Self::new()
    }
}

impl RtenEngine {
    /// The engine without graph optimisations: on convolutional networks they gain nothing measurable.
    pub fn new() -> Self {
        Self::with_optimization(false)
    }

    /// With or without graph optimisations (fusions, constant propagation); rten guarantees that they keep a model's
    /// inputs and outputs.
    pub fn with_optimization(optimize: bool) -> Self {
        Self { optimize, pools: Arc::default() }
    }
}

impl Engine for RtenEngine {
    fn name(&self) -> String {
        NAME.to_owned()
    }

    fn load(&self, model: Bytes) -> Result<Box<dyn Session>, ExecError> {
        let mut parsed = Model::from_bytes(model.clone())?;
        let nodes = NodeNames::of(&parsed);
        let mut options = ModelOptions::with_all_ops();
        options.enable_optimization(self.optimize).prepack_weights(true);
        let bytes = repaired(&mut parsed)?.unwrap_or(model);
        let model = options.load(bytes.to_vec()).map_err(|error| load_error(&error, &nodes))?;
        Ok(Box::new(RtenSession { model, nodes, pools: Arc::clone(&self.pools) }))
    }
}

fn load_error(error: &rten::LoadError, nodes: &NodeNames) -> ExecError {
    let node = error.node().unwrap_or_default().to_owned();
    let op_type = nodes.op_type(&node);
    refused(node, op_type, error)
}

/// rten has fewer operators than the other engine, which a reader of the message may not know of.
pub(crate) fn refused(node: String, op_type: String, reason: impl std::fmt::Display) -> ExecError {
    let reason = format!("{reason}; ONNX Runtime may run it: `--onnxruntime LIB`");
    ExecError::Load { engine: NAME.into(), node, op_type, reason }
}

/// Idle one-thread pools; a run takes one and brings it back.
#[derive(Debug, Default)]
struct Pools {
    idle: Mutex<Vec<Arc<ThreadPool>>>,
}

impl Pools {
    fn with<R>(&self, run: impl FnOnce(&Arc<ThreadPool>) -> R) -> R {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let pool = idle.unwrap_or_else(|| Arc::new(ThreadPool::with_num_threads(1)));
        let result = run(&pool);
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(pool);
        result
    }
}

struct RtenSession {
    model: rten::Model,
    nodes: NodeNames,
    pools: Arc<Pools>,
}

impl Session for RtenSession {
    fn run(&self, inputs: &[(&str, &Tensor)], outputs: &[&str]) -> Result<Vec<Tensor>, ExecError> {
        let fed = inputs
            .iter()
            .map(|(name, tensor)| Ok((self.id(name)?, to_rten(name, tensor)?)))
            .collect::<Result<Vec<_>, ExecError>>()?;
        let ids = outputs.iter().map(|name| self.id(name)).collect::<Result<Vec<_>, _>>()?;
        let values = self.pools.with(|pool| {
            let options = RunOptions::default().with_thread_pool(Some(Arc::clone(pool)));
            self.model.run(fed, &ids, Some(options))
        });
        let values = values.map_err(|error| self.run_error(&error))?;
        values.into_iter().zip(outputs).map(|(value, name)| from_rten(name, value)).collect()
    }
}

impl RtenSession {
    fn id(&self, name: &str) -> Result<rten::NodeId, ExecError> {
        self.model.find_node(name).ok_or_else(|| ExecError::Missing { name: name.to_owned() })
    }

    fn run_error(&self, error: &rten::RunError) -> ExecError {
        let node = error.node_path().into_iter().flatten().next_back().unwrap_or_default().to_owned();
        let op_type = self.nodes.op_type(&node);
        ExecError::Run { engine: NAME.into(), node, op_type, reason: error.to_string() }
    }
}

fn to_rten<'a>(name: &str, tensor: &'a Tensor) -> Result<ValueOrView<'a>, ExecError> {
    let shape = tensor.shape.as_slice();
    let value: Result<ValueOrView<'a>, String> = match &tensor.data {
        Data::F32(v) => ValueView::from_shape(shape, v.as_slice()).map(ValueOrView::from).map_err(text),
        Data::I32(v) => ValueView::from_shape(shape, v.as_slice()).map(ValueOrView::from).map_err(text),
        Data::I8(v) => ValueView::from_shape(shape, v.as_slice()).map(ValueOrView::from).map_err(text),
        Data::U8(v) => ValueView::from_shape(shape, v.as_slice()).map(ValueOrView::from).map_err(text),
        Data::F64(v) => owned(shape, v.iter().map(|x| *x as f32).collect::<Vec<f32>>()),
        Data::Bool(v) => owned(shape, v.iter().map(|x| i32::from(*x)).collect::<Vec<i32>>()),
        Data::I64(v) => owned(shape, narrow(name, v)?),
    };
    value.map_err(|reason| ExecError::Internal(format!("tensor `{name}`: {reason}")))
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn owned<T>(shape: &[usize], data: Vec<T>) -> Result<ValueOrView<'static>, String>
where
    Value: From<rten_tensor::Tensor<T>>,
{
    Value::from_shape(shape, data).map(ValueOrView::Value).map_err(text)
}

fn narrow(name: &str, values: &[i64]) -> Result<Vec<i32>, ExecError> {
    let narrow = |(index, value): (usize, &i64)| {
        i32::try_from(*value).map_err(|_| ExecError::IntegerRange {
            name: name.to_owned(),
            index,
            value: *value,
            engine: NAME.into(),
        })
    };
    values.iter().enumerate().map(narrow).collect()
}

fn from_rten(name: &str, value: Value) -> Result<Tensor, ExecError> {
    use rten_tensor::Layout;
    let (shape, data) = match value {
        Value::FloatTensor(t) => (t.shape().to_vec(), Data::F32(t.into_data())),
        Value::Int32Tensor(t) => (t.shape().to_vec(), Data::I32(t.into_data())),
        Value::Int8Tensor(t) => (t.shape().to_vec(), Data::I8(t.into_data())),
        Value::UInt8Tensor(t) => (t.shape().to_vec(), Data::U8(t.into_data())),
        other => {
            return Err(ExecError::Tensor {
                name: name.to_owned(),
                expected: "a dense tensor".into(),
                actual: format!("{:?}", other.dtype()),
            });
        }
    };
    Ok(Tensor::new(shape, data)?)
}
