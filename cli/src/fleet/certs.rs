//! `certs`: a development authority and a certificate for each role.

use halfstep_proto::certs::make;

use super::args::CertsArgs;
use crate::commands::print;
use crate::exit::{CliError, Exit};

/// Runs the command.
///
/// # Errors
/// Bad input for a folder that cannot be written or holds certificates already, usage for impossible hosts or days.
pub(crate) fn certs(arguments: &CertsArgs) -> Result<Exit, CliError> {
    let files = make(&arguments.dir, &arguments.hosts, arguments.days).map_err(|error| {
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
