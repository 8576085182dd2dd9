//! Adding up statistics in a group of nodes, by NCCL between their devices, instead of fetching them.
//!
//! [`Exchange`] is what a node can add up with, [`Together`] what came of it for a job, `round` the addition.
//! Not here: joining and leaving groups (`daemon::group`), who is in one (`coordinator`).

mod round;
mod together;

pub(crate) use together::Together;

use crate::devices::Devices;
use halfstep_compute::cuda::{Memory, Nccl, NcclError};
use std::sync::Arc;

/// What a node adds up statistics with.
#[derive(Clone, Debug)]
pub struct Exchange {
    library: Arc<Nccl>,
    host_memory: bool,
}

impl Exchange {
    /// NCCL, on the first CUDA device of the node.
    ///
    /// # Errors
    /// What is missing, as a sentence.
    pub fn over(devices: &Devices) -> Result<Self, String> {
        let library = Nccl::find().map_err(|error| error.to_string())?;
        let found = Self { library, host_memory: false };
        found.memory(devices).map_err(|error| error.to_string())?;
        Ok(found)
    }

    /// A library that stands in for NCCL in a test and takes addresses of this process's memory. NCCL itself does not.
    pub fn in_host_memory(library: Arc<Nccl>) -> Self {
        Self { library, host_memory: true }
    }

    /// Nodes that say the same here can be in one group.
    pub fn describe(&self) -> String {
        let memory = if self.host_memory { ", host memory" } else { "" };
        format!("NCCL {}{memory}", self.library.version())
    }

    pub(crate) fn library(&self) -> &Arc<Nccl> {
        &self.library
    }

    /// Where a new group's integers are put.
    ///
    /// # Errors
    /// `Memory` if there is no device, or no room on it.
    pub(crate) fn memory(&self, devices: &Devices) -> Result<Memory, NcclError> {
        if self.host_memory {
            return Ok(Memory::host());
        }
        let missing = || NcclError::Memory { reason: "the node has no CUDA device".into() };
        devices.first_cuda().ok_or_else(missing).and_then(Memory::on)
    }
}
