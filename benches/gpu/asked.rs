//! The command line: what is to be measured, on which device, with which files.
//!
//! Help is written for whoever has a machine with a GPU and two files. Not here: what the parts do.

use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, ValueEnum};

use crate::checkpoint::{SHAPES, Shape};

/// What can be asked for, in the order in which it is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// Every method of the device against the CPU
    Check,
    /// The device's own rates: copies, large products
    Floors,
    /// Products of a gradient's shape
    Products,
    /// The fused AdaRound step
    Step,
    /// Product and step, one lane and several
    Iteration,
    /// Gram matrices
    Gram,
    /// Statistics of a shard, from the host to sums
    Statistics,
    /// Refinement sweeps
    Refine,
    /// Whole solves of a layer
    Solve,
    /// Decoder blocks, forward
    Decoder,
    /// Whole networks through `halfstep quantize`, device beside CPU
    Models,
    /// Blocks of large language models through `halfstep quantize`
    Blocks,
}

impl Part {
    /// Whether it runs `halfstep` instead of kernels.
    fn is_of_jobs(self) -> bool {
        matches!(self, Self::Models | Self::Blocks)
    }
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Where {
    Cpu,
    Cuda(usize),
}

const EXAMPLES: &str = "Examples:
  halfstep-gpu --json figures.json
  halfstep-gpu check
  halfstep-gpu models --models models
  halfstep-gpu blocks --block llama-8b --gpus 1,2,4 -- --iterations 300
  halfstep-gpu --device cpu --quick

Exit codes:
  0  everything that was asked for ran, and nothing differed from what it must be
  1  a check failed, results differed, or something was missing: the last lines say what
  2  wrong usage of the command line";

/// Check what a GPU computes and time it: kernels beside the CPU, then whole jobs
///
/// Needs NVIDIA's driver, cuBLAS and NVRTC (HALFSTEP_CUDA_LIBRARIES names their folders, separated by colons) and, for the parts
/// `models` and `blocks`, the binary `halfstep` beside this one. No network, no Rust, no Python.
#[derive(Debug, Parser)]
#[command(name = "halfstep-gpu", version, max_term_width = 100, after_help = EXAMPLES)]
pub(crate) struct Asked {
    /// Run these parts [default: all]
    #[arg(value_name = "PART")]
    parts: Vec<Part>,

    /// Measure this device: cuda:N, or cpu
    #[arg(long, value_name = "DEVICE", default_value = "cuda:0", value_parser = device)]
    pub(crate) device: Where,

    /// Multiply gradients and statistics in f32 instead of TF32
    #[arg(long)]
    pub(crate) f32: bool,

    /// Take tiny shapes: a dry run of a minute, whose times mean nothing
    #[arg(long)]
    pub(crate) quick: bool,

    /// Write all figures into this file too
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    /// Run whole jobs by this binary [default: `halfstep` beside this program]
    #[arg(long, value_name = "FILE")]
    pub(crate) halfstep: Option<PathBuf>,

    /// models: look for networks in this folder [default: examples]
    ///
    /// Folders in it: fashion-mnist and efficientnet-lite0 with model.onnx, calibration.npz and, to measure results, eval.npz (x,
    /// y); smollm2 with config.json, model.safetensors and calib.npy or tokens.npz (calib, eval_handbook, eval_anarchism). Those
    /// that are not there are left out, saying so.
    #[arg(long, value_name = "DIR", default_value = "examples", hide_default_value = true)]
    pub(crate) models: PathBuf,

    /// blocks: quantize a block of this shape: tiny, llama-1b, llama-8b, llama-70b; repeatable
    ///
    /// [default: llama-8b, with and without AdaRound iterations, and llama-70b with them]
    ///
    /// Weights are random with the spread that trained ones have: times and memory mean something, accuracy does not. The
    /// checkpoint (1.7 GB for llama-70b) and the results lie in the system's temporary folder (TMPDIR).
    #[arg(long, value_name = "NAME", value_parser = shape)]
    pub(crate) block: Vec<Shape>,

    /// blocks: calibrate on this many windows [default: 128]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) samples: Option<u32>,

    /// blocks: take windows of this many tokens [default: 2048]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) sequence_length: Option<u32>,

    /// blocks: run each on cuda:0, on cuda:0,1, .. up to so many, and compare the bytes [default: --device alone]
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) gpus: Vec<u32>,

    /// blocks: give these options to `quantize`, after ours
    #[arg(last = true, value_name = "OPTIONS OF quantize")]
    pub(crate) quantize: Vec<String>,
}

impl Asked {
    /// The command line of this process; it ends here if that is wrong or asks for help.
    pub(crate) fn parse_or_exit() -> Self {
        let asked = Self::parse();
        if asked.device == Where::Cpu && !asked.gpus.is_empty() {
            let why = "--gpus counts CUDA devices, but --device is cpu";
            Self::command().error(ErrorKind::ArgumentConflict, why).exit();
        }
        asked
    }

    /// Whether a part is to be run.
    pub(crate) fn part(&self, part: Part) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }

    /// Whether there are parts that need the device in this process.
    pub(crate) fn kernels(&self) -> bool {
        self.parts.is_empty() || self.parts.iter().any(|part| !part.is_of_jobs())
    }
}

fn device(text: &str) -> Result<Where, String> {
    match (text, text.strip_prefix("cuda:").map(str::parse)) {
        ("cpu", _) => Ok(Where::Cpu),
        (_, Some(Ok(ordinal))) => Ok(Where::Cuda(ordinal)),
        _ => Err("expected cuda:N or cpu".to_owned()),
    }
}

fn shape(text: &str) -> Result<Shape, String> {
    let names = SHAPES.map(|shape| shape.sizes.name).join(", ");
    let found = SHAPES.into_iter().find(|shape| shape.sizes.name == text);
    found.ok_or_else(|| format!("expected one of {names}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &str) -> Result<Asked, String> {
        Asked::try_parse_from(words.split(' ')).map_err(|error| error.to_string())
    }

    #[test]
    fn parts_devices_and_blocks_are_known_by_name() {
        let asked = parsed("gpu --device cuda:3 check blocks --block tiny --gpus 1,2 -- --bits 3").unwrap();
        assert!(asked.part(Part::Check) && asked.part(Part::Blocks) && !asked.part(Part::Models));
        assert_eq!((asked.device, asked.block[0].sizes.name), (Where::Cuda(3), "tiny"));
        assert_eq!((asked.gpus, asked.quantize), (vec![1, 2], vec!["--bits".to_owned(), "3".to_owned()]));
        for (words, expect) in [
            ("gpu --device gpu:0", "expected cuda:N or cpu"),
            ("gpu --block llama-9b", "expected one of tiny, llama-1b"),
            ("gpu everything", "[possible values: check, floors"),
            ("gpu --gpus 0", "0 is not in 1..=64"),
        ] {
            let error = parsed(words).unwrap_err();
            assert!(error.contains(expect), "{words}: {error}");
        }
    }

    #[test]
    fn only_parts_of_kernels_need_the_device_here() {
        for (words, expect) in [("gpu", true), ("gpu gram", true), ("gpu models blocks", false)] {
            assert_eq!(parsed(words).unwrap().kernels(), expect, "{words}");
        }
        Asked::command().debug_assert();
    }
}
