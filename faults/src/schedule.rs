//! What is done to a cluster and when, drawn from a seed.

use std::time::Duration;

use fastrand::Rng;

use crate::cluster::Settings;

/// One thing that happens. `victim` picks among the nodes that are there then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// kill -9 of a node; the same comes back after a while.
    KillNode {
        /// Which.
        victim: u8,
        /// How long it is away.
        away: Duration,
    },
    /// kill -9 of the coordinator.
    KillCoordinator {
        /// How long it is away.
        away: Duration,
    },
    /// kill -9 of coordinator, nodes and client at once, as when power fails.
    KillEverything {
        /// How long all are away.
        away: Duration,
    },
    /// SIGSTOP of a node, then SIGCONT.
    FreezeNode {
        /// Which.
        victim: u8,
        /// In between.
        away: Duration,
    },
    /// SIGSTOP of the coordinator, then SIGCONT.
    FreezeCoordinator {
        /// In between.
        away: Duration,
    },
    /// A new node.
    Join,
    /// SIGTERM of a node, which has to go by itself; another one comes.
    Drain {
        /// Which.
        victim: u8,
    },
    /// kill -9 of the client, which is started again.
    KillClient,
}

impl Fault {
    /// Column of the summary.
    pub fn kind(self) -> &'static str {
        match self {
            Self::KillNode { .. } => "node",
            Self::KillCoordinator { .. } => "coordinator",
            Self::KillEverything { .. } => "everything",
            Self::FreezeNode { .. } => "freeze",
            Self::FreezeCoordinator { .. } => "freeze-coord",
            Self::Join => "join",
            Self::Drain { .. } => "drain",
            Self::KillClient => "client",
        }
    }

    /// All columns.
    pub const KINDS: [&'static str; 8] =
        ["node", "coordinator", "everything", "freeze", "freeze-coord", "join", "drain", "client"];
}

/// Nodes to begin with, and what happens, by time since the job was submitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Nodes at the start.
    pub nodes: u8,
    /// Which of the jobs.
    pub job: u8,
    /// In order of time.
    pub faults: Vec<(Duration, Fault)>,
}

impl Schedule {
    /// The schedule of a seed. Times suit a job of about two seconds and the lease of `settings`.
    pub fn draw(seed: u64, settings: &Settings) -> Self {
        let mut rng = Rng::with_seed(seed);
        let (nodes, job, count) = (rng.u8(1..=4), rng.u8(..), rng.usize(2..=7));
        let mut at = Duration::ZERO;
        let faults = (0..count).map(|_| {
            at += Duration::from_millis(rng.u64(20..700));
            (at, draw_fault(&mut rng, settings))
        });
        Self { nodes, job, faults: faults.collect() }
    }
}

fn draw_fault(rng: &mut Rng, settings: &Settings) -> Fault {
    let victim = rng.u8(..);
    let away = Duration::from_millis(rng.u64(0..600));
    // Around the lease, both sides: a freeze may go unnoticed or make a zombie.
    let frozen = settings.lease.mul_f64(0.2 + 1.5 * rng.f64());
    match rng.u8(0..20) {
        0..6 => Fault::KillNode { victim, away },
        6..11 => Fault::KillCoordinator { away },
        11..13 => Fault::KillEverything { away },
        13..15 => Fault::FreezeNode { victim, away: frozen },
        15 => Fault::FreezeCoordinator { away: frozen },
        16 => Fault::Join,
        17..19 => Fault::Drain { victim },
        _ => Fault::KillClient,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_seed_is_a_schedule_and_fifty_seeds_have_every_kind_of_fault() {
        let settings = Settings::default();
        let drawn: Vec<Schedule> = (0..50).map(|seed| Schedule::draw(seed, &settings)).collect();
        assert_eq!(drawn[7], Schedule::draw(7, &settings));
        let kinds: BTreeSet<&str> =
            drawn.iter().flat_map(|schedule| &schedule.faults).map(|(_, fault)| fault.kind()).collect();
        assert_eq!(kinds, BTreeSet::from(Fault::KINDS));
    }
}
