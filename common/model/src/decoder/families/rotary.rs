//! Frequencies of rotary positions, for each way of stretching them.
//!
//! Sources: linear and dynamic as in `transformers`; YaRN, arXiv:2309.00071; LongRoPE, arXiv:2402.13753; Llama 3.1's
//! smoothing. Computed in f64, rounded once.

use super::FamilyError;
use super::fields::Fields;
use crate::decoder::{Rotary, Rotation};
use std::f64::consts::TAU;
use std::ops::RangeInclusive;

const KNOWN: &str = "default, linear, dynamic, llama3, yarn or longrope";
const POSITIONS: RangeInclusive<usize> = 1..=1 << 30;

/// What a family says about its rotation where the configuration says nothing.
pub(super) struct Defaults {
    /// Base of the frequencies.
    pub(super) theta: f64,
    /// Whether a part of a head may turn (`partial_rotary_factor`).
    pub(super) partial: bool,
    /// Whether every stretching is LongRoPE, whatever its name (Phi-3: `su`, `yarn`).
    pub(super) always_longrope: bool,
}

/// Everything a rotation is computed from.
struct Rope<'a> {
    config: &'a Fields<'a>,
    /// `rope_parameters`, or `rope_scaling` of older files.
    scaling: Option<Fields<'a>>,
    theta: f64,
    width: usize,
}

/// The rotation of a layer of the given type, for heads of `head_dim`.
pub(super) fn rotary(
    config: &Fields<'_>,
    layer_type: &str,
    defaults: &Defaults,
    head_dim: usize,
) -> Result<Rotary, FamilyError> {
    let scaling = parameters(config, layer_type)?;
    let theta = match &scaling {
        Some(scaling) if scaling.has("rope_theta") => scaling.positive("rope_theta")?,
        _ => config.positive("rope_theta")?,
    };
    let width = width(config, scaling.as_ref(), defaults, head_dim)?;
    let rope = Rope { config, scaling, theta: theta.unwrap_or(defaults.theta), width };
    Ok(Rotary { width, rotation: rope.rotation(defaults)? })
}

/// One base for the whole model, no stretching.
pub(super) fn plain(theta: f64, width: usize) -> Rotary {
    let frequencies = frequencies(theta, width).into_iter().map(|f| f as f32).collect();
    Rotary { width, rotation: Rotation::Fixed { frequencies, factor: 1.0 } }
}

fn parameters<'a>(config: &Fields<'a>, layer_type: &str) -> Result<Option<Fields<'a>>, FamilyError> {
    if let Some(scaling) = config.object("rope_scaling")? {
        return Ok(Some(scaling));
    }
    let Some(parameters) = config.object("rope_parameters")? else { return Ok(None) };
    Ok(match parameters.object(layer_type)? {
        Some(own) => Some(own),
        None => Some(parameters),
    })
}

fn width(
    config: &Fields<'_>,
    scaling: Option<&Fields<'_>>,
    defaults: &Defaults,
    head_dim: usize,
) -> Result<usize, FamilyError> {
    const NAME: &str = "partial_rotary_factor";
    let owner = scaling.filter(|scaling| scaling.has(NAME)).unwrap_or(config);
    let part = owner.positive(NAME)?.unwrap_or(1.0);
    let width = (head_dim as f64 * part) as usize;
    if part > 1.0 || width == 0 || !width.is_multiple_of(2) {
        return Err(owner.refuse(NAME, format!("a part of heads of {head_dim} that is even and not 0")));
    }
    if part < 1.0 && !defaults.partial {
        return Err(owner.refuse(NAME, "1: this family turns whole heads"));
    }
    Ok(width)
}

/// Radians per position of each pair.
fn frequencies(theta: f64, width: usize) -> Vec<f64> {
    (0..width / 2).map(|i| theta.powf(-((2 * i) as f64) / width as f64)).collect()
}

fn fixed(frequencies: impl IntoIterator<Item = f64>, factor: f64) -> Rotation {
    Rotation::Fixed {
        frequencies: frequencies.into_iter().map(|f| f as f32).collect(),
        factor: factor as f32,
    }
}

