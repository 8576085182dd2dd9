//! cuBLAS on one stream: row-major products and Gram matrices of f32, and products of f64.
//!
//! Its default algorithms sum in a fixed order for a shape, so equal arguments give equal bits on one kind of device.
//! Not here: which shapes are allowed (`shape`), how row-major becomes column-major (`column_major`).
#![expect(unsafe_code, reason = "cuBLAS takes raw device pointers; shapes are checked by the caller")]

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublas::result::{
    CublasError, create_handle, destroy_handle, gemm_ex, gemm_strided_batched_ex, set_stream,
};
use cudarc::cublas::sys;
use cudarc::driver::CudaStream;

use super::column_major::{ColumnMajor, Factor};
use super::triangle::Squares;

/// Bytes that cuBLAS takes for itself per handle, at most.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;

/// How the factors of a product are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Digits {
    /// All 24 bits.
    Full,
    /// TF32: 11 bits, the sums still in f32.
    Rough,
}

impl Digits {
    fn compute(self) -> sys::cublasComputeType_t {
        match self {
            Self::Full => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            Self::Rough => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        }
    }
}

/// What rows are made of on the device and how they are multiplied. Sums are f32 in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowDigits {
    /// f32, all bits multiplied.
    F32,
    /// f32, read as TF32 (11 bits): what is summed are the exact products of numbers next to those given.
    Tf32,
    /// bfloat16: products of two are exact in f32.
    Bf16,
}

impl RowDigits {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::Tf32 => 4,
            Self::Bf16 => 2,
        }
    }

    fn compute(self) -> sys::cublasComputeType_t {
        match self {
            Self::F32 | Self::Bf16 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            Self::Tf32 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        }
    }

    fn kind(self) -> sys::cudaDataType {
        match self {
            Self::F32 | Self::Tf32 => sys::cudaDataType::CUDA_R_32F,
            Self::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        }
    }
}

/// Rows whose columns are multiplied with each other, as cuBLAS counts.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowShape {
    pub(super) rows: i32,
    pub(super) cols: i32,
    pub(super) digits: RowDigits,
}

/// Products of one shape, each of whose arrays begins so many elements behind that of the one before: our `b`, our `a`, the
/// result.
#[derive(Debug, Clone, Copy)]
pub(super) struct Batch {
    pub(super) count: i32,
    pub(super) steps: [i64; 3],
}

/// A handle bound to a stream.
pub(super) struct Blas {
    handle: sys::cublasHandle_t,
    /// The handle's, as long as that lives.
    stream: Arc<CudaStream>,
}

// SAFETY: a handle is used from any thread that has its context current; cuBLAS locks what calls share.
unsafe impl Send for Blas {}
// SAFETY: as above; nothing of the handle is changed after it was made.
unsafe impl Sync for Blas {}

impl Drop for Blas {
    fn drop(&mut self) {
        // A context that cannot be used any more has taken the handle with it.
        if self.stream.context().bind_to_thread().is_ok() {
            // SAFETY: made by `new`, destroyed once.
            let _ = unsafe { destroy_handle(self.handle) };
        }
    }
}

fn operation(factor: Factor) -> sys::cublasOperation_t {
    match factor.transposed {
        true => sys::cublasOperation_t::CUBLAS_OP_T,
        false => sys::cublasOperation_t::CUBLAS_OP_N,
    }
}

impl Blas {
    /// The context is current.
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self, CublasError> {
        let handle = create_handle()?;
        let blas = Self { handle, stream: Arc::clone(stream) };
        // SAFETY: the handle was made a line above; the stream lives as long as it.
        unsafe { set_stream(handle, stream.cu_stream().cast()) }?;
        Ok(blas)
    }

    /// `out = alpha * first * second + beta * out`, column-major; no dimension is 0.
    ///
    /// # Safety
    /// The addresses are the device's, of arrays of f32 that hold what `args` says of them; `out` overlaps neither factor. The
    /// context is current.
    pub(super) unsafe fn product(
        &self,
        args: &ColumnMajor,
        digits: Digits,
        (alpha, beta): (f32, f32),
        first: u64,
        second: u64,
        out: u64,
    ) -> Result<(), CublasError> {
        let kind = sys::cudaDataType::CUDA_R_32F;
        let kinds = (kind, kind, digits.compute());
        let factors = ((&raw const alpha).cast(), (&raw const beta).cast());
        // SAFETY: the caller's promise; alpha and beta are of the kind of the sums.
        unsafe { self.multiply(args, kinds, factors, first, second, out) }
    }

