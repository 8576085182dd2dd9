//! Row-major products as the column-major ones cuBLAS knows: the one place where the two meet.
//!
//! A row-major matrix read column by column is its transpose. So `out = a b` becomes `out^T = b^T a^T`: the operands trade
//! places, and an operand is marked transposed for cuBLAS exactly if it is for us.
//!
//! Pure numbers, tested against the CPU on any machine. Not here: the call itself (`blas`).

use crate::device::{DeviceError, Product};

/// One factor as cuBLAS is told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Factor {
    pub(super) transposed: bool,
    /// Elements from one stored column to the next.
    pub(super) leading: i32,
}

/// Arguments of a column-major product `[m, k] x [k, n]`. Its first factor is our second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ColumnMajor {
    pub(super) m: i32,
    pub(super) n: i32,
    pub(super) k: i32,
    /// Our `b`.
    pub(super) first: Factor,
    /// Our `a`.
    pub(super) second: Factor,
    /// Of the result.
    pub(super) leading: i32,
}

/// How a row-major factor of `rows` by `cols` is stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stored {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) stride: usize,
    pub(super) transposed: bool,
}

impl Stored {
    fn factor(self) -> Result<Factor, DeviceError> {
        let columns = if self.transposed { self.rows } else { self.cols };
        Ok(Factor { transposed: self.transposed, leading: leading(self.stride, columns)? })
    }
}

/// cuBLAS wants a stride that covers the row even where there is no second row to reach.
pub(super) fn leading(stride: usize, columns: usize) -> Result<i32, DeviceError> {
    int("matmul row stride", stride.max(columns).max(1))
}

/// cuBLAS counts in 32 bits.
pub(super) fn int(operand: &'static str, value: usize) -> Result<i32, DeviceError> {
    i32::try_from(value).map_err(|_| DeviceError::Index {
        operand,
        index: value,
        limit: i32::MAX as usize + 1,
    })
}

impl ColumnMajor {
    /// `a` and `b` are stored with these strides, transposed or not.
    pub(super) fn new(
        product: Product,
        a: (usize, bool),
        b: (usize, bool),
        out_stride: usize,
    ) -> Result<Self, DeviceError> {
        let Product { m, n, k, .. } = product;
        let a = Stored { rows: m, cols: k, stride: a.0, transposed: a.1 };
        let b = Stored { rows: k, cols: n, stride: b.0, transposed: b.1 };
        Ok(Self {
            m: int("matmul columns", n)?,
            n: int("matmul rows", m)?,
            k: int("matmul depth", k)?,
            first: b.factor()?,
            second: a.factor()?,
            leading: leading(out_stride, n)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::product::{Stored as HostStored, multiply};
    use crate::random::Stream;

    /// What cuBLAS computes by its documentation, one element at a time.
    fn column_major(args: &ColumnMajor, first: &[f32], second: &[f32], product: Product, out: &mut [f32]) {
        let at = |matrix: &[f32], factor: Factor, row: i32, col: i32| {
            let (row, col) = if factor.transposed { (col, row) } else { (row, col) };
            matrix[(row + col * factor.leading) as usize]
        };
        for col in 0..args.n {
            for row in 0..args.m {
                let sum: f32 = (0..args.k)
                    .map(|i| at(first, args.first, row, i) * at(second, args.second, i, col))
                    .sum();
                let value = &mut out[(row + col * args.leading) as usize];
                *value = product.alpha * sum + if product.beta == 0.0 { 0.0 } else { product.beta * *value };
            }
        }
    }

    fn small_integers(stream: &mut Stream, len: usize) -> Vec<f32> {
        (0..len).map(|_| stream.index(9) as f32 - 4.0).collect()
    }

    #[test]
    fn the_column_major_product_is_the_row_major_one() {
        for (m, n, k) in [(1, 1, 1), (2, 3, 4), (5, 1, 7), (1, 6, 2), (4, 4, 4), (3, 5, 1)] {
            for (a_t, b_t) in [(false, false), (true, false), (false, true), (true, true)] {
                for pad in [0, 3] {
                    let mut stream = Stream::new(5, (m * 10 + n) as u64, (k + pad) as u32);
                    let a_stride = if a_t { m } else { k } + pad;
                    let b_stride = if b_t { k } else { n } + pad;
                    let a = small_integers(&mut stream, m.max(k) * a_stride);
                    let b = small_integers(&mut stream, n.max(k) * b_stride);
                    let mut want = small_integers(&mut stream, m * (n + pad));
                    let mut got = want.clone();
                    let product = Product { m, n, k, alpha: 2.0, beta: -1.0 };
                    let args = ColumnMajor::new(product, (a_stride, a_t), (b_stride, b_t), n + pad).unwrap();
                    column_major(&args, &b, &a, product, &mut got);
                    let stored = |data, stride, transposed| HostStored { data, stride, transposed };
                    multiply(
                        product,
                        stored(&a, a_stride, a_t),
                        stored(&b, b_stride, b_t),
                        &mut want,
                        n + pad,
                    );
                    assert_eq!(got, want, "[{m}, {k}] x [{k}, {n}], transposed {a_t} {b_t}, pad {pad}");
                }
            }
        }
    }

    #[test]
    fn single_rows_may_have_any_stride_and_what_overflows_is_refused() {
        let one = ColumnMajor::new(Product::new(1, 4, 3), (0, false), (4, false), 0).unwrap();
        assert_eq!((one.second.leading, one.first.leading, one.leading), (3, 4, 4));
        let wide = ColumnMajor::new(Product::new(1, 1 << 31, 1), (1, false), (1 << 31, false), 1 << 31);
        assert!(wide.unwrap_err().to_string().starts_with("matmul columns: index 2147483648 out of range"));
    }
}
