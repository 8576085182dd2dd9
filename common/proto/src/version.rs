//! Which peers understand each other.

use crate::telemetry::{self, Rejected};
use crate::wire;
use tonic::Status;

/// Peers of different protocols refuse each other.
pub const PROTOCOL: u32 = 1;

/// This build, as shown to people and named in refusals.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Bytes of a foreign version that are repeated in a refusal.
const VERSION_MAX: usize = 64;

/// Who speaks: the first field of the first message of every conversation.
pub fn hello() -> wire::Hello {
    wire::Hello { protocol: PROTOCOL, version: VERSION.to_owned() }
}

/// Checks that the peer speaks this protocol. `whose`: what it is, as in "the node".
///
/// # Errors
/// `failed_precondition`, naming both versions and both protocols.
pub fn check_hello(hello: &Option<wire::Hello>, whose: &str) -> Result<(), Status> {
    let ours = format!("this is halfstep {VERSION} (protocol {PROTOCOL})");
    if hello.as_ref().is_none_or(|hello| hello.protocol != PROTOCOL) {
        telemetry::rejected(Rejected::Version);
    }
    match hello {
        None => Err(Status::failed_precondition(format!("{whose} did not say its version; {ours}"))),
        Some(hello) if hello.protocol == PROTOCOL => Ok(()),
        Some(hello) => {
            let version: String =
                hello.version.chars().filter(|c| !c.is_control()).take(VERSION_MAX).collect();
            let theirs = format!("{whose} is halfstep {version} (protocol {})", hello.protocol);
            Err(Status::failed_precondition(format!(
                "{theirs}, {ours}: they do not understand each other, use the same version"
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_protocol_is_refused_by_both_names() {
        assert!(check_hello(&Some(hello()), "the node").is_ok());
        let other = wire::Hello { protocol: 7, version: "9.9.9\u{1b}".into() };
        let refused = check_hello(&Some(other), "the node").unwrap_err();
        for part in ["the node is halfstep 9.9.9 (protocol 7)", &format!("halfstep {VERSION} (protocol 1)")] {
            assert!(refused.message().contains(part), "{}", refused.message());
        }
        assert!(check_hello(&None, "the node").unwrap_err().message().contains("did not say"));
    }
}
