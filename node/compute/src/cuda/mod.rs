//! CUDA: NVIDIA's devices behind the interface, through libraries found at run time.
//!
//! One binary runs with and without them. [`probe`] says what is there and what is missing; [`Cuda::open`] takes a device
//! that is usable. Products are cuBLAS's, everything else the kernels in `cu/`, compiled by NVRTC for the device found.
//! A [`Cuda`] is a lane: one stream with its own cuBLAS handle; threads take one each with [`Cuda::lane`].
//!
//! [`Nccl`] and [`Communicator`] add integers over the devices of several processes.
//! Not here: several devices in one solve.

mod attention;
mod blas;
mod column_major;
mod compile;
mod decoder;
mod device;
mod error;
mod grams;
mod halves;
mod interface;
mod kernels;
mod learn;
mod libraries;
mod magnitude;
mod modules;
mod moments;
mod nccl;
mod objective;
mod place;
mod probe;
mod search;
mod staging;
mod transfer;
mod triangle;

pub use blas::RowDigits;
pub use decoder::{CudaChoice, CudaFactor, CudaLane, CudaSequences, CudaTable};
pub use device::{Cuda, CudaBuffer, Precision};
pub use grams::{CudaProducts, CudaSums, Factors, GramShape, ShardGrams};
pub use halves::CudaHalves;
pub use libraries::{LibraryError, open_libraries};
pub use nccl::{Communicator, Memory, Nccl, NcclError, Patience, Place, UniqueId};
pub use place::CudaPlace;
pub use probe::{Found, Gpu, Probe, probe};
pub use search::GridSearch;
pub use staging::RowStaging;
