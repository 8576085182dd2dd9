//! Where the time of a solve goes: seconds of each of its phases, for a record in the log.
//!
//! Phases are those that the solver names, and before them the search for grids and the way of the statistics to the device.
//! Not here: what the phases do (`solver`).

use halfstep_solver::Step;
use std::time::Instant;

/// What a solve is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Choosing grids.
    Grids,
    /// Putting the layer's statistics on the device, or waiting for who does.
    Prepare,
    /// What the solver says.
    Solver(Step),
}

/// Seconds by phase, and everybody's progress.
pub(crate) struct PhaseClock<'a> {
    progress: &'a dyn Fn(),
    phase: Phase,
    begun: Instant,
    seconds: Vec<(Phase, f64)>,
}

impl<'a> PhaseClock<'a> {
    pub(crate) fn new(progress: &'a dyn Fn()) -> Self {
        Self { progress, phase: Phase::Grids, begun: Instant::now(), seconds: Vec::new() }
    }

    /// What a solver tells: an iteration is progress, everything else begins a phase.
    pub(crate) fn tell(&mut self, step: Step) {
        (self.progress)();
        if step != Step::Iterate {
            self.enter(Phase::Solver(step));
        }
    }

    /// Ends the phase and begins another.
    pub(crate) fn enter(&mut self, phase: Phase) {
        let now = Instant::now();
        let spent = (now - self.begun).as_secs_f64();
        match self.seconds.iter_mut().find(|(known, _)| *known == self.phase) {
            Some((_, seconds)) => *seconds += spent,
            None => self.seconds.push((self.phase, spent)),
        }
        (self.phase, self.begun) = (phase, now);
    }

    /// Of a phase that has ended, every time it was entered.
    pub(crate) fn seconds(&self, phase: Phase) -> f64 {
        self.seconds.iter().find(|(known, _)| *known == phase).map_or(0.0, |(_, seconds)| *seconds)
    }

    /// Of the solver's phases.
    pub(crate) fn step(&self, step: Step) -> f64 {
        self.seconds(Phase::Solver(step))
    }

    /// One record: all phases of a chunk of `rows` by `cols`.
    pub(crate) fn record(&self, layer: &str, rows: usize, cols: usize) {
        tracing::debug!(
            layer,
            rows,
            cols,
            grids = self.seconds(Phase::Grids),
            prepare = self.seconds(Phase::Prepare),
            multiply = self.step(Step::Multiply),
            start = self.step(Step::Start),
            learn = self.step(Step::Learn),
            refine = self.step(Step::Refine),
            choose = self.step(Step::Choose),
            guard = self.step(Step::Guard),
            measure = self.step(Step::Measure),
            fit = self.step(Step::Fit),
            regrid = self.step(Step::Regrid),
            "seconds of a chunk's phases"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::time::Duration;

    #[test]
    fn phases_that_come_again_add_up_and_iterations_belong_to_theirs() {
        let heard = Cell::new(0);
        let progress = || heard.set(heard.get() + 1);
        let mut clock = PhaseClock::new(&progress);
        clock.enter(Phase::Prepare);
        let moment = || std::thread::sleep(Duration::from_millis(2));
        for step in [Step::Multiply, Step::Refine, Step::Iterate, Step::Fit, Step::Refine, Step::Done] {
            clock.tell(step);
            moment();
        }
        assert_eq!(heard.get(), 6);
        assert!(clock.step(Step::Refine) >= 6e-3 && clock.step(Step::Fit) >= 2e-3);
        assert_eq!((clock.step(Step::Iterate), clock.step(Step::Done)), (0.0, 0.0));
        assert!(clock.seconds(Phase::Prepare) < clock.step(Step::Refine));
    }
}
