//! What Slurm says to a process in its variables, as checked values.
//!
//! Pure: variables come as a function from name to value, so a table of them tests everything here. Reading the real ones
//! is `mod`'s. Not here: what is done with the values (`coordinator`, `node`, `connect`).

use super::hostlist::expand;
use crate::values::DeviceArg;

/// Coordinators listen here and above, by the number of their job, unless told otherwise.
const PORT_BASE: u32 = 20_000;
const PORTS: u32 = 20_000;
/// Threads that no host is beyond.
const CPUS_MAX: usize = 4_096;
/// Devices that a variable may list.
const DEVICES_MAX: usize = 1_024;
/// What Slurm and people write where a job has no GPU.
const NO_DEVICES: [&str; 4] = ["", "NoDevFiles", "none", "-1"];

/// Where a process stands in its Slurm job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Allocation {
    /// SLURM_JOB_ID.
    pub(crate) job: u32,
    /// SLURM_PROCID: number of the task in its step.
    pub(crate) rank: u32,
    /// SLURM_NTASKS: tasks of the step.
    pub(crate) size: u32,
    /// SLURM_RESTART_COUNT, absent on the first run.
    pub(crate) restarts: u32,
    /// SLURMD_NODENAME: this host as Slurm calls it.
    pub(crate) host: Option<String>,
    /// SLURM_LOCALID: number of the task on this host.
    pub(crate) local: u32,
    /// SLURM_STEP_NODELIST, else SLURM_JOB_NODELIST.
    pub(crate) hosts: Vec<String>,
    /// SLURM_CPUS_PER_TASK, if the user asked for a number.
    pub(crate) cpus: Option<usize>,
    /// CUDA_VISIBLE_DEVICES: how many, none if it is not set or says none.
    pub(crate) devices: usize,
}

impl Allocation {
    /// Reads the variables; `None` outside of Slurm jobs.
    ///
    /// # Errors
    /// One sentence with the variable that is not as Slurm writes it.
    pub(crate) fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, String> {
        if variable("SLURM_JOB_ID").is_none() {
            return Ok(None);
        }
        let number = |name: &str, otherwise: u32| match variable(name) {
            None => Ok(otherwise),
            Some(text) => {
                text.parse().map_err(|_| format!("{name} is `{text}`, expected a number as Slurm sets it"))
            }
        };
        let (rank, size) = (number("SLURM_PROCID", 0)?, number("SLURM_NTASKS", 1)?);
        if rank >= size {
            return Err(format!("SLURM_PROCID is {rank}, expected less than SLURM_NTASKS, {size}"));
        }
        let list = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"].into_iter().find_map(|name| {
            let list = variable(name).filter(|list| !list.is_empty())?;
            Some(expand(&list).map_err(|error| format!("{name}: {error}")))
        });
        let cpus = number("SLURM_CPUS_PER_TASK", 0)? as usize;
        Ok(Some(Self {
            cpus: (1..=CPUS_MAX).contains(&cpus).then_some(cpus),
            job: number("SLURM_JOB_ID", 0)?,
            rank,
            size,
            restarts: number("SLURM_RESTART_COUNT", 0)?,
            host: variable("SLURMD_NODENAME").filter(|name| !name.is_empty()),
            local: number("SLURM_LOCALID", 0)?,
            hosts: list.transpose()?.unwrap_or_default(),
            devices: devices(variable("CUDA_VISIBLE_DEVICES").as_deref())?,
        }))
    }

    /// The port of this job's coordinator.
    pub(crate) fn port(&self) -> u16 {
        u16::try_from(PORT_BASE + self.job % PORTS).unwrap_or(u16::MAX)
    }

    /// Where this job's coordinator is: on the first host.
    ///
    /// # Errors
    /// If Slurm names no host.
    pub(crate) fn coordinator(&self) -> Result<String, String> {
        let first = self.hosts.first().ok_or(
            "neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST names a host, expected the coordinator's there",
        )?;
        Ok(format!("{first}:{}", self.port()))
    }

    /// What this task is called among nodes: its host, and its number there if it is not alone.
    pub(crate) fn name(&self) -> Option<String> {
        let alone = self.size as usize <= self.hosts.len().max(1);
        let host = self.host.clone()?;
        Some(if alone { host } else { format!("{host}.{}", self.local) })
    }

    /// What this task solves on if it was given GPUs: its own. `None` without any.
    ///
    /// # Errors
    /// If there are several, but fewer than tasks on this host.
    pub(crate) fn device(&self) -> Result<Option<DeviceArg>, String> {
        let local = self.local as usize;
        match self.devices {
            0 => Ok(None),
            1 => Ok(Some(DeviceArg::Cuda(vec![0]))),
            devices if local < devices => Ok(Some(DeviceArg::Cuda(vec![local]))),
            devices => Err(format!(
                "SLURM_LOCALID is {local}, but CUDA_VISIBLE_DEVICES lists {devices} devices, expected one for each task"
            )),
        }
    }

    /// For the log: who and where.
    pub(crate) fn line(&self) -> String {
        let host = self.host.as_deref().unwrap_or("an unnamed host");
        let restarts = match self.restarts {
            0 => String::new(),
            1 => ", restarted once".into(),
            times => format!(", restarted {times} times"),
        };
        format!("Slurm job {}, task {} of {} on {host}{restarts}", self.job, self.rank, self.size)
    }
}

