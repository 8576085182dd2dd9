//! What each way of spreading a job over nodes costs, and which one to take.
//!
//! Method: seconds of one slot, bytes of statistics and carries are known per stage (`halfstep plan` measures them); a
//! partition spreads the seconds over slots and adds the time its transfers take on the link as stated. *Batches* sums
//! partial statistics of all nodes and hands out the means; *layers* moves full-precision carries from range to range;
//! the *grid* does both. Only batches is exact sequential propagation, so another one has to be much better to be taken.
//! Not here: cutting the ranges (`planner`), who computes what (`scheduler`).

use halfstep_work::Partition;
use std::fmt;

/// Another partition than batches must be at least this many times faster where batches fits into memory.
const WORTH_RESTARTING: f64 = 2.0;

/// What one stage costs, whoever does it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StageCost {
    /// Seconds of one slot to run the segment on all samples, original model.
    pub forward_seconds: f64,
    /// The same for the quantized stream; 0 where the streams are one.
    pub quantized_seconds: f64,
    /// Seconds of one slot to add up the statistics of all samples.
    pub statistics_seconds: f64,
    /// Seconds of one slot to solve all rows.
    pub solve_seconds: f64,
    /// Bytes of the 64-bit sums of the stage's layers.
    pub sums_bytes: u64,
    /// Bytes of all samples' live tensors after the segment, original model.
    pub carry_bytes: u64,
    /// The same for the quantized stream.
    pub quantized_carry_bytes: u64,
}

impl StageCost {
    fn slot_seconds(&self) -> f64 {
        self.forward_seconds + self.quantized_seconds + self.statistics_seconds + self.solve_seconds
    }

    fn live_bytes(&self) -> u64 {
        self.carry_bytes + self.quantized_carry_bytes
    }
}

/// The nodes a job may count on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fleet {
    /// How many; 1 or more.
    pub nodes: usize,
    /// Slots of each.
    pub slots: usize,
    /// Bytes that carries and statistics may take on each; 0 if unknown.
    pub memory_bytes: u64,
    /// Bytes per second that a node can receive.
    pub link_bytes_per_second: f64,
}

/// What a partition would cost on a fleet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The partition.
    pub partition: Partition,
    /// Wall seconds.
    pub seconds: f64,
    /// Bytes between nodes, all together.
    pub bytes_moved: u64,
    /// The most that one node holds.
    pub node_bytes: u64,
    /// Whether that fits; true if the memory is unknown.
    pub fits: bool,
}

/// The partition taken, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// All that were compared, batches first.
    pub estimates: Vec<Estimate>,
    /// Index of the one taken.
    pub taken: usize,
    /// One sentence.
    pub why: String,
}

/// Compares the partitions that make sense for the fleet.
pub fn choose(stages: &[StageCost], fleet: &Fleet) -> Choice {
    let nodes = fleet.nodes.clamp(1, stages.len().max(1));
    let mut partitions = vec![Partition::Batches];
    if nodes >= 2 {
        partitions.push(Partition::Layers { ranges: nodes });
    }
    // Squarest grid: as many ranges as divide the nodes and are nearest to their square root.
    let square = (2..=nodes / 2).filter(|ranges| fleet.nodes.is_multiple_of(*ranges));
    if let Some(ranges) = square.min_by_key(|ranges| ranges.abs_diff(fleet.nodes / ranges)) {
        partitions.push(Partition::Grid { ranges, nodes: fleet.nodes / ranges });
    }
    let estimates: Vec<Estimate> = partitions.into_iter().map(|p| estimate(stages, fleet, p)).collect();
    let fastest = |wanted: &dyn Fn(&Estimate) -> bool| {
        let candidates = estimates.iter().enumerate().filter(|(_, e)| wanted(e));
        candidates.min_by(|a, b| a.1.seconds.total_cmp(&b.1.seconds)).map(|(index, _)| index)
    };
    let batches = &estimates[0];
    let (taken, why) = match fastest(&|e| e.fits) {
        Some(other)
            if other != 0
                && batches.fits
                && batches.seconds < WORTH_RESTARTING * estimates[other].seconds =>
        {
            (0, "exact sequential propagation; nothing else is twice as fast".into())
        }
        Some(0) => (0, "exact sequential propagation, and the fastest".into()),
        Some(other) if !batches.fits => (
            other,
            format!("batches needs {} bytes on a node, which has {}", batches.node_bytes, fleet.memory_bytes),
        ),
        Some(other) => {
            (other, format!("{:.1} times faster than batches", batches.seconds / estimates[other].seconds))
        }
        None => (0, "none fits into the nodes' memory; batches spills most evenly".into()),
    };
    Choice { estimates, taken, why }
}

