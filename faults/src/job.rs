//! Jobs, mostly on the Fashion-MNIST example, and what they produce undisturbed.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Result, ensure};
use tempfile::TempDir;

use crate::binary::{NO_DEVICES, binary, example};
use crate::logs::Logs;
use crate::outputs::Outputs;
use crate::process::Process;

/// An undisturbed run takes seconds; this is for a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(600);

/// Options of a job, as typed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Job {
    model: PathBuf,
    calibration: PathBuf,
    options: Vec<String>,
}

impl Job {
    /// About half a second of work in 8 shards.
    pub fn short() -> Self {
        Self::of(&["--samples", "128", "--shard-size", "16", "--iterations", "20"])
    }

    /// About a second of work in 16 shards.
    pub fn medium() -> Self {
        Self::of(&["--samples", "256", "--shard-size", "16", "--iterations", "600"])
    }

    /// About two seconds of work in 16 shards: there is a middle in which something can happen.
    pub fn long() -> Self {
        Self::of(&["--samples", "256", "--shard-size", "16", "--iterations", "2000"])
    }

    /// About six seconds of work in 16 shards.
    pub fn longer() -> Self {
        Self::of(&["--samples", "256", "--shard-size", "16", "--iterations", "8000"])
    }

    fn of(options: &[&str]) -> Self {
        Self::plain().with(&["--bits", "3"]).with(options)
    }

    /// The example with the options of a user who gives none.
    pub fn plain() -> Self {
        Self::on(&example("model.onnx"), &example("calibration.npz"))
    }

    /// On another network, with the options of a user who gives none.
    pub fn on(model: &Path, calibration: &Path) -> Self {
        Self { model: model.into(), calibration: calibration.into(), options: Vec::new() }
    }

    /// On other files, where some are given.
    #[must_use]
    pub fn on_files(self, model: Option<&Path>, calibration: Option<&Path>) -> Self {
        let given = |path: Option<&Path>, own: PathBuf| path.map_or(own, Path::to_path_buf);
        Self {
            model: given(model, self.model),
            calibration: given(calibration, self.calibration),
            options: self.options,
        }
    }

    /// With more options.
    #[must_use]
    pub fn with(mut self, options: &[&str]) -> Self {
        self.options.extend(options.iter().map(|option| (*option).to_string()));
        self
    }

    /// The arguments after the name of the command.
    pub fn arguments(&self) -> Vec<String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let mut arguments = vec![text(&self.model), "--calibration".into(), text(&self.calibration)];
        arguments.extend(self.options.iter().cloned());
        arguments
    }

    /// What one undisturbed process produces, computed once per job and test process.
    ///
    /// # Errors
    /// If that run fails.
    pub fn golden(&self) -> Result<Arc<Outputs>> {
        self.golden_from(Path::new("."))
    }

    /// The same for a job whose paths are relative to `inputs`.
    ///
    /// # Errors
    /// If that run fails.
    pub fn golden_from(&self, inputs: &Path) -> Result<Arc<Outputs>> {
        static KNOWN: Mutex<Option<HashMap<Job, Arc<Outputs>>>> = Mutex::new(None);
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.get_or_insert_default();
        if let Some(outputs) = known.get(self) {
            return Ok(outputs.clone());
        }
        let folder = TempDir::new()?;
        let outputs = Arc::new(Outputs::of(&self.quantize_from(inputs, folder.path(), &[])?)?);
        known.insert(self.clone(), outputs.clone());
        Ok(outputs)
    }

    /// Runs `halfstep quantize` of this job inside `folder`; returns where its results are.
    ///
    /// # Errors
    /// If it fails.
    pub fn quantize(&self, folder: &Path, more: &[&str]) -> Result<PathBuf> {
        self.quantize_from(Path::new("."), folder, more)
    }

    fn quantize_from(&self, inputs: &Path, folder: &Path, more: &[&str]) -> Result<PathBuf> {
        let output = folder.join("golden");
        let mut command = Command::new(binary()?);
        command.arg("quantize").args(self.arguments()).arg("--output").arg(&output).args(more);
        command.env_remove("FAILPOINTS").env(NO_DEVICES.0, NO_DEVICES.1).current_dir(inputs);
        let mut process = Process::start("quantize", &mut command, folder, &Logs::default())?;
        let code = process.wait(PATIENCE)?;
        ensure!(code == 0, "quantize: expected exit 0, got {code}\n{}", process.stderr());
        Ok(output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_options_make_another_job() {
        let job = Job::short();
        assert_eq!(job, Job::short());
        assert_ne!(job, Job::short().with(&["--seed", "1"]));
        let arguments = job.arguments();
        assert!(
            arguments[0].ends_with("model.onnx") && Path::new(&arguments[0]).is_file(),
            "{}",
            arguments[0]
        );
    }
}
