//! NCCL's functions, opened at run time by the public C interface of its version 2 (`nccl.h`).
//!
//! A dozen of them, and three structures: the id of a group, the oldest form of a configuration (later fields take their
//! defaults, as the interface promises for a structure that says its own size and version), and numbers of results.
//! A library that is open stays open: its threads may outlive whatever used it.
//!
//! Not here: when they may be called (`communicator`).
#![expect(unsafe_code, reason = "functions of a shared library have the types that its header gives them")]

use std::ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::sync::Arc;

use libloading::Library;

use super::NcclError;
use crate::cuda::libraries;

/// What the system's loader is asked for.
const FILE: &str = "libnccl.so.2";
/// Oldest version with groups that are made without blocking.
const VERSION_MIN: c_int = 21_400;
/// One past the newest of this interface.
const VERSION_END: c_int = 30_000;

/// Bytes of the id of a group.
const ID_BYTES: usize = 128;

/// `ncclResult_t`: no error.
pub(super) const SUCCESS: c_int = 0;
/// `ncclResult_t`: begun, not done.
pub(super) const IN_PROGRESS: c_int = 7;
/// `ncclDataType_t`: 64-bit signed integers.
pub(super) const INT64: c_int = 4;
/// `ncclRedOp_t`: sums.
pub(super) const SUM: c_int = 0;

/// `ncclComm_t`: a group as NCCL has it.
pub(super) type Comm = *mut c_void;

/// The name of a group that is to be made; whoever has it can join.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct UniqueId([u8; ID_BYTES]);

impl UniqueId {
    /// As bytes, to be handed on.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// From bytes that were handed on.
    ///
    /// # Errors
    /// `Size` if there are not 128 of them.
    pub fn new(bytes: &[u8]) -> Result<Self, NcclError> {
        bytes.try_into().map(Self).map_err(|_| NcclError::Size {
            subject: "length of an id",
            expected: format!("{ID_BYTES}"),
            actual: bytes.len(),
        })
    }
}

/// An id is what lets a process in: it is not for logs.
impl std::fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("UniqueId")
    }
}

/// `ncclConfig_t` as version 2.14 had it.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

impl Config {
    /// Every call returns at once.
    const UNBLOCKED: Self =
        Self { size: size_of::<Self>(), magic: 0xcafe_beef, version: VERSION_MIN as c_uint, blocking: 0 };
}

/// Declares the functions: a field each, filled from the symbol of that name.
macro_rules! functions {
    ($($field:ident: $symbol:literal, fn($($argument:ty),*) -> $result:ty;)*) => {
        // SAFETY: types alone; whoever calls one answers for its arguments.
        struct Functions { $($field: unsafe extern "C" fn($($argument),*) -> $result,)* }

        impl Functions {
            /// # Safety
            /// The library's symbols of these names must have these types, and it must stay open.
            unsafe fn new(library: &Library, name: &str) -> Result<Self, NcclError> {
                Ok(Self { $($field: {
                    // SAFETY: the caller vouches for type and life.
                    let found = unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> $result>($symbol) };
                    *found.map_err(|_| missing(name, $symbol))?
                },)* })
            }
        }
    };
}

functions! {
    version: c"ncclGetVersion", fn(*mut c_int) -> c_int;
    unique_id: c"ncclGetUniqueId", fn(*mut UniqueId) -> c_int;
    init: c"ncclCommInitRankConfig", fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int;
    async_error: c"ncclCommGetAsyncError", fn(Comm, *mut c_int) -> c_int;
    finalize: c"ncclCommFinalize", fn(Comm) -> c_int;
    destroy: c"ncclCommDestroy", fn(Comm) -> c_int;
    abort: c"ncclCommAbort", fn(Comm) -> c_int;
    all_reduce: c"ncclAllReduce", fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
    reduce_scatter: c"ncclReduceScatter", fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
    broadcast: c"ncclBroadcast", fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
    error_string: c"ncclGetErrorString", fn(c_int) -> *const c_char;
}

