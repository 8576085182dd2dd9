//! What coordinator and nodes agree on: ids, settings, the plan, tasks, and the state of a running job.
//!
//! Pure: no clock (callers pass monotonic time), no files, no sockets. Not here: who decides the plan
//! (`coordinator::planner`), who computes (`agent`), how messages travel (an in-process call today, gRPC later).

mod exchange;
mod ids;
mod job;
mod node;
mod plan;
mod state;
mod task;

pub use exchange::{GroupAnswer, GroupOrder, Round};
pub use ids::{ChunkId, JobId, LayerId, LeaseId, NodeId, RangeId, SegmentId, ShardId, SliceId};
pub use job::{Objective, Partition, Propagation, SolverSettings, StartPoint};
pub use node::{
    Grant, Held, Holding, InputTensor, Inventory, Node, NodeDescription, ScalarKind, Source, SourceError,
    Unwatched, Verdict, Wanted, Watch,
};
pub use plan::{KeptLayer, LayerPlan, Plan, PlanError, StagePlan};
pub use state::{
    ATTEMPTS_MAX, Applied, COUNTED_MAX, Census, Change, Counters, Event, EventRefused, Group, JobState,
    Lease, Progress, SHORT_OF_MEMORY_MAX, TaskId, TaskState, TaskTable,
};
pub use task::{
    ChunkReport, Cost, Done, Failure, FailureClass, PeakRecord, Receipt, Rounding, Task, TaskPhase,
    agree_peaks,
};
