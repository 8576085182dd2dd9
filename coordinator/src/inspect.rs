//! What is in a model: its interface, the layers that can be rounded, and those that cannot, with reasons.

use crate::{CoordinatorError, LanguageConfig, LanguageModel, Subject, prepare_model};
use halfstep_model::checkpoint::is_checkpoint;
use halfstep_model::decoder::{LOGITS, TOKENS};
use halfstep_model::{Dim, Layer, ValueInfo};
use halfstep_work::KeptLayer;
use std::path::Path;

/// One layer that can be rounded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedLayer {
    /// Name.
    pub name: String,
    /// Operator.
    pub op_type: String,
    /// Weight's name in the model.
    pub weight: String,
    /// Weight's shape in the model.
    pub weight_shape: Vec<usize>,
    /// Output channels.
    pub rows: usize,
    /// Inputs per group times kernel positions.
    pub cols: usize,
    /// Groups.
    pub groups: usize,
    /// What follows directly.
    pub activation: String,
    /// Nodes that share the weight.
    pub uses: usize,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Each `name type [dims]`.
    pub inputs: Vec<String>,
    /// Each `name type [dims]`.
    pub outputs: Vec<String>,
    /// Opset of the default domain, of an ONNX model.
    pub opset: Option<i64>,
    /// Layers that can be rounded.
    pub layers: Vec<ListedLayer>,
    /// Constant-weight layers that cannot.
    pub kept: Vec<KeptLayer>,
}

/// Reads a model and lists what is in it.
///
/// # Errors
/// A model that cannot be read.
pub fn inspect(path: &Path, fold_batch_norm: bool) -> Result<Listed, CoordinatorError> {
    if is_checkpoint(path) {
        let model = LanguageModel::open(path, &LanguageConfig::default())?;
        let vocabulary = model.decoder().vocabulary;
        let (inputs, outputs) =
            (format!("{TOKENS} int64 [n, T]"), format!("{LOGITS} float [n * T, {vocabulary}]"));
        return listed_from(&Subject::Language(Box::new(model)), vec![inputs], vec![outputs], None);
    }
    let (model, _) = prepare_model(path, fold_batch_norm)?;
    let (inputs, outputs) = (model.inputs(), model.outputs());
    let interface = |infos: &[ValueInfo]| infos.iter().map(describe).collect::<Vec<_>>();
    let opset = model.opset();
    let subject = Subject::Onnx(Box::new(model));
    listed_from(&subject, interface(&inputs), interface(&outputs), Some(opset))
}

fn listed_from(
    subject: &Subject,
    inputs: Vec<String>,
    outputs: Vec<String>,
    opset: Option<i64>,
) -> Result<Listed, CoordinatorError> {
    let (layers, unsupported) = subject.layers()?;
    Ok(Listed {
        inputs,
        outputs,
        opset,
        layers: layers.into_iter().map(listed).collect(),
        kept: unsupported
            .into_iter()
            .map(|u| KeptLayer { name: u.name, op_type: u.op_type, reason: u.reason })
            .collect(),
    })
}

fn listed(layer: Layer) -> ListedLayer {
    let activation = layer.uses.first().map_or(String::new(), |u| format!("{:?}", u.activation));
    ListedLayer {
        uses: layer.uses.len(),
        name: layer.name,
        op_type: layer.op_type,
        weight: layer.weight,
        weight_shape: layer.weight_shape,
        rows: layer.rows,
        cols: layer.cols,
        groups: layer.groups,
        activation,
    }
}

fn describe(value: &ValueInfo) -> String {
    let dims: Vec<String> = value
        .dims
        .iter()
        .map(|dim| match dim {
            Dim::Known(size) => size.to_string(),
            Dim::Symbol(name) => name.clone(),
            Dim::Unknown => "?".into(),
        })
        .collect();
    format!("{} {:?} [{}]", value.name, value.dtype, dims.join(", "))
}
