//! AdaRound: objective, schedule, optimiser, refinement, guard.
