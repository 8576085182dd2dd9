//! The node's reading of the model: layers, segments, and the sub-models it runs.
//!
//! Built from the model's graph alone; constants are fetched when a segment needs them and dropped with it.

use crate::{failure, transit};
use bytes::Bytes;
use halfstep_model::{Cut, Layer, Model, Segment, Tensor, cut, extract, list_layers};
use halfstep_work::{Failure, LayerId, Plan, Source};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

pub(crate) struct Program {
    model: Model,
    /// In plan order.
    pub(crate) layers: Vec<Layer>,
    pub(crate) cut: Cut,
}

impl Program {
    /// # Errors
    /// `Internal` if this node sees other layers or stages than the plan.
    pub(crate) fn new(plan: &Plan, source: &dyn Source) -> Result<Self, Failure> {
        let model = Model::from_bytes(source.program().map_err(failure::source)?).map_err(failure::model)?;
        let (listed, _) = list_layers(&model).map_err(failure::model)?;
        let mut by_name: BTreeMap<String, Layer> = listed.into_iter().map(|l| (l.name.clone(), l)).collect();
        let layers: Result<Vec<Layer>, Failure> = plan
            .layers
            .iter()
            .map(|entry| {
                by_name
                    .remove(&entry.name)
                    .filter(|l| (l.rows, l.cols, l.groups) == (entry.rows, entry.cols, entry.groups))
                    .ok_or_else(|| {
                        failure::internal(format!(
                            "layer `{}`: the graph disagrees with the plan",
                            entry.name
                        ))
                    })
            })
            .collect();
        let layers = layers?;
        let cut = cut(&model, &layers, &vec![true; layers.len()]).map_err(failure::model)?;
        if cut.segments.len() != plan.stages.len() {
            return Err(failure::internal(format!(
                "model: cut into {} segments, the plan has {} stages",
                cut.segments.len(),
                plan.stages.len()
            )));
        }
        Ok(Self { model, layers, cut })
    }

    pub(crate) fn segment(&self, index: usize) -> Result<&Segment, Failure> {
        let found = self.cut.segments.get(index);
        found.ok_or_else(|| {
            failure::internal(format!("segment {index}: there are {}", self.cut.segments.len()))
        })
    }

    /// The segment as a model of its own; `replace` overrides constants by name.
    pub(crate) fn sub_model(
        &self,
        segment: &Segment,
        source: &dyn Source,
        mut replace: BTreeMap<String, Tensor>,
    ) -> Result<Bytes, Failure> {
        let index = self.model.index();
        let mut names: BTreeSet<String> = BTreeSet::new();
        for node in &segment.nodes {
            let read = index.reads(*node).iter().map(|name| name.to_string());
            names.extend(read.filter(|name| self.model.has_initializer(name)));
        }
        for name in names {
            if let Entry::Vacant(vacant) = replace.entry(name) {
                let constant = source.constant(vacant.key()).map_err(failure::constant)?;
                vacant.insert(transit::tensor(&constant)?);
            }
        }
        extract(&self.model, &segment.nodes, &segment.inputs, &segment.outputs, &replace)
            .map_err(failure::model)
    }

    pub(crate) fn layer(&self, id: LayerId) -> &Layer {
        &self.layers[id.index()]
    }
}
