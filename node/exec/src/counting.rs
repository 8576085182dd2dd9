//! An engine that counts: how many calibration samples passed through each node.
//!
//! The proof that a job runs every operator at most once per sample and stream. Wraps any engine; a node is counted
//! for every run of a segment that contains it.
//! Not here: timing.

use crate::engine::{Engine, Session, node_name};
use crate::error::ExecError;
use bytes::Bytes;
use halfstep_model::{Model, Tensor};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

type Counts = Arc<Mutex<BTreeMap<String, u64>>>;

/// Counts samples per node of everything an inner engine runs.
pub struct CountingEngine<E> {
    inner: E,
    counts: Counts,
}

impl<E: Engine> CountingEngine<E> {
    /// Wraps an engine; all counts are 0.
    pub fn new(inner: E) -> Self {
        Self { inner, counts: Counts::default() }
    }

    /// Samples that passed each node so far, all streams together. Nodes without a name go by their first output.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl<E: Engine> Engine for CountingEngine<E> {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn load(&self, model: Bytes) -> Result<Box<dyn Session>, ExecError> {
        let nodes = Model::from_bytes(model.clone())?.graph().node.iter().map(node_name).collect();
        let inner = self.inner.load(model)?;
        Ok(Box::new(CountingSession { inner, nodes, counts: Arc::clone(&self.counts) }))
    }
}

struct CountingSession {
    inner: Box<dyn Session>,
    nodes: Vec<String>,
    counts: Counts,
}

impl Session for CountingSession {
    /// Without a sample count, the first input's leading dimension is taken for it.
    fn run(&self, inputs: &[(&str, &Tensor)], outputs: &[&str]) -> Result<Vec<Tensor>, ExecError> {
        let samples = inputs.first().and_then(|(_, tensor)| tensor.shape.first()).copied().unwrap_or(1);
        self.run_batch(samples, inputs, outputs)
    }

    fn run_batch(
        &self,
        samples: usize,
        inputs: &[(&str, &Tensor)],
        outputs: &[&str],
    ) -> Result<Vec<Tensor>, ExecError> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        for node in &self.nodes {
            *counts.entry(node.clone()).or_default() += samples as u64;
        }
        drop(counts);
        self.inner.run_batch(samples, inputs, outputs)
    }
}