    /// The same of factors of bfloat16; sums and the result are f32.
    ///
    /// # Safety
    /// As [`Self::product`], the factors being of bfloat16.
    pub(super) unsafe fn product_halves(
        &self,
        args: &ColumnMajor,
        (alpha, beta): (f32, f32),
        first: u64,
        second: u64,
        out: u64,
    ) -> Result<(), CublasError> {
        let (halves, sums) = (sys::cudaDataType::CUDA_R_16BF, sys::cudaDataType::CUDA_R_32F);
        let kinds = (halves, sums, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F);
        let factors = ((&raw const alpha).cast(), (&raw const beta).cast());
        // SAFETY: as above.
        unsafe { self.multiply(args, kinds, factors, first, second, out) }
    }

    /// `out = first * second` of factors in half precision; sums and the result are f32.
    ///
    /// # Safety
    /// As [`Self::product`], the factors being of half precision.
    pub(super) unsafe fn product_f16(
        &self,
        args: &ColumnMajor,
        first: u64,
        second: u64,
        out: u64,
    ) -> Result<(), CublasError> {
        let (halves, sums) = (sys::cudaDataType::CUDA_R_16F, sys::cudaDataType::CUDA_R_32F);
        let kinds = (halves, sums, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F);
        let (alpha, beta) = (1f32, 0f32);
        let factors = ((&raw const alpha).cast(), (&raw const beta).cast());
        // SAFETY: as above.
        unsafe { self.multiply(args, kinds, factors, first, second, out) }
    }

