//! An engine that counts: how many calibration samples passed through each node.
//!
//! The proof that a job runs every operator at most once per sample and stream. Wraps any engine; a node is counted
//! for every run of a segment that contains it, by the largest leading dimension among the inputs.
//! Not here: timing.

use crate::engine::{Engine, Session};
use crate::error::ExecError;
use bytes::Bytes;
use halfstep_model::{Model, Tensor};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Samples that passed through each node, all streams together, by the name of the node's first output.
pub type NodeCounts = Arc<Mutex<BTreeMap<String, u64>>>;

/// Counts samples per node of everything an inner engine runs.
pub struct CountingEngine<E> {
    inner: E,
    counts: NodeCounts,
}

impl<E: Engine> CountingEngine<E> {
    /// Wraps an engine; read the counts through the returned handle.
    pub fn new(inner: E) -> (Self, NodeCounts) {
        let counts = NodeCounts::default();
        (Self { inner, counts: Arc::clone(&counts) }, counts)
    }
}

impl<E: Engine> Engine for CountingEngine<E> {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn load(&self, model: Bytes) -> Result<Box<dyn Session>, ExecError> {
        let parsed = Model::from_bytes(model.clone())?;
        let nodes = parsed.graph().node.iter().filter_map(|node| node.output.first().cloned()).collect();
        let inner = self.inner.load(model)?;
        Ok(Box::new(CountingSession { inner, nodes, counts: Arc::clone(&self.counts) }))
    }
}

struct CountingSession {
    inner: Box<dyn Session>,
    nodes: Vec<String>,
    counts: NodeCounts,
}

impl Session for CountingSession {
    fn run(&self, inputs: &[(&str, &Tensor)], outputs: &[&str]) -> Result<Vec<Tensor>, ExecError> {
        let samples = inputs.iter().filter_map(|(_, tensor)| tensor.shape.first()).max();
        let samples = samples.copied().unwrap_or(1) as u64;
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        for node in &self.nodes {
            *counts.entry(node.clone()).or_default() += samples;
        }
        drop(counts);
        self.inner.run(inputs, outputs)
    }
}
