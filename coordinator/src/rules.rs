//! Which grid each layer gets: the job's default, changed by name patterns.

use crate::{CoordinatorError, Rule};
use globset::{Glob, GlobMatcher};
use halfstep_model::Layer;
use halfstep_quant::GridSpec;

/// What the rules say of one layer.
pub(crate) enum Decision {
    Quantize(GridSpec),
    Skip { pattern: String },
}

enum Matcher {
    First,
    Last,
    Glob(Box<GlobMatcher>),
}

impl Matcher {
    fn new(pattern: &str) -> Result<Self, CoordinatorError> {
        match pattern {
            "first" => Ok(Self::First),
            "last" => Ok(Self::Last),
            _ => Glob::new(pattern).map(|glob| Self::Glob(Box::new(glob.compile_matcher()))).map_err(|e| {
                CoordinatorError::Configuration(format!(
                    "pattern `{pattern}`: not a valid glob: {}",
                    e.kind()
                ))
            }),
        }
    }

    fn matches(&self, index: usize, count: usize, layer: &Layer) -> bool {
        match self {
            Self::First => index == 0,
            Self::Last => index + 1 == count,
            // Users know a layer by its node or by its weight.
            Self::Glob(glob) => glob.is_match(&layer.name) || glob.is_match(&layer.weight),
        }
    }
}

/// One decision per layer, in order.
///
/// # Errors
/// `Configuration` for an invalid pattern or grid, and for a pattern that matches nothing: a typo there would
/// silently quantize what the user wanted kept.
pub(crate) fn decide(
    layers: &[Layer],
    default: GridSpec,
    rules: &[Rule],
) -> Result<Vec<Decision>, CoordinatorError> {
    default.validate()?;
    let mut grids = vec![(default, None::<String>); layers.len()];
    for rule in rules {
        let matcher = Matcher::new(&rule.pattern)?;
        let mut hits = 0;
        for (index, layer) in layers.iter().enumerate() {
            if !matcher.matches(index, layers.len(), layer) {
                continue;
            }
            hits += 1;
            apply(rule, &mut grids[index]);
        }
        if hits == 0 {
            return Err(CoordinatorError::Configuration(format!(
                "pattern `{}`: matches none of the model's {} layers; `halfstep inspect` lists their names",
                rule.pattern,
                layers.len()
            )));
        }
    }
    grids
        .into_iter()
        .map(|(grid, skip)| match skip {
            Some(pattern) => Ok(Decision::Skip { pattern }),
            None => grid.validate().map(|()| Decision::Quantize(grid)).map_err(CoordinatorError::from),
        })
        .collect()
}

fn apply(rule: &Rule, (grid, skip): &mut (GridSpec, Option<String>)) {
    *skip = rule.skip.then(|| rule.pattern.clone());
    grid.bits = rule.bits.unwrap_or(grid.bits);
    grid.scheme = rule.scheme.unwrap_or(grid.scheme);
    grid.granularity = rule.granularity.unwrap_or(grid.granularity);
    grid.range = rule.range.unwrap_or(grid.range);
}
