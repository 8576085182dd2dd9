//! [`RunConfig`]: a job as typed, with defaults filled in and options that contradict each other refused.
//!
//! No I/O: whether files exist is found out by whoever opens them.
//! Not here: what a job becomes (`Plan`), parsing (`args`, `job_file`).

use std::path::PathBuf;

use halfstep_coordinator::LanguageConfig;
use halfstep_coordinator::dataset::tokens::tokenizer_file;
use halfstep_quant::blocks::BLOCK;
use halfstep_quant::{Granularity, GridSpec, RangeEstimator, Scheme};
use halfstep_work::{Objective, Partition, Propagation, StartPoint};
use serde::Serialize;

use crate::exit::CliError;
use crate::options::{
    Carries, Colours, DataOptions, EncodingsVersion, GranularityKind, JobOptions, Layout, OutputFormat,
};
use crate::subject::{Measured, Subject};
use crate::values::{ByteSize, DeviceArg, GradientsArg, Override};

/// A quantization job, complete.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct RunConfig {
    pub(crate) model: PathBuf,
    pub(crate) data: DataConfig,
    /// `None` only for `plan`.
    pub(crate) output: Option<PathBuf>,
    /// Overwrite a non-empty output folder.
    pub(crate) force: bool,
    pub(crate) grid: GridSpec,
    pub(crate) skip: Vec<String>,
    pub(crate) overrides: Vec<Override>,
    pub(crate) fold_batch_norm: bool,
    pub(crate) rounding: RoundingConfig,
    pub(crate) resources: Resources,
    pub(crate) encodings: Vec<EncodingsVersion>,
    pub(crate) language: LanguageConfig,
}

/// Data and its preparation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct DataConfig {
    pub(crate) path: PathBuf,
    pub(crate) samples: Option<usize>,
    pub(crate) resize: Option<u32>,
    pub(crate) crop: Option<u32>,
    pub(crate) scale: f32,
    pub(crate) mean: Vec<f32>,
    pub(crate) std: Vec<f32>,
    pub(crate) layout: Layout,
    pub(crate) channels: Colours,
}

/// How roundings are found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct RoundingConfig {
    pub(crate) objective: Objective,
    pub(crate) propagation: Propagation,
    pub(crate) iterations: u32,
    pub(crate) learning_rate: f32,
    pub(crate) lambda: f32,
    pub(crate) beta_range: (f32, f32),
    pub(crate) warm_start: f32,
    pub(crate) batch: u32,
    pub(crate) damping: f32,
    pub(crate) start: StartPoint,
    pub(crate) refine_sweeps: u32,
    pub(crate) scale_fits: u32,
    pub(crate) positions: f32,
    pub(crate) seed: u64,
    /// `None`: chosen by the size of samples.
    pub(crate) shard_size: Option<usize>,
    /// Batches, until another is chosen.
    pub(crate) partition: Partition,
    /// Whether it is to be chosen by the nodes that are there when the job is submitted.
    pub(crate) choose_partition: bool,
}

/// What solves run on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct DeviceConfig {
    pub(crate) device: DeviceArg,
    pub(crate) gradients: GradientsArg,
    /// Searched for CUDA's libraries besides the system's folders.
    pub(crate) libraries: Vec<PathBuf>,
}

impl DeviceConfig {
    /// Fills in defaults.
    pub(crate) fn new(
        device: Option<DeviceArg>,
        gradients: Option<GradientsArg>,
        libraries: Vec<PathBuf>,
    ) -> Self {
        let (device, gradients) = (device.unwrap_or_default(), gradients.unwrap_or_default());
        Self { device, gradients, libraries }
    }
}

/// What the job may use; changes its result only by the kind of device.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Resources {
    pub(crate) memory_budget: ByteSize,
    pub(crate) spill_dir: Option<PathBuf>,
    /// `None`: one per core.
    pub(crate) threads: Option<usize>,
    pub(crate) device: DeviceConfig,
    pub(crate) onnxruntime: Option<PathBuf>,
}

