//! Who may call what.
//!
//! Every RPC has a row; a request for one without a row is refused, whoever sends it. The rules:
//!
//! - Clients submit, watch, cancel, explain and forget jobs, see jobs and nodes, and ask nodes to leave. Whoever has a client's certificate sees all jobs.
//! - Nodes attach and commit. They see the jobs they are given, and can neither submit nor cancel nor list.
//! - `Fetch` is for all, with a finer rule ([`may_fetch`]): nodes may ask for everything of a job, and each other for probes; clients only for
//!   artefacts by their hash, which they learn from `Results`. A coordinator gives them only files of results.
//! - `Upload` is for clients (inputs of jobs) and nodes (roundings). It cannot replace anything: names are hashes.
//! - A coordinator calls nodes only for what they hold.
//! - Health is for every role and, on a port of its own, for anybody: probes have no certificates. Local peers, in the clear on loopback or in memory, have all roles.

use crate::{BlobName, Fetch, Peer, Role, WireError, wire};
use Role::{Client, Coordinator, Node};
use tonic::{Request, Status};

/// Path of an RPC, and the roles that may call it.
pub const TABLE: [(&str, &[Role]); 18] = [
    ("/halfstep.v1.Fleet/Attach", &[Node]),
    ("/halfstep.v1.Fleet/Commit", &[Node]),
    ("/halfstep.v1.Artefacts/Fetch", &[Client, Node, Coordinator]),
    ("/halfstep.v1.Artefacts/Upload", &[Client, Node]),
    ("/halfstep.v1.Client/Offer", &[Client]),
    ("/halfstep.v1.Client/Submit", &[Client]),
    ("/halfstep.v1.Client/List", &[Client]),
    ("/halfstep.v1.Client/Status", &[Client]),
    ("/halfstep.v1.Client/Watch", &[Client]),
    ("/halfstep.v1.Client/Cancel", &[Client]),
    ("/halfstep.v1.Client/Forget", &[Client]),
    ("/halfstep.v1.Client/Results", &[Client]),
    ("/halfstep.v1.Client/Nodes", &[Client]),
    ("/halfstep.v1.Client/Explain", &[Client]),
    ("/halfstep.v1.Client/Drain", &[Client]),
    ("/grpc.health.v1.Health/Check", &[Client, Node, Coordinator]),
    ("/grpc.health.v1.Health/Watch", &[Client, Node, Coordinator]),
    ("/grpc.health.v1.Health/List", &[Client, Node, Coordinator]),
];

/// What anybody may call.
const HEALTH: &str = "/grpc.health.v1.Health/";

/// Whether `peer` may call `path`.
pub(crate) fn may_call(peer: &Peer, path: &str) -> Result<(), Status> {
    let Some((_, roles)) = TABLE.iter().find(|(row, _)| *row == path) else {
        let path: String = path.chars().filter(|c| !c.is_control()).take(100).collect();
        return Err(Status::unimplemented(format!("`{path}` is no call of halfstep")));
    };
    if peer.is(roles) || (*peer == Peer::Anybody && path.starts_with(HEALTH)) {
        return Ok(());
    }
    let names: Vec<&str> = roles.iter().map(|role| role.name()).collect();
    Err(Status::permission_denied(format!("`{path}` is for role {}, not for {peer}", names.join(" or "))))
}

/// Whether `peer` may ask for such a blob, besides being allowed to fetch at all.
///
/// # Errors
/// `permission_denied` for a client that asks for anything but an artefact by its hash.
pub fn may_fetch(peer: &Peer, name: &BlobName) -> Result<(), Status> {
    match name {
        BlobName::Artefact(_) if *peer != Peer::Anybody => Ok(()),
        _ if peer.is(&[Node, Coordinator]) => Ok(()),
        _ => Err(Status::permission_denied(format!("only nodes may fetch this, not {peer}"))),
    }
}

impl Fetch {
    /// What a request asks for, if its sender may: for handlers of `Fetch`.
    ///
    /// # Errors
    /// `permission_denied`; `invalid_argument` for what is no request.
    pub fn asked(request: &Request<wire::FetchRequest>) -> Result<Self, Status> {
        let peer = Peer::of(request)?;
        let fetch =
            Self::try_from(request.get_ref().clone()).map_err(|error: WireError| Status::from(error))?;
        may_fetch(peer, &fetch.name)?;
        Ok(fetch)
    }
}

#[cfg(test)]
mod tests;