fn devices(list: Option<&str>) -> Result<usize, String> {
    let list = list.unwrap_or_default().trim();
    if NO_DEVICES.contains(&list) {
        return Ok(0);
    }
    let count = list.split(',').count();
    if list.split(',').any(|device| device.trim().is_empty()) || count > DEVICES_MAX {
        return Err(format!("CUDA_VISIBLE_DEVICES is `{list:.80}`, expected devices with commas between"));
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Variables as `NAME=VALUE`.
    fn read(variables: &[&str]) -> Result<Option<Allocation>, String> {
        let pairs: Vec<_> = variables.iter().map(|pair| pair.split_once('=').unwrap()).collect();
        Allocation::read(|name| pairs.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_string()))
    }

    fn allocation(variables: &[&str]) -> Allocation {
        read(variables).unwrap().unwrap()
    }

    #[test]
    fn outside_of_slurm_there_is_nothing() {
        assert_eq!(read(&[]).unwrap(), None);
        assert_eq!(read(&["SLURM_NTASKS=junk", "CUDA_VISIBLE_DEVICES=0"]).unwrap(), None);
    }

    #[test]
    fn a_task_of_a_step_knows_its_place() {
        // What srun sets for task 4 of 6 on the second of three hosts.
        let found = allocation(&[
            "SLURM_JOB_ID=123456",
            "SLURM_PROCID=3",
            "SLURM_NTASKS=6",
            "SLURM_LOCALID=1",
            "SLURMD_NODENAME=n2",
            "SLURM_STEP_NODELIST=n[1-3]",
            "SLURM_JOB_NODELIST=n[0-3]",
            "SLURM_RESTART_COUNT=2",
            "SLURM_CPUS_PER_TASK=16",
            "CUDA_VISIBLE_DEVICES=4,5",
        ]);
        assert_eq!(found.cpus, Some(16));
        assert_eq!((found.job, found.rank, found.size, found.restarts), (123_456, 3, 6, 2));
        assert_eq!(found.coordinator().unwrap(), "n1:23456");
        assert_eq!(found.name().unwrap(), "n2.1");
        assert_eq!(found.device().unwrap(), Some(DeviceArg::Cuda(vec![1])));
        assert_eq!(found.line(), "Slurm job 123456, task 3 of 6 on n2, restarted 2 times");
    }

    #[test]
    fn a_batch_script_has_the_hosts_of_the_job() {
        let found = allocation(&["SLURM_JOB_ID=7", "SLURM_JOB_NODELIST=gpu[08-11]", "SLURMD_NODENAME=gpu08"]);
        assert_eq!(found.coordinator().unwrap(), "gpu08:20007");
        assert_eq!((found.restarts, found.rank, found.size, found.cpus), (0, 0, 1, None));
        assert_eq!(found.name().unwrap(), "gpu08");
        assert_eq!(found.line(), "Slurm job 7, task 0 of 1 on gpu08");
    }

    #[test]
    fn ports_stay_in_their_range_for_every_job() {
        for (job, port) in [("1", 20_001), ("19999", 39_999), ("20000", 20_000), ("4294967295", 27_295)] {
            assert_eq!(allocation(&[&format!("SLURM_JOB_ID={job}")]).port(), port, "job {job}");
        }
    }

    #[test]
    fn a_task_takes_its_own_device() {
        let device = |visible: &str, local: u32| {
            let visible = format!("CUDA_VISIBLE_DEVICES={visible}");
            allocation(&["SLURM_JOB_ID=1", &format!("SLURM_LOCALID={local}"), &visible]).device()
        };
        for none in ["", "NoDevFiles", "none", "-1"] {
            assert_eq!(device(none, 0).unwrap(), None, "{none}");
        }
        assert_eq!(allocation(&["SLURM_JOB_ID=1"]).device().unwrap(), None);
        for (visible, local, ordinal) in [("3", 0, 0), ("3", 5, 0), ("4,5,6", 2, 2), ("GPU-a,MIG-b", 1, 1)] {
            assert_eq!(device(visible, local).unwrap(), Some(DeviceArg::Cuda(vec![ordinal])), "{visible}");
        }
        let error = device("0,1", 2).unwrap_err();
        assert_eq!(
            error,
            "SLURM_LOCALID is 2, but CUDA_VISIBLE_DEVICES lists 2 devices, expected one for each task"
        );
    }

    #[test]
    fn what_slurm_does_not_write_is_named() {
        for (wrong, said) in [
            ("SLURM_JOB_ID=x", "SLURM_JOB_ID is `x`, expected a number as Slurm sets it"),
            ("SLURM_RESTART_COUNT=-1", "SLURM_RESTART_COUNT is `-1`, expected a number as Slurm sets it"),
            ("SLURM_PROCID=1", "SLURM_PROCID is 1, expected less than SLURM_NTASKS, 1"),
            ("SLURM_NTASKS=0", "SLURM_PROCID is 0, expected less than SLURM_NTASKS, 0"),
            ("SLURM_STEP_NODELIST=n[1-", "SLURM_STEP_NODELIST: host list `n[1-`: has `[` without `]`"),
            (
                "CUDA_VISIBLE_DEVICES=0,,1",
                "CUDA_VISIBLE_DEVICES is `0,,1`, expected devices with commas between",
            ),
        ] {
            let variables = [wrong, "SLURM_JOB_ID=1"];
            assert_eq!(read(&variables).unwrap_err(), said);
        }
        let no_hosts = allocation(&["SLURM_JOB_ID=1"]).coordinator().unwrap_err();
        assert!(no_hosts.starts_with("neither SLURM_STEP_NODELIST nor"), "{no_hosts}");
    }
}
