//! CUDA's shared libraries: opened from folders that the system's loader does not search, and asked for by presence.
//!
//! A library that is open satisfies every later look-up of its name, so opening it once by its path is all it takes.
//! NCCL's, of several hundred megabytes, is only noted: who wants it opens it.
//! Not here: what they say of themselves (`probe`, `nccl`).
#![expect(unsafe_code, reason = "opening a shared library runs its initialisers")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::{cublas, driver, nvrtc};

/// Beginnings of file names, each after what it needs.
const WANTED: [&str; 5] =
    ["libnvJitLink.so", "libnvrtc-builtins.so", "libnvrtc.so", "libcublasLt.so", "libcublas.so"];

/// The beginning of NCCL's file name.
const NCCL: &str = "libnccl.so";
/// NCCL in the latest folder that was named and has it.
static NCCL_FOUND: Mutex<Option<PathBuf>> = Mutex::new(None);

/// A folder of CUDA libraries that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// The folder cannot be listed.
    #[error("CUDA libraries `{folder}`: cannot be listed: {source}")]
    Folder {
        /// Which.
        folder: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// There is nothing of interest in it.
    #[error("CUDA libraries `{folder}`: found none of libcublas.so, libcublasLt.so, libnvrtc.so, libnccl.so")]
    Empty {
        /// Which.
        folder: PathBuf,
    },
    /// A library does not open.
    #[error("CUDA library `{file}`: does not open: {reason}")]
    Open {
        /// Which.
        file: PathBuf,
        /// What the loader says.
        reason: String,
    },
}

/// Opens the CUDA libraries in `folders` (all at once: they need each other) for the rest of the process; returns the files.
/// NCCL's is remembered for [`Nccl::find`](super::Nccl::find).
///
/// # Errors
/// `Folder`, `Empty`, `Open`.
pub fn open_libraries(folders: &[PathBuf]) -> Result<Vec<PathBuf>, LibraryError> {
    let mut found = Vec::new();
    for folder in folders {
        let before = found.len();
        let names = names_in(folder)?;
        found.extend(
            (0..WANTED.len()).filter_map(|rank| Some((rank, folder.join(longest(&names, WANTED[rank])?)))),
        );
        match longest(&names, NCCL) {
            Some(nccl) => *noted() = Some(folder.join(nccl)),
            None if found.len() == before => return Err(LibraryError::Empty { folder: folder.clone() }),
            None => {}
        }
    }
    found.sort_by_key(|(rank, path)| (*rank, path.clone()));
    found.into_iter().map(|(_, path)| open(&path).map(|()| path)).collect()
}

/// NCCL in a folder that the user named.
pub(super) fn nccl() -> Option<PathBuf> {
    noted().clone()
}

fn noted() -> MutexGuard<'static, Option<PathBuf>> {
    // A path is replaced whole.
    NCCL_FOUND.lock().unwrap_or_else(PoisonError::into_inner)
}

fn names_in(folder: &Path) -> Result<Vec<String>, LibraryError> {
    let unreadable = |source| LibraryError::Folder { folder: folder.to_owned(), source };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        names.push(entry.map_err(unreadable)?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// Of several versions of a library, the longest name: a link has less.
fn longest<'a>(names: &'a [String], beginning: &str) -> Option<&'a String> {
    let fitting = names.iter().filter(|name| name.starts_with(beginning));
    fitting.max_by_key(|name| (name.len(), *name))
}

#[cfg(unix)]
fn open(file: &Path) -> Result<(), LibraryError> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    // SAFETY: the user named the folder as one of CUDA's libraries; their initialisers only register things of their own.
    let library = unsafe { Library::open(Some(file), RTLD_NOW | RTLD_GLOBAL) };
    let library =
        library.map_err(|error| LibraryError::Open { file: file.to_owned(), reason: error.to_string() })?;
    // It stays for the rest of the process: functions taken from it have no lifetime.
    std::mem::forget(library);
    Ok(())
}

#[cfg(not(unix))]
fn open(file: &Path) -> Result<(), LibraryError> {
    // SAFETY: as above.
    let library = unsafe { libloading::Library::new(file) };
    let library =
        library.map_err(|error| LibraryError::Open { file: file.to_owned(), reason: error.to_string() })?;
    std::mem::forget(library);
    Ok(())
}

/// The libraries that the device needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Library {
    Driver,
    Blas,
    Nvrtc,
}

impl Library {
    /// Whether it can be opened. Everything of cudarc that follows panics without.
    pub(super) fn is_present(self) -> bool {
        // SAFETY: opens the library and drops it again; its initialisers only register things of their own.
        let present = || unsafe {
            match self {
                Self::Driver => driver::sys::is_culib_present(),
                Self::Blas => cublas::sys::is_culib_present(),
                Self::Nvrtc => nvrtc::sys::is_culib_present(),
            }
        };
        guarded(present).unwrap_or(false)
    }

    pub(super) fn file(self) -> &'static str {
        match self {
            Self::Driver => "libcuda.so.1",
            Self::Blas => "libcublas.so",
            Self::Nvrtc => "libnvrtc.so",
        }
    }
}

/// Runs `f`; a panic (a library without a function that cudarc looks up) becomes its text.
pub(super) fn guarded<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given").to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_each_library_the_longest_name_is_opened_and_nccl_is_noted() {
        let folder = tempfile::tempdir().unwrap();
        let files = [
            "libcublas.so.13",
            "libcublas.so",
            "libcublasLt.so.13",
            "libnvrtc.so.13",
            "libnccl.so",
            "libnccl.so.2",
            "readme.txt",
        ];
        for name in files {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let names = names_in(folder.path()).unwrap();
        let found: Vec<_> = WANTED.iter().filter_map(|beginning| longest(&names, beginning)).collect();
        assert_eq!(found, ["libnvrtc.so.13", "libcublasLt.so.13", "libcublas.so.13"]);
        let error = open_libraries(&[folder.path().to_owned()]).unwrap_err().to_string();
        assert!(error.contains("libnvrtc.so.13`: does not open"), "{error}");
        // A library that nobody asks for may be broken.
        assert_eq!(nccl(), Some(folder.path().join("libnccl.so.2")));
        let error = super::super::Nccl::find().unwrap_err().to_string();
        assert!(error.contains("libnccl.so.2` does not open: "), "{error}");
    }

    #[test]
    fn folders_without_libraries_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = open_libraries(&[folder.path().to_owned()]).unwrap_err().to_string();
        assert!(
            error.ends_with("found none of libcublas.so, libcublasLt.so, libnvrtc.so, libnccl.so"),
            "{error}"
        );
        let error = open_libraries(&[folder.path().join("no")]).unwrap_err().to_string();
        assert!(error.contains("no`: cannot be listed"), "{error}");
    }

    #[test]
    fn a_panic_becomes_its_text() {
        let missing = |name: &str| -> u32 { panic!("no {name}") };
        assert_eq!(guarded(|| missing("cuWonder")), Err("no cuWonder".into()));
        assert_eq!(guarded(|| 3), Ok(3));
    }
}
