//! What an ONNX engine must be able to do: load a sub-model from bytes, and run it.
//!
//! Not here: the engines (`rten_engine`, `ort_engine`), cutting models (`halfstep_model`).

use crate::ExecError;
use crate::carry::{Carried, round_to_bf16};
use bytes::Bytes;
use halfstep_model::decoder::CarryPrecision;
use halfstep_model::{Model, Tensor};
use std::collections::HashMap;
use std::sync::Arc;

/// Loads models.
pub trait Engine: Send + Sync {
    /// Name and version, for reports and messages.
    fn name(&self) -> String;

    /// Loads a serialized `ModelProto` with all its weights inside.
    ///
    /// # Errors
    /// `Load`, naming the operator and the node when the engine does not know it; `Model`.
    fn load(&self, model: Bytes) -> Result<Box<dyn Session>, ExecError>;

    /// Whether the engine has every operator of an outline ([`halfstep_model::outline`]): known before hours of work.
    ///
    /// # Errors
    /// As `load` of the nodes with their weights would.
    fn check(&self, outline: Bytes) -> Result<(), ExecError> {
        self.load(outline).map(drop)
    }
}

/// A loaded model. Concurrent runs are allowed, each is computed by one thread in a fixed order: results do not
/// depend on how many run at once.
pub trait Session: Send + Sync {
    /// Computes `outputs` (names among the model's outputs or inputs, in the order asked for).
    ///
    /// Integers may come back as I32 (rten computes with 32 bits); the same engine takes them as input again.
    ///
    /// # Errors
    /// `Run`, naming the node if the engine says; `Missing` for names the model does not have; `Tensor`,
    /// `IntegerRange` for inputs the engine cannot take.
    fn run(&self, inputs: &[(&str, &Tensor)], outputs: &[&str]) -> Result<Vec<Tensor>, ExecError>;

    /// [`Self::run`] from carries to carries: f32 outputs are rounded to what `precision` says.
    ///
    /// # Errors
    /// The same.
    fn run_carried(
        &self,
        inputs: &[(&str, &Carried)],
        outputs: &[&str],
        precision: CarryPrecision,
    ) -> Result<Vec<Carried>, ExecError> {
        let whole = inputs.iter().map(|(_, carried)| (*carried).clone().tensor());
        let whole = whole.collect::<Result<Vec<Arc<Tensor>>, _>>()?;
        let views: Vec<(&str, &Tensor)> =
            inputs.iter().zip(&whole).map(|((name, _), tensor)| (*name, tensor.as_ref())).collect();
        let round = |mut tensor: Tensor| {
            if precision == CarryPrecision::Bf16 {
                round_to_bf16(&mut tensor);
            }
            Carried::new(Arc::new(tensor), precision)
        };
        Ok(self.run(&views, outputs)?.into_iter().map(round).collect())
    }
}

/// Operators of a model's nodes, to complete engines' messages.
#[derive(Debug, Clone, Default)]
pub(crate) struct NodeNames {
    op_types: HashMap<String, String>,
}

impl NodeNames {
    /// Reads them; unnamed nodes go by their first output.
    pub(crate) fn of(model: &Model) -> Self {
        let nodes = model.graph().node.iter();
        Self { op_types: nodes.map(|node| (node_name(node), node.op_type().to_owned())).collect() }
    }

    /// The operator of a node; empty if there is no such node.
    pub(crate) fn op_type(&self, node: &str) -> String {
        self.op_types.get(node).cloned().unwrap_or_default()
    }

    /// The node and operator whose name occurs in an engine's message.
    pub(crate) fn find_in(&self, message: &str) -> (String, String) {
        let quoted = |name: &str| {
            [('"', '"'), ('\'', '\''), ('(', ')'), ('`', '`')]
                .iter()
                .any(|(a, b)| message.contains(&format!("{a}{name}{b}")))
        };
        let mut hits: Vec<_> = self.op_types.iter().filter(|(name, _)| quoted(name)).collect();
        hits.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        hits.first().map_or_else(Default::default, |(name, op)| ((*name).clone(), (*op).clone()))
    }
}

/// A node's name, or its first output.
pub(crate) fn node_name(node: &halfstep_model::NodeProto) -> String {
    match node.name() {
        "" => node.output.first().cloned().unwrap_or_default(),
        name => name.to_owned(),
    }
}
