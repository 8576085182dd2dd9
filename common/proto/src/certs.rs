//! A development authority and one certificate per role (`halfstep certs`).
//!
//! ECDSA P-256. The role is a URI among the subject's alternative names: `halfstep://role/node`. For production take
//! certificates from elsewhere (cert-manager, Vault) with the same URI; the authority's key made here lies beside them.

use crate::Role;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, Error, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use time::{Duration, OffsetDateTime};

/// Days a certificate may be made for: ten years.
pub const DAYS_MAX: u32 = 3653;
/// Certificates are valid from a little earlier: clocks differ.
const EARLIER: Duration = Duration::hours(1);
const URI: &str = "halfstep://role/";

/// Why there are no certificates.
#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    /// An earlier run's.
    #[error("`{}` exists: certificates are never overwritten, choose another folder or remove it", path.display())]
    Exists {
        /// Which file.
        path: PathBuf,
    },
    /// No room or no permission.
    #[error("`{}` cannot be written: {source}", path.display())]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Neither a name nor an address.
    #[error("host `{host}` cannot stand in a certificate: {source}")]
    Host {
        /// As given.
        host: String,
        /// Why.
        source: Error,
    },
    /// Too few or too many.
    #[error("a certificate is valid for 1 to {DAYS_MAX} days, not {days}")]
    Days {
        /// As given.
        days: u32,
    },
    /// Something in the cryptography.
    #[error("a certificate cannot be made: {0}")]
    Make(#[from] Error),
}

/// Names of the files of a role within a folder of certificates: certificate and key.
pub fn names(role: Role) -> (String, String) {
    (format!("{role}.pem"), format!("{role}-key.pem"))
}

/// Name of the file with the authority's certificate.
pub const CA: &str = "ca.pem";
const CA_KEY: &str = "ca-key.pem";

/// The URI that says a role in a certificate.
pub(crate) fn role_uri(role: Role) -> String {
    format!("{URI}{role}")
}

/// The role that a URI says, if it says one.
pub(crate) fn role_of_uri(uri: &str) -> Option<Role> {
    let name = uri.strip_prefix(URI)?;
    Role::ALL.into_iter().find(|role| role.name() == name)
}

/// Makes an authority and a certificate per role in `dir`, valid for `days`. `hosts`: names and addresses under which
/// coordinators are reached, besides those of loopback. Keys can be read by their owner only. Returns the files.
///
/// # Errors
/// If anything is there already (nothing is overwritten) or cannot be written (nothing is left).
pub fn make(dir: &Path, hosts: &[String], days: u32) -> Result<Vec<PathBuf>, CertsError> {
    if !(1..=DAYS_MAX).contains(&days) {
        return Err(CertsError::Days { days });
    }
    let validity = Validity::days(days);
    let authority = Authority::new(validity)?;
    let mut files =
        vec![(dir.join(CA), authority.pem(), PUBLIC), (dir.join(CA_KEY), authority.key_pem(), SECRET)];
    for role in Role::ALL {
        let pair = authority.issue(&[role], hosts, validity)?;
        let (certificate, key) = names(role);
        files.push((dir.join(certificate), pair.certificate, PUBLIC));
        files.push((dir.join(key), pair.key, SECRET));
    }
    if let Some((path, ..)) = files.iter().find(|(path, ..)| path.symlink_metadata().is_ok()) {
        return Err(CertsError::Exists { path: path.clone() });
    }
    fs::create_dir_all(dir).map_err(|source| CertsError::Write { path: dir.to_owned(), source })?;
    for (index, (path, text, mode)) in files.iter().enumerate() {
        if let Err(source) = write(path, text, *mode) {
            // Also the one just begun, unless somebody else's appeared under its name.
            let begun = usize::from(source.kind() != io::ErrorKind::AlreadyExists);
            files[..index + begun].iter().for_each(|(path, ..)| drop(fs::remove_file(path)));
            return Err(CertsError::Write { path: path.clone(), source });
        }
    }
    Ok(files.into_iter().map(|(path, ..)| path).collect())
}