    /// `out = first * second` for each of a batch, column-major; no dimension is 0. `at`: where the first of each are.
    ///
    /// # Safety
    /// As [`Self::product`], for each of them.
    pub(super) unsafe fn products(
        &self,
        args: &ColumnMajor,
        digits: Digits,
        Batch { count, steps: [first_step, second_step, out_step] }: Batch,
        [first, second, out]: [u64; 3],
    ) -> Result<(), CublasError> {
        let (kind, (alpha, beta)) = (sys::cudaDataType::CUDA_R_32F, (1f32, 0f32));
        // SAFETY: the caller's promise; alpha and beta live until the call returns, which has read them by then.
        unsafe {
            gemm_strided_batched_ex(
                self.handle,
                operation(args.first),
                operation(args.second),
                args.m,
                args.n,
                args.k,
                (&raw const alpha).cast(),
                first as *const c_void,
                kind,
                args.first.leading,
                first_step,
                second as *const c_void,
                kind,
                args.second.leading,
                second_step,
                (&raw const beta).cast(),
                out as *mut c_void,
                kind,
                args.leading,
                out_step,
                count,
                digits.compute(),
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
    }

    /// The same of f64.
    ///
    /// # Safety
    /// As [`Self::product`], the arrays being of f64.
    pub(super) unsafe fn product_f64(
        &self,
        args: &ColumnMajor,
        (alpha, beta): (f64, f64),
        first: u64,
        second: u64,
        out: u64,
    ) -> Result<(), CublasError> {
        let kind = sys::cudaDataType::CUDA_R_64F;
        let kinds = (kind, kind, sys::cublasComputeType_t::CUBLAS_COMPUTE_64F);
        let factors = ((&raw const alpha).cast(), (&raw const beta).cast());
        // SAFETY: as above.
        unsafe { self.multiply(args, kinds, factors, first, second, out) }
    }

    /// # Safety
    /// As [`Self::product`], factors and result being of the kinds of numbers named; alpha and beta are of the kind of the sums.
    unsafe fn multiply(
        &self,
        args: &ColumnMajor,
        (kind, result, compute): (sys::cudaDataType, sys::cudaDataType, sys::cublasComputeType_t),
        (alpha, beta): (*const c_void, *const c_void),
        first: u64,
        second: u64,
        out: u64,
    ) -> Result<(), CublasError> {
        // SAFETY: the caller's promise; alpha and beta live until the call returns, which has read them by then.
        unsafe {
            gemm_ex(
                self.handle,
                operation(args.first),
                operation(args.second),
                args.m,
                args.n,
                args.k,
                alpha,
                first as *const c_void,
                kind,
                args.first.leading,
                second as *const c_void,
                kind,
                args.second.leading,
                beta,
                out as *mut c_void,
                result,
                args.leading,
                compute,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
    }

    /// `out = x^T y + beta * out` where `squares` says, in our order; `x`, `y`: `[rows, cols]`, `out`: `[cols, cols]` of f32.
    /// No dimension is 0.
    ///
    /// # Safety
    /// As [`Self::product`]; the squares lie within `cols` columns.
    pub(super) unsafe fn row_products(
        &self,
        shape: RowShape,
        squares: Squares,
        (x, y): (u64, u64),
        beta: f32,
        out: u64,
    ) -> Result<(), CublasError> {
        let RowShape { rows, cols, digits } = shape;
        let (width, side) = (cols.unsigned_abs() as usize, squares.side as i32);
        let address = |base: u64, elements: usize, bytes: usize| base + (elements * bytes) as u64;
        let (left, right) =
            (address(x, squares.left, digits.bytes()), address(y, squares.right, digits.bytes()));
        let out = address(out, squares.start(width), size_of::<f32>());
        let (plain, transposed) = (sys::cublasOperation_t::CUBLAS_OP_N, sys::cublasOperation_t::CUBLAS_OP_T);
        let (alpha, step) = (1f32, squares.side as i64);
        // Column by column the result is its transpose, `y^T x`, and both factors are theirs, `[cols, rows]`.
        // SAFETY: the caller's promise; alpha and beta live until the call returns, which has read them by then.
        unsafe {
            gemm_strided_batched_ex(
                self.handle,
                plain,
                transposed,
                side,
                side,
                rows,
                (&raw const alpha).cast(),
                right as *const c_void,
                digits.kind(),
                cols,
                step,
                left as *const c_void,
                digits.kind(),
                cols,
                step,
                (&raw const beta).cast(),
                out as *mut c_void,
                sys::cudaDataType::CUDA_R_32F,
                cols,
                squares.stride(width) as i64,
                squares.count as i32,
                digits.compute(),
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
    }

    /// `out = beta * out`, `[rows, columns]` in our order; with `beta` 0, `out` is not read.
    ///
    /// # Safety
    /// As [`Self::product`].
    pub(super) unsafe fn scale(
        &self,
        (rows, columns, leading): (i32, i32, i32),
        beta: f32,
        out: u64,
    ) -> Result<(), CublasError> {
        let (plain, nothing) = (sys::cublasOperation_t::CUBLAS_OP_N, 0f32);
        let out = out as *mut f32;
        // SAFETY: the caller's promise; adding nothing of the array itself is allowed where the layouts are equal.
        unsafe {
            sys::cublasSgeam(
                self.handle,
                plain,
                plain,
                columns,
                rows,
                &raw const beta,
                out,
                leading,
                &raw const nothing,
                out,
                leading,
                out,
                leading,
            )
        }
        .result()
    }

    /// `a -= b`, exactly as one subtraction each.
    ///
    /// # Safety
    /// As [`Self::product`].
    pub(super) unsafe fn subtract(&self, len: i32, a: u64, b: u64) -> Result<(), CublasError> {
        let minus = -1f32;
        // SAFETY: the caller's promise.
        unsafe {
            sys::cublasSaxpy_v2(self.handle, len, &raw const minus, b as *const f32, 1, a as *mut f32, 1)
        }
        .result()
    }

    /// `g += x^T x`, the lower triangle of `g` in our order, all bits; `x`: `[n, k]`, `g`: `[k, k]`.
    ///
    /// # Safety
    /// As [`Self::product`].
    pub(super) unsafe fn gram_lower(&self, n: i32, k: i32, x: u64, g: u64) -> Result<(), CublasError> {
        let one = 1f32;
        // Column by column our lower triangle is the upper one, and `x` is its transpose, `[k, n]`.
        // SAFETY: the caller's promise.
        unsafe {
            sys::cublasSsyrk_v2(
                self.handle,
                sys::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER,
                sys::cublasOperation_t::CUBLAS_OP_N,
                k,
                n,
                &raw const one,
                x as *const f32,
                k,
                &raw const one,
                g as *mut f32,
                k,
            )
        }
        .result()
    }
}
