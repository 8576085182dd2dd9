//! Sixteen f32 side by side, per instruction-set level, for the kernels whose loops a compiler does not vectorise.
//!
//! Not here: choosing a level (`isa`), kernels.
#![expect(unsafe_code, reason = "vector intrinsics")]

/// Number of lanes.
pub(crate) const LANES: usize = 16;

/// Sixteen values. Implementations for a level may be used only in functions compiled for that level: constructing the
/// first value (`splat`, `load`) is where the caller vouches for it.
pub(crate) trait Lanes: Copy {
    /// All lanes the same.
    fn splat(value: f32) -> Self;
    /// From memory.
    fn load(from: &[f32; LANES]) -> Self;
    /// To memory.
    fn store(self, to: &mut [f32; LANES]);
    /// `self * b`.
    fn mul(self, b: Self) -> Self;
    /// `self * b + c`; one rounding where the level has it.
    fn fma(self, b: Self, c: Self) -> Self;
    /// `then` where `self < b`, else 0; and a bit per lane that is.
    fn less_then(self, b: Self, then: Self) -> (Self, u32);
}

/// Any machine; multiply-add rounds twice.
#[derive(Clone, Copy)]
pub(crate) struct Plain([f32; LANES]);

impl Lanes for Plain {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Plain([value; LANES])
    }
    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Plain(*from)
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        *to = self.0;
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        Plain(std::array::from_fn(|i| self.0[i] * b.0[i]))
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        Plain(std::array::from_fn(|i| self.0[i] * b.0[i] + c.0[i]))
    }
    #[inline(always)]
    fn less_then(self, b: Self, then: Self) -> (Self, u32) {
        let bits = (0..LANES).fold(0, |bits, i| bits | u32::from(self.0[i] < b.0[i]) << i);
        (Plain(std::array::from_fn(|i| if self.0[i] < b.0[i] { then.0[i] } else { 0.0 })), bits)
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Lanes};

    /// One AVX-512 register.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    // SAFETY (all blocks below): by the trait's contract this code is inlined into functions compiled for AVX-512 F, which
    // `isa()` found on this machine; loads and stores go through references to 16 values and need no alignment.
    impl Lanes for Avx512 {
        #[inline(always)]
        fn splat(value: f32) -> Self {
            // SAFETY: see above the impl.
            Avx512(unsafe { _mm512_set1_ps(value) })
        }
        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Self {
            // SAFETY: see above the impl.
            Avx512(unsafe { _mm512_loadu_ps(from.as_ptr()) })
        }
        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            // SAFETY: see above the impl.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
        }
        #[inline(always)]
        fn mul(self, b: Self) -> Self {
            // SAFETY: see above the impl.
            Avx512(unsafe { _mm512_mul_ps(self.0, b.0) })
        }
        #[inline(always)]
        fn fma(self, b: Self, c: Self) -> Self {
            // SAFETY: see above the impl.
            Avx512(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
        }
        #[inline(always)]
        fn less_then(self, b: Self, then: Self) -> (Self, u32) {
            // SAFETY: see above the impl.
            unsafe {
                let mask = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, b.0);
                (Avx512(_mm512_maskz_mov_ps(mask, then.0)), u32::from(mask))
            }
        }
    }

    /// Two AVX registers.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256, __m256);

    // SAFETY (all blocks below): by the trait's contract this code is inlined into functions compiled for AVX2 and FMA, which
    // `isa()` found on this machine; loads and stores stay inside the 16 values (8 from the start, 8 from the eighth).
    impl Lanes for Avx2 {
        #[inline(always)]
        fn splat(value: f32) -> Self {
            // SAFETY: see above the impl.
            let half = unsafe { _mm256_set1_ps(value) };
            Avx2(half, half)
        }
        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Self {
            // SAFETY: see above the impl.
            unsafe { Avx2(_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))) }
        }
        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            // SAFETY: see above the impl.
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), self.0);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), self.1);
            }
        }
        #[inline(always)]
        fn mul(self, b: Self) -> Self {
            // SAFETY: see above the impl.
            unsafe { Avx2(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1)) }
        }
        #[inline(always)]
        fn fma(self, b: Self, c: Self) -> Self {
            // SAFETY: see above the impl.
            unsafe { Avx2(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
        }
        #[inline(always)]
        fn less_then(self, b: Self, then: Self) -> (Self, u32) {
            // SAFETY: see above the impl.
            unsafe {
                let low = _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, b.0);
                let high = _mm256_cmp_ps::<_CMP_LT_OQ>(self.1, b.1);
                let bits = (_mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8) as u32;
                (Avx2(_mm256_and_ps(low, then.0), _mm256_and_ps(high, then.1)), bits)
            }
        }
    }
}
