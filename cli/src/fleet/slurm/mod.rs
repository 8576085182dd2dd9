//! Life as a task of a Slurm job: what Slurm's variables say, and the exit code that asks to be started again.
//!
//! The only place that reads Slurm's variables. Not here: what they mean (`allocation`, `hostlist`), the scripts (`slurm/`
//! at the root), which do what an exit code asks for.

mod allocation;
mod hostlist;

use super::args::SlurmArgs;
use crate::exit::{CliError, Exit};
use crate::observe::say;

pub(crate) use allocation::Allocation;
pub(crate) use hostlist::{expand, is_list};

/// Restarts unless told otherwise.
const REQUEUE_LIMIT: u32 = 20;

/// A process that was started with `--slurm`.
#[derive(Clone, Debug)]
pub(crate) struct Slurm {
    pub(crate) allocation: Allocation,
    limit: u32,
}

/// This process's place in a Slurm job, if it has one.
///
/// # Errors
/// Bad configuration for variables that are not as Slurm writes them.
pub(crate) fn allocation() -> Result<Option<Allocation>, CliError> {
    let variable = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    Allocation::read(variable).map_err(CliError::configuration)
}

impl Slurm {
    /// What the flags ask for; says where it found itself.
    ///
    /// # Errors
    /// Bad configuration outside of Slurm; internal if the job was restarted too often.
    pub(crate) fn of(arguments: &SlurmArgs) -> Result<Option<Self>, CliError> {
        if !arguments.slurm {
            return Ok(None);
        }
        let allocation = allocation()?.ok_or_else(|| {
            CliError::configuration("--slurm: SLURM_JOB_ID is not set, expected to run inside a Slurm job")
                .hint("start it by srun or from a script of sbatch, or leave --slurm out")
        })?;
        say(&allocation.line());
        let slurm = Self { allocation, limit: arguments.requeue_limit.unwrap_or(REQUEUE_LIMIT) };
        match slurm.allocation.restarts > slurm.limit {
            true => Err(slurm.too_often("not started again")),
            false => Ok(Some(slurm)),
        }
    }

    /// How a process ends that was told to stop and has handed back what it had.
    ///
    /// # Errors
    /// Internal if another restart would be one too many.
    pub(crate) fn handed_back(&self) -> Result<Exit, CliError> {
        let (next, limit) = (self.allocation.restarts.saturating_add(1), self.limit);
        if next > limit {
            return Err(self.too_often("stopped for good"));
        }
        say(&format!("Handed back: exit 75 asks for restart {next} of at most {limit}"));
        Ok(Exit::Interrupted)
    }

    fn too_often(&self, what: &str) -> CliError {
        let Self { allocation: Allocation { job, restarts, .. }, limit } = self;
        CliError::internal(format!(
            "Slurm job {job}: {what} after {restarts} restarts, expected at most {limit}"
        ))
        .hint("nothing is lost: submit the script again, or raise --requeue-limit")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slurm(restarts: u32, limit: u32) -> Slurm {
        let restarted = restarts.to_string();
        let variable = |name: &str| match name {
            "SLURM_JOB_ID" => Some("17".to_string()),
            "SLURM_RESTART_COUNT" => Some(restarted.clone()),
            _ => None,
        };
        Slurm { allocation: Allocation::read(variable).unwrap().unwrap(), limit }
    }

    #[test]
    fn a_process_asks_to_be_requeued_until_its_limit() {
        for (restarts, limit, exit) in
            [(0, 1, Some(75)), (19, 20, Some(75)), (0, 0, None), (20, 20, None), (u32::MAX, 20, None)]
        {
            let ended = slurm(restarts, limit).handed_back();
            assert_eq!(ended.as_ref().ok().map(|exit| exit.code()), exit.map(|code: u8| code), "{restarts}");
            if let Err(error) = ended {
                assert_eq!(error.exit, Exit::Internal);
                assert_eq!(
                    error.message,
                    format!(
                        "Slurm job 17: stopped for good after {restarts} restarts, expected at most {limit}"
                    )
                );
            }
        }
    }
}