/// What `partition` costs on `fleet`.
pub fn estimate(stages: &[StageCost], fleet: &Fleet, partition: Partition) -> Estimate {
    let (ranges, share) = match partition {
        Partition::Batches => (1, fleet.nodes.max(1)),
        Partition::Layers { ranges } => (ranges.max(1), 1),
        Partition::Grid { ranges, nodes } => (ranges.max(1), nodes.max(1)),
    };
    let groups = cut_evenly(stages, ranges);
    let mut seconds = 0.0f64;
    let mut bytes_moved = 0;
    let mut node_bytes = 0;
    let mut before = 0.0;
    for (index, group) in groups.iter().enumerate() {
        let spread = (share * fleet.slots.max(1)) as f64;
        let compute = group.iter().map(StageCost::slot_seconds).sum::<f64>() / spread;
        let forward = group.iter().map(|s| s.forward_seconds).sum::<f64>() / spread;
        let reduced: u64 = group.iter().map(|s| exchanged(s.sums_bytes, share)).sum();
        let boundary = if index + 1 < groups.len() { group.last().map_or(0, |s| s.carry_bytes) } else { 0 };
        let transfer = reduced as f64 / share as f64 / fleet.link_bytes_per_second;
        // A range starts when the original model has run through all before it, and runs it once more for the next.
        let again = if boundary > 0 { forward } else { 0.0 };
        seconds = seconds.max(before + again + compute + transfer);
        before += again + boundary as f64 / share as f64 / fleet.link_bytes_per_second;
        bytes_moved += reduced + boundary;
        let live = |s: &StageCost| s.live_bytes().div_ceil(share as u64) + s.sums_bytes + s.sums_bytes / 2;
        node_bytes = node_bytes.max(group.iter().map(live).max().unwrap_or(0) + boundary / share as u64);
    }
    let fits = fleet.memory_bytes == 0 || node_bytes <= fleet.memory_bytes;
    Estimate { partition, seconds, bytes_moved, node_bytes, fits }
}

/// Bytes on the wire to reduce and hand out one stage's statistics among `share` nodes: every node gets the others' part
/// of its slices (64-bit), then everybody else's means (32-bit).
fn exchanged(sums_bytes: u64, share: usize) -> u64 {
    let others = share as u64 - 1;
    others * sums_bytes + others * sums_bytes / 2
}

/// Contiguous groups of about equal seconds; never more groups than stages, never an empty one.
fn cut_evenly(stages: &[StageCost], groups: usize) -> Vec<&[StageCost]> {
    let groups = groups.clamp(1, stages.len().max(1));
    let total: f64 = stages.iter().map(StageCost::slot_seconds).sum();
    let mut cut = Vec::with_capacity(groups);
    let (mut start, mut sum) = (0, 0.0);
    for (index, stage) in stages.iter().enumerate() {
        sum += stage.slot_seconds();
        let left = groups - cut.len();
        let must = stages.len() - index - 1 < left;
        let due = sum >= total * (cut.len() + 1) as f64 / groups as f64;
        if left > 1 && index + 1 < stages.len() && (due || must) {
            cut.push(&stages[start..=index]);
            start = index + 1;
        }
    }
    cut.push(&stages[start..]);
    cut
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.partition {
            Partition::Batches => f.write_str("batches"),
            Partition::Layers { ranges } => write!(f, "layers:{ranges}"),
            Partition::Grid { ranges, nodes } => write!(f, "grid:{ranges}x{nodes}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(seconds: f64, sums_bytes: u64, carry_bytes: u64) -> StageCost {
        StageCost {
            forward_seconds: seconds,
            solve_seconds: seconds,
            sums_bytes,
            carry_bytes,
            ..StageCost::default()
        }
    }

    fn fleet(nodes: usize, memory_bytes: u64, link: f64) -> Fleet {
        Fleet { nodes, slots: 1, memory_bytes, link_bytes_per_second: link }
    }

    #[test]
    fn one_node_has_one_way_and_moves_nothing() {
        let choice = choose(&[stage(1.0, 100, 1000), stage(2.0, 100, 1000)], &fleet(1, 0, 1e9));
        assert_eq!(choice.estimates.len(), 1);
        let only = choice.estimates[0];
        assert_eq!((only.partition, only.bytes_moved), (Partition::Batches, 0));
        assert!((only.seconds - 6.0).abs() < 1e-9);
    }

    #[test]
    fn batches_is_taken_unless_another_is_twice_as_fast() {
        let stages = vec![stage(1.0, 1_000, 1_000); 4];
        assert_eq!(choose(&stages, &fleet(4, 0, 1e9)).taken, 0);
        // A link so slow that summing statistics takes far longer than computing.
        let heavy = vec![stage(1.0, 1_000_000, 10); 4];
        let choice = choose(&heavy, &fleet(4, 0, 1e5));
        assert_ne!(choice.taken, 0, "{choice:?}");
        assert!(choice.why.contains("times faster"), "{}", choice.why);
    }

    #[test]
    fn what_does_not_fit_is_not_taken() {
        // All samples' carries of one stage on every node of a range, or a quarter of them with batches.
        let stages = vec![stage(1.0, 0, 4_000); 4];
        let choice = choose(&stages, &fleet(4, 1_500, 1e9));
        assert!(choice.estimates[0].fits && !choice.estimates[1].fits, "{choice:?}");
        assert_eq!(choice.taken, 0);
        let none = choose(&stages, &fleet(4, 10, 1e9));
        assert!(none.estimates.iter().all(|e| !e.fits) && none.taken == 0);
    }

    #[test]
    fn statistics_are_sent_once_reduced_and_once_gathered() {
        let all = estimate(&[stage(1.0, 800, 0)], &fleet(3, 0, 1e9), Partition::Batches);
        assert_eq!(all.bytes_moved, 2 * 800 + 2 * 400);
    }

    #[test]
    fn groups_are_contiguous_nonempty_and_cover_everything() {
        for (count, groups) in [(1, 1), (1, 5), (7, 3), (10, 10), (5, 2)] {
            let stages: Vec<StageCost> = (0..count).map(|i| stage(f64::from(i % 3), 0, 0)).collect();
            let cut = cut_evenly(&stages, groups);
            assert!(cut.iter().all(|group| !group.is_empty()), "{count} in {groups}");
            assert_eq!(cut.iter().map(|group| group.len()).sum::<usize>(), stages.len());
            assert!(cut.len() <= groups);
        }
    }
}