impl Rope<'_> {
    fn rotation(&self, defaults: &Defaults) -> Result<Rotation, FamilyError> {
        let plain = || frequencies(self.theta, self.width);
        let Some(scaling) = &self.scaling else { return Ok(fixed(plain(), 1.0)) };
        let name = if scaling.has("rope_type") { "rope_type" } else { "type" };
        match scaling.text(name)?.unwrap_or("default") {
            "default" => Ok(fixed(plain(), 1.0)),
            "longrope" => self.longrope(scaling),
            "su" | "yarn" if defaults.always_longrope => self.longrope(scaling),
            _ if defaults.always_longrope => Err(scaling.refuse(name, "default or longrope")),
            "linear" => {
                let factor = scaling.need_positive("factor")?;
                Ok(fixed(plain().into_iter().map(|f| f / factor), 1.0))
            }
            "dynamic" => Ok(Rotation::Dynamic {
                after: self.config.size("max_position_embeddings", POSITIONS)?,
                base: self.theta as f32,
                scaling: scaling.need_positive("factor")? as f32,
            }),
            "llama3" => self.llama3(scaling),
            "yarn" => self.yarn(scaling),
            _ => Err(scaling.refuse(name, KNOWN)),
        }
    }

    /// Positions before any stretching.
    fn original(&self, scaling: &Fields<'_>) -> Result<usize, FamilyError> {
        const NAME: &str = "original_max_position_embeddings";
        match [self.config, scaling].into_iter().find(|fields| fields.has(NAME)) {
            Some(fields) => fields.size(NAME, POSITIONS),
            None => self.config.size("max_position_embeddings", POSITIONS),
        }
    }

    /// By how much positions are stretched: `factor`, else the ratio of the two lengths.
    fn stretch(&self, scaling: &Fields<'_>) -> Result<f64, FamilyError> {
        if let Some(factor) = scaling.positive("factor")? {
            return Ok(factor);
        }
        let positions = self.config.size("max_position_embeddings", POSITIONS)?;
        Ok(positions as f64 / self.original(scaling)? as f64)
    }

    /// Long waves are stretched, short ones are not, those between are blended.
    fn llama3(&self, scaling: &Fields<'_>) -> Result<Rotation, FamilyError> {
        let factor = scaling.need_positive("factor")?;
        let low = scaling.need_positive("low_freq_factor")?;
        let high = scaling.need_positive("high_freq_factor")?;
        if high <= low {
            return Err(scaling.refuse("high_freq_factor", format!("more than low_freq_factor, {low}")));
        }
        let original = self.original(scaling)? as f64;
        let stretched = |frequency: f64| {
            let turns = original * frequency / TAU;
            let short = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 - short) * frequency / factor + short * frequency
        };
        Ok(fixed(frequencies(self.theta, self.width).into_iter().map(stretched), 1.0))
    }

    fn longrope(&self, scaling: &Fields<'_>) -> Result<Rotation, FamilyError> {
        let after = self.original(scaling)?;
        let stretch = self.stretch(scaling)?;
        let factor = match scaling.positive("attention_factor")? {
            Some(factor) => factor,
            None if stretch <= 1.0 => 1.0,
            None if after == 1 => {
                return Err(scaling.refuse("original_max_position_embeddings", "at least 2"));
            }
            None => (1.0 + stretch.ln() / (after as f64).ln()).sqrt(),
        };
        let divided = |name: &str| -> Result<Vec<f32>, FamilyError> {
            let by = scaling.positives(name, self.width / 2)?;
            let plain = frequencies(self.theta, self.width);
            Ok(plain.iter().zip(by).map(|(frequency, by)| (frequency / by) as f32).collect())
        };
        let (short, long) = (divided("short_factor")?, divided("long_factor")?);
        Ok(Rotation::ByLength { after, short, long, factor: factor as f32 })
    }

    /// Pairs that turn often keep their frequency, those that turn seldom are stretched, with a ramp between.
    fn yarn(&self, scaling: &Fields<'_>) -> Result<Rotation, FamilyError> {
        let stretch = self.stretch(scaling)?;
        let original = self.original(scaling)? as f64;
        let fast = scaling.positive("beta_fast")?.unwrap_or(32.0);
        let slow = scaling.positive("beta_slow")?.unwrap_or(1.0);
        if self.theta == 1.0 {
            return Err(scaling.refuse("rope_theta", "another base than 1"));
        }
        // The pair that turns `rotations` times over the original length.
        let pair = |rotations: f64| {
            self.width as f64 * (original / (rotations * TAU)).ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (pair(fast), pair(slow));
        if scaling.flag("truncate", true)? {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(self.width as f64 - 1.0));
        // Deviation from the paper, as in `transformers`: no division by 0.
        let span = if low == high { 0.001 } else { high - low };
        let ramped = frequencies(self.theta, self.width).into_iter().enumerate().map(|(i, frequency)| {
            let seldom = ((i as f64 - low) / span).clamp(0.0, 1.0);
            frequency / stretch * seldom + frequency * (1.0 - seldom)
        });
        Ok(fixed(ramped, yarn_factor(scaling, stretch)?))
    }
}

/// Factor of sine and cosine.
fn yarn_factor(scaling: &Fields<'_>, stretch: f64) -> Result<f64, FamilyError> {
    if let Some(factor) = scaling.positive("attention_factor")? {
        return Ok(factor);
    }
    let factor = |weight: f64| if stretch <= 1.0 { 1.0 } else { 0.1 * weight * stretch.ln() + 1.0 };
    Ok(match (scaling.positive("mscale")?, scaling.positive("mscale_all_dim")?) {
        (Some(mscale), Some(all)) => factor(mscale) / factor(all),
        _ => factor(1.0),
    })
}
