//! Fetches and uploads over a simulated network that holds back, drops and cuts (turmoil).
//!
//! Simulated time: minutes pass in a moment. A cut loses what was on the way for good, as when a router dies; the
//! connection then hangs until somebody notices.

use super::{CHUNK, DataClient, Fetched, Tamper, Traffic};
use crate::testing::Fake;
use crate::transport::{Accept, Accepted, BoxIo, Network};
use crate::{BlobHash, BlobName, Fetch, Role, Security, Transport, TransportError};
use bytes::Bytes;
use halfstep_work::{FailureClass, JobId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::time::sleep;
use tonic::codegen::BoxFuture;
use turmoil::net::{TcpListener, TcpStream};
use turmoil::{Builder, Sim};

const SERVER: &str = "server";
const CLIENT: &str = "client";
const ADDRESS: &str = "server:7421";
const LIMIT: u64 = 64 << 20;

struct Simulated;

impl Network for Simulated {
    fn connect(&self, address: String) -> BoxFuture<BoxIo, TransportError> {
        Box::pin(async move {
            let stream = TcpStream::connect(address.clone()).await;
            let failed =
                |error: std::io::Error| TransportError::Connect { address, message: error.to_string() };
            Ok(Box::new(stream.map_err(failed)?) as BoxIo)
        })
    }

    fn listen(&self, address: String) -> BoxFuture<Box<dyn Accept>, TransportError> {
        Box::pin(async move {
            let listener = TcpListener::bind("0.0.0.0:7421").await;
            let failed = |source| TransportError::Listen { address, source };
            Ok(Box::new(Bound(listener.map_err(failed)?)) as Box<dyn Accept>)
        })
    }
}

struct Bound(TcpListener);

impl Accept for Bound {
    fn accept(&mut self) -> Accepted<'_> {
        Box::pin(async {
            let (stream, from) = self.0.accept().await?;
            Ok((Box::new(stream) as BoxIo, from.ip().to_string()))
        })
    }

    fn address(&self) -> String {
        ADDRESS.to_owned()
    }
}

fn transport() -> Transport {
    Transport::over(Simulated, Security::Plaintext)
}

fn content() -> Bytes {
    (0..8 * CHUNK).map(|i| ((i * 31) >> 7) as u8).collect::<Vec<_>>().into()
}

/// A network with a server that has the content; `tamper` sees every chunk that it sends, numbered from 0.
fn network(seed: u64, tamper: impl Fn(u32) + Send + Sync + 'static) -> (Sim<'static>, Fake) {
    let mut builder = Builder::new();
    builder.tick_duration(Duration::from_millis(10)).simulation_duration(Duration::from_secs(600));
    builder.tcp_capacity(1 << 16).rng_seed(seed);
    let mut sim = builder.build();
    let counter = AtomicU32::new(0);
    let tamper: Tamper = Arc::new(move |_| {
        tamper(counter.fetch_add(1, Ordering::SeqCst));
        Ok(())
    });
    let fake = Fake { traffic: Traffic::default().tampered(tamper), ..Fake::default() };
    fake.keep(content());
    let served = fake.clone();
    sim.host(SERVER, move || {
        let services = served.services();
        async move {
            let listener = transport().listen(ADDRESS).await?;
            Ok(services.serve(listener, std::future::pending()).await?)
        }
    });
    (sim, fake)
}

fn client() -> DataClient {
    DataClient::new(&transport().connector(ADDRESS, Role::Coordinator), Traffic::default())
}

fn fetch() -> Fetch {
    Fetch::new(JobId([0; 16]), BlobName::Artefact(BlobHash::of(&content())))
}

fn arrives(mut sim: Sim<'static>) {
    sim.client(CLIENT, async {
        let fetched = client().fetch(fetch(), LIMIT).await?;
        assert_eq!(fetched, Fetched::Blob { bytes: content(), hash: BlobHash::of(&content()) });
        Ok(())
    });
    sim.run().unwrap();
}