fn missing(library: &str, symbol: &'static CStr) -> NcclError {
    // The names above are plain ASCII.
    NcclError::Symbol { library: library.to_owned(), symbol: symbol.to_str().unwrap_or("") }
}

/// An open library.
pub struct Nccl {
    functions: Functions,
    version: c_int,
}

impl std::fmt::Debug for Nccl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nccl").field("version", &self.version()).finish()
    }
}

impl Nccl {
    /// The library in a folder that the user named, else the one that the system's loader finds. No device is touched.
    ///
    /// # Errors
    /// `Missing`, `Symbol`, `Version`.
    pub fn find() -> Result<Arc<Self>, NcclError> {
        match libraries::nccl() {
            Some(file) => Self::open(&file),
            None => Self::load(FILE.as_ref(), |_| format!("the loader finds no {FILE}")),
        }
    }

    /// A library by its path.
    ///
    /// # Errors
    /// `Missing`, `Symbol`, `Version`.
    pub fn open(file: &Path) -> Result<Arc<Self>, NcclError> {
        Self::load(file.as_os_str(), |error| format!("`{}` does not open: {error}", file.display()))
    }

    fn load(file: &OsStr, absent: impl Fn(libloading::Error) -> String) -> Result<Arc<Self>, NcclError> {
        let name = file.to_string_lossy();
        // SAFETY: the user or the system says that this is NCCL; its initialisers only register things of their own.
        let library = unsafe { Library::new(file) };
        let library = library.map_err(|error| NcclError::Missing { reason: absent(error) })?;
        // SAFETY: the types are those of NCCL's header; the library is never closed.
        let functions = unsafe { Functions::new(&library, &name)? };
        let mut version: c_int = 0;
        // SAFETY: writes one integer to where it is told.
        let answered = unsafe { (functions.version)(&raw mut version) };
        std::mem::forget(library);
        let nccl = Self { functions, version };
        nccl.refused("ncclGetVersion", answered)?;
        if !(VERSION_MIN..VERSION_END).contains(&version) {
            return Err(NcclError::Version { library: name.into_owned(), found: nccl.version() });
        }
        Ok(Arc::new(nccl))
    }

    /// Its version, as in `2.27.3`.
    pub fn version(&self) -> String {
        // Until 2.8 one digit was kept for the minor version, two since.
        let scale = if self.version < 10_000 { 10 } else { 100 };
        let (major, minor) = (self.version / (scale * 100), self.version / 100 % scale);
        format!("{major}.{minor}.{}", self.version % 100)
    }

    /// A name for a group to be made. Who asks for it must live until all have joined: they meet there.
    ///
    /// # Errors
    /// `Refused`.
    pub fn unique_id(&self) -> Result<UniqueId, NcclError> {
        let mut id = UniqueId([0; ID_BYTES]);
        // SAFETY: writes one id to where it is told.
        let made = unsafe { (self.functions.unique_id)(&raw mut id) };
        self.refused("ncclGetUniqueId", made).map(|()| id)
    }

    /// Begins to join a group, without waiting; `rank` of `size`, on the device that is current on this thread.
    pub(super) fn init(&self, id: UniqueId, rank: c_int, size: c_int) -> Result<Comm, NcclError> {
        let (mut comm, mut config) = (std::ptr::null_mut(), Config::UNBLOCKED);
        // SAFETY: writes a handle to where it is told; the configuration is read before the call returns and says its size.
        let begun = unsafe { (self.functions.init)(&raw mut comm, size, id, rank, &raw mut config) };
        self.refused("ncclCommInitRankConfig", begun)?;
        match comm.is_null() {
            true => Err(NcclError::Refused {
                call: "ncclCommInitRankConfig",
                reason: "it gave no communicator".into(),
            }),
            false => Ok(comm),
        }
    }

