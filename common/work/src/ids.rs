//! Newtype ids; each is an index into the plan unless it says otherwise.

use serde::{Deserialize, Serialize};
use std::fmt;

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
    /// A node that has registered with this coordinator; never reused.
    NodeId, u32, "node-"
);
id!(
    /// One grant of one task to one node; never reused.
    LeaseId, u64, "lease-"
);
