//! Both ends together, over memory, with harm done on the way.

use super::*;
use crate::testing::{Fake, UPLOAD_MAX, start};
use crate::wire::BlobChunk;
use crate::{BlobHash, BlobName, Fetch, Transport};
use bytes::Bytes;
use halfstep_work::{FailureClass, JobId, SourceError};
use std::io::{Read, Seek, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tonic::Status;

const LIMIT: u64 = 64 << 20;

fn bytes(len: usize) -> Bytes {
    (0..len).map(|i| (i as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect::<Vec<_>>().into()
}

fn named(hash: BlobHash) -> Fetch {
    Fetch::new(JobId([1; 16]), BlobName::Artefact(hash))
}

fn hasty() -> Patience {
    Patience { pause: Duration::from_millis(1), ..Patience::default() }
}

/// A server whose chunks go through `tamper`, numbered from 0, and a client of it.
async fn harmed(
    tamper: impl Fn(u32, &mut BlobChunk) -> Result<(), Status> + Send + Sync + 'static,
) -> (Fake, DataClient, impl Sized) {
    let counter = AtomicU32::new(0);
    let tamper: Tamper = Arc::new(move |chunk| tamper(counter.fetch_add(1, Ordering::SeqCst), chunk));
    let fake = Fake { traffic: Traffic::default().tampered(tamper), ..Fake::default() };
    let (served, connector) = start(&Transport::memory(), "", &fake).await;
    let client = DataClient::new(&connector, Traffic::default()).with_patience(hasty());
    (fake, client, served)
}

async fn whole() -> (Fake, DataClient, impl Sized) {
    harmed(|_, _| Ok(())).await
}

fn offsets(fake: &Fake) -> Vec<u64> {
    fake.requests.lock().unwrap().iter().map(|request| request.offset).collect()
}

fn broken() -> Status {
    Status::unavailable("the wire was cut")
}

#[tokio::test]
async fn blobs_of_every_size_arrive() {
    let (fake, client, _served) = whole().await;
    let mut sum = 0;
    for len in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17] {
        let hash = fake.keep(bytes(len));
        let fetched = client.fetch(named(hash), LIMIT).await.unwrap();
        assert_eq!(fetched, Fetched::Blob { bytes: bytes(len), hash });
        sum += len as u64;
        assert_eq!((fake.traffic.sent(), client.traffic.received()), (sum, sum));
    }
}

#[tokio::test]
async fn what_the_caller_has_and_what_does_not_exist_is_not_sent() {
    let (fake, client, _served) = whole().await;
    let hash = fake.keep(bytes(100));
    let have = Fetch { have: Some(hash), ..named(hash) };
    assert_eq!(client.fetch(have, LIMIT).await.unwrap(), Fetched::Same);
    let program = Fetch { name: BlobName::Program, ..named(hash) };
    assert_eq!(client.fetch(program, LIMIT).await.unwrap(), Fetched::None);
    assert_eq!(fake.traffic.sent(), 0);
}

#[tokio::test]
async fn a_broken_stream_goes_on_where_it_ended() {
    let (fake, client, _served) = harmed(|n, _| if n == 2 || n == 4 { Err(broken()) } else { Ok(()) }).await;
    let hash = fake.keep(bytes(5 * CHUNK));
    let Fetched::Blob { bytes: got, .. } = client.fetch(named(hash), LIMIT).await.unwrap() else {
        panic!("no blob");
    };
    assert_eq!(got, bytes(5 * CHUNK));
    assert_eq!(offsets(&fake), [0, 512 << 10, 768 << 10]);
}

#[tokio::test]
async fn a_flipped_bit_is_found_and_the_chunk_fetched_again() {
    let flip = |n, chunk: &mut BlobChunk| {
        if n == 1 {
            let mut data = chunk.data.to_vec();
            data[77] ^= 4;
            chunk.data = data.into();
        }
        Ok(())
    };
    let (fake, client, _served) = harmed(flip).await;
    let hash = fake.keep(bytes(3 * CHUNK));
    let fetched = client.fetch(named(hash), LIMIT).await.unwrap();
    assert_eq!(fetched, Fetched::Blob { bytes: bytes(3 * CHUNK), hash });
    assert_eq!(offsets(&fake), [0, 256 << 10]);
}

#[tokio::test]
async fn lasting_harm_is_an_error_of_its_class() {
    let flip = |_, chunk: &mut BlobChunk| {
        chunk.crc32c ^= 1;
        Ok(())
    };
    let (fake, client, _served) = harmed(flip).await;
    let hash = fake.keep(bytes(10));
    let error = client.fetch(named(hash), LIMIT).await.unwrap_err();
    assert_eq!(error.class, FailureClass::Damaged);
    assert!(error.message.contains("chunk at 0 was damaged on the way"), "{error}");
    assert_eq!(offsets(&fake).len() as u32, hasty().attempts);

    let (fake, client, _served) = harmed(|_, _| Err(broken())).await;
    let hash = fake.keep(bytes(10));
    let error = client.fetch(named(hash), LIMIT).await.unwrap_err();
    assert_eq!(error, SourceError::new(FailureClass::PeerLost, format!("{}: the wire was cut", client.peer)));
}

/// Memory of the sender went bad after it was hashed: every chunk is consistent, the whole is not.
#[tokio::test]
async fn other_bytes_under_correct_checksums_are_found_by_the_hash() {
    let change = |_, chunk: &mut BlobChunk| {
        let mut data = chunk.data.to_vec();
        data[0] ^= 1;
        chunk.crc32c = crc32c::crc32c(&data);
        chunk.data = data.into();
        Ok(())
    };
    let (fake, client, _served) = harmed(change).await;
    let hash = fake.keep(bytes(10));
    let error = client.fetch(named(hash), LIMIT).await.unwrap_err();
    assert_eq!(error.class, FailureClass::Damaged);
    assert!(error.message.contains("its bytes have the hash"), "{error}");
    assert_eq!(offsets(&fake), [0; 4]);
}

#[tokio::test]
async fn chunks_out_of_place_and_blobs_beyond_the_limit_are_refused() {
    let shift = |_, chunk: &mut BlobChunk| {
        chunk.offset += 1;
        Ok(())
    };
    let (fake, client, _served) = harmed(shift).await;
    let hash = fake.keep(bytes(10));
    let error = client.fetch(named(hash), LIMIT).await.unwrap_err();
    assert_eq!(error.class, FailureClass::Internal);
    assert!(error.message.contains("expected the bytes from 0 of 10, found 10 from 1"), "{error}");
    let error = client.fetch(named(hash), 9).await.unwrap_err();
    assert!(error.message.contains("expected at most 9 bytes, found 10"), "{error}");
}

#[tokio::test]
async fn a_missing_blob_and_a_missing_peer_are_lost_peers() {
    let (_fake, client, _served) = whole().await;
    let error = client.fetch(named(BlobHash::of(b"else")), LIMIT).await.unwrap_err();
    assert_eq!(error.class, FailureClass::PeerLost);
    assert!(error.message.ends_with("is not here"), "{error}");

    let nowhere = Transport::memory().connector("nowhere", crate::Role::Node);
    let client = DataClient::new(&nowhere, Traffic::default()).with_patience(hasty());
    let error = client.fetch(named(BlobHash::of(b"")), LIMIT).await.unwrap_err();
    assert_eq!(error.class, FailureClass::PeerLost);
    assert!(error.message.contains("cannot connect to `nowhere`: nobody listens there"), "{error}");
}

#[tokio::test]
async fn a_silent_peer_is_a_lost_peer() {
    let transport = Transport::memory();
    let _listener = transport.listen("mute").await.unwrap();
    let connector = transport.connector("mute", crate::Role::Node);
    let patience = Patience { header: Duration::from_millis(20), attempts: 2, ..hasty() };
    let client = DataClient::new(&connector, Traffic::default()).with_patience(patience);
    let error = client.fetch(named(BlobHash::of(b"")), LIMIT).await.unwrap_err();
    assert_eq!(error, SourceError::new(FailureClass::PeerLost, "mute: no answer within 20ms"));
}

#[tokio::test]
async fn a_client_connects_again_to_a_server_that_came_back() {
    let transport = Transport::memory();
    let fake = Fake::default();
    let hash = fake.keep(bytes(10));
    let (served, connector) = start(&transport, "place", &fake).await;
    let client = DataClient::new(&connector, Traffic::default()).with_patience(hasty());
    assert!(client.fetch(named(hash), LIMIT).await.is_ok());
    drop(served);
    let patience = Patience { pause: Duration::from_millis(20), attempts: 8, ..hasty() };
    let client = client.with_patience(patience);
    let waiting = tokio::spawn(async move { client.fetch(named(hash), LIMIT).await });
    tokio::task::yield_now().await;
    let (_served, _) = start_again(&transport, &fake).await;
    assert!(waiting.await.unwrap().is_ok());
}

async fn start_again(transport: &Transport, fake: &Fake) -> (crate::testing::Served, crate::Connector) {
    loop {
        // Until the former server has let go of its place.
        match transport.listen("place").await {
            Ok(listener) => {
                let served = crate::testing::serve_at(listener, fake.services());
                let connector = transport.connector("place", crate::Role::Coordinator);
                return (served, connector);
            }
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

#[tokio::test]
async fn files_are_sent_and_received() {
    let (fake, client, _served) = whole().await;
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let content = bytes(2 * CHUNK + 5);
    file.write_all(&content).unwrap();
    let hash = client.upload_file(file.path()).await.unwrap();
    assert_eq!(fake.blobs.lock().unwrap()[&hash], content);
    let mut into = tempfile::tempfile().unwrap();
    into.write_all(b"something before").unwrap();
    let FetchedInto::Blob { sink: mut got, .. } = client.fetch_into(named(hash), LIMIT, into).await.unwrap()
    else {
        panic!("no blob");
    };
    let mut read = Vec::new();
    got.rewind().unwrap();
    got.read_to_end(&mut read).unwrap();
    assert_eq!(read, content);

    let blob = Blob::File { file: file.reopen().unwrap(), size: content.len() as u64, hash };
    let from = Fetch { offset: (CHUNK + 1) as u64, ..named(hash) };
    let replies: Vec<_> = tokio_stream::StreamExt::collect(serve(blob, &from, &fake.traffic).unwrap()).await;
    assert_eq!(replies.len(), 3, "a header and two chunks");

    let missing = client.upload_file("/nowhere/at/all".as_ref()).await.unwrap_err();
    assert_eq!(missing.class, FailureClass::BadInput);
}

#[tokio::test]
async fn a_file_that_shrank_ends_in_an_error() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes(10)).unwrap();
    let blob = Blob::File { file, size: 20, hash: BlobHash::of(b"") };
    let stream = serve(blob, &named(BlobHash::of(b"")), &Traffic::default()).unwrap();
    let last = tokio_stream::StreamExt::collect::<Vec<_>>(stream).await.pop().unwrap();
    assert!(last.unwrap_err().message().contains("a stored blob cannot be read"));
}

#[tokio::test]
async fn uploads_are_checked_and_repeated() {
    let counter = Arc::new(AtomicU32::new(0));
    let seen = counter.clone();
    let tamper: Tamper = Arc::new(move |chunk| match seen.fetch_add(1, Ordering::SeqCst) {
        1 => {
            chunk.crc32c ^= 1;
            Ok(())
        }
        _ => Ok(()),
    });
    let fake = Fake::default();
    let (_served, connector) = start(&Transport::memory(), "", &fake).await;
    let client = DataClient::new(&connector, Traffic::default().tampered(tamper)).with_patience(hasty());
    let hash = client.upload(bytes(2 * CHUNK)).await.unwrap();
    assert_eq!(fake.blobs.lock().unwrap()[&hash], bytes(2 * CHUNK));
    assert_eq!(counter.load(Ordering::SeqCst), 4, "one upload refused, one taken");

    let error = client.upload(bytes(UPLOAD_MAX as usize + 1)).await.unwrap_err();
    assert!(error.message.contains("expected at most 16777216 bytes, found 16777217"), "{error}");
}

#[tokio::test]
async fn an_upload_that_ends_early_is_refused() {
    let sent = |messages: Vec<crate::wire::UploadRequest>| {
        let stream = tokio_stream::iter(messages.into_iter().map(Ok));
        async move { receive(stream, LIMIT, Vec::new(), &Traffic::default()).await.map(|(hash, _)| hash) }
    };
    use crate::wire::{BlobHeader, UploadRequest, upload_request::Body};
    let hash = BlobHash::of(b"abc");
    let header = || Some(Body::Header(BlobHeader { size: 3, hash: hash.to_vec(), ..Default::default() }));
    let chunk = |data: &'static [u8]| Some(Body::Chunk(serve::chunk(0, Bytes::from_static(data))));
    let messages =
        |bodies: Vec<Option<Body>>| bodies.into_iter().map(|body| UploadRequest { body }).collect();
    assert_eq!(sent(messages(vec![header(), chunk(b"abc")])).await.unwrap(), hash);
    for (bodies, problem) in [
        (vec![], "blob without a header"),
        (vec![None], "expected one header, then chunks"),
        (vec![chunk(b"abc")], "expected one header, then chunks"),
        (vec![header(), header()], "expected one header, then chunks"),
        (vec![header(), chunk(b"ab")], "ends after 2 of 3 bytes"),
        (vec![header(), chunk(b"abcd")], "found 4 from 0"),
        (vec![header(), chunk(b"abd")], "its bytes have the hash"),
    ] {
        let error = sent(messages(bodies)).await.unwrap_err();
        assert!(error.message().contains(problem), "{problem}: {}", error.message());
    }
}

#[test]
fn blocking_callers_wait_on_their_own_threads() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (fake, client, _served) = runtime.block_on(whole());
    let blocking = BlockingData::new(client, runtime.handle().clone());
    let hash = blocking.upload(bytes(10)).unwrap();
    assert_eq!(blocking.fetch(named(hash), LIMIT).unwrap(), Fetched::Blob { bytes: bytes(10), hash });
    assert_eq!(fake.blobs.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn an_upload_that_nobody_answers_ends() {
    let transport = Transport::memory();
    let listener = transport.listen("deaf").await.unwrap();
    let served = crate::testing::serve_at(listener, crate::Services::new().with(Deaf));
    let connector = transport.connector(&served.address, crate::Role::Coordinator);
    let patience = Patience { header: Duration::from_millis(50), attempts: 2, ..hasty() };
    let client = DataClient::new(&connector, Traffic::default()).with_patience(patience);
    let error = client.upload(bytes(10)).await.unwrap_err();
    assert_eq!(error, SourceError::new(FailureClass::PeerLost, "deaf: no answer within 50ms"));
}

/// Takes every request to the data plane and answers none.
#[derive(Clone)]
struct Deaf;

impl tonic::server::NamedService for Deaf {
    const NAME: &'static str = "halfstep.v1.Artefacts";
}

impl tower::Service<tonic::codegen::http::Request<tonic::body::Body>> for Deaf {
    type Response = tonic::codegen::http::Response<tonic::body::Body>;
    type Error = std::convert::Infallible;
    type Future = std::future::Pending<Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: tonic::codegen::http::Request<tonic::body::Body>) -> Self::Future {
        std::future::pending()
    }
}
