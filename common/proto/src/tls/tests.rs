//! Certificates of every kind of wrong, in files and over real loopback sockets.

use super::*;
use crate::certs::{Authority, Pair, Validity};
use crate::testing::{Fake, Served, serve_at};
use crate::transport::{BoxIo, Network, Tcp};
use crate::wire::client_client::ClientClient;
use crate::{
    BlobHash, BlobName, Fetch, Limits, Peer, Security, Transport, TransportError, explain, roles, wire,
};
use halfstep_work::{JobId, ShardId};
use std::fmt::Write as _;
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::codegen::BoxFuture;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// A fleet's authority and a folder for certificates of it.
struct Fleet {
    authority: Authority,
    dir: TempDir,
}

fn days(from: i64, until: i64) -> Validity {
    let now = time::OffsetDateTime::now_utc();
    Validity { from: now + time::Duration::days(from), until: now + time::Duration::days(until) }
}

impl Fleet {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new(Validity::days(2)).unwrap();
        fs::write(dir.path().join("ca.pem"), authority.pem()).unwrap();
        Self { authority, dir }
    }

    fn pair(&self, roles: &[Role]) -> Pair {
        self.authority.issue(roles, &[], Validity::days(1)).unwrap()
    }

    /// Files with this certificate and key.
    fn keep(&self, name: &str, pair: &Pair) -> TlsFiles {
        let path = |end: &str| self.dir.path().join(format!("{name}{end}"));
        let files = TlsFiles { ca: path("-ca.pem"), certificate: path(".pem"), key: path("-key.pem") };
        fs::write(&files.ca, self.authority.pem()).unwrap();
        fs::write(&files.certificate, &pair.certificate).unwrap();
        fs::write(&files.key, &pair.key).unwrap();
        set_mode(&files.key, 0o600);
        files
    }

    fn transport(&self, role: Role) -> Transport {
        let files = self.keep(role.name(), &self.pair(&[role]));
        Transport::tcp(Security::Tls(Tls::load(&files, role).unwrap()))
    }

    /// Of a certificate that its own process would have refused.
    fn unchecked(&self, pair: &Pair) -> Transport {
        let files = self.keep("unchecked", pair);
        let configs = Arc::new(load(&files, Role::Client, |_, _, _, _| Ok(())).unwrap());
        let state = State { configs, stamps: stamps(&files), looked: Instant::now() };
        let tls = Tls { files, role: Role::Client, state: Mutex::new(state) };
        Transport::tcp(Security::Tls(Arc::new(tls)))
    }

    async fn serve(&self, role: Role) -> Served {
        let listener = self.transport(role).listen("127.0.0.1:0").await.unwrap();
        serve_at(listener, Fake::default().services())
    }
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Calls any RPC with an empty message.
async fn call(channel: Channel, path: &'static str) -> Result<(), Status> {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.map_err(|error| Status::from_error(error.into()))?;
    let codec = tonic_prost::ProstCodec::<wire::Empty, wire::Empty>::default();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
    let mut stream = grpc.server_streaming(Request::new(wire::Empty {}), path, codec).await?.into_inner();
    stream.message().await.map(drop)
}

#[tokio::test]
async fn every_role_may_call_its_rows_of_the_table_and_no_other() {
    let fleet = Fleet::new();
    let served = fleet.serve(Role::Coordinator).await;
    for role in Role::ALL {
        let channel = fleet.transport(role).connector(&served.address, Role::Coordinator).channel();
        for (path, allowed) in roles::TABLE {
            let outcome = call(channel.clone(), path).await;
            let Err(status) = outcome else {
                assert!(allowed.contains(&role), "{role} called {path}");
                continue;
            };
            let refused = status.code() == Code::PermissionDenied;
            assert_eq!(refused, !allowed.contains(&role), "{role} calls {path}: {status}");
            if refused {
                let who = format!("not for `CN=halfstep {role}`, whose certificate is for role {role}");
                assert!(status.message().contains(&format!("`{path}` is for role ")), "{status}");
                assert!(status.message().ends_with(&who), "{status}");
            }
        }
    }
}

