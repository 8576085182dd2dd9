//! What shells and `man` know of the command line, made from the command line itself.

use std::fs;
use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::args::Cli;
use crate::commands::print;
use crate::exit::{CliError, Exit};

/// Prints a completion script.
///
/// # Errors
/// Internal if stdout cannot be written.
pub(crate) fn completions(shell: Shell) -> Result<Exit, CliError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "halfstep", &mut script);
    print(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Solved)
}

/// Writes a page for the binary and one for each command into `folder`, which is made if there is none.
///
/// # Errors
/// Bad input for a place that cannot be written to.
pub(crate) fn pages(folder: &Path) -> Result<Exit, CliError> {
    let refused = |error: std::io::Error| {
        CliError::bad_input(format!("manual `{}`: cannot be written into: {error}", folder.display()))
    };
    fs::create_dir_all(folder).map_err(refused)?;
    let mut whole = Cli::command();
    whole.build();
    for command in std::iter::once(&whole).chain(whole.get_subcommands()) {
        let page = Man::new(command.clone()).generate_to(folder).map_err(refused)?;
        print(&format!("{}\n", page.display()))?;
    }
    Ok(Exit::Solved)
}
