//! One attempt at one lease: what it may ask others for, who watches it, what it has fetched.

use crate::failure;
use bytes::Bytes;
use halfstep_work::{Failure, FailureClass, Grant, Held, Holding, Source, Wanted, Watch};
use std::sync::atomic::{AtomicU64, Ordering};

/// See the module.
pub(crate) struct Attempt<'a> {
    pub(crate) grant: &'a Grant,
    watch: &'a dyn Watch,
    fetched: AtomicU64,
}

impl<'a> Attempt<'a> {
    pub(crate) fn new(grant: &'a Grant, watch: &'a dyn Watch) -> Self {
        Self { grant, watch, fetched: AtomicU64::new(0) }
    }

    /// Something has moved.
    pub(crate) fn progress(&self) {
        self.watch.progress();
    }

    /// Between two steps: something has moved.
    ///
    /// # Errors
    /// `Cancelled` if the task should stop.
    pub(crate) fn step(&self) -> Result<(), Failure> {
        self.watch.progress();
        match self.watch.cancelled() {
            true => Err(Failure::new(FailureClass::Cancelled, "the lease was revoked")),
            false => Ok(()),
        }
    }

    /// Holdings of this kind, in the order given, and whether this node is the holder.
    pub(crate) fn holdings<'b, T>(
        &'b self,
        pick: impl Fn(&'b Held) -> Option<T>,
    ) -> impl Iterator<Item = (&'b Holding, bool, T)> {
        let own = self.grant.lease.node;
        let all = self.grant.holdings.iter();
        all.filter_map(move |holding| Some((holding, holding.node == own, pick(&holding.held)?)))
    }

    /// Asks another node.
    ///
    /// # Errors
    /// As `Source::held`.
    pub(crate) fn fetch(
        &self,
        source: &dyn Source,
        holder: &Holding,
        wanted: &Wanted,
    ) -> Result<Bytes, Failure> {
        self.step()?;
        let bytes = source.held(holder, wanted).map_err(failure::source)?;
        self.fetched.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes)
    }

    pub(crate) fn bytes_fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }
}