    /// Where a group is: `SUCCESS`, `IN_PROGRESS` or an error.
    ///
    /// # Safety
    /// The group must be this library's and neither destroyed nor aborted.
    pub(super) unsafe fn state(&self, comm: Comm) -> c_int {
        let mut state = SUCCESS;
        // SAFETY: the caller vouches for the group; writes one integer to where it is told.
        match unsafe { (self.functions.async_error)(comm, &raw mut state) } {
            SUCCESS => state,
            refused => refused,
        }
    }

    /// Begins a clean end.
    ///
    /// # Safety
    /// As `state`.
    pub(super) unsafe fn finalize(&self, comm: Comm) -> c_int {
        // SAFETY: the caller vouches for the group.
        unsafe { (self.functions.finalize)(comm) }
    }

    /// Frees a group that is finalized.
    ///
    /// # Safety
    /// As `state`; the group is gone afterwards.
    pub(super) unsafe fn destroy(&self, comm: Comm) {
        // SAFETY: the caller vouches for the group. There is nothing to be done about an error.
        let _ = unsafe { (self.functions.destroy)(comm) };
    }

    /// Ends whatever the group is at, and frees it. May take its time.
    ///
    /// # Safety
    /// As `destroy`.
    pub(super) unsafe fn abort(&self, comm: Comm) {
        // SAFETY: as above.
        let _ = unsafe { (self.functions.abort)(comm) };
    }

    /// Adds `count` integers at `address` over all members, in place.
    ///
    /// # Safety
    /// As `state`; the integers must stay and be left alone until the group says that it is done, or is gone.
    pub(super) unsafe fn all_reduce(
        &self,
        comm: Comm,
        address: u64,
        count: usize,
        stream: *mut c_void,
    ) -> c_int {
        let at = address as *mut c_void;
        // SAFETY: the caller vouches for group and memory.
        unsafe { (self.functions.all_reduce)(at, at, count, INT64, SUM, comm, stream) }
    }

    /// Adds `count` times as many integers as there are members, from `address`; of the sums this member's are put to `to`.
    ///
    /// # Safety
    /// As `all_reduce`.
    pub(super) unsafe fn reduce_scatter(
        &self,
        comm: Comm,
        address: u64,
        to: u64,
        count: usize,
        stream: *mut c_void,
    ) -> c_int {
        let (from, to) = (address as *const c_void, to as *mut c_void);
        // SAFETY: the caller vouches for group and memory.
        unsafe { (self.functions.reduce_scatter)(from, to, count, INT64, SUM, comm, stream) }
    }

    /// Copies `count` integers at `address` from the member `root` to all, in place.
    ///
    /// # Safety
    /// As `all_reduce`.
    pub(super) unsafe fn broadcast(
        &self,
        comm: Comm,
        address: u64,
        count: usize,
        root: c_int,
        stream: *mut c_void,
    ) -> c_int {
        let at = address as *mut c_void;
        // SAFETY: the caller vouches for group and memory.
        unsafe { (self.functions.broadcast)(at, at, count, INT64, root, comm, stream) }
    }

    /// An error that a call returned; what is in progress is none.
    pub(super) fn refused(&self, call: &'static str, result: c_int) -> Result<(), NcclError> {
        match result {
            SUCCESS | IN_PROGRESS => Ok(()),
            error => Err(NcclError::Refused { call, reason: self.words(error) }),
        }
    }

    /// NCCL's words for a result, with its number.
    pub(super) fn words(&self, result: c_int) -> String {
        // SAFETY: takes any number.
        let text = unsafe { (self.functions.error_string)(result) };
        if text.is_null() {
            return format!("result {result}");
        }
        // SAFETY: NCCL's texts are constants that end in 0.
        let text = unsafe { CStr::from_ptr(text) };
        format!("{} (result {result})", text.to_string_lossy())
    }
}
