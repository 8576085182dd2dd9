//! Where the coordinator is: an address, or a file that says it and may say another later.
//!
//! A file is how processes find a coordinator whose host a scheduler chooses: `coordinator --publish FILE` writes it,
//! `--coordinator @FILE` reads it. `over` in its place ends the nodes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::NamedTempFile;

use super::args::ConnectArgs;
use super::slurm;
use crate::exit::{CliError, Exit};

/// What `@` in front of a file makes of an address.
const FILE_MARK: char = '@';
/// A host name and a port are no longer.
const ADDRESS_MAX: u64 = 300;
/// What a file says when no coordinator will come any more.
const OVER: &str = "over";
/// How often a file is looked at.
const LOOK: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 1_000 });

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Whereabouts {
    Address(String),
    File(PathBuf),
}

/// What is known of a coordinator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    At(String),
    NotYet,
    Over,
}

impl Whereabouts {
    /// As the user says; else, in a Slurm job, its first host.
    ///
    /// # Errors
    /// Usage if nobody says; bad configuration for variables that are not as Slurm writes them.
    pub(crate) fn of(arguments: &ConnectArgs) -> Result<Self, CliError> {
        if let Some(said) = &arguments.coordinator {
            return Ok(match said.strip_prefix(FILE_MARK) {
                Some(file) => Self::File(file.into()),
                None => Self::Address(said.clone()),
            });
        }
        match slurm::allocation()? {
            Some(allocation) => allocation.coordinator().map(Self::Address).map_err(CliError::configuration),
            None => Err(CliError::usage("no coordinator is named")
                .hint("add `--coordinator HOST:PORT`, or set HALFSTEP_COORDINATOR")),
        }
    }

    /// Where it is now.
    ///
    /// # Errors
    /// Interrupted if that is not known; as [`look`](Self::look).
    pub(crate) fn now(&self) -> Result<String, CliError> {
        match self.look()? {
            Known::At(address) => Ok(address),
            Known::NotYet => Err(CliError::new(Exit::Interrupted, self.says("is not there yet"))),
            Known::Over => Err(CliError::new(Exit::Interrupted, self.says("says that its work is over"))),
        }
    }

    /// What is known now.
    ///
    /// # Errors
    /// Bad configuration for a file that cannot be read or holds no address.
    fn look(&self) -> Result<Known, CliError> {
        match self {
            Self::Address(address) => Ok(Known::At(address.clone())),
            Self::File(file) => read(file).map_err(|problem| CliError::configuration(self.says(&problem))),
        }
    }

    fn says(&self, what: &str) -> String {
        match self {
            Self::Address(address) => format!("coordinator `{address}`: {what}"),
            Self::File(file) => format!("coordinator `{FILE_MARK}{}`: {what}", file.display()),
        }
    }

    /// Returns when it is known not to be at `address` any more.
    pub(crate) async fn moved(&self, address: &str) {
        loop {
            match self.look() {
                Ok(Known::Over) => return,
                Ok(Known::At(now)) if now != address => return,
                // A file that is gone or half written says nothing.
                Ok(_) | Err(_) => tokio::time::sleep(LOOK).await,
            }
        }
    }

