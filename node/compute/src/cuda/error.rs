//! What CUDA's libraries answer, as errors of a device.

use cudarc::cublas::result::CublasError;
use cudarc::cublas::sys::cublasStatus_t;
use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

use crate::device::DeviceError;

/// A sentence of the driver, with its name for it.
pub(super) fn sentence(error: DriverError) -> String {
    let text = |found: Result<&std::ffi::CStr, DriverError>| {
        found.map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
    };
    match text(error.error_string()) {
        said if said.is_empty() => format!("{:?}", error.0),
        said => format!("{said} ({:?})", error.0),
    }
}

/// Who failed, for the error.
#[derive(Debug, Clone, Copy)]
pub(super) struct Subject<'a> {
    pub(super) device: &'a str,
    /// Bytes that were asked for, where memory was.
    pub(super) asked: usize,
    /// Bytes free now.
    pub(super) free: Option<usize>,
}

impl Subject<'_> {
    pub(super) fn driver(self, error: DriverError) -> DeviceError {
        match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => self.out_of_memory(),
            _ => self.failed(sentence(error)),
        }
    }

    pub(super) fn blas(self, error: CublasError) -> DeviceError {
        match error.0 {
            cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => self.out_of_memory(),
            status => self.failed(format!("cuBLAS: {status:?}")),
        }
    }

    pub(super) fn out_of_memory(self) -> DeviceError {
        DeviceError::OutOfMemory { device: self.device.to_owned(), asked: self.asked, free: self.free }
    }

    pub(super) fn failed(self, reason: String) -> DeviceError {
        DeviceError::Failed { device: self.device.to_owned(), reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUBJECT: Subject<'_> = Subject { device: "cuda:0", asked: 4096, free: Some(100) };

    #[test]
    fn memory_is_told_from_everything_else() {
        let full = SUBJECT.driver(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
        assert_eq!(full.to_string(), "cuda:0: out of memory, 4096 bytes asked for, 100 free");
        let full = SUBJECT.blas(CublasError(cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED));
        assert!(matches!(full, DeviceError::OutOfMemory { asked: 4096, .. }));
        let other = SUBJECT.blas(CublasError(cublasStatus_t::CUBLAS_STATUS_EXECUTION_FAILED));
        assert_eq!(other.to_string(), "cuda:0: cuBLAS: CUBLAS_STATUS_EXECUTION_FAILED");
    }
}
