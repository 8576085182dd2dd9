//! Mutual TLS 1.3: loading certificates, checking them early, and the two ends of a handshake.
//!
//! Both ends show a certificate of the same authority. A dialled coordinator's must name the host dialled; a node's need
//! not (nodes come and go and may share one), but both must name their role. Files are looked at again every ten
//! seconds when connections are made, so renewed certificates need no restart; one that cannot be used is logged and
//! the one before kept.

use crate::identity::Certified;
use crate::{Role, certs, telemetry};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig,
    SignatureScheme,
};

/// A file of certificates or keys is no larger.
const FILE_MAX: u64 = 1 << 20;
/// How often files are looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
const ALPN: &[u8] = b"h2";

/// Where a process has its certificates: PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the authorities that peers are believed from.
    pub ca: PathBuf,
    /// Its own certificate, and any between it and the authority.
    pub certificate: PathBuf,
    /// Its key; must not be readable by others than owner and group.
    pub key: PathBuf,
}

impl TlsFiles {
    /// Those that `halfstep certs` made in a folder.
    pub fn in_folder(dir: &Path, role: Role) -> Self {
        let (certificate, key) = certs::names(role);
        Self { ca: dir.join(certs::CA), certificate: dir.join(certificate), key: dir.join(key) }
    }
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Missing, or no permission.
    #[error("{what} `{}` cannot be read: {source}", path.display())]
    Read {
        /// What it should be.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not what it should be.
    #[error("{what} `{}` {problem}", path.display())]
    Content {
        /// What it should be.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A key for everybody.
    #[error("key `{}` is open to others (mode {mode:03o}): expected 600, or 640 at most", path.display())]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
}

/// The certificates of this process, ready to be used and looked at again now and then.
pub struct Tls {
    files: TlsFiles,
    role: Role,
    state: Mutex<State>,
}

struct State {
    configs: Arc<Configs>,
    stamps: Vec<Stamp>,
    looked: Instant,
}

/// What tells a replaced file from the one before.
type Stamp = Option<(SystemTime, u64)>;

struct Configs {
    server: Arc<ServerConfig>,
    /// One per role that may be dialled, in the order of [`Role::ALL`].
    client: Vec<Arc<ClientConfig>>,
}

impl Tls {
    /// Reads and checks certificates for a process of this role.
    ///
    /// # Errors
    /// Files that are missing, open to others or something else; a certificate that is expired or not yet valid, of
    /// another role, not of this authority, or not of this key.
    pub fn load(files: &TlsFiles, role: Role) -> Result<Arc<Self>, TlsError> {
        let stamps = stamps(files);
        let configs = Arc::new(load(files, role, check_own)?);
        let state = State { configs, stamps, looked: Instant::now() };
        Ok(Arc::new(Self { files: files.clone(), role, state: Mutex::new(state) }))
    }

    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        self.configs(LOOK_AGAIN).server.clone()
    }

    pub(crate) fn client(&self, expects: Role) -> Arc<ClientConfig> {
        self.configs(LOOK_AGAIN).client[expects as usize].clone()
    }

    /// The newest that can be used.
    fn configs(&self, look_again: Duration) -> Arc<Configs> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.elapsed() >= look_again {
            state.looked = Instant::now();
            let stamps = stamps(&self.files);
            if stamps != state.stamps {
                match load(&self.files, self.role, check_own) {
                    Ok(configs) => {
                        tracing::info!(certificate = %self.files.certificate.display(), "certificates renewed");
                        (state.configs, state.stamps) = (Arc::new(configs), stamps);
                    }
                    // Perhaps half written: tried again next time.
                    Err(error) => tracing::warn!(%error, "renewed certificates cannot be used"),
                }
            }
        }
        state.configs.clone()
    }
}

fn stamps(files: &TlsFiles) -> Vec<Stamp> {
    let stamp = |path: &PathBuf| {
        let metadata = fs::metadata(path).ok()?;
        Some((metadata.modified().ok()?, metadata.len()))
    };
    [&files.ca, &files.certificate, &files.key].map(stamp).to_vec()
}

const AUTHORITY: &str = "certificate authority";
const CERTIFICATE: &str = "certificate";
const KEY: &str = "key";

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    let unreadable = |source| TlsError::Read { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    if what == KEY {
        private(path, &file).map_err(unreadable)??;
    }
    let mut content = Vec::new();
    file.take(FILE_MAX).read_to_end(&mut content).map_err(unreadable)?;
    Ok(content)
}

#[cfg(unix)]
fn private(path: &Path, file: &File) -> io::Result<Result<(), TlsError>> {
    use std::os::unix::fs::PermissionsExt;
    let mode = file.metadata()?.permissions().mode() & 0o777;
    // A secret in Kubernetes belongs to root and is read by way of the group.
    let open = mode & 0o037 != 0;
    Ok(if open { Err(TlsError::Exposed { path: path.to_owned(), mode }) } else { Ok(()) })
}