/// Defaults of every subject ([`Subject::defaults`] has the others); the help text states them and a test compares the two.
pub(crate) mod defaults {
    pub(crate) const BITS: u8 = 4;
    pub(crate) const LEARNING_RATE: f32 = 0.1;
    pub(crate) const LAMBDA: f32 = 3.0;
    pub(crate) const BETA_RANGE: (f32, f32) = (20.0, 2.0);
    pub(crate) const WARM_START: f32 = 0.2;
    pub(crate) const BATCH: u32 = 32;
    pub(crate) const REFINE_SWEEPS: u32 = 30;
    pub(crate) const POSITIONS: f32 = 1.0;
    pub(crate) const SEED: u64 = 0;
    pub(crate) const MEMORY_BUDGET: u64 = 4 << 30;
    pub(crate) const PIXEL_SCALE: f32 = 255.0;
}

impl RunConfig {
    /// Fills in defaults.
    ///
    /// # Errors
    /// Usage if MODEL or data is missing; bad configuration if options contradict each other.
    pub(crate) fn resolve(options: JobOptions, force: bool) -> Result<Self, CliError> {
        let model = options.model.clone().ok_or_else(|| {
            CliError::usage("no MODEL given").hint("name an ONNX file, or set `model` in a job file")
        })?;
        let subject = Subject::at(&model);
        subject.check_options(&options)?;
        let grid = grid(&options)?;
        let config = Self {
            model,
            grid,
            force,
            output: options.output.clone(),
            skip: options.skip.clone(),
            overrides: options.overrides.clone(),
            fold_batch_norm: !options.no_fold_batch_norm,
            rounding: rounding(&options, subject.defaults()),
            resources: resources(&options),
            encodings: encodings(&options.encodings),
            language: language(&options),
            data: DataConfig::resolve(options.data, "--calibration")?,
        };
        config.check()?;
        Ok(config)
    }

    /// The output folder, which `quantize` needs and `plan` does not.
    pub(crate) fn require_output(&self) -> Result<(), CliError> {
        match self.output {
            Some(_) => Ok(()),
            None => Err(CliError::usage("no output folder given").hint("add `--output DIR`")),
        }
    }

    fn check(&self) -> Result<(), CliError> {
        let at_least_one = [
            ("shard-size", self.rounding.shard_size),
            ("sequence-length", self.language.sequence_length),
            ("file-size", usize::try_from(self.language.file_bytes).ok()),
            ("batch", usize::try_from(self.rounding.batch).ok()),
            ("threads", self.resources.threads),
        ];
        for (name, value) in at_least_one {
            if value == Some(0) {
                return Err(CliError::configuration(format!("{name} is 0, expected 1 or more")));
            }
        }
        for over in &self.overrides {
            over.apply(self.grid).validate().map_err(|error| {
                CliError::configuration(format!("override for `{}`: {error}", over.pattern))
            })?;
        }
        Ok(())
    }
}

impl Override {
    /// `grid` with what this override sets.
    pub(crate) fn apply(&self, grid: GridSpec) -> GridSpec {
        GridSpec {
            bits: self.bits.unwrap_or(grid.bits),
            scheme: self.scheme.unwrap_or(grid.scheme),
            granularity: self.granularity.unwrap_or(grid.granularity),
            range: self.range.unwrap_or(grid.range),
        }
    }
}

impl DataConfig {
    /// Fills in defaults. `flag` is what the path is called on the command line.
    ///
    /// # Errors
    /// Usage if no data is named; bad configuration for a sample count of 0.
    pub(crate) fn resolve(options: DataOptions, flag: &str) -> Result<Self, CliError> {
        let path = options.calibration.ok_or_else(|| {
            let hint = format!("add `{flag} PATH`: an .npz, an .npy, or a folder of those or of images");
            CliError::usage("no data given").hint(hint)
        })?;
        if options.samples == Some(0) {
            return Err(CliError::configuration("samples is 0, expected 1 or more"));
        }
        Ok(Self {
            path,
            samples: options.samples,
            resize: options.resize,
            crop: options.crop,
            scale: options.scale.unwrap_or(defaults::PIXEL_SCALE),
            mean: options.mean,
            std: options.std,
            layout: options.layout.unwrap_or(Layout::Nchw),
            channels: options.channels.unwrap_or(Colours::Rgb),
        })
    }
}

