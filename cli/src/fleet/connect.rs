//! A line to a coordinator: transport by the security options, clients of its services, errors in the user's words.

use std::net::ToSocketAddrs;

use halfstep_proto::wire::client_client::ClientClient;
use halfstep_proto::{Connector, Security, Tls, TlsFiles, Transport, TransportError, explain};
use halfstep_proto::{Role, data::DataClient, data::Traffic};
use halfstep_work::JobId;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::args::{ConnectArgs, SecurityArgs};
use super::whereabouts::Whereabouts;
use crate::exit::{CliError, Exit};

/// Clients of one coordinator's services; clones share the connection, which comes back when it is lost.
#[derive(Clone)]
pub(crate) struct Line {
    pub(crate) jobs: ClientClient<Channel>,
    pub(crate) data: DataClient,
    pub(crate) address: String,
}

impl Line {
    /// Over a transport of whatever kind; connects when first used.
    pub(crate) fn new(connector: &Connector) -> Self {
        let channel = connector.channel();
        let address = connector.address().to_owned();
        let data = DataClient::with_channel(channel.clone(), &address, Traffic::default());
        Self { jobs: ClientClient::new(channel), data, address }
    }

    /// To the coordinator named in the arguments.
    ///
    /// # Errors
    /// Bad configuration for security options that cannot be used; as [`Whereabouts`] for an address that is not known.
    pub(crate) fn open(arguments: &ConnectArgs) -> Result<Self, CliError> {
        let transport = transport(&arguments.security, Role::Client)?;
        let address = Whereabouts::of(arguments)?.now()?;
        arguments.security.check(&address)?;
        Ok(Self::new(&transport.connector(&address, Role::Coordinator)))
    }

    /// What the coordinator said no to.
    pub(crate) fn refused(&self, status: &Status) -> CliError {
        let exit = match status.code() {
            Code::InvalidArgument | Code::NotFound | Code::DataLoss => Exit::BadInput,
            Code::FailedPrecondition | Code::PermissionDenied | Code::Unauthenticated => {
                Exit::BadConfiguration
            }
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => Exit::Interrupted,
            _ => Exit::Internal,
        };
        CliError::new(exit, format!("coordinator {}: {}", self.address, explain(status)))
    }
}

/// Whether asking again later may help: the coordinator is away, not against it.
pub(crate) fn is_passing(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown)
}

/// TCP, secured as the user asked.
///
/// # Errors
/// Bad configuration if neither certificates nor plain text were asked for, or the certificates cannot be used.
pub(crate) fn transport(security: &SecurityArgs, role: Role) -> Result<Transport, CliError> {
    match (&security.certs, security.insecure) {
        (Some(folder), _) => {
            let tls = Tls::load(&TlsFiles::in_folder(folder, role), role).map_err(CliError::configuration)?;
            Ok(Transport::tcp(Security::Tls(tls)))
        }
        (None, true) => Ok(Transport::tcp(Security::Plaintext)),
        (None, false) => Err(CliError::configuration("no certificates given").hint(
            "add `--certs DIR` (`halfstep certs` makes them), or `--insecure` for plain text on one machine",
        )),
    }
}

impl SecurityArgs {
    /// Plain text to another machine is refused at once, not tried again and again.
    ///
    /// # Errors
    /// Bad configuration. A name that means nothing now may do so later.
    pub(crate) fn check(&self, coordinator: &str) -> Result<(), CliError> {
        let Ok(mut found) = coordinator.to_socket_addrs() else { return Ok(()) };
        let far = found.find(|address| !address.ip().to_canonical().is_loopback());
        match far.filter(|_| self.insecure) {
            Some(far) => Err(CliError::configuration(format!(
                "coordinator `{coordinator}`: is {}, not a loopback address, expected one with --insecure",
                far.ip()
            ))
            .hint("between machines use `--certs DIR`; `halfstep certs` makes certificates")),
            None => Ok(()),
        }
    }
}

/// An address that cannot be used as asked.
pub(crate) fn unusable(error: TransportError) -> CliError {
    match error {
        TransportError::Connect { .. } => CliError::new(Exit::Interrupted, error),
        _ => CliError::configuration(error),
    }
}

/// Runs a command's conversation.
///
/// # Errors
/// Internal if threads cannot be had.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| CliError::internal(format!("runtime: {error}")))
}

/// A job's id as people type it.
///
/// # Errors
/// Usage for anything but 32 hexadecimal digits.
pub(crate) fn job_id(text: &str) -> Result<JobId, CliError> {
    let wrong = || {
        CliError::usage(format!("job `{text}`: expected 32 hexadecimal digits"))
            .hint("`halfstep status` lists jobs")
    };
    let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect();
    let digits = digits.filter(|digits| digits.len() == 32).ok_or_else(wrong)?;
    let mut id = [0; 16];
    for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    Ok(JobId(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_as_they_are_shown() {
        let id = JobId(*b"0123456789abcdef");
        assert_eq!(job_id(&id.to_string()).unwrap(), id);
        for wrong in ["", "12", &"g".repeat(32), &"0".repeat(33)] {
            assert!(job_id(wrong).unwrap_err().message.contains("32 hexadecimal digits"), "{wrong}");
        }
    }

    #[test]
    fn one_of_the_two_ways_to_connect_must_be_chosen() {
        let none = SecurityArgs { certs: None, insecure: false };
        let error = transport(&none, Role::Client).err().unwrap();
        assert_eq!(error.exit, Exit::BadConfiguration);
        assert!(error.hint.unwrap().contains("--insecure"));
    }
}
