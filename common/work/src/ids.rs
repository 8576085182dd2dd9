//! Newtype ids; each is an index into the plan unless it says otherwise.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A job of a coordinator: the BLAKE3 hash of what it computes, so the same job submitted again is the same job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct JobId(pub [u8; 16]);

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $inner:ty, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl $name {
            /// The id as an index into the plan's table.
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }
    };
}

id!(
    /// A layer that is quantized.
    LayerId, u32, "layer-"
);
id!(
    /// A segment of the model, and the stage at its end.
    SegmentId, u32, "segment-"
);
id!(
    /// A fixed group of calibration samples.
    ShardId, u32, "shard-"
);
id!(
    /// A fixed range of rows of one layer.
    ChunkId, u32, "chunk-"
);
id!(
    /// A fixed range of rows of a layer's statistics matrices, all groups one after the other.
    SliceId, u32, "slice-"
);
id!(
    /// A contiguous range of stages that starts from the original model's activations.
    RangeId, u32, "range-"
);
id!(
    /// One registration of one node process with a coordinator; never reused, also not by the same process.
    NodeId, u32, "node-"
);
id!(
    /// One grant of one task to one node; never reused.
    LeaseId, u64, "lease-"
);
