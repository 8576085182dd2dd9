//! What a user may choose about the rounding of a layer, with defaults chosen by measurement.
//!
//! Not here: grids (`quant::GridSpec`), which layers (`work`).

use serde::{Deserialize, Serialize};

use crate::SolveError;

/// Where the rounding variables start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Start {
    /// Soft weights start at the weights: `h(v) = frac(w / scale)`.
    #[default]
    Nearest,
    /// GPTQ order, constrained to {floor, ceil}: columns by falling diagonal of H, each error fed forward.
    Gptq,
}

impl std::str::FromStr for Start {
    type Err = SolveError;
    fn from_str(text: &str) -> Result<Self, SolveError> {
        match text {
            "nearest" => Ok(Self::Nearest),
            "gptq" => Ok(Self::Gptq),
            _ => Err(SolveError::Setting {
                name: "start",
                value: text.to_owned(),
                expected: "`nearest` or `gptq`",
            }),
        }
    }
}

impl std::fmt::Display for Start {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Nearest => "nearest",
            Self::Gptq => "gptq",
        })
    }
}

/// Settings of one solve.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Settings {
    /// AdaRound iterations; 0 leaves the start to refinement alone.
    pub iterations: u32,
    /// Adam's learning rate on the rounding variables.
    pub learning_rate: f32,
    /// Adam's decays of the first and second moment for full-batch gradients (gram objective). Minibatches always use
    /// Adam's own 0.9 and 0.999.
    ///
    /// Deviation: exact gradients need no long memory; (0.8, 0.9) reaches in 300 iterations what (0.9, 0.999) does in 1,000.
    pub adam: (f32, f32),
    /// Annealing exponent of the rounding loss, from and to. The paper's (20, 2).
    pub beta: (f32, f32),
    /// Fraction of the iterations without rounding loss, in [0, 1).
    pub warm_start: f32,
    /// Weight of the rounding loss relative to the row's rounding noise (see [`Settings::normalize`]).
    pub lambda: f32,
    /// Divide each row's reconstruction loss by the row's expected nearest-rounding noise per weight,
    /// `sum(delta^2 H_jj) / 12 / cols`, so that `lambda` means the same in every layer and row.
    ///
    /// Deviation: the paper and AIMET add lambda to the raw loss; `false` does that.
    pub normalize: bool,
    /// Positions per iteration of the samples objective.
    pub batch: usize,
    /// Pull towards the original weights: H + d I and W C + d W with d this fraction of the mean diagonal of H.
    pub damping: f32,
    /// Start of the rounding variables.
    pub start: Start,
    /// Coordinate-descent sweeps at most, per start; ends earlier when nothing flips. 0 turns refinement off.
    pub refine_sweeps: u32,
    /// Rounds of [`crate::fit_scales`] at most; 0 leaves the grid as it was given.
    pub scale_fits: u32,
    /// Seed of the minibatches.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            iterations: 300,
            learning_rate: 0.1,
            adam: (0.8, 0.9),
            beta: (20.0, 2.0),
            warm_start: 0.2,
            lambda: 3.0,
            normalize: true,
            batch: 32,
            damping: 1e-2,
            start: Start::Nearest,
            refine_sweeps: 30,
            scale_fits: 0,
            seed: 0,
        }
    }
}

impl Settings {
    /// The paper's and AIMET's choices: 10,000 minibatch iterations, lambda on the raw loss, no refinement or damping.
    pub fn paper() -> Self {
        Self {
            iterations: 10_000,
            learning_rate: 1e-3,
            adam: (0.9, 0.999),
            lambda: 0.01,
            normalize: false,
            damping: 0.0,
            refine_sweeps: 0,
            ..Self::default()
        }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// `Setting` with the first value that is out of range.
    pub fn validate(&self) -> Result<(), SolveError> {
        let check = |name, value: f32, ok: bool, expected| match ok {
            true => Ok(()),
            false => Err(SolveError::Setting { name, value: value.to_string(), expected }),
        };
        let non_negative = |value: f32| value.is_finite() && value >= 0.0;
        check("learning-rate", self.learning_rate, non_negative(self.learning_rate), "a finite number >= 0")?;
        check("lambda", self.lambda, non_negative(self.lambda), "a finite number >= 0")?;
        check("damping", self.damping, non_negative(self.damping), "a finite number >= 0")?;
        check("warm-start", self.warm_start, (0.0..1.0).contains(&self.warm_start), "in [0, 1)")?;
        for decay in [self.adam.0, self.adam.1] {
            check("adam", decay, (0.0..1.0).contains(&decay), "decays in [0, 1)")?;
        }
        for beta in [self.beta.0, self.beta.1] {
            check("beta", beta, beta.is_finite() && beta >= 1.0, "finite numbers >= 1")?;
        }
        check("batch", self.batch as f32, self.batch > 0, "at least 1")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_and_paper_settings_are_valid() {
        Settings::default().validate().unwrap();
        Settings::paper().validate().unwrap();
    }

    #[test]
    fn each_bad_value_is_refused_by_name() {
        let base = Settings::default;
        let cases = [
            ("learning-rate", Settings { learning_rate: f32::NAN, ..base() }),
            ("lambda", Settings { lambda: -1.0, ..base() }),
            ("damping", Settings { damping: f32::INFINITY, ..base() }),
            ("warm-start", Settings { warm_start: 1.0, ..base() }),
            ("adam", Settings { adam: (0.9, 1.0), ..base() }),
            ("beta", Settings { beta: (20.0, 0.5), ..base() }),
            ("batch", Settings { batch: 0, ..base() }),
        ];
        for (name, settings) in cases {
            let message = settings.validate().unwrap_err().to_string();
            assert!(message.contains(name), "{name}: {message}");
        }
    }

    #[test]
    fn start_reads_what_it_prints() {
        for start in [Start::Nearest, Start::Gptq] {
            assert_eq!(start.to_string().parse::<Start>().unwrap(), start);
        }
        assert!("babai".parse::<Start>().is_err());
    }
}
