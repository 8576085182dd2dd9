//! What the wire counts of itself, through the `metrics` facade: of no effect where nobody collects.
//!
//! Labels take values of fixed lists: nothing that a peer says becomes one.

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use std::time::Duration;
use tonic::Code;

const ANSWERED: &str = "halfstep_rpc_server_duration_seconds";
const REJECTED: &str = "halfstep_rpc_rejected_total";
const DAMAGED: &str = "halfstep_artifact_checksum_failures_total";
const MOVED: &str = "halfstep_data_bytes_total";
const EXPIRES: &str = "halfstep_auth_cert_expiry_timestamp_seconds";

/// Why a peer was turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rejected {
    /// It showed no certificate.
    NoCertificate,
    /// One that is not believed: of another authority, expired, misused.
    BadCertificate,
    /// Whatever else ends a TLS handshake: plain text, silence.
    Handshake,
    /// There are too many connections.
    TooMany,
    /// Its role may not make the call.
    Role,
    /// Another protocol.
    Version,
}

impl Rejected {
    const ALL: [Self; 6] = [
        Self::NoCertificate,
        Self::BadCertificate,
        Self::Handshake,
        Self::TooMany,
        Self::Role,
        Self::Version,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::NoCertificate => "no_cert",
            Self::BadCertificate => "bad_cert",
            Self::Handshake => "handshake",
            Self::TooMany => "too_many",
            Self::Role => "role",
            Self::Version => "version",
        }
    }
}

/// Where something was when its checksum did not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damaged {
    /// On its way from another process.
    Received,
    /// In a coordinator's folder.
    Stored,
    /// In a node's file of activations.
    Spilled,
}

impl Damaged {
    const ALL: [Self; 3] = [Self::Received, Self::Stored, Self::Spilled];

    /// Counts one.
    pub fn count(self) {
        counter!(DAMAGED, "kind" => self.name()).increment(1);
    }

    fn name(self) -> &'static str {
        match self {
            Self::Received => "received",
            Self::Stored => "stored",
            Self::Spilled => "spilled",
        }
    }
}

/// Says what there is, and begins counters at zero, so that the first event is a change.
pub fn describe() {
    describe_histogram!(
        ANSWERED,
        Unit::Seconds,
        "Time from a call until its answer, or the first part of it, began"
    );
    describe_counter!(REJECTED, "Connections and calls refused before anything was done for them");
    describe_counter!(
        DAMAGED,
        "Artefacts and tensors whose checksum did not fit; they are made or fetched again"
    );
    describe_counter!(
        MOVED,
        Unit::Bytes,
        "Bytes of tensors, roundings and files sent to and fetched from others"
    );
    describe_gauge!(
        EXPIRES,
        Unit::Seconds,
        "When this process' certificate expires, in seconds since 1970; 0 without"
    );
    for reason in Rejected::ALL {
        counter!(REJECTED, "reason" => reason.name()).increment(0);
    }
    for kind in Damaged::ALL {
        counter!(DAMAGED, "kind" => kind.name()).increment(0);
    }
    for direction in ["sent", "received"] {
        counter!(MOVED, "direction" => direction).increment(0);
    }
    gauge!(EXPIRES).increment(0.0);
}

pub(crate) fn answered(method: &'static str, code: Code, after: Duration) {
    histogram!(ANSWERED, "method" => method, "code" => name(code)).record(after);
}

pub(crate) fn rejected(reason: Rejected) {
    counter!(REJECTED, "reason" => reason.name()).increment(1);
}

pub(crate) fn sent(bytes: usize) {
    counter!(MOVED, "direction" => "sent").increment(bytes as u64);
}

pub(crate) fn received(bytes: usize) {
    counter!(MOVED, "direction" => "received").increment(bytes as u64);
}

/// `unix_seconds`: of the certificate in use.
pub(crate) fn certificate_expires(unix_seconds: i64) {
    gauge!(EXPIRES).set(unix_seconds as f64);
}

fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Unauthenticated => "unauthenticated",
    }
}
