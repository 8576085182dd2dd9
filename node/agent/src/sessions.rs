//! Loaded segments, the ones used last: replays go back and forth, the undisturbed run only forward.
//!
//! Not here: what a session's model is made of (`program`).

use crate::lazy::Lazy;
use halfstep_exec::{Session, Stream};
use halfstep_work::{Failure, SegmentId};
use std::sync::{Arc, Mutex, PoisonError};

/// Beyond this many bytes of models only the latest segment's sessions are kept, one for each stream.
const KEEP_BYTES: usize = 64 << 20;
const KEEP_LEAST: usize = 2;

type Key = (SegmentId, Stream);

/// See the module.
#[derive(Default)]
pub(crate) struct Sessions {
    /// Least recently used first.
    entries: Mutex<Vec<Entry>>,
}

struct Entry {
    key: Key,
    bytes: usize,
    session: Arc<Lazy<dyn Session>>,
}

impl Sessions {
    /// The session of a segment on a stream; `load` gives it with the bytes of its model.
    ///
    /// # Errors
    /// What `load` says; the next call tries again.
    pub(crate) fn get(
        &self,
        key: Key,
        load: impl FnOnce() -> Result<(Arc<dyn Session>, usize), Failure>,
    ) -> Result<Arc<dyn Session>, Failure> {
        let slot = self.touch(key);
        let mut size = None;
        let session = slot.get_or_make(|| {
            let (session, bytes) = load()?;
            size = Some(bytes);
            Ok(session)
        })?;
        if let Some(bytes) = size {
            self.weigh(key, bytes);
        }
        Ok(session)
    }

    /// The segment has run for all shards: where its models are large they go, and are loaded again should it be replayed.
    pub(crate) fn passed(&self, segment: SegmentId) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let total: usize = entries.iter().map(|entry| entry.bytes).sum();
        if total > KEEP_BYTES {
            entries.retain(|entry| entry.key.0 != segment);
        }
    }

    /// Drops all that nobody is running: memory is short.
    pub(crate) fn clear(&self) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn touch(&self, key: Key) -> Arc<Lazy<dyn Session>> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = match entries.iter().position(|entry| entry.key == key) {
            Some(at) => entries.remove(at),
            None => Entry { key, bytes: 0, session: Arc::new(Lazy::default()) },
        };
        let session = Arc::clone(&entry.session);
        entries.push(entry);
        // Before another is loaded: both at once may be too much.
        drop_oldest(&mut entries);
        session
    }

    fn weigh(&self, key: Key, bytes: usize) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.iter_mut().find(|entry| entry.key == key) {
            entry.bytes = bytes;
        }
        drop_oldest(&mut entries);
    }
}

fn drop_oldest(entries: &mut Vec<Entry>) {
    let mut total: usize = entries.iter().map(|entry| entry.bytes).sum();
    while total > KEEP_BYTES && entries.len() > KEEP_LEAST {
        total -= entries.remove(0).bytes;
    }
}
