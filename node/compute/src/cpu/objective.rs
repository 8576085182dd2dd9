//! What a rounding's errors are, and the sums over rows that its objective is made of.
//!
//! Twins of `cu/objective.cu` and of `run_dots` in `cu/dots.cu`. Not here: the product of errors with H, what the sums mean (`solver`).

/// `out = up * delta + low`, as many elements as `out` has.
///
/// # Panics
/// If a slice is shorter.
pub fn rounding_errors(low: &[f32], delta: &[f32], up: &[f32], out: &mut [f32]) {
    let len = out.len();
    let cells = low[..len].iter().zip(&delta[..len]).zip(&up[..len]);
    out.iter_mut().zip(cells).for_each(|(out, ((low, delta), up))| *out = up * delta + low);
}

/// Of one row, in f64: `sum e (product - 2 target)`, `sum e^2`, `sum |e| root`, `sum |e| gap`, over as many columns as `errors` has.
pub fn row_sums(errors: &[f32], product: &[f32], target: &[f32], roots: &[f32], gaps: &[f32]) -> [f64; 4] {
    let mut sums = [0.0; 4];
    let columns = roots.iter().zip(gaps);
    for (((e, product), target), (root, gap)) in errors.iter().zip(product).zip(target).zip(columns) {
        let e = f64::from(*e);
        sums[0] += e * (f64::from(*product) - 2.0 * f64::from(*target));
        sums[1] += e * e;
        sums[2] += e.abs() * f64::from(*root);
        sums[3] += e.abs() * f64::from(*gap);
    }
    sums
}

/// Sums side by side, in a fixed order.
const LANES: usize = 8;

/// `a . b` of each run of `width` elements (the last may be shorter), in f64.
///
/// # Panics
/// If `b` is shorter, or `width` 0.
pub fn run_dots<'a>(a: &'a [f32], b: &'a [f32], width: usize) -> impl Iterator<Item = f64> + 'a {
    a.chunks(width).zip(b[..a.len()].chunks(width)).map(|(a, b)| dot(a, b))
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0.0; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
        *sum += f64::from(*a) * f64::from(*b);
    }
    sums.iter().sum()
}
