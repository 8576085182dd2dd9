//! Who is at the other end of a connection, and in which role.

use crate::certs::role_of_uri;
use std::fmt;
use std::sync::Arc;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tonic::{Request, Status};
use x509_parser::prelude::{ASN1Time, FromDer, GeneralName, X509Certificate};

/// Bytes of a certificate's subject that are kept.
const SUBJECT_MAX: usize = 200;

/// What a process is in the fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A person's tool: submits, watches, cancels, fetches results.
    Client,
    /// Does tasks.
    Node,
    /// Plans and keeps.
    Coordinator,
}

impl Role {
    /// Every role, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Client, Self::Node, Self::Coordinator];

    /// As in certificates and file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Node => "node",
            Self::Coordinator => "coordinator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The other end of an accepted connection; in the extensions of every request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A process of this machine over plaintext loopback, or this process itself: trusted with every role.
    Local,
    /// One whose certificate was checked.
    Certified(Arc<Certified>),
    /// Whoever reached a port that is open to all: may ask for health, nothing else.
    Anybody,
}

impl Peer {
    /// Whether it has one of these roles.
    pub fn is(&self, roles: &[Role]) -> bool {
        match self {
            Self::Local => !roles.is_empty(),
            Self::Certified(certified) => certified.roles.iter().any(|role| roles.contains(role)),
            Self::Anybody => false,
        }
    }

    /// Who sent this request.
    ///
    /// # Errors
    /// `unauthenticated` if the request did not come by a `Transport`.
    pub fn of<T>(request: &Request<T>) -> Result<&Self, Status> {
        request.extensions().get().ok_or_else(Self::nobody)
    }

    pub(crate) fn nobody() -> Status {
        Status::unauthenticated("the request came by no connection of a transport")
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.pad("a local process"),
            Self::Anybody => f.pad("a process that nothing is known of"),
            Self::Certified(certified) => {
                write!(f, "`{}`, whose certificate is for {}", certified.subject, certified.role_names())
            }
        }
    }
}

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certified {
    /// Its subject, as text.
    pub subject: String,
    /// Roles it names; none if it was made for something else.
    pub roles: Vec<Role>,
    from: ASN1Time,
    until: ASN1Time,
}

impl Certified {
    /// Reads a certificate. Whether to believe it is decided elsewhere.
    pub(crate) fn read(der: &CertificateDer<'_>) -> Result<Self, String> {
        let (_, certificate) = X509Certificate::from_der(der).map_err(|error| error.to_string())?;
        let names = certificate.subject_alternative_name().map_err(|error| error.to_string())?;
        let names = names.map_or(&[] as &[_], |names| &names.value.general_names);
        let mut roles: Vec<Role> = names
            .iter()
            .filter_map(|name| match name {
                GeneralName::URI(uri) => role_of_uri(uri),
                _ => None,
            })
            .collect();
        roles.sort_unstable();
        roles.dedup();
        let subject = certificate.subject().to_string();
        let validity = certificate.validity();
        Ok(Self {
            subject: subject.chars().filter(|c| !c.is_control()).take(SUBJECT_MAX).collect(),
            roles,
            from: validity.not_before,
            until: validity.not_after,
        })
    }

    /// Why it is of no use now.
    pub(crate) fn untimely(&self) -> Option<String> {
        let now = ASN1Time::now();
        if now < self.from {
            return Some(format!("is not valid before {}, it is {now}", self.from));
        }
        (now > self.until).then(|| format!("has expired on {}, it is {now}", self.until))
    }

    pub(crate) fn expires_unix_seconds(&self) -> i64 {
        self.until.timestamp()
    }

    pub(crate) fn role_names(&self) -> String {
        match self.roles.as_slice() {
            [] => "no role".to_owned(),
            [role] => format!("role {role}"),
            roles => {
                let names: Vec<&str> = roles.iter().map(|role| role.name()).collect();
                format!("roles {}", names.join(" and "))
            }
        }
    }
}
