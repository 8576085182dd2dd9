//! Exit codes and the error that carries one.
//!
//! The table in `--help` is made from [`Exit`], so it cannot differ from what the process returns.
//! Not here: printing (`main`).

use std::fmt;

/// How the process ends; the numbers are the documented interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    Solved = 0,
    Internal = 1,
    Usage = 2,
    SomeKept = 3,
    SomeFailed = 4,
    BadInput = 65,
    Interrupted = 75,
    BadConfiguration = 78,
}

impl Exit {
    pub(crate) const ALL: [Self; 8] = [
        Self::Solved,
        Self::Internal,
        Self::Usage,
        Self::SomeKept,
        Self::SomeFailed,
        Self::BadInput,
        Self::Interrupted,
        Self::BadConfiguration,
    ];

    pub(crate) fn code(self) -> u8 {
        self as u8
    }

    fn meaning(self) -> &'static str {
        match self {
            Self::Solved => "all layers solved, or the command did what it was asked",
            Self::Internal => "internal error: please report it",
            Self::Usage => "wrong usage of the command line",
            Self::SomeKept => "finished, but some layers were kept as they are or at nearest rounding",
            Self::SomeFailed => "finished, but some layers failed",
            Self::BadInput => "a file cannot be used: model, data, manifest, or a place to write to",
            Self::Interrupted => "interrupted; no results were written, the same command goes on from there",
            Self::BadConfiguration => "a setting or job file cannot be used",
        }
    }

    /// The table for `--help`.
    pub(crate) fn table() -> String {
        let rows = Self::ALL.map(|exit| format!("  {:>2}  {}", exit.code(), exit.meaning()));
        format!("Exit codes:\n{}", rows.join("\n"))
    }
}

/// What went wrong, for a person, with the exit code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CliError {
    pub(crate) exit: Exit,
    /// Subject, what is wrong, expected and actual.
    pub(crate) message: String,
    /// What to do about it.
    pub(crate) hint: Option<String>,
}

impl CliError {
    pub(crate) fn new(exit: Exit, message: impl fmt::Display) -> Self {
        Self { exit, message: message.to_string(), hint: None }
    }

    pub(crate) fn bad_input(message: impl fmt::Display) -> Self {
        Self::new(Exit::BadInput, message)
    }

    pub(crate) fn configuration(message: impl fmt::Display) -> Self {
        Self::new(Exit::BadConfiguration, message)
    }

    pub(crate) fn usage(message: impl fmt::Display) -> Self {
        Self::new(Exit::Usage, message)
    }

    pub(crate) fn internal(message: impl fmt::Display) -> Self {
        Self::new(Exit::Internal, message)
    }

    #[must_use]
    pub(crate) fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for CliError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_documented_ones_and_all_are_in_the_table() {
        assert_eq!(Exit::ALL.map(Exit::code), [0, 1, 2, 3, 4, 65, 75, 78]);
        assert_eq!(Exit::table().lines().count(), 1 + Exit::ALL.len());
    }

    #[test]
    fn a_hint_is_a_second_line() {
        let error = CliError::bad_input("model `m.onnx`: is cut off").hint("export it again");
        assert_eq!(error.to_string(), "error: model `m.onnx`: is cut off\nhint: export it again");
    }
}
