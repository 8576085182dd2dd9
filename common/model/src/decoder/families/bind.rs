//! Fits a decoder's names to the tensors of one checkpoint, and checks their shapes.
//!
//! Old checkpoints of GPT-2 and OPT were saved from the model without its head, whose names lack the first part.

use super::FamilyError;
use crate::decoder::{Decoder, Op};

impl Decoder {
    /// The decoder with its weights named as they are stored. Names of nodes stay.
    ///
    /// `shape`: of the tensor of that name, `None` if there is none.
    ///
    /// # Errors
    /// `Tensor` for the first that is missing or has another shape than the configuration says.
    pub fn bind(mut self, shape: impl Fn(&str) -> Option<Vec<usize>>) -> Result<Self, FamilyError> {
        if let Some(prefix) = absent_prefix(&self, &shape) {
            let names = self.nodes.iter_mut().flat_map(|node| node.op.constant_names());
            for name in names.filter(|name| name.starts_with(&prefix)) {
                name.drain(..prefix.len());
            }
        }
        for node in &self.nodes {
            for (tensor, expected) in node.op.constants(&self) {
                let found = shape(tensor);
                if found.as_ref() != Some(&expected) {
                    return Err(wrong(tensor, &expected, found, &shape));
                }
            }
        }
        Ok(self)
    }
}

fn wrong(
    tensor: &str,
    expected: &[usize],
    found: Option<Vec<usize>>,
    shape: &impl Fn(&str) -> Option<Vec<usize>>,
) -> FamilyError {
    let actual = match (found, fused_experts(tensor)) {
        (Some(found), _) => format!("shape {found:?}"),
        (None, Some(fused)) if shape(&fused).is_some() => {
            format!("all experts fused in `{fused}`: save the checkpoint with one matrix per expert")
        }
        _ => "no tensor of that name".to_owned(),
    };
    FamilyError::Tensor { tensor: tensor.to_owned(), expected: format!("shape {expected:?}"), actual }
}

/// Where an expert's matrix would be if the experts were stored as they are in memory.
fn fused_experts(tensor: &str) -> Option<String> {
    let (path, _) = tensor.split_once(".experts.")?;
    let path = path.strip_suffix("block_sparse_moe").map_or(path.to_owned(), |layer| format!("{layer}mlp"));
    Some(format!("{path}.experts.gate_up_proj"))
}

/// The first part of the embedding's name and its dot, if the embedding is stored without.
fn absent_prefix(decoder: &Decoder, shape: &impl Fn(&str) -> Option<Vec<usize>>) -> Option<String> {
    let weight = decoder.nodes.iter().find_map(|node| match &node.op {
        Op::Embed(embed) => Some(embed.weight.as_str()),
        _ => None,
    })?;
    let (_, rest) = weight.split_once('.')?;
    let stored_without = shape(weight).is_none() && shape(rest).is_some();
    stored_without.then(|| weight[..weight.len() - rest.len()].to_owned())
}
