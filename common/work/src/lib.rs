//! Job specification, plan, ids and the task state machine; pure.