fn grid(options: &JobOptions) -> Result<GridSpec, CliError> {
    let granularity = match (options.granularity, options.group_size) {
        (None | Some(GranularityKind::PerGroup), Some(group_size)) => Granularity::PerGroup { group_size },
        (Some(GranularityKind::PerGroup), None) => {
            return Err(CliError::configuration("granularity is per-group but no group size is given")
                .hint("add `--group-size WEIGHTS`, for example 64 or 128"));
        }
        (Some(_), Some(size)) => {
            let message = format!("group size is {size} but granularity is not per-group");
            return Err(CliError::configuration(message).hint("drop one of the two options"));
        }
        (Some(GranularityKind::PerTensor), None) => Granularity::PerTensor,
        // The only groups that it has.
        (None, None) if options.format == Some(OutputFormat::Gguf) => {
            Granularity::PerGroup { group_size: BLOCK }
        }
        (Some(GranularityKind::PerChannel) | None, None) => Granularity::PerChannel,
    };
    let grid = GridSpec {
        bits: options.bits.unwrap_or(defaults::BITS),
        scheme: options.scheme.unwrap_or(Scheme::Symmetric),
        granularity,
        range: options.range.map_or(RangeEstimator::Mse, |range| range.0),
    };
    grid.validate().map_err(CliError::configuration)?;
    Ok(grid)
}

fn rounding(options: &JobOptions, measured: Measured) -> RoundingConfig {
    RoundingConfig {
        objective: options.objective.unwrap_or(Objective::Gram),
        propagation: options.propagation.unwrap_or(Propagation::Sequential),
        iterations: options.iterations.unwrap_or(measured.iterations),
        learning_rate: options.learning_rate.unwrap_or(defaults::LEARNING_RATE),
        lambda: options.lambda.unwrap_or(defaults::LAMBDA),
        beta_range: options.beta_range.map_or(defaults::BETA_RANGE, |range| (range.0, range.1)),
        warm_start: options.warm_start.unwrap_or(defaults::WARM_START),
        batch: options.batch.unwrap_or(defaults::BATCH),
        damping: options.damping.unwrap_or(measured.damping),
        start: options.start.unwrap_or(StartPoint::Gptq),
        refine_sweeps: options.refine_sweeps.unwrap_or(defaults::REFINE_SWEEPS),
        scale_fits: options.scale_fits.unwrap_or(measured.scale_fits),
        positions: options.positions.unwrap_or(defaults::POSITIONS),
        seed: options.seed.unwrap_or(defaults::SEED),
        shard_size: options.shard_size,
        partition: options.partition.and_then(|partition| partition.0).unwrap_or(Partition::Batches),
        choose_partition: options.partition.is_some_and(|partition| partition.0.is_none()),
    }
}

fn resources(options: &JobOptions) -> Resources {
    Resources {
        memory_budget: options.memory_budget.unwrap_or(ByteSize(defaults::MEMORY_BUDGET)),
        spill_dir: options.spill_dir.clone(),
        threads: options.threads,
        device: DeviceConfig::new(options.device.clone(), options.gradients, options.cuda_libraries.clone()),
        onnxruntime: options.onnxruntime.clone(),
    }
}

fn language(options: &JobOptions) -> LanguageConfig {
    let below = LanguageConfig::default();
    LanguageConfig {
        format: options.format.map_or(below.format, OutputFormat::to_job),
        sequence_length: options.sequence_length,
        text_field: options.text_field.clone(),
        tokenizer: options.tokenizer.as_deref().map(tokenizer_file),
        all_experts: options.calibrate_all_experts,
        carries: options.carries.map_or(below.carries, Carries::to_job),
        file_bytes: options.file_size.map_or(below.file_bytes, |size| size.0),
    }
}

