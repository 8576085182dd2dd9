//! What happens to a job, for people and their tools: the JSON inside `WatchEvent`.
//!
//! Numbers that JSON cannot say (infinity, NaN) are absent. A reader skips keys it does not know; events it does not
//! know come as [`JobEvent::Unknown`]. Rendering is not here (`cli`).

use crate::{WireError, wire};
use serde::{Deserialize, Serialize};

/// One event of a job. Seconds since the job began, unless said otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum JobEvent {
    /// The plan stands; work begins.
    Planned {
        /// Layers to quantize.
        layers: usize,
        /// Stages they are solved in.
        stages: usize,
        /// Shards of the samples.
        shards: usize,
        /// Calibration samples.
        samples: usize,
        /// Nodes there are now.
        nodes: usize,
    },
    /// A task was finished.
    Task {
        /// Its phase, as in `capture`.
        phase: String,
        /// Seconds it took.
        seconds: f64,
        /// Stage it belongs to, from 0.
        stage: usize,
        /// All stages.
        stages: usize,
        /// Tasks of this phase and stage that are done.
        done: usize,
        /// Of how many.
        total: usize,
    },
    /// A layer was solved.
    LayerSolved {
        /// Its name in the model.
        name: String,
        /// How many layers are over, with this one.
        index: usize,
        /// Of how many.
        total: usize,
        /// Bits of its grid.
        bits: u8,
        /// Squared output error of nearest rounding.
        objective_before: Option<f64>,
        /// Squared output error now.
        objective_after: Option<f64>,
        /// Signal over error, in decibels.
        sqnr_db: Option<f64>,
        /// Weights not rounded to nearest.
        rounded_away: u64,
        /// Weights.
        weights: u64,
        /// Seconds from the beginning of its first chunk to the end of its last, of the attempts that this coordinator saw succeed.
        seconds: f64,
    },
    /// A layer could not be solved and keeps its weights.
    LayerFailed {
        /// Its name in the model.
        name: String,
        /// Why.
        cause: String,
    },
    /// A layer was left out by the plan.
    LayerKept {
        /// Its name in the model.
        name: String,
        /// Why.
        reason: String,
    },
    /// A node takes part.
    NodeJoined {
        /// Its name.
        name: String,
        /// Tasks it works on at once.
        slots: usize,
    },
    /// A node does not take part any more.
    NodeLost {
        /// Its name.
        name: String,
        /// Why.
        why: String,
    },
    /// A node takes no part in this job, but may in the next one.
    NodeLeftOut {
        /// Its name.
        name: String,
        /// Why.
        why: String,
    },
    /// A task will be done again.
    Retry {
        /// Which, as text.
        task: String,
        /// Why.
        why: String,
        /// Number of the coming attempt.
        attempt: u32,
    },
    /// Nothing can be done for now.
    Waiting {
        /// Why, and for how long at most.
        why: String,
    },
    /// All layers are over; the files are being written.
    Writing,
    /// The job is over.
    Finished {
        /// Documented exit code.
        exit: u32,
        /// Layers solved.
        solved: usize,
        /// Layers left out.
        kept: usize,
        /// Layers failed.
        failed: usize,
        /// Seconds of the job.
        seconds: f64,
        /// One sentence, if there is more to say.
        message: String,
    },
    /// An event of a newer coordinator.
    #[serde(other)]
    Unknown,
}

/// A number as JSON can carry it.
pub fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

impl TryFrom<&JobEvent> for wire::WatchEvent {
    type Error = WireError;

    fn try_from(event: &JobEvent) -> Result<Self, WireError> {
        let json = serde_json::to_vec(event).map_err(|error| WireError::new("event", error.to_string()))?;
        Ok(Self { json })
    }
}

impl TryFrom<&wire::WatchEvent> for JobEvent {
    type Error = WireError;

    fn try_from(event: &wire::WatchEvent) -> Result<Self, WireError> {
        serde_json::from_slice(&event.json).map_err(|error| WireError::new("event", error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn solved(after: f64) -> JobEvent {
        JobEvent::LayerSolved {
            name: "conv".into(),
            index: 1,
            total: 3,
            bits: 4,
            objective_before: finite(0.1),
            objective_after: finite(after),
            sqnr_db: None,
            rounded_away: 5,
            weights: 10,
            seconds: 0.5,
        }
    }

    #[test]
    fn events_come_back_also_without_a_finite_number() {
        let finished =
            JobEvent::Finished { exit: 4, solved: 1, kept: 2, failed: 3, seconds: 1.25, message: "m".into() };
        for event in [solved(0.1 + 0.2), solved(f64::INFINITY), JobEvent::Writing, finished] {
            let sent = wire::WatchEvent::try_from(&event).unwrap();
            assert_eq!(JobEvent::try_from(&sent).unwrap(), event);
        }
    }

    #[test]
    fn newer_events_are_unknown_and_broken_ones_errors() {
        let read = |json: &str| JobEvent::try_from(&wire::WatchEvent { json: json.into() });
        assert_eq!(read(r#"{"event":"task-split","parts":3}"#).unwrap(), JobEvent::Unknown);
        assert_eq!(
            read(r#"{"event":"waiting","why":"no nodes","since":5}"#).unwrap(),
            JobEvent::Waiting { why: "no nodes".into() }
        );
        assert!(read("{").unwrap_err().to_string().starts_with("event: "));
    }
}
