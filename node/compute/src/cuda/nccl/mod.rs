//! NCCL: exact sums and copies between the devices of several processes, through a library found at run time.
//!
//! [`Nccl`] is the library, [`Communicator`] one process's place in a group, [`Memory`] what it sends from and receives
//! into. Nothing here waits without an end: every call of a group takes a [`Patience`], and a group that fails once is
//! aborted and of no use afterwards; another one is made with another id.
//!
//! Not here: who is in a group and when it is made anew (`coordinator`), what is added up (`agent`).

mod communicator;
mod error;
mod library;
mod memory;

pub use communicator::{Communicator, Patience, Place};
pub use error::NcclError;
pub use library::{Nccl, UniqueId};
pub use memory::Memory;