    /// Where it is, as soon as there is an answer, `None` if it will never be anywhere; `waiting` hears once that there
    /// is no answer yet.
    ///
    /// # Errors
    /// As [`look`](Self::look), at once.
    pub(crate) async fn known(&self, waiting: impl FnOnce(&str)) -> Result<Option<String>, CliError> {
        let mut waiting = Some(waiting);
        loop {
            match self.look()? {
                Known::At(address) => return Ok(Some(address)),
                Known::Over => return Ok(None),
                Known::NotYet => {}
            }
            if let Some(waiting) = waiting.take() {
                waiting(&self.says("is not there yet"));
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// What a file says, or what is wrong with it.
fn read(file: &Path) -> Result<Known, String> {
    let mut text = String::new();
    // Opened anew each time: a network file system looks for changes then.
    match File::open(file).and_then(|file| file.take(ADDRESS_MAX).read_to_string(&mut text)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Known::NotYet),
        Err(error) => return Err(format!("cannot be read: {error}")),
        Ok(_) => {}
    }
    let text = text.trim();
    match text.rsplit_once(':') {
        Some((host, port)) if is_host(host) && port.parse::<u16>().is_ok() => Ok(Known::At(text.into())),
        None if text == OVER => Ok(Known::Over),
        _ => Err(format!("holds `{text:.60}`, expected HOST:PORT or `{OVER}`")),
    }
}

fn is_host(host: &str) -> bool {
    !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || "-._:[]".contains(c))
}

/// Writes an address for `--coordinator @FILE`; readers see the old file or the new one.
///
/// # Errors
/// Bad input if it cannot be written.
pub(crate) fn publish(address: &str, file: &Path) -> Result<(), CliError> {
    let write = || {
        let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty());
        let mut new = NamedTempFile::new_in(parent.unwrap_or(Path::new(".")))?;
        writeln!(new, "{address}")?;
        new.as_file().sync_all()?;
        new.persist(file).map(drop).map_err(io::Error::from)
    };
    write().map_err(|error| CliError::bad_input(format!("address file `{}`: {error}", file.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::args::SecurityArgs;
    use std::fs;
    use tempfile::TempDir;

    fn named(coordinator: &str) -> Whereabouts {
        let security = SecurityArgs { certs: None, insecure: true };
        Whereabouts::of(&ConnectArgs { coordinator: Some(coordinator.into()), security }).unwrap()
    }

    #[test]
    fn what_was_published_is_found_and_what_is_no_address_is_refused() {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("address");
        let place = named(&format!("@{}", file.display()));
        let missing = place.now().unwrap_err();
        assert_eq!((missing.exit, missing.message.ends_with("is not there yet")), (Exit::Interrupted, true));
        for address in ["n1:20001", "10.0.0.7:7421", "[::1]:7421"] {
            publish(address, &file).unwrap();
            assert_eq!(place.now().unwrap(), address);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file is left");
        for wrong in ["", "n1", "n1:99999", "n1:x", ":7421", "a b:1", &"x".repeat(1000)] {
            fs::write(&file, wrong).unwrap();
            let error = place.now().unwrap_err();
            assert_eq!(error.exit, Exit::BadConfiguration, "{wrong:.20}");
            assert!(error.message.contains("expected HOST:PORT") && error.message.len() < 300, "{error}");
        }
        fs::write(&file, "over\n").unwrap();
        let over = place.now().unwrap_err();
        assert_eq!(
            (over.exit, over.message.ends_with("says that its work is over")),
            (Exit::Interrupted, true)
        );
        fs::write(&file, [0xff, 0xfe]).unwrap();
        assert_eq!(place.now().unwrap_err().exit, Exit::BadConfiguration);
        let error = publish("n1:1", &folder.path().join("none/address")).unwrap_err();
        assert_eq!(error.exit, Exit::BadInput);
    }

    #[tokio::test]
    async fn a_coordinator_that_moves_is_noticed() {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("address");
        let place = named(&format!("@{}", file.display()));
        let pause = || tokio::time::sleep(5 * LOOK);
        let writer = tokio::spawn(async move {
            pause().await;
            publish("n1:1", &file).unwrap();
            pause().await;
            fs::remove_file(&file).unwrap();
            pause().await;
            publish("n2:1", &file).unwrap();
            pause().await;
            fs::write(&file, "over\n").unwrap();
        });
        let mut told = String::new();
        assert_eq!(place.known(|why| told = why.into()).await.unwrap().unwrap(), "n1:1");
        assert!(told.ends_with("is not there yet"), "{told}");
        place.moved("n1:1").await;
        assert_eq!(place.now().unwrap(), "n2:1");
        place.moved("n2:1").await;
        assert_eq!(place.known(|_| ()).await.unwrap(), None);
        writer.await.unwrap();
        let fixed = named("n3:1");
        assert!(tokio::time::timeout(20 * LOOK, fixed.moved("n3:1")).await.is_err());
    }
}