fn encodings(asked: &[EncodingsVersion]) -> Vec<EncodingsVersion> {
    let mut versions = Vec::new();
    for version in asked {
        if !versions.contains(version) {
            versions.push(*version);
        }
    }
    if versions.is_empty() { vec![EncodingsVersion::V1_0_0] } else { versions }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Args;

    fn minimal() -> JobOptions {
        let data = DataOptions { calibration: Some("c.npz".into()), ..DataOptions::default() };
        JobOptions { model: Some("m.onnx".into()), data, ..JobOptions::default() }
    }

    fn error(options: JobOptions) -> String {
        RunConfig::resolve(options, false).unwrap_err().to_string()
    }

    #[test]
    fn flags_win_over_the_job_file() {
        let file = JobOptions { bits: Some(8), seed: Some(7), skip: vec!["a".into()], ..minimal() };
        let flags = JobOptions { bits: Some(3), skip: vec!["b".into()], ..JobOptions::default() };
        let config = RunConfig::resolve(flags.over(file), false).unwrap();
        assert_eq!((config.grid.bits, config.rounding.seed, config.skip), (3, 7, vec!["b".to_string()]));
    }

    #[test]
    fn gguf_has_groups_of_its_own_unless_told_otherwise() {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../common/model/tests/decoders/llama");
        let of = |group_size| JobOptions {
            model: Some(model.into()),
            format: Some(OutputFormat::Gguf),
            group_size,
            ..minimal()
        };
        let grid = |options| RunConfig::resolve(options, false).unwrap().grid.granularity;
        assert_eq!(grid(of(None)), Granularity::PerGroup { group_size: 32 });
        assert_eq!(grid(of(Some(64))), Granularity::PerGroup { group_size: 64 });
    }

    #[test]
    fn granularity_and_group_size_must_agree() {
        let of = |granularity, group_size| JobOptions { granularity, group_size, ..minimal() };
        let grid = |options| RunConfig::resolve(options, false).unwrap().grid.granularity;
        assert_eq!(grid(of(None, None)), Granularity::PerChannel);
        assert_eq!(grid(of(None, Some(64))), Granularity::PerGroup { group_size: 64 });
        assert!(error(of(Some(GranularityKind::PerGroup), None)).contains("no group size is given"));
        assert!(
            error(of(Some(GranularityKind::PerTensor), Some(8))).contains("granularity is not per-group")
        );
        assert!(error(of(None, Some(0))).contains("group size is 0"));
    }

    #[test]
    fn what_is_missing_is_named_with_the_remedy() {
        assert_eq!(
            error(JobOptions { model: None, ..minimal() }),
            "error: no MODEL given\nhint: name an ONNX file, or set `model` in a job file"
        );
        let no_data = JobOptions { data: DataOptions::default(), ..minimal() };
        assert!(error(no_data).starts_with("error: no data given\nhint: add `--calibration PATH`"));
        assert_eq!(
            error(JobOptions { shard_size: Some(0), ..minimal() }),
            "error: shard-size is 0, expected 1 or more"
        );
    }

    #[test]
    fn the_help_text_states_the_defaults() {
        let command = JobOptions::augment_args(clap::Command::new("x"));
        let help = |long: &str| {
            let arg = command.get_arguments().find(|arg| arg.get_long() == Some(long)).unwrap();
            arg.get_help().unwrap().to_string()
        };
        for (flag, default) in [
            ("bits", defaults::BITS.to_string()),
            ("learning-rate", defaults::LEARNING_RATE.to_string()),
            ("lambda", defaults::LAMBDA.to_string()),
            ("beta-range", format!("{},{}", defaults::BETA_RANGE.0, defaults::BETA_RANGE.1)),
            ("warm-start", defaults::WARM_START.to_string()),
            ("batch", defaults::BATCH.to_string()),
            ("refine-sweeps", defaults::REFINE_SWEEPS.to_string()),
            ("positions", defaults::POSITIONS.to_string()),
            ("seed", defaults::SEED.to_string()),
            ("memory-budget", format!("{}GiB", defaults::MEMORY_BUDGET >> 30)),
            ("scale", defaults::PIXEL_SCALE.to_string()),
        ] {
            assert!(help(flag).contains(&format!("[default: {default}]")), "{flag}: {}", help(flag));
        }
        let (network, language) = (Subject::Network.defaults(), Subject::Language.defaults());
        for (flag, network, language) in [
            ("iterations", network.iterations.to_string(), language.iterations.to_string()),
            ("damping", network.damping.to_string(), language.damping.to_string()),
            ("scale-fits", network.scale_fits.to_string(), language.scale_fits.to_string()),
        ] {
            let stated = format!("[default: {network}; language models: {language}]");
            assert!(help(flag).contains(&stated), "{flag}: {}", help(flag));
        }
    }
}