#[cfg(not(unix))]
fn private(_: &Path, _: &File) -> io::Result<Result<(), TlsError>> {
    Ok(Ok(()))
}

fn content(what: &'static str, path: &Path, problem: impl ToString) -> TlsError {
    TlsError::Content { what, path: path.to_owned(), problem: problem.to_string() }
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = read(what, path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let found = found.map_err(|error| content(what, path, format!("is no PEM file: {error}")))?;
    if found.is_empty() {
        return Err(content(what, path, "has no certificate in it"));
    }
    Ok(found)
}

/// `check`: what a process must know of its own certificate.
fn load(files: &TlsFiles, role: Role, check: Check) -> Result<Configs, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let wrong = |problem: String| content(CERTIFICATE, &files.certificate, problem);
    let mut roots = RootCertStore::empty();
    for root in certificates(AUTHORITY, &files.ca)? {
        roots.add(root).map_err(|e| content(AUTHORITY, &files.ca, format!("cannot be used: {e}")))?;
    }
    let roots = Arc::new(roots);
    let chain = certificates(CERTIFICATE, &files.certificate)?;
    let key = PrivateKeyDer::from_pem_slice(&read(KEY, &files.key)?)
        .map_err(|error| content(KEY, &files.key, format!("has no private key in it: {error}")))?;
    let peers = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
        .build()
        .map_err(|error| content(AUTHORITY, &files.ca, format!("cannot be used: {error}")))?;
    check(&chain, role, peers.as_ref(), files)?;
    let unusable = |error: Error| wrong(format!("does not go with key `{}`: {error}", files.key.display()));
    let mut server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(unusable)?
        .with_client_cert_verifier(peers)
        .with_single_cert(chain.clone(), key.clone_key())
        .map_err(unusable)?;
    server.alpn_protocols = vec![ALPN.to_vec()];
    let client = |expects| {
        let verifier = RoleVerifier::new(roots.clone(), provider.clone(), expects)
            .map_err(|error| content(AUTHORITY, &files.ca, format!("cannot be used: {error}")))?;
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(unusable)?;
        client.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Arc::new(client))
    };
    let client = Role::ALL.into_iter().map(client).collect::<Result<_, TlsError>>()?;
    Ok(Configs { server: Arc::new(server), client })
}

type Check = fn(&[CertificateDer<'static>], Role, &dyn ClientCertVerifier, &TlsFiles) -> Result<(), TlsError>;

/// What peers would find out later, with less to say about it.
fn check_own(
    chain: &[CertificateDer<'static>],
    role: Role,
    peers: &dyn ClientCertVerifier,
    files: &TlsFiles,
) -> Result<(), TlsError> {
    let wrong = |problem: String| Err(content(CERTIFICATE, &files.certificate, problem));
    let own = Certified::read(&chain[0])
        .map_err(|error| content(CERTIFICATE, &files.certificate, format!("cannot be read: {error}")))?;
    if let Some(problem) = own.untimely() {
        return wrong(problem);
    }
    if !own.roles.contains(&role) {
        return wrong(format!("is for {}, expected role {role}", own.role_names()));
    }
    match peers.verify_client_cert(&chain[0], &chain[1..], UnixTime::now()) {
        Ok(_) => {
            telemetry::certificate_expires(own.expires_unix_seconds());
            Ok(())
        }
        Err(Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)) => {
            wrong(format!("was not issued by authority `{}`", files.ca.display()))
        }
        Err(error) => wrong(format!("cannot be used: {error}")),
    }
}

/// Believes servers of our authority that name the role expected.
#[derive(Debug)]
struct RoleVerifier {
    inner: Arc<WebPkiServerVerifier>,
    expects: Role,
}

impl RoleVerifier {
    fn new(roots: Arc<RootCertStore>, provider: Arc<CryptoProvider>, expects: Role) -> Result<Self, String> {
        let inner = WebPkiServerVerifier::builder_with_provider(roots, provider).build();
        inner.map(|inner| Self { inner, expects }).map_err(|error| error.to_string())
    }
}

impl ServerCertVerifier for RoleVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified =
            self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        match verified {
            Ok(_) => {}
            // The name is what is checked last: all else is as it should be.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if self.expects == Role::Node => {}
            Err(error) => return Err(error),
        }
        let peer = Certified::read(end_entity).map_err(Error::General)?;
        if peer.roles.contains(&self.expects) {
            return Ok(ServerCertVerified::assertion());
        }
        Err(Error::General(format!(
            "its certificate is for {}, expected role {}",
            peer.role_names(),
            self.expects
        )))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests;
