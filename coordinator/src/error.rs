//! The coordinator's errors, with the kind that decides an exit code.

use crate::ArtefactError;
use crate::dataset::DatasetError;
use crate::store::StoreError;
use halfstep_model::ModelError;
use halfstep_quant::QuantError;
use halfstep_work::{Failure, FailureClass, PlanError};
use std::path::PathBuf;

/// Who has to act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The model or the data cannot be used.
    BadInput,
    /// The request contradicts itself or the model.
    Configuration,
    /// Reading or writing failed outside Halfstep.
    Storage,
    /// The user stopped the job.
    Interrupted,
    /// A broken promise inside Halfstep.
    Internal,
}

/// Anything that stops a job.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The calibration data.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// A grid.
    #[error(transparent)]
    Quant(#[from] QuantError),
    /// A plan that does not hold together.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A node's failure that ends the job.
    #[error(transparent)]
    Failure(#[from] Failure),
    /// A setting that cannot be.
    #[error("{0}")]
    Configuration(String),
    /// A model or data set that cannot be quantized.
    #[error("{0}")]
    BadInput(String),
    /// Files.
    #[error("{path}: cannot {action}: {source}")]
    Storage {
        /// Which file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The state folder.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file of the state folder.
    #[error(transparent)]
    Artefact(#[from] ArtefactError),
    /// What was written is not what was solved.
    #[error("{subject}: read back after writing, {what}")]
    ReadBack {
        /// File or layer.
        subject: String,
        /// The difference.
        what: String,
    },
}

impl CoordinatorError {
    /// Who has to act.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Model(_) | Self::Dataset(_) | Self::BadInput(_) => ErrorKind::BadInput,
            Self::Configuration(_) | Self::Quant(_) => ErrorKind::Configuration,
            Self::Storage { .. } | Self::Store(_) | Self::Artefact(_) => ErrorKind::Storage,
            Self::Plan(_) | Self::ReadBack { .. } => ErrorKind::Internal,
            Self::Failure(failure) => match failure.class {
                FailureClass::BadInput | FailureClass::NonFinite => ErrorKind::BadInput,
                FailureClass::Storage | FailureClass::OutOfMemory => ErrorKind::Storage,
                FailureClass::Cancelled | FailureClass::HandedBack => ErrorKind::Interrupted,
                FailureClass::NodeLost
                | FailureClass::PeerLost
                | FailureClass::Hung
                | FailureClass::Damaged
                | FailureClass::Nondeterminism
                | FailureClass::Internal => ErrorKind::Internal,
            },
        }
    }

    /// Exit code that the command line documents for it.
    pub fn exit(&self) -> u8 {
        match self.kind() {
            ErrorKind::BadInput | ErrorKind::Storage => 65,
            ErrorKind::Configuration => 78,
            ErrorKind::Interrupted => 75,
            ErrorKind::Internal => 1,
        }
    }

    /// The failure of a job that it stops.
    pub fn into_failure(self) -> Failure {
        let class = match self.kind() {
            ErrorKind::BadInput | ErrorKind::Configuration => FailureClass::BadInput,
            ErrorKind::Storage => FailureClass::Storage,
            ErrorKind::Interrupted => FailureClass::Cancelled,
            ErrorKind::Internal => FailureClass::Internal,
        };
        match self {
            Self::Failure(failure) => failure,
            error => Failure::new(class, error),
        }
    }

    pub(crate) fn storage(path: impl Into<PathBuf>, action: &'static str, source: std::io::Error) -> Self {
        Self::Storage { path: path.into(), action, source }
    }
}
