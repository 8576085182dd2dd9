//! Products of f64, for the few places where f32 cannot tell two values apart.
//!
//! Not here: when that is (`solver`).
#![expect(unsafe_code, reason = "gemm takes raw pointers; shapes are checked here")]

/// Depth of the product done in one go: below what `gemm` splits by the caches it finds, so that the bits depend on the
/// shape alone.
const SLAB: usize = 256;

/// `out[m, n] += alpha * a[m, k] * b[k, n]`, row-major, `lda`, `ldb`, `ldo` elements from row to row.
///
/// # Panics
/// If a slice does not hold its shape.
#[expect(clippy::too_many_arguments, reason = "the BLAS argument list, known to every reader")]
pub fn add_product_f64(
    m: usize,
    n: usize,
    k: usize,
    alpha: f64,
    a: &[f64],
    lda: usize,
    b: &[f64],
    ldb: usize,
    out: &mut [f64],
    ldo: usize,
) {
    check("a", a.len(), m, k, lda);
    check("b", b.len(), k, n, ldb);
    check("out", out.len(), m, n, ldo);
    if m == 0 || n == 0 {
        return;
    }
    for start in (0..k).step_by(SLAB) {
        let depth = SLAB.min(k - start);
        // SAFETY: the checks above hold for the whole depth, hence for this part of it: rows of `a` from its column `start`,
        // rows of `b` from `start`; `out` is borrowed mutably, so it is neither. Strides fit isize, as the slices' lengths do.
        unsafe {
            gemm::gemm(
                m,
                n,
                depth,
                out.as_mut_ptr(),
                1,
                ldo as isize,
                true,
                a.as_ptr().add(start),
                1,
                lda as isize,
                b.as_ptr().add(start * ldb),
                1,
                ldb as isize,
                // gemm's first factor multiplies what `out` held.
                1.0,
                alpha,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}

fn check(name: &str, len: usize, rows: usize, cols: usize, stride: usize) {
    let needed = match rows.checked_sub(1) {
        Some(before) if cols > 0 => before.checked_mul(stride).and_then(|n| n.checked_add(cols)),
        _ => Some(0),
    };
    assert!(
        (rows < 2 || stride >= cols) && needed.is_some_and(|needed| needed <= len),
        "{name}: expected [{rows}, {cols}], rows {stride} apart, actual {len} elements"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    #[test]
    fn products_are_those_of_the_definition_at_awkward_shapes() {
        for (m, n, k, pad) in
            [(1, 1, 1, 0), (3, 5, 7, 2), (17, 33, 255, 0), (5, 9, 257, 1), (2, 3, 0, 1), (0, 3, 4, 0)]
        {
            let mut stream = Stream::new(3, (m * 100 + n) as u64, k as u32);
            let mut uniform =
                |len: usize| -> Vec<f64> { (0..len).map(|_| f64::from(stream.unit_f32()) - 0.5).collect() };
            let (lda, ldb, ldo) = (k + pad, n + pad, n + pad);
            let (a, b, before) = (uniform(m * lda), uniform(k * ldb), uniform(m * ldo));
            let mut out = before.clone();
            add_product_f64(m, n, k, -2.0, &a, lda, &b, ldb, &mut out, ldo);
            for (at, (got, before)) in out.iter().zip(&before).enumerate() {
                let (row, col) = (at / ldo, at % ldo);
                let sum: f64 = match col < n {
                    true => (0..k).map(|i| a[row * lda + i] * b[i * ldb + col]).sum(),
                    false => 0.0,
                };
                assert!(
                    (got - (before - 2.0 * sum)).abs() < 1e-13 * (k as f64 + 1.0),
                    "[{m}, {n}, {k}] {row} {col}"
                );
            }
        }
    }

    #[test]
    #[should_panic(expected = "b: expected [3, 2], rows 2 apart, actual 5 elements")]
    fn short_operands_are_refused() {
        add_product_f64(1, 2, 3, 1.0, &[0.0; 3], 3, &[0.0; 5], 2, &mut [0.0; 2], 2);
    }
}