/// All of them fail on every row, with a sentence that says why.
#[tokio::test]
async fn strangers_are_refused_on_every_rpc() {
    let fleet = Fleet::new();
    let served = fleet.serve(Role::Coordinator).await;
    let issue = |validity| fleet.authority.issue(&Role::ALL, &[], validity).unwrap();
    let others = Fleet::new();
    let strangers = [
        (
            fleet.unchecked(&issue(days(-2, -1))),
            "the peer finds this side's certificate expired or not yet valid",
        ),
        (
            fleet.unchecked(&issue(days(1, 2))),
            "the peer finds this side's certificate expired or not yet valid",
        ),
        (
            fleet.unchecked(&others.pair(&Role::ALL)),
            "the peer does not know the authority of this side's certificate",
        ),
        (Transport::over(Anonymous, Security::Plaintext), "the peer wants a certificate and was shown none"),
        (fleet.unchecked(&fleet.pair(&[])), "whose certificate is for no role"),
    ];
    for (transport, message) in strangers {
        let channel = transport.connector(&served.address, Role::Coordinator).channel();
        for (path, _) in roles::TABLE {
            let status = call(channel.clone(), path).await.unwrap_err();
            let explained = explain(&status);
            assert!(explained.contains(message), "{path}: expected `{message}`, found `{explained}`");
        }
    }
}

/// Connects with TLS but shows no certificate.
struct Anonymous;

impl Network for Anonymous {
    fn connect(&self, address: String) -> BoxFuture<BoxIo, TransportError> {
        Box::pin(async move {
            let io = Tcp::new(true).connect(address).await?;
            let provider = Arc::new(ring::default_provider());
            let config = ClientConfig::builder_with_provider(provider.clone())
                .with_protocol_versions(&[&TLS13])
                .unwrap()
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Credulous(provider)))
                .with_no_client_auth();
            let connector = TlsConnector::from(Arc::new(config));
            let io = connector.connect("localhost".try_into().unwrap(), io).await.unwrap();
            Ok(Box::new(io) as BoxIo)
        })
    }

    fn listen(&self, _: String) -> BoxFuture<Box<dyn crate::transport::Accept>, TransportError> {
        unreachable!("only dials")
    }
}

#[derive(Debug)]
struct Credulous(Arc<CryptoProvider>);

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[tokio::test]
async fn clients_fetch_artefacts_and_nothing_else() {
    let fleet = Fleet::new();
    let served = fleet.serve(Role::Coordinator).await;
    for role in Role::ALL {
        let connector = fleet.transport(role).connector(&served.address, Role::Coordinator);
        let mut client = wire::artefacts_client::ArtefactsClient::new(connector.channel());
        let mut ask = async |name| {
            let fetch = Fetch::new(JobId([0; 16]), name);
            client.fetch(wire::FetchRequest::from(fetch)).await.map(drop)
        };
        let missing = ask(BlobName::Artefact(BlobHash::of(b""))).await.unwrap_err();
        assert_eq!(missing.code(), Code::NotFound, "{role}");
        let inputs = ask(BlobName::Inputs(ShardId(0))).await;
        if role == Role::Client {
            let refused = inputs.unwrap_err();
            assert_eq!(refused.code(), Code::PermissionDenied);
            assert!(
                refused.message().starts_with("only nodes may fetch this, not `CN=halfstep client`"),
                "{refused}"
            );
        } else {
            assert!(inputs.is_ok(), "{role}");
        }
    }
}

async fn refused(transport: &Transport, address: &str, expects: Role) -> String {
    transport.connector(address, expects).connect().await.err().unwrap().to_string()
}

