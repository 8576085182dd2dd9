//! Counter-based random numbers: Philox4x32-10 keyed by (seed, layer, iteration).
//!
//! Method: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); checked against the known answers of
//! their Random123 library. A stream's numbers depend on its key alone, so any row chunk on any node draws the same.
//!
//! Not here: cryptographic randomness.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Ten rounds of Philox4x32.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let low = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let high = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        let upper = |product: u64| (product >> 32) as u32;
        counter =
            [upper(high) ^ counter[1] ^ key[0], high as u32, upper(low) ^ counter[3] ^ key[1], low as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// The numbers of one iteration of one layer, in order.
#[derive(Debug, Clone)]
pub struct Stream {
    key: [u32; 2],
    /// Words 0: block number; 1: iteration; 2, 3: layer.
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl Stream {
    /// The stream of one iteration of one layer. It holds 2^34 numbers, then repeats.
    pub fn new(seed: u64, layer: u64, iteration: u32) -> Self {
        let halves = |value: u64| [value as u32, (value >> 32) as u32];
        let [layer_low, layer_high] = halves(layer);
        Self { key: halves(seed), counter: [0, iteration, layer_low, layer_high], block: [0; 4], used: 4 }
    }

    /// Next 32 bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox(self.counter, self.key);
            self.counter[0] = self.counter[0].wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// Uniform in `0..limit`, without modulo bias; 0 if `limit` is 0.
    ///
    /// Method: Lemire's multiplication with rejection (ACM TOMACS 29(1), 2019).
    pub fn index(&mut self, limit: u32) -> u32 {
        let reject_below = limit.wrapping_neg().checked_rem(limit).unwrap_or(0);
        loop {
            let wide = u64::from(self.next_u32()) * u64::from(limit);
            if wide as u32 >= reject_below {
                return (wide >> 32) as u32;
            }
        }
    }

    /// Uniform in [0, 1), 24 bits.
    pub fn unit_f32(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 / 16_777_216.0
    }

    /// Standard normal, by Box and Muller (two draws each, so that calls stay independent of each other).
    ///
    /// Uses the platform's `ln` and `cos`: the last bit may differ between systems. For tests and benchmarks.
    pub fn normal_f32(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - f64::from(self.unit_f32())).ln()).sqrt();
        (radius * (std::f64::consts::TAU * f64::from(self.unit_f32())).cos()) as f32
    }

    /// Fills `out` with indices of `0..limit`, distinct as long as there are enough (Floyd's method, then in order of
    /// drawing); with `out.len() > limit` they repeat in rounds of `limit` distinct ones. Nothing is written for `limit` 0.
    ///
    /// Quadratic in the length: meant for minibatches of at most a few hundred.
    pub fn distinct(&mut self, limit: u32, out: &mut [u32]) {
        if limit == 0 {
            return;
        }
        for round in out.chunks_mut(limit as usize) {
            let taken = round.len() as u32;
            for i in 0..round.len() {
                let top = limit - taken + i as u32;
                let drawn = self.index(top + 1);
                round[i] = if round[..i].contains(&drawn) { top } else { drawn };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_known_answers_of_random123() {
        let ones = u32::MAX;
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([ones; 4], [ones; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expect) in cases {
            assert_eq!(philox(counter, key), expect, "counter {counter:x?}, key {key:x?}");
        }
    }

    #[test]
    fn streams_differ_by_seed_layer_and_iteration_and_repeat_by_key() {
        let first = |seed, layer, iteration| {
            let mut stream = Stream::new(seed, layer, iteration);
            (0..6).map(|_| stream.next_u32()).collect::<Vec<_>>()
        };
        let base = first(1, 2, 3);
        assert_eq!(base, first(1, 2, 3));
        for other in
            [first(2, 2, 3), first(1, 3, 3), first(1, 2, 4), first(1 << 32, 2, 3), first(1, 2 + (1 << 32), 3)]
        {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn indices_are_uniform_where_a_modulus_would_be_biased() {
        // With this limit a plain modulus draws the lower third twice as often as the rest.
        let limit = 3 << 30;
        let mut stream = Stream::new(7, 0, 0);
        let draws = 30_000;
        let low = (0..draws).filter(|_| stream.index(limit) < 1 << 30).count() as f64;
        let (mean, deviation) = (f64::from(draws) / 3.0, (f64::from(draws) * 2.0 / 9.0).sqrt());
        assert!((low - mean).abs() < 5.0 * deviation, "lower third: {low} of {draws}");
        assert_eq!(stream.index(0), 0);
        assert_eq!(stream.index(1), 0);
    }

    #[test]
    fn small_limits_hit_every_index_evenly() {
        let mut stream = Stream::new(3, 1, 4);
        let mut counts = [0u32; 10];
        for _ in 0..20_000 {
            counts[stream.index(10) as usize] += 1;
        }
        let statistic: f64 = counts.iter().map(|c| (f64::from(*c) - 2000.0).powi(2) / 2000.0).sum();
        // Chi-squared with 9 degrees of freedom exceeds 33.7 once in 10,000.
        assert!(statistic < 33.7, "chi-squared {statistic}: {counts:?}");
    }

    #[test]
    fn distinct_indices_are_distinct_and_cover_all_when_asked_for_all() {
        let mut stream = Stream::new(11, 0, 0);
        for (limit, len) in [(1, 1), (5, 5), (1000, 32), (7, 3)] {
            let mut out = vec![u32::MAX; len];
            stream.distinct(limit, &mut out);
            let mut sorted = out.clone();
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!(sorted.len(), len, "limit {limit}: {out:?}");
            assert!(out.iter().all(|i| *i < limit), "limit {limit}: {out:?}");
        }
        let mut out = [9; 7];
        stream.distinct(3, &mut out);
        for round in out.chunks(3).take(2) {
            let mut round = round.to_vec();
            round.sort_unstable();
            assert_eq!(round, [0, 1, 2]);
        }
    }

    #[test]
    fn normals_have_mean_zero_and_variance_one() {
        let mut stream = Stream::new(5, 0, 0);
        let draws: Vec<f64> = (0..20_000).map(|_| f64::from(stream.normal_f32())).collect();
        let mean = draws.iter().sum::<f64>() / 20_000.0;
        let variance = draws.iter().map(|x| x * x).sum::<f64>() / 20_000.0;
        assert!(mean.abs() < 0.035 && (variance - 1.0).abs() < 0.05, "mean {mean}, variance {variance}");
    }
}
