//! Real sockets on loopback: refusals, bounds, foreign bytes.

use super::*;
use crate::testing::{Fake, serve_at, start};
use crate::wire::{self, client_client::ClientClient, fleet_client::FleetClient};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::Code;

fn plain() -> Transport {
    Transport::tcp(Security::Plaintext)
}

#[tokio::test]
async fn plaintext_beyond_loopback_is_refused_at_both_ends() {
    for address in ["0.0.0.0:0", "192.0.2.1:7000", "[::]:0", "[2001:db8::1]:7000"] {
        let refused = plain().listen(address).await.err().unwrap().to_string();
        assert!(refused.contains("not a loopback address: without certificates"), "{refused}");
        let refused = plain().connector(address, Role::Node).connect().await.err().unwrap().to_string();
        assert!(refused.contains("not a loopback address: without certificates"), "{refused}");
    }
    let refused = plain().listen("192.0.2.1").await.err().unwrap().to_string();
    assert!(refused.contains("`192.0.2.1` cannot be resolved, expected HOST:PORT"), "{refused}");
}

#[tokio::test]
async fn names_of_loopback_are_loopback() {
    for address in ["localhost:0", "127.0.0.2:0", "[::1]:0", "[::ffff:127.0.0.1]:0"] {
        match plain().listen(address).await {
            Ok(listener) => assert!(!listener.address().ends_with(":0"), "{}", listener.address()),
            // A machine may have no IPv6.
            Err(error) => assert!(matches!(error, TransportError::Listen { .. }), "{error}"),
        }
    }
}

#[tokio::test]
async fn calls_arrive_over_tcp_and_over_memory() {
    for (transport, address) in [(plain(), "127.0.0.1:0"), (Transport::memory(), "")] {
        let (_served, connector) = start(&transport, address, &Fake::default()).await;
        let mut client = ClientClient::new(connector.connect().await.unwrap());
        let spec = wire::SubmitRequest { spec: vec![7; 20], ..Default::default() };
        assert_eq!(client.submit(spec).await.unwrap().into_inner().job, [7; 16]);
    }
}

#[tokio::test]
async fn a_taken_port_and_an_empty_one_are_named() {
    let listener = plain().listen("127.0.0.1:0").await.unwrap();
    let address = listener.address();
    let taken = plain().listen(&address).await.err().unwrap().to_string();
    assert!(taken.starts_with(&format!("cannot listen on `{address}`: ")), "{taken}");
    drop(listener);
    let empty = plain().connector(&address, Role::Node).connect().await.err().unwrap().to_string();
    assert!(empty.contains(&format!("cannot connect to `{address}`: ")), "{empty}");
    assert!(empty.contains("refused"), "{empty}");
    // The same from a call on a channel that connects when used.
    let mut client = ClientClient::new(plain().connector(&address, Role::Node).channel());
    let status = client.list(wire::ListRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(explain(&status).contains(&format!("cannot connect to `{address}`")), "{}", explain(&status));
}

#[tokio::test]
async fn an_oversize_message_is_refused_and_the_connection_goes_on() {
    let (_served, connector) = start(&plain(), "127.0.0.1:0", &Fake::default()).await;
    let mut client = ClientClient::new(connector.connect().await.unwrap());
    let spec = |len| wire::SubmitRequest { spec: vec![0; len], ..Default::default() };
    let status = client.submit(spec(5 << 20)).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
    assert!(status.message().contains("message length too large"), "{status}");
    assert!(client.submit(spec(4_000_000)).await.is_ok());
}

#[tokio::test]
async fn an_rpc_that_nobody_answers_is_named() {
    let services = crate::Services::new();
    let served = serve_at(plain().listen("127.0.0.1:0").await.unwrap(), services);
    let channel = plain().connector(&served.address, Role::Coordinator).connect().await.unwrap();
    let status = FleetClient::new(channel).commit(wire::CommitRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    assert!(status.message().contains("`/halfstep.v1.Fleet/Commit`"), "{status}");
}

/// What a raw socket gets back until it is closed.
async fn speak(address: &str, bytes: &[u8]) -> Vec<u8> {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let read = socket.read_to_end(&mut answer);
    // A reset is an answer, too.
    let _ = timeout(Duration::from_secs(10), read).await.expect("the connection is closed");
    answer
}

#[tokio::test]
async fn garbage_closes_its_connection_and_harms_nobody() {
    let fake = Fake::default();
    let (served, connector) = start(&plain(), "127.0.0.1:0", &fake).await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let huge_frame = [preface.as_slice(), &[0xff; 64]].concat();
    for garbage in [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), vec![0; 4096], vec![0xff; 100], huge_frame]
    {
        let answer = speak(&served.address, &garbage).await;
        assert!(answer.len() < 1024, "{} bytes back", answer.len());
    }
    let mut client = ClientClient::new(connector.connect().await.unwrap());
    assert!(client.list(wire::ListRequest::default()).await.is_ok());
}

#[tokio::test]
async fn a_silent_connection_is_closed() {
    let limits = Limits { idle: Duration::from_millis(50), ..Limits::default() };
    let listener = plain().listen("127.0.0.1:0").await.unwrap().with_limits(limits);
    let served = serve_at(listener, Fake::default().services());
    speak(&served.address, b"").await;
    speak(&served.address, b"PRI * HTTP/2.0\r\n").await;
}

#[tokio::test]
async fn connections_of_one_place_and_of_all_are_bounded() {
    for limits in [
        Limits { connections_per_peer: 2, ..Limits::default() },
        Limits { connections: 2, ..Limits::default() },
    ] {
        let listener = plain().listen("127.0.0.1:0").await.unwrap().with_limits(limits);
        let served = serve_at(listener, Fake::default().services());
        let connector = plain().connector(&served.address, Role::Coordinator);
        let first = connector.connect().await.unwrap();
        let mut second = ClientClient::new(connector.connect().await.unwrap());
        assert!(second.list(wire::ListRequest::default()).await.is_ok());
        let mut third = ClientClient::new(connector.channel());
        assert!(third.list(wire::ListRequest::default()).await.is_err());
        drop(first);
        // The server notices the end of the first on its own time.
        while third.list(wire::ListRequest::default()).await.is_err() {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn the_standard_health_service_fits_in() {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("halfstep", tonic_health::ServingStatus::Serving).await;
    let services = Fake::default().services().with(health);
    let served = serve_at(plain().listen("127.0.0.1:0").await.unwrap(), services);
    let channel = plain().connector(&served.address, Role::Coordinator).channel();
    let mut client = tonic_health::pb::health_client::HealthClient::new(channel);
    let request = tonic_health::pb::HealthCheckRequest { service: "halfstep".into() };
    let status = client.check(request).await.unwrap().into_inner().status();
    assert_eq!(status, tonic_health::pb::health_check_response::ServingStatus::Serving);
}

#[tokio::test]
async fn a_public_port_is_open_beyond_loopback_and_tells_of_health_only() {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("halfstep", tonic_health::ServingStatus::Serving).await;
    let services = Fake::default().services().with(health);
    let listener = Transport::tcp(Security::Public).listen("0.0.0.0:0").await.unwrap();
    let served = serve_at(listener, services);
    let address = served.address.replace("0.0.0.0", "127.0.0.1");
    let channel = plain().connector(&address, Role::Coordinator).channel();
    let mut client = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let request = tonic_health::pb::HealthCheckRequest { service: "halfstep".into() };
    assert!(client.check(request).await.is_ok());
    let refused = ClientClient::new(channel).list(wire::ListRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
}
