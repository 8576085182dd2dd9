//! What a job is asked to do, beyond the grids of its layers.

use serde::{Deserialize, Serialize};

/// The data term that rounding minimises (DESIGN section 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// Exact full-batch squared error from the Gram matrices; no activation.
    Gram,
    /// Minibatches of collected samples, through the activation that follows.
    Samples,
}

/// Which inputs a layer is solved for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Propagation {
    /// Inputs of the model whose earlier layers are already quantized; targets of the original.
    Sequential,
    /// Inputs of the original model for both: layers do not wait for each other.
    Independent,
}

/// Where the rounding starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StartPoint {
    /// Soft values at the weights themselves, hard values at nearest.
    Nearest,
    /// Columns in GPTQ order with error feedback, kept within {floor, ceil}.
    Gptq,
}

/// Everything the solver is told besides data.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SolverSettings {
    /// Data term.
    pub objective: Objective,
    /// AdaRound iterations; 0 leaves start and refinement alone.
    pub iterations: u32,
    /// Adam's step size.
    pub learning_rate: f32,
    /// Annealing of the rounding loss' exponent: from, to.
    pub beta: (f32, f32),
    /// Fraction of the iterations without rounding loss.
    pub warm_start: f32,
    /// Weight of the rounding loss.
    pub lambda: f32,
    /// Positions in a minibatch of the samples objective.
    pub batch: u32,
    /// Statistics are damped towards the original weights by this fraction of the mean diagonal.
    pub damping: f32,
    /// Start point.
    pub start: StartPoint,
    /// At most this many sweeps of coordinate descent.
    pub refine_sweeps: u32,
    /// At most this many rounds of fitting scales to the rounding; 0 leaves the grid as the range search chose it.
    pub scale_fits: u32,
    /// Key of all randomness.
    pub seed: u64,
    /// Positions kept for the samples objective, per layer and shard.
    pub positions_per_shard: u32,
    /// Fraction of positions that enter the Gram statistics, in (0, 1].
    pub positions_fraction: f32,
}

/// How stages and shards are spread over nodes. Only the number of ranges can change a result (`Plan::ranges`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Partition {
    /// One range: every node holds some shards and walks all stages.
    Batches,
    /// Several ranges, each on one node at a time.
    Layers {
        /// How many; 2 or more.
        ranges: usize,
    },
    /// Several ranges, each spread over several nodes by shards.
    Grid {
        /// How many ranges.
        ranges: usize,
        /// Nodes of each range.
        nodes: usize,
    },
}
