//! Mixtures of experts: the choice, the rows of one expert, the weighted sum.
//!
//! Not here: the experts, which are products like any other.

use super::attention::softmax;

/// Weights of the experts, `[P, experts]`: the softmax of each row of `logits`, 0 but for the largest `top_k` (the lower
/// index where equal), divided by their sum if `normalise`. A chosen weight is never 0.
///
/// # Panics
/// If the shapes differ, or `top_k` is not in `1..=experts`.
pub fn route(logits: &[f32], experts: usize, top_k: usize, normalise: bool, weights: &mut [f32]) {
    assert!((1..=experts).contains(&top_k), "route: top {top_k} of {experts}");
    assert!(
        logits.len() == weights.len() && logits.len().is_multiple_of(experts),
        "route: {} logits and {} weights of {experts} experts",
        logits.len(),
        weights.len()
    );
    let mut order = Vec::with_capacity(experts);
    weights.copy_from_slice(logits);
    for row in weights.chunks_exact_mut(experts) {
        softmax(row);
        order.clear();
        order.extend(0..experts);
        // Stable: of equals the lower index comes first.
        order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
        let (kept, dropped) = order.split_at(top_k);
        let sum: f32 = if normalise { kept.iter().map(|e| row[*e]).sum() } else { 1.0 };
        for expert in kept {
            let weight = row[*expert] / sum;
            row[*expert] = if weight < f32::MIN_POSITIVE { f32::MIN_POSITIVE } else { weight };
        }
        dropped.iter().for_each(|expert| row[*expert] = 0.0);
    }
}

/// Tokens of an expert, ascending: those whose weight is not 0, or all. `weights`: `[P, experts]`.
pub fn chosen(
    weights: &[f32],
    experts: usize,
    expert: usize,
    all_tokens: bool,
) -> impl Iterator<Item = usize> + '_ {
    let rows = weights.chunks_exact(experts).enumerate();
    rows.filter(move |(_, row)| all_tokens || row[expert] != 0.0).map(|(token, _)| token)
}

/// Copies rows of `x`, `[_, width]`, one after the other to `out`.
///
/// # Panics
/// If a row is not there, or `out` does not hold exactly the rows.
pub fn gather(x: &[f32], width: usize, rows: impl Iterator<Item = usize>, out: &mut [f32]) {
    let mut slots = out.chunks_exact_mut(width);
    for row in rows {
        let slot = slots.next().expect("gather: more rows than places");
        slot.copy_from_slice(&x[row * width..][..width]);
    }
    assert!(slots.next().is_none(), "gather: fewer rows than places");
}

/// `out[token] += weight of expert * x[i]` for the `i`th of the expert's tokens ([`chosen`]); `x`: `[p, width]`.
///
/// # Panics
/// If `x` does not hold exactly the expert's rows, or `out` not a row per token.
pub fn combine(
    weights: &[f32],
    experts: usize,
    expert: usize,
    all_tokens: bool,
    x: &[f32],
    width: usize,
    out: &mut [f32],
) {
    let mut rows = x.chunks_exact(width);
    for token in chosen(weights, experts, expert, all_tokens) {
        let row = rows.next().expect("combine: fewer rows than tokens");
        let weight = weights[token * experts + expert];
        for (out, x) in out[token * width..][..width].iter_mut().zip(row) {
            // An expert that was not chosen adds nothing, whatever it computed.
            *out += if weight == 0.0 { 0.0 } else { weight * x };
        }
    }
    assert!(rows.next().is_none(), "combine: more rows than tokens");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_are_chosen_and_the_lower_of_equals() {
        let logits = [0.0, 1.0, 1.0, -1.0, 2.0, 2.0, 2.0, 2.0];
        let mut weights = [f32::NAN; 8];
        route(&logits, 4, 2, true, &mut weights);
        assert_eq!(weights[0..4], [0.0, 0.5, 0.5, 0.0]);
        assert_eq!(weights[4..8], [0.5, 0.5, 0.0, 0.0]);
        route(&logits, 4, 1, false, &mut weights);
        let e = std::f32::consts::E;
        let want = e / (1.0 + 2.0 * e + 1.0 / e);
        assert!((weights[1] - want).abs() < 1e-6 && weights[2] == 0.0, "{weights:?}");
        assert_eq!(weights[4..8], [0.25, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn a_chosen_weight_is_never_zero() {
        let mut weights = [0.0; 3];
        route(&[1000.0, -1000.0, -2000.0], 3, 2, true, &mut weights);
        assert!(weights[0] == 1.0 && weights[1] > 0.0 && weights[2] == 0.0, "{weights:?}");
    }

    #[test]
    fn rows_go_out_and_come_back_weighted() {
        let weights = [0.25, 0.75, 1.0, 0.0, 0.0, 1.0];
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        for all in [false, true] {
            let mut out = [0.0; 6];
            for expert in 0..2 {
                let count = chosen(&weights, 2, expert, all).count();
                assert_eq!(count, if all { 3 } else { 2 });
                let mut rows = vec![0.0; 2 * count];
                gather(&x, 2, chosen(&weights, 2, expert, all), &mut rows);
                rows.iter_mut().for_each(|x| *x *= 10.0);
                combine(&weights, 2, expert, all, &rows, 2, &mut out);
            }
            assert_eq!(out, x.map(|x| x * 10.0));
        }
    }

    #[test]
    fn an_expert_without_tokens_is_no_work() {
        let weights = [1.0, 0.0];
        gather(&[1.0], 1, chosen(&weights, 2, 1, false), &mut []);
        let mut out = [0.0];
        combine(&weights, 2, 1, false, &[], 1, &mut out);
        assert_eq!(out, [0.0]);
    }
}
