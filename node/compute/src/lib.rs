//! Devices behind one interface; the CPU reference.
//!
//! [`Device`] is what the solver is generic over: buffers of f32, products, Gram matrices, the fused AdaRound
//! step and the refinement kernel. [`Cpu`] implements it with the plain functions of [`cpu`], which are also
//! the twins other devices are tested against; [`cuda::Cuda`] with cuBLAS and the kernels in `cu/`, through libraries
//! found at run time. [`decoder`] is the same for what running a language model needs. [`random`] is the counter-based generator every device shares.
//!
//! All results are a function of the arguments and the device's kind ([`Device::describe`]) alone, never of thread count.
//!
//! Statistics have no such interface: the CPU's are plain functions ([`cpu::gram_lower`]), a CUDA device's keep their sums on the device
//! ([`cuda::ShardGrams`], [`cuda::CudaSums`]); `exec` puts both under one set of rules.
//!
//! Not here: schedules, optimiser loops, guards (`solver`); running models (`exec`); choosing encodings (`quant`).

pub mod activation;
pub mod cpu;
pub mod cuda;
pub mod decoder;
mod device;
mod memory;
pub mod random;
mod shape;

pub use activation::Activation;
pub use cpu::step::{Gradient, StepArgs};
pub use cpu::{Cpu, CpuBuffer, Host};
pub use device::{
    Descent, Device, DeviceError, LearnBuffers, MatMut, MatRef, Moments, PlaneBuffers, Product, RefineShape,
    RowTerms, Steering, StepBuffers, StepGradient,
};
pub use memory::{LargePages, give_back_large_blocks};
