//! Which windows are used: one from each of equal stretches, by the seed.
//!
//! Not here: the windows (`windows`).

/// Indices of `wanted` of `count` windows, ascending; all if there are not more.
///
/// The `i`-th depends on `seed`, `i` and the two counts alone, not on any choice before it.
pub(super) fn choose(count: usize, wanted: usize, seed: u64) -> Vec<usize> {
    if wanted >= count {
        return (0..count).collect();
    }
    let bound = |index: usize| (index as u128 * count as u128 / wanted as u128) as usize;
    let pick = |index: usize| {
        let (start, end) = (bound(index), bound(index + 1));
        start + (number(seed, index as u64) % (end - start) as u64) as usize
    };
    (0..wanted).map(pick).collect()
}

/// A number from a counter: the same on every machine.
fn number(seed: u64, counter: u64) -> u64 {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..].copy_from_slice(&counter.to_le_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&blake3::hash(&key).as_bytes()[..8]);
    u64::from_le_bytes(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_each_stretch_is_chosen_and_the_seed_matters() {
        for (count, wanted) in [(96, 16), (97, 16), (17, 16), (1000, 1), (16, 16), (3, 16)] {
            let chosen = choose(count, wanted, 7);
            assert_eq!(chosen.len(), wanted.min(count));
            for (index, window) in chosen.iter().enumerate() {
                let stretch = index * count / chosen.len()..(index + 1) * count / chosen.len();
                assert!(stretch.contains(window), "{count} {wanted}: {index} is {window}");
            }
            assert_eq!(chosen, choose(count, wanted, 7));
        }
        assert_ne!(choose(1000, 16, 1), choose(1000, 16, 2));
    }
}
