//! Errors of the node's parts as failures the scheduler can read.

use halfstep_compute::DeviceError;
use halfstep_exec::ExecError;
use halfstep_model::ModelError;
use halfstep_proto::telemetry::Damaged;
use halfstep_quant::QuantError;
use halfstep_solver::{ErrorKind, SolveError};
use halfstep_work::{Failure, FailureClass, SourceError};

pub(crate) fn model(error: ModelError) -> Failure {
    Failure::new(FailureClass::BadInput, error)
}

pub(crate) fn source(error: SourceError) -> Failure {
    Failure::new(error.class, error.message)
}

/// Something another node should have had.
pub(crate) fn peer(message: impl std::fmt::Display) -> Failure {
    Failure::new(FailureClass::PeerLost, message)
}

pub(crate) fn internal(message: impl std::fmt::Display) -> Failure {
    Failure::new(FailureClass::Internal, message)
}

pub(crate) fn exec(error: ExecError) -> Failure {
    if matches!(error, ExecError::Damaged { .. }) {
        Damaged::Spilled.count();
    }
    let class = match &error {
        ExecError::NonFinite { .. } => FailureClass::NonFinite,
        ExecError::Storage { .. } => FailureClass::Storage,
        ExecError::Damaged { .. } | ExecError::Format { .. } => FailureClass::Damaged,
        ExecError::Internal { .. } | ExecError::Missing { .. } => FailureClass::Internal,
        ExecError::Load { reason, .. } | ExecError::Run { reason, .. } if is_shortage(reason) => {
            FailureClass::OutOfMemory
        }
        _ => FailureClass::BadInput,
    };
    Failure::new(class, error)
}

/// ONNX Runtime has no code for it: its arena's words, and C++'s.
fn is_shortage(reason: &str) -> bool {
    ["Failed to allocate memory", "bad_alloc", "bad allocation"].iter().any(|words| reason.contains(words))
}

/// A layer whose data cannot be used fails alone.
pub(crate) fn solve(layer: &str, error: &SolveError) -> Failure {
    let class = match error.kind() {
        ErrorKind::Data => FailureClass::NonFinite,
        ErrorKind::Settings => FailureClass::BadInput,
        ErrorKind::Memory => FailureClass::OutOfMemory,
        ErrorKind::Device => DEVICE,
        ErrorKind::Caller => FailureClass::Internal,
    };
    Failure::new(class, format!("layer `{layer}`: {error}"))
}

/// A device that fails is this node's trouble: another may have better luck.
const DEVICE: FailureClass = FailureClass::Hung;

pub(crate) fn device(layer: &str, error: &DeviceError) -> Failure {
    let class = match error {
        DeviceError::OutOfMemory { .. } => FailureClass::OutOfMemory,
        _ => DEVICE,
    };
    Failure::new(class, format!("layer `{layer}`: {error}"))
}

pub(crate) fn quant(layer: &str, error: &QuantError) -> Failure {
    Failure::new(FailureClass::NonFinite, format!("layer `{layer}`: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_short_of_memory_is_told_from_one_that_cannot_run_the_model() {
        let class = |reason: &str| {
            let (node, op_type) = (String::new(), String::new());
            exec(ExecError::Run { engine: "ONNX Runtime".into(), node, op_type, reason: reason.into() }).class
        };
        let arena = "Non-zero status code: Failed to allocate memory for requested buffer of size 1073741824";
        assert_eq!(class(arena), FailureClass::OutOfMemory);
        assert_eq!(class("std::bad_alloc"), FailureClass::OutOfMemory);
        assert_eq!(class("shapes do not match"), FailureClass::BadInput);
    }
}
