//! The table against the services as they are declared.

use super::*;
use std::collections::BTreeSet;

#[test]
fn every_rpc_has_a_row_and_every_row_an_rpc() {
    let files = protox::compile(["halfstep.proto"], [concat!(env!("CARGO_MANIFEST_DIR"), "/proto")]).unwrap();
    let mut declared = BTreeSet::new();
    for file in &files.file {
        for service in &file.service {
            for method in &service.method {
                declared.insert(format!("/{}.{}/{}", file.package(), service.name(), method.name()));
            }
        }
    }
    let rows: BTreeSet<String> = TABLE.iter().map(|(path, _)| (*path).to_owned()).collect();
    assert_eq!(rows.len(), TABLE.len(), "no row twice");
    let ours: BTreeSet<String> = rows.into_iter().filter(|path| !path.starts_with(HEALTH)).collect();
    assert_eq!(ours, declared);
}

#[test]
fn local_peers_may_call_every_row_and_nothing_else() {
    for (path, roles) in TABLE {
        assert!(!roles.is_empty() && may_call(&Peer::Local, path).is_ok(), "{path}");
    }
    let unknown = may_call(&Peer::Local, "/halfstep.v1.Client/Format").unwrap_err();
    assert_eq!(unknown.message(), "`/halfstep.v1.Client/Format` is no call of halfstep");
}

#[test]
fn anybody_may_ask_for_health_and_nothing_else() {
    for (path, _) in TABLE {
        let admitted = may_call(&Peer::Anybody, path);
        assert_eq!(admitted.is_ok(), path.starts_with(HEALTH), "{path}");
    }
    let artefact = BlobName::Artefact(crate::BlobHash([7; 32]));
    assert!(!Peer::Anybody.is(&Role::ALL) && may_fetch(&Peer::Anybody, &artefact).is_err());
}
