//! The binary under test and the example it works on.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail, ensure};

/// Names a binary to be used instead of building one.
const GIVEN: &str = "HALFSTEP_BIN";
/// Set for every process: what is compared is computed by the CPU, also on a machine that has more.
pub(crate) const NO_DEVICES: (&str, &str) = ("CUDA_VISIBLE_DEVICES", "");

/// The `halfstep` binary with failpoints: the one `HALFSTEP_BIN` names, else built once per process into the target
/// folder this program was built into.
///
/// # Errors
/// If it cannot be built.
pub fn binary() -> Result<&'static Path> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    match BUILT.get_or_init(|| find().map_err(|error| format!("{error:#}"))) {
        Ok(path) => Ok(path),
        Err(error) => bail!("no halfstep binary: {error}"),
    }
}

fn find() -> Result<PathBuf> {
    if let Some(given) = std::env::var_os(GIVEN) {
        let path = PathBuf::from(given);
        ensure!(path.is_file(), "{GIVEN} names {}, which is no file", path.display());
        return Ok(path.canonicalize()?);
    }
    let target = target_folder()?;
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.args(["build", "--release", "--quiet", "-p", "halfstep", "--features", "failpoints"]);
    cargo.arg("--target-dir").arg(&target).current_dir(root()).stdin(Stdio::null());
    ensure!(cargo.status()?.success(), "{cargo:?} failed");
    Ok(target.join("release/halfstep"))
}

/// `TARGET` of `TARGET/PROFILE/[deps/]PROGRAM`.
fn target_folder() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let target = program.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
    Ok(target.with_context(|| format!("{} is in no target folder", program.display()))?.into())
}

/// The root of the repository.
pub(crate) fn root() -> &'static Path {
    const CRATE: &str = env!("CARGO_MANIFEST_DIR");
    Path::new(CRATE).parent().unwrap_or(Path::new(CRATE))
}

/// A file of the Fashion-MNIST example.
pub fn example(name: &str) -> PathBuf {
    root().join("examples/fashion-mnist").join(name)
}

/// Whether this process may do what only root may.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Makes sure that `program` can be run, installing the Debian package if need be and allowed.
///
/// # Errors
/// The reason why it cannot: a test prints it and is skipped.
pub fn install(program: &str, package: &str) -> Result<(), String> {
    if is_there(program) {
        return Ok(());
    }
    if !is_root() || !is_there("apt-get") {
        return Err(format!("`{program}` is not installed (Debian package {package})"));
    }
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("timeout");
        command.args(["120", "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=60"]).args(arguments);
        command.env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    let installed = apt(&["install", "-y", "--no-install-recommends", package])
        || (apt(&["update"]) && apt(&["install", "-y", "--no-install-recommends", package]));
    if installed && is_there(program) {
        Ok(())
    } else {
        Err(format!("package {package} cannot be installed"))
    }
}

fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}