#[tokio::test]
async fn servers_must_be_who_was_dialled() {
    let fleet = Fleet::new();
    let client = fleet.transport(Role::Client);
    let node = fleet.serve(Role::Node).await;
    let message = refused(&client, &node.address, Role::Coordinator).await;
    assert!(message.contains("its certificate is for role node, expected role coordinator"), "{message}");
    let message = refused(&Fleet::new().transport(Role::Client), &node.address, Role::Node).await;
    assert!(message.contains("invalid peer certificate: UnknownIssuer"), "{message}");

    // 127.0.0.2 is nobody in these certificates: enough for a node, not for a coordinator.
    for (role, known) in [(Role::Node, true), (Role::Coordinator, false)] {
        let listener = fleet.transport(role).listen("127.0.0.2:0").await.unwrap();
        let served = serve_at(listener, Fake::default().services());
        let connected = client.connector(&served.address, role).connect().await;
        assert_eq!(connected.is_ok(), known, "{role}");
        if let Err(error) = connected {
            assert!(error.to_string().contains("certificate not valid for name \"127.0.0.2\""), "{error}");
        }
    }
}

#[tokio::test]
async fn plaintext_and_tls_do_not_mix_and_say_so() {
    let fleet = Fleet::new();
    let served = fleet.serve(Role::Coordinator).await;
    let plain = Transport::tcp(Security::Plaintext);
    let message = refused(&plain, &served.address, Role::Coordinator).await;
    assert!(message.ends_with(", perhaps because it wants certificates"), "{message}");

    let open = serve_at(plain.listen("127.0.0.1:0").await.unwrap(), Fake::default().services());
    let message = refused(&fleet.transport(Role::Client), &open.address, Role::Coordinator).await;
    assert!(message.contains("received corrupt message of type InvalidContentType"), "{message}");
}

#[tokio::test]
async fn a_slow_handshake_is_cut_off_and_holds_up_nobody() {
    let fleet = Fleet::new();
    let limits = Limits { handshake: Duration::from_millis(100), ..Limits::default() };
    let transport = fleet.transport(Role::Coordinator);
    let listener = transport.listen("127.0.0.1:0").await.unwrap().with_limits(limits);
    let served = serve_at(listener, Fake::default().services());
    let mut slow = TcpStream::connect(&served.address).await.unwrap();
    let client = fleet.transport(Role::Client);
    let channel = client.connector(&served.address, Role::Coordinator).connect().await.unwrap();
    assert!(ClientClient::new(channel).list(wire::ListRequest::default()).await.is_ok());
    let closed = tokio::time::timeout(Duration::from_secs(10), slow.read(&mut [0; 64])).await;
    assert!(matches!(closed, Ok(Ok(0) | Err(_))), "{closed:?}");
}

/// Also over any address: with certificates there is no rule about loopback.
#[tokio::test]
async fn with_certificates_any_address_may_be_listened_at() {
    assert!(Fleet::new().transport(Role::Coordinator).listen("0.0.0.0:0").await.is_ok());
}