#[test]
fn a_partition_in_the_middle_of_a_fetch_is_waited_out() {
    for (seed, cut) in [(1, 0), (2, 3), (3, 7)] {
        let (mut sim, fake) = network(seed, move |n| {
            if n == cut {
                turmoil::partition(SERVER, CLIENT);
            }
        });
        sim.client("repair", async {
            sleep(Duration::from_secs(20)).await;
            turmoil::repair(SERVER, CLIENT);
            Ok(())
        });
        arrives(sim);
        let offsets: Vec<u64> = fake.requests.lock().unwrap().iter().map(|request| request.offset).collect();
        assert!(offsets.len() >= 2 && offsets.is_sorted(), "{offsets:?}");
    }
}

#[test]
fn a_path_that_is_cut_in_one_direction_is_waited_out() {
    for (from, to) in [(SERVER, CLIENT), (CLIENT, SERVER)] {
        let (mut sim, _fake) = network(4, move |n| {
            if n == 2 {
                turmoil::partition_oneway(from, to);
            }
        });
        sim.client("repair", async move {
            sleep(Duration::from_secs(20)).await;
            turmoil::repair_oneway(from, to);
            Ok(())
        });
        arrives(sim);
    }
}

#[test]
fn a_path_that_stalls_for_a_while_delivers_everything() {
    let (mut sim, _fake) = network(5, |n| {
        if n == 1 {
            turmoil::hold(SERVER, CLIENT);
        }
    });
    sim.client("repair", async {
        sleep(Duration::from_secs(8)).await;
        turmoil::release(SERVER, CLIENT);
        Ok(())
    });
    arrives(sim);
}

#[test]
fn a_server_that_crashes_and_returns_finishes_the_fetch() {
    let (mut sim, fake) = network(6, |_| ());
    sim.client(CLIENT, async {
        let fetched = client().fetch(fetch(), LIMIT).await?;
        assert_eq!(fetched, Fetched::Blob { bytes: content(), hash: BlobHash::of(&content()) });
        Ok(())
    });
    while fake.traffic.sent() < 3 * CHUNK as u64 {
        assert!(!sim.step().unwrap(), "not all can have been sent");
    }
    sim.crash(SERVER);
    (0..50).for_each(|_| assert!(!sim.step().unwrap()));
    sim.bounce(SERVER);
    sim.run().unwrap();
}

#[test]
fn a_peer_that_stays_away_is_given_up_in_bounded_time() {
    let (mut sim, _fake) = network(7, |n| {
        if n == 2 {
            turmoil::partition(SERVER, CLIENT);
        }
    });
    sim.client(CLIENT, async {
        let began = tokio::time::Instant::now();
        let error = client().fetch(fetch(), LIMIT).await.unwrap_err();
        assert_eq!(error.class, FailureClass::PeerLost);
        assert!(began.elapsed() < Duration::from_secs(240), "{:?}", began.elapsed());
        Ok(())
    });
    sim.run().unwrap();
}

#[test]
fn an_upload_through_a_partition_arrives() {
    let (mut sim, fake) = network(8, |_| ());
    let received = fake.traffic.clone();
    sim.client("weather", async move {
        while received.received() < CHUNK as u64 {
            sleep(Duration::from_millis(10)).await;
        }
        turmoil::partition(SERVER, CLIENT);
        sleep(Duration::from_secs(15)).await;
        turmoil::repair(SERVER, CLIENT);
        Ok(())
    });
    sim.client(CLIENT, async move {
        client().upload(content()).await?;
        Ok(())
    });
    fake.blobs.lock().unwrap().clear();
    sim.run().unwrap();
    assert_eq!(fake.blobs.lock().unwrap()[&BlobHash::of(&content())], content());
    assert!(fake.traffic.received() > content().len() as u64, "the first try was cut");
}
