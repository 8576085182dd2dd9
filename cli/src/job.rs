//! From the command line's words to the coordinator's: [`RunConfig`] to `JobConfig`.
//!
//! Nothing is decided here; every default is in `config`. Not here: running the job (`backend`).

use halfstep_coordinator::checkpoint::Format;
use halfstep_coordinator::dataset::{Channels, DatasetOptions, ImageLayout, ImageOptions};
use halfstep_coordinator::{CarryPrecision, EncodingsVersion as Version, JobConfig, Rule};
use halfstep_work::SolverSettings;

use crate::config::{DataConfig, RoundingConfig, RunConfig};
use crate::exit::CliError;
use crate::options::{Carries, Colours, EncodingsVersion, Layout, OutputFormat};
use crate::values::Override;

/// Positions kept per layer and shard for the samples objective; bounds its memory.
const POSITIONS_PER_SHARD: u32 = 4096;

impl RunConfig {
    /// The job as the coordinator takes it. `plan` has no output folder and gives any.
    pub(crate) fn to_job(&self) -> JobConfig {
        let skips = self.skip.iter().map(|pattern| rule(pattern, true, None));
        let overrides = self.overrides.iter().map(|over| rule(&over.pattern, false, Some(over)));
        JobConfig {
            model: self.model.clone(),
            calibration: self.data.path.clone(),
            dataset: self.data.to_options(),
            output: self.output.clone().unwrap_or_default(),
            force: self.force,
            grid: self.grid,
            // Later rules win: what is skipped stays skipped.
            rules: overrides.chain(skips).collect(),
            solver: self.rounding.to_settings(),
            propagation: self.rounding.propagation,
            shard_size: self.rounding.shard_size,
            partition: self.rounding.partition,
            fold_batch_norm: self.fold_batch_norm,
            encodings: self.encodings.iter().map(|version| version.to_job()).collect(),
            language: self.language.clone(),
        }
    }
}

impl DataConfig {
    /// How the data is read.
    pub(crate) fn to_options(&self) -> DatasetOptions {
        let images = ImageOptions {
            resize: self.resize,
            crop: self.crop,
            mean: self.mean.clone(),
            std: self.std.clone(),
            scale: self.scale,
            layout: match self.layout {
                Layout::Nchw => ImageLayout::Nchw,
                Layout::Nhwc => ImageLayout::Nhwc,
            },
            channels: match self.channels {
                Colours::Rgb => Channels::Rgb,
                Colours::Bgr => Channels::Bgr,
                Colours::Gray => Channels::Gray,
            },
        };
        DatasetOptions { samples: self.samples, images }
    }
}

impl RoundingConfig {
    fn to_settings(&self) -> SolverSettings {
        SolverSettings {
            objective: self.objective,
            iterations: self.iterations,
            learning_rate: self.learning_rate,
            beta: self.beta_range,
            warm_start: self.warm_start,
            lambda: self.lambda,
            batch: self.batch,
            damping: self.damping,
            start: self.start,
            refine_sweeps: self.refine_sweeps,
            scale_fits: self.scale_fits,
            seed: self.seed,
            positions_per_shard: POSITIONS_PER_SHARD,
            positions_fraction: self.positions,
        }
    }
}

impl OutputFormat {
    pub(crate) fn to_job(self) -> Format {
        match self {
            Self::CompressedTensors => Format::CompressedTensors,
            Self::Gptq => Format::Gptq,
            Self::GptqV2 => Format::GptqV2,
            Self::FakeQuant => Format::FakeQuant,
            Self::Gguf => Format::Gguf,
        }
    }
}

impl Carries {
    pub(crate) fn to_job(self) -> CarryPrecision {
        match self {
            Self::F32 => CarryPrecision::F32,
            Self::Bf16 => CarryPrecision::Bf16,
        }
    }
}

impl EncodingsVersion {
    fn to_job(self) -> Version {
        match self {
            Self::V0_6_1 => Version::V0_6_1,
            Self::V1_0_0 => Version::V1_0_0,
            Self::V2_0_0 => Version::V2_0_0,
        }
    }
}

fn rule(pattern: &str, skip: bool, over: Option<&Override>) -> Rule {
    Rule {
        pattern: pattern.into(),
        skip,
        bits: over.and_then(|over| over.bits),
        scheme: over.and_then(|over| over.scheme),
        granularity: over.and_then(|over| over.granularity),
        range: over.and_then(|over| over.range),
    }
}

/// Errors of the coordinator, by whose mistake they are.
impl From<halfstep_coordinator::CoordinatorError> for CliError {
    fn from(error: halfstep_coordinator::CoordinatorError) -> Self {
        use crate::exit::Exit;
        use halfstep_coordinator::ErrorKind;
        let exit = match error.kind() {
            ErrorKind::BadInput | ErrorKind::Storage => Exit::BadInput,
            ErrorKind::Configuration => Exit::BadConfiguration,
            ErrorKind::Interrupted => Exit::Interrupted,
            ErrorKind::Internal => Exit::Internal,
        };
        Self::new(exit, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{DataOptions, JobOptions};

    #[test]
    fn settings_arrive_where_they_belong() {
        let data = DataOptions {
            calibration: Some("c".into()),
            samples: Some(9),
            crop: Some(224),
            mean: vec![0.5],
            layout: Some(Layout::Nhwc),
            channels: Some(Colours::Bgr),
            ..DataOptions::default()
        };
        let options = JobOptions {
            model: Some("m".into()),
            data,
            bits: Some(3),
            skip: vec!["head*".into()],
            overrides: vec!["conv1:bits=8,scheme=asymmetric".parse().unwrap()],
            iterations: Some(11),
            lambda: Some(0.5),
            damping: Some(0.25),
            positions: Some(0.75),
            no_fold_batch_norm: true,
            encodings: vec![EncodingsVersion::V2_0_0, EncodingsVersion::V2_0_0],
            ..JobOptions::default()
        };
        let job = RunConfig::resolve(options, true).unwrap().to_job();
        assert_eq!((job.grid.bits, job.force, job.fold_batch_norm), (3, true, false));
        let (solver, images) = (job.solver, job.dataset.images);
        assert_eq!((solver.iterations, solver.lambda, solver.damping), (11, 0.5, 0.25));
        assert_eq!(solver.positions_fraction, 0.75);
        assert_eq!(
            (images.crop, images.resize, images.mean, job.dataset.samples),
            (Some(224), None, vec![0.5], Some(9))
        );
        assert_eq!((images.layout, images.channels), (ImageLayout::Nhwc, Channels::Bgr));
        assert_eq!(job.encodings, [Version::V2_0_0]);
        let rules: Vec<_> =
            job.rules.iter().map(|rule| (rule.pattern.as_str(), rule.skip, rule.bits)).collect();
        assert_eq!(rules, [("conv1", false, Some(8)), ("head*", true, None)]);
    }
}