#[test]
fn certificates_of_no_use_are_refused_before_they_are_used() {
    let fleet = Fleet::new();
    let good = fleet.pair(&[Role::Node]);
    let issue = |validity| fleet.authority.issue(&[Role::Node], &[], validity).unwrap();
    let refused = |files: &TlsFiles, parts: &[&str]| {
        let error = Tls::load(files, Role::Node).err().unwrap().to_string();
        parts.iter().for_each(|part| assert!(error.contains(part), "expected `{part}` in `{error}`"));
    };
    assert!(Tls::load(&fleet.keep("good", &good), Role::Node).is_ok());

    let missing = TlsFiles { key: "/nowhere/key.pem".into(), ..fleet.keep("missing", &good) };
    refused(&missing, &["key `/nowhere/key.pem` cannot be read: No such file"]);
    let open = fleet.keep("open", &good);
    for mode in [0o644, 0o604, 0o660] {
        set_mode(&open.key, mode);
        let says = format!("open-key.pem` is open to others (mode {mode:o}): expected 600, or 640 at most");
        refused(&open, &[&says]);
    }
    set_mode(&open.key, 0o440);
    assert!(Tls::load(&open, Role::Node).is_ok());

    refused(&fleet.keep("old", &issue(days(-2, -1))), &["old.pem` has expired on ", ", it is "]);
    refused(&fleet.keep("young", &issue(days(1, 2))), &["young.pem` is not valid before ", ", it is "]);
    refused(
        &fleet.keep("client", &fleet.pair(&[Role::Client])),
        &["client.pem` is for role client, expected role node"],
    );
    refused(&fleet.keep("none", &fleet.pair(&[])), &["none.pem` is for no role, expected role node"]);
    let foreign = Fleet::new().pair(&[Role::Node]);
    refused(
        &fleet.keep("foreign", &foreign),
        &["foreign.pem` was not issued by authority `", "foreign-ca.pem`"],
    );
    let crossed = Pair { certificate: good.certificate.clone(), key: foreign.key };
    refused(&fleet.keep("crossed", &crossed), &["crossed.pem` does not go with key `", "crossed-key.pem`"]);
    let swapped = Pair { certificate: good.key.clone(), key: good.certificate.clone() };
    refused(&fleet.keep("swapped", &swapped), &["swapped.pem` has no certificate in it"]);
    let empty = Pair { certificate: good.certificate.clone(), key: String::new() };
    refused(&fleet.keep("empty", &empty), &["empty-key.pem` has no private key in it"]);
    let mut mangled = String::new();
    for line in good.certificate.lines() {
        writeln!(mangled, "{}", if line.starts_with("MI") { "AAAA" } else { line }).unwrap();
    }
    let mangled = Pair { certificate: mangled, key: good.key };
    refused(&fleet.keep("mangled", &mangled), &["mangled.pem` cannot be read: "]);
}

#[test]
fn several_roles_in_one_certificate_are_all_held() {
    let fleet = Fleet::new();
    let files = fleet.keep("both", &fleet.pair(&[Role::Coordinator, Role::Node]));
    assert!(Tls::load(&files, Role::Node).is_ok() && Tls::load(&files, Role::Coordinator).is_ok());
    let certified = Certified::read(&certificates(CERTIFICATE, &files.certificate).unwrap()[0]).unwrap();
    assert_eq!(certified.role_names(), "roles node and coordinator");
    let peer = Peer::Certified(Arc::new(certified));
    assert!(peer.is(&[Role::Node]) && !peer.is(&[Role::Client]) && !peer.is(&[]));
}

#[test]
fn renewed_files_are_used_and_broken_ones_are_not() {
    let fleet = Fleet::new();
    let files = fleet.keep("node", &fleet.pair(&[Role::Node]));
    let tls = Tls::load(&files, Role::Node).unwrap();
    let first = tls.configs(Duration::ZERO);
    assert!(Arc::ptr_eq(&first, &tls.configs(Duration::ZERO)), "nothing has changed");
    fs::write(&files.certificate, "half of a").unwrap();
    assert!(Arc::ptr_eq(&first, &tls.configs(Duration::ZERO)), "broken files change nothing");
    fleet
        .keep("node", &fleet.authority.issue(&[Role::Node], &["other.example".into()], days(-1, 2)).unwrap());
    assert!(Arc::ptr_eq(&first, &tls.configs(Duration::from_secs(3600))), "not looked at yet");
    assert!(!Arc::ptr_eq(&first, &tls.configs(Duration::ZERO)), "renewed");
}

#[tokio::test]
async fn what_certs_makes_works_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    certs::make(dir.path(), &["fleet.example".into()], 30).unwrap();
    let transport = |role| {
        Transport::tcp(Security::Tls(Tls::load(&TlsFiles::in_folder(dir.path(), role), role).unwrap()))
    };
    let listener = transport(Role::Coordinator).listen("127.0.0.1:0").await.unwrap();
    let served = serve_at(listener, Fake::default().services());
    let address = served.address.replace("127.0.0.1", "localhost");
    for role in Role::ALL {
        let channel = transport(role).connector(&address, Role::Coordinator).connect().await.unwrap();
        let listed = ClientClient::new(channel).list(wire::ListRequest::default()).await;
        assert_eq!(listed.is_ok(), role == Role::Client, "{role}");
    }
}