const PUBLIC: u32 = 0o644;
const SECRET: u32 = 0o600;

fn write(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, mode);
    let mut file = options.open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// From when to when.
#[derive(Clone, Copy)]
pub(crate) struct Validity {
    pub(crate) from: OffsetDateTime,
    pub(crate) until: OffsetDateTime,
}

impl Validity {
    pub(crate) fn days(days: u32) -> Self {
        let now = OffsetDateTime::now_utc();
        Self { from: now - EARLIER, until: now + Duration::days(days.into()) }
    }
}

/// A certificate and its key, as PEM.
pub(crate) struct Pair {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// Signs certificates.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new(validity: Validity) -> Result<Self, CertsError> {
        let mut params = CertificateParams::default();
        let key = KeyPair::generate()?;
        // Authorities of one name would look alike to peers until a signature fails.
        let number = blake3::hash(key.public_key_raw()).to_hex();
        let name = format!("halfstep development authority {}", &number[..8]);
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = (validity.from, validity.until);
        Ok(Self(CertifiedIssuer::self_signed(params, key)?))
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    fn key_pem(&self) -> String {
        self.0.key().serialize_pem()
    }

    /// A certificate for these roles. Clients have no hosts: nobody dials them.
    pub(crate) fn issue(
        &self,
        roles: &[Role],
        hosts: &[String],
        validity: Validity,
    ) -> Result<Pair, CertsError> {
        let serves = roles.iter().any(|role| *role != Role::Client);
        let mut params = CertificateParams::default();
        let loopback = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
        for host in loopback.iter().chain(hosts).filter(|_| serves) {
            let named = CertificateParams::new(vec![host.clone()])
                .map_err(|source| CertsError::Host { host: host.clone(), source })?;
            params.subject_alt_names.extend(named.subject_alt_names);
        }
        for role in roles {
            params.subject_alt_names.push(SanType::URI(role_uri(*role).as_str().try_into()?));
        }
        let names: Vec<&str> = roles.iter().map(|role| role.name()).collect();
        params.distinguished_name.push(DnType::CommonName, format!("halfstep {}", names.join(" ")));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if serves {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (validity.from, validity.until);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.0)?;
        Ok(Pair { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_complete_and_keys_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("new");
        let files = make(&dir, &["fleet.example".into(), "10.0.0.7".into()], 30).unwrap();
        assert_eq!(files.len(), 8);
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            let secret = file.to_string_lossy().ends_with("-key.pem");
            assert_eq!(text.contains("PRIVATE KEY"), secret, "{}", file.display());
            #[cfg(unix)]
            {
                use std::os::unix::fs::PermissionsExt;
                let mode = file.metadata().unwrap().permissions().mode() & 0o777;
                assert_eq!(mode & 0o077 == 0, secret, "{}: {mode:o}", file.display());
            }
        }
    }

    #[test]
    fn nothing_is_overwritten_and_nothing_added_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("node.pem"), "mine").unwrap();
        let error = make(dir.path(), &[], 30).unwrap_err().to_string();
        assert!(error.contains("node.pem` exists: certificates are never overwritten"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(fs::read_to_string(dir.path().join("node.pem")).unwrap(), "mine");
    }

    #[test]
    fn hosts_and_days_that_cannot_be_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("new");
        let error = make(&dir, &["bücher.example".into()], 30).unwrap_err().to_string();
        assert!(error.starts_with("host `bücher.example` cannot stand in a certificate"), "{error}");
        for days in [0, DAYS_MAX + 1] {
            let error = make(&dir, &[], days).unwrap_err().to_string();
            assert_eq!(error, format!("a certificate is valid for 1 to 3653 days, not {days}"));
        }
        assert!(!dir.exists());
    }
}
