//! The `halfstep` binary as a child process: a job with its seconds and the files it wrote.
//!
//! Not here: what the files say (`results`), which jobs there are (`models`, `blocks`).

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::asked::{Asked, Where};
use crate::memory;

/// Lines of a child that failed which are shown.
const LAST_LINES: usize = 15;
/// Finished, but some layers were kept as they are: `report.json` says which.
const SOME_KEPT: i32 = 3;

/// The binary.
pub(crate) struct Halfstep {
    path: PathBuf,
    /// Options of `quantize` that go with this benchmark's own.
    gradients: Option<&'static str>,
}

/// What a job is solved on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Device {
    Cpu,
    /// Numbers of CUDA devices.
    Cuda(Vec<usize>),
}

/// A job of `quantize`.
pub(crate) struct Job<'a> {
    pub(crate) model: &'a Path,
    pub(crate) calibration: &'a OsStr,
    pub(crate) device: &'a Device,
    /// One per core if absent.
    pub(crate) threads: Option<usize>,
    pub(crate) options: &'a [String],
    /// Where the results go; must not be there.
    pub(crate) output: &'a Path,
}

/// What running a job took.
pub(crate) struct Ran {
    /// From the start of the process to its end.
    pub(crate) seconds: f64,
    /// Most memory in use on one of the GPUs.
    pub(crate) gpu_bytes: Option<u64>,
}

impl From<Where> for Device {
    fn from(place: Where) -> Self {
        match place {
            Where::Cpu => Self::Cpu,
            Where::Cuda(ordinal) => Self::Cuda(vec![ordinal]),
        }
    }
}

impl std::fmt::Display for Device {
    /// As `--device` takes it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let numbers: Vec<String> = self.ordinals().iter().map(usize::to_string).collect();
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(_) => write!(f, "cuda:{}", numbers.join(",")),
        }
    }
}

impl Device {
    /// Numbers of its CUDA devices: none for the CPU.
    pub(crate) fn ordinals(&self) -> &[usize] {
        match self {
            Self::Cpu => &[],
            Self::Cuda(ordinals) => ordinals,
        }
    }
}

impl Halfstep {
    /// The binary that was named, or the one beside this program.
    ///
    /// # Errors
    /// A sentence if it is not there.
    pub(crate) fn find(asked: &Asked) -> Result<Self, String> {
        let beside = || {
            let own = std::env::current_exe().unwrap_or_default();
            own.with_file_name(format!("halfstep{}", std::env::consts::EXE_SUFFIX))
        };
        let path = asked.halfstep.clone().unwrap_or_else(beside);
        if !path.is_file() {
            return Err(format!(
                "the parts `models` and `blocks` run `halfstep`, and {} is not there: build it where there is Rust with \
                 `cargo build --release -p halfstep` and carry target/release/halfstep beside halfstep-gpu, or name it with \
                 --halfstep",
                path.display()
            ));
        }
        Ok(Self { path, gradients: asked.f32.then_some("f32") })
    }

    /// Runs a job.
    ///
    /// # Errors
    /// As [`Halfstep::run`].
    pub(crate) fn quantize(&self, job: &Job<'_>) -> Result<Ran, String> {
        let mut words: Vec<OsString> = vec!["quantize".into(), job.model.into()];
        let mut option = |name: &str, value: &OsStr| words.extend([name.into(), value.into()]);
        option("--calibration", job.calibration);
        option("--output", job.output.as_os_str());
        option("--device", job.device.to_string().as_ref());
        if let Some(threads) = job.threads {
            option("--threads", threads.to_string().as_ref());
        }
        if let (Some(digits), Device::Cuda(_)) = (self.gradients, job.device) {
            option("--gradients", digits.as_ref());
        }
        words.extend(job.options.iter().map(OsString::from));
        let begun = Instant::now();
        let (ran, gpu_bytes) = memory::watched(job.device.ordinals(), || self.run(&words));
        ran.map(|_| Ran { seconds: begun.elapsed().as_secs_f64(), gpu_bytes })
    }

    /// Runs a command; what it wrote to its standard output.
    ///
    /// # Errors
    /// A sentence if it cannot be started or does not end well; its last lines have been printed then.
    pub(crate) fn run(&self, words: &[OsString]) -> Result<String, String> {
        let mut command = Command::new(&self.path);
        let output = command.args(words).stdin(Stdio::null()).output();
        let output = output.map_err(|error| format!("{} cannot be run: {error}", self.path.display()))?;
        if output.status.success() || output.status.code() == Some(SOME_KEPT) {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = said.lines().collect();
        for line in &lines[lines.len().saturating_sub(LAST_LINES)..] {
            println!("  | {line}");
        }
        let typed: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        // Its own words: `exit status: 65`, `signal: 9 (SIGKILL)`.
        Err(format!("`halfstep {}` ended with {}", typed.join(" "), output.status))
    }
}
