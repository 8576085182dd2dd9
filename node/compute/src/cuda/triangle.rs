//! Products of rows with themselves, cut into squares: which columns meet which.
//!
//! The lower triangle of `x^T x` needs little more than half of the square. Cut into `parts` strips, the squares that are equally
//! far from the diagonal are equally far from each other, in the rows as in the result: one batch of products each. What is
//! computed above the diagonal is never read.
//!
//! Pure numbers, tested on any machine. Not here: the products (`blas`).

/// Squares `x[:, left..left + side]^T y[:, right..right + side]`, the first of `count`, each `side` columns further on in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Squares {
    pub(super) left: usize,
    pub(super) right: usize,
    pub(super) side: usize,
    pub(super) count: usize,
}

impl Squares {
    /// The whole product of rows of `cols`.
    pub(super) fn whole(cols: usize) -> Self {
        Self { left: 0, right: 0, side: cols, count: 1 }
    }

    /// Where the first result begins in a matrix `[cols, cols]`.
    pub(super) fn start(&self, cols: usize) -> usize {
        self.left * cols + self.right
    }

    /// From one result to the next.
    pub(super) fn stride(&self, cols: usize) -> usize {
        self.side * (cols + 1)
    }
}

/// Strips are cut at multiples of this many columns, so that they begin where whole rows do in memory (16 bytes).
const ALIGNMENT: usize = 8;

/// Into how many strips rows of `cols` are cut: by the shape alone. More strips save products; too narrow ones leave the
/// device half idle.
pub(super) fn parts(cols: usize) -> usize {
    let wanted = match cols {
        0..2048 => 1,
        2048..8192 => 4,
        _ => 8,
    };
    [wanted, 4].into_iter().filter(|n| *n <= wanted).find(|n| cols.is_multiple_of(n * ALIGNMENT)).unwrap_or(1)
}

/// The squares that cover the lower triangle, each entry once; `parts` divides `cols`.
pub(super) fn lower(cols: usize, parts: usize) -> impl Iterator<Item = Squares> {
    let side = cols / parts.max(1);
    (0..parts).map(move |apart| Squares { left: apart * side, right: 0, side, count: parts - apart })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_of_the_triangle_is_computed_once() {
        for (cols, parts) in [(1, 1), (12, 1), (12, 2), (12, 3), (12, 4), (40, 8)] {
            let mut met = vec![0u32; cols * cols];
            for squares in lower(cols, parts) {
                for number in 0..squares.count {
                    let (left, right) =
                        (squares.left + number * squares.side, squares.right + number * squares.side);
                    let start = squares.start(cols) + number * squares.stride(cols);
                    for i in 0..squares.side {
                        for j in 0..squares.side {
                            assert_eq!(start + i * cols + j, (left + i) * cols + right + j);
                            met[start + i * cols + j] += 1;
                        }
                    }
                }
            }
            for (at, times) in met.iter().enumerate() {
                let below = at % cols <= at / cols;
                assert!(*times == 1 || (*times == 0 && !below), "{cols} in {parts}: {at} met {times} times");
            }
        }
    }

    #[test]
    fn widths_of_language_models_are_cut_and_others_only_where_they_divide() {
        for (cols, cut) in [
            (576, 1),
            (1999, 1),
            (2048, 4),
            (4096, 4),
            (4608, 4),
            (4100, 1),
            (8192, 8),
            (11008, 8),
            (14336, 8),
            (28672, 8),
            (29568, 8),
            (9248, 4),
            (9001, 1),
        ] {
            assert_eq!(parts(cols), cut, "{cols}");
            assert!(cols.is_multiple_of(parts(cols)));
        }
    }
}
