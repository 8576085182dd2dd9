//! `certs`: a development authority and a certificate for each role.

use halfstep_proto::certs::make;

use super::args::CertsArgs;
use super::slurm::{expand, is_list};
use crate::commands::print;
use crate::exit::{CliError, Exit};

/// Runs the command.
///
/// # Errors
/// Bad input for a folder that cannot be written or holds certificates already, usage for impossible hosts or days.
pub(crate) fn certs(arguments: &CertsArgs) -> Result<Exit, CliError> {
    let hosts = hosts(&arguments.hosts)?;
    let files = make(&arguments.dir, &hosts, arguments.days).map_err(|error| {
        use halfstep_proto::certs::CertsError as E;
        match &error {
            E::Exists { .. } | E::Write { .. } => CliError::bad_input(&error),
            E::Host { .. } | E::Days { .. } => CliError::usage(&error),
            E::Make(_) => CliError::internal(&error),
        }
    })?;
    let names = files.iter().map(|path| format!("{}\n", path.display()));
    print(&names.collect::<String>())?;
    Ok(Exit::Solved)
}

/// As typed, host lists expanded.
fn hosts(typed: &[String]) -> Result<Vec<String>, CliError> {
    let mut hosts = Vec::new();
    for host in typed {
        match is_list(host) {
            true => hosts.extend(expand(host).map_err(CliError::usage)?),
            false => hosts.push(host.clone()),
        }
    }
    Ok(hosts)
}
