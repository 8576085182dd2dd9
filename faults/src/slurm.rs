//! A real Slurm on this machine: a controller and hosts with a slurmd each, in network namespaces of their own. Root only.
//!
//! Jobs are submitted by a user who is not root, from a folder that all hosts share. Nothing of the machine's own Slurm or
//! munge is used or changed: keys, sockets, state and logs lie in a folder that goes when this does, and so does every
//! process that runs on the hosts. No cgroups, no accounting.
//! Not here: what jobs do (the scripts in `slurm/` at the root), links that fail (`bench`).

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::bench::{Bench, NetworkFault};
use crate::binary::{binary, install, is_root, root};
use crate::capacity::Permit;
use crate::logs::Logs;
use crate::process::Process;
use crate::wait::until;

/// Daemons start in a second; this is for a machine that is busy.
const START: Duration = Duration::from_secs(40);
/// Who submits: `nobody`, whom every machine has.
const USER: u32 = 65_534;
const CONTROLLER: &str = "coord";
const PROGRAMS: [(&str, &str); 6] = [
    ("slurmctld", "slurmctld"),
    ("slurmd", "slurmd"),
    ("srun", "slurm-client"),
    ("munged", "munge"),
    ("nsenter", "util-linux"),
    ("hostname", "hostname"),
];
/// What is the same everywhere. Short times: a test cannot wait for a site's five minutes.
const CONFIGURATION: &str = "\
ClusterName=faults
SlurmUser=slurm
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=20
InactiveLimit=0
KillWait=5
SchedulerParameters=sched_interval=1,bf_interval=1,requeue_delay=1
GresTypes=gpu
SlurmdParameters=config_overrides
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=off
";

/// The cluster, ended when dropped.
#[derive(Debug)]
pub struct Slurm {
    hosts: Vec<String>,
    logs: Logs,
    daemons: BTreeMap<String, Process>,
    started: usize,
    bench: Bench,
    folder: TempDir,
    _permit: Permit,
}

impl Slurm {
    /// Starts a controller and these hosts, each with two devices that look like GPUs and, as Slurm is told, eight
    /// cores.
    ///
    /// # Errors
    /// If something fails that should work; `Ok(Err(reason))` where it cannot work.
    pub fn up(hosts: &[&str]) -> Result<Result<Self, String>> {
        let permit = Permit::one();
        if !is_root() {
            return Ok(Err("a Slurm of its own needs root".into()));
        }
        if let Some(reason) = PROGRAMS.iter().find_map(|(program, package)| install(program, package).err()) {
            return Ok(Err(reason));
        }
        let all: Vec<&str> = [&[CONTROLLER][..], hosts].concat();
        let bench = match Bench::up(&all)? {
            Ok(bench) => bench,
            Err(reason) => return Ok(Err(reason)),
        };
        let hosts = hosts.iter().map(|host| (*host).to_string()).collect();
        let (logs, folder) = (Logs::default(), TempDir::with_prefix("halfstep-slurm-")?);
        let mut slurm =
            Self { hosts, logs, daemons: BTreeMap::new(), started: 0, bench, folder, _permit: permit };
        slurm.lay_out()?;
        slurm.start_munge()?;
        let foreground = ["slurmctld", "-D", "-c", "-f", &slurm.text("slurm.conf")];
        slurm.start_daemon(CONTROLLER, CONTROLLER, &foreground)?;
        for host in slurm.hosts.clone() {
            slurm.start_host(&host)?;
        }
        slurm.wait_idle()?;
        Ok(Ok(slurm))
    }

    /// The folder that all hosts and the user share: scripts, inputs and outputs of jobs.
    pub fn home(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    fn text(&self, name: &str) -> String {
        self.folder.path().join(name).to_string_lossy().into_owned()
    }

    /// Folders, keys, configuration, the binary, and the scripts as they are shipped.
    fn lay_out(&self) -> Result<()> {
        let mode = |path: &Path, mode: u32| fs::set_permissions(path, fs::Permissions::from_mode(mode));
        mode(self.folder.path(), 0o755)?;
        for (name, user) in [("home", "nobody"), ("state", "slurm"), ("munge", "munge")] {
            let path = self.folder.path().join(name);
            fs::create_dir(&path)?;
            let (user, group) = ids(user)?;
            chown(&path, Some(user), Some(group))?;
        }
        let key = self.folder.path().join("munge/key");
        fs::write(&key, [(); 128].map(|()| fastrand::u8(..)))?;
        let (user, group) = ids("munge")?;
        chown(&key, Some(user), Some(group))?;
        mode(&key, 0o400)?;
        for number in 0..2 {
            run("mknod", &[&self.text(&format!("gpu{number}")), "c", "1", "3"])?;
        }
        fs::write(self.folder.path().join("hosts"), self.host_names()?)?;
        fs::write(self.folder.path().join("slurm.conf"), self.configuration()?)?;
        fs::write(self.folder.path().join("cgroup.conf"), "CgroupAutomount=no\n")?;
        let devices = format!("Name=gpu Flags=nvidia_gpu_env File={}[0-1]\n", self.text("gpu"));
        fs::write(self.folder.path().join("gres.conf"), devices)?;
        fs::copy(binary()?, self.folder.path().join("halfstep"))?;
        mode(&self.folder.path().join("halfstep"), 0o755)?;
        Ok(())
    }

    fn host_names(&self) -> Result<String> {
        let mut text = String::from("127.0.0.1 localhost\n");
        for host in self.hosts.iter().map(String::as_str).chain([CONTROLLER]) {
            text += &format!("{} {host}\n", self.bench.ip(host)?);
        }
        Ok(text)
    }

    fn configuration(&self) -> Result<String> {
        let folder = self.folder.path().display();
        let mut text = format!(
            "{CONFIGURATION}SlurmctldHost={CONTROLLER}({})\n\
             AuthInfo=socket={folder}/munge/socket,cred_expire=5\n\
             StateSaveLocation={folder}/state\nSlurmctldPidFile={folder}/state/pid\n\
             SlurmdSpoolDir={folder}/spool.%n\nSlurmdPidFile={folder}/%n.pid\n",
            self.bench.ip(CONTROLLER)?
        );
        for host in &self.hosts {
            let address = self.bench.ip(host)?;
            text += &format!(
                "NodeName={host} NodeAddr={address} CPUs=8 RealMemory=2000 Gres=gpu:2 State=UNKNOWN\n"
            );
        }
        Ok(text)
    }

    fn start_munge(&mut self) -> Result<()> {
        let (user, group) = ids("munge")?;
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={user}"), &format!("--regid={group}"), "--clear-groups", "munged"]);
        command.arg("--foreground");
        for (option, name) in
            [("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("seed-file", "seed")]
        {
            command.arg(format!("--{option}={}", self.text(&format!("munge/{name}"))));
        }
        command.arg(format!("--log-file={}", self.text("munge/log")));
        self.start("munge", &mut command)?;
        let socket = self.folder.path().join("munge/socket");
        self.expect("munged to open its socket", START, |_| Ok(socket.exists().then_some(())))
    }

    /// Starts a host's slurmd.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_host(&mut self, host: &str) -> Result<()> {
        fs::create_dir_all(self.folder.path().join(format!("spool.{host}")))?;
        let configuration = self.text("slurm.conf");
        self.start_daemon(host, host, &["slurmd", "-D", "-N", host, "-f", &configuration])
    }

    fn start_daemon(&mut self, name: &str, host: &str, words: &[&str]) -> Result<()> {
        let mut command = self.on(host);
        command.args(words);
        self.start(name, &mut command)
    }

    fn start(&mut self, name: &str, command: &mut Command) -> Result<()> {
        self.started += 1;
        let process =
            Process::start(&format!("{:02}-{name}", self.started), command, self.folder.path(), &self.logs)?;
        self.daemons.insert(name.into(), process);
        Ok(())
    }

    /// A command on a host: its network, its name, its names of others.
    fn on(&self, host: &str) -> Command {
        // Not `ip netns exec`, which hides the cgroups that slurmd looks for.
        let enter = "mount --bind \"$1\" /etc/hosts && hostname \"$2\" && shift 2 && exec \"$@\"";
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/var/run/netns/{}", self.bench.namespace(host)));
        command.args(["unshare", "--mount", "--uts", "sh", "-c", enter, "sh", &self.text("hosts"), host]);
        command.env("SLURM_CONF", self.text("slurm.conf"));
        command
    }

    /// Runs a command as the user, in the shared folder, with these variables besides PATH; its standard output.
    ///
    /// # Errors
    /// If it fails.
    pub fn user(&self, words: &[&str], variables: &[(&str, &str)]) -> Result<String> {
        let output = self.user_output(words, variables)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{}: {said}\n{}", words.join(" "), self.logs.tails());
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_string())
    }

    fn user_output(&self, words: &[&str], variables: &[(&str, &str)]) -> Result<Output> {
        let mut command = self.on(CONTROLLER);
        command.args(["setpriv", &format!("--reuid={USER}"), &format!("--regid={USER}"), "--clear-groups"]);
        command.args(["timeout", "30"]).args(words).current_dir(self.home()).stdin(Stdio::null());
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("SLURM_CONF", self.text("slurm.conf")).env("HOME", self.home());
        command.envs(variables.iter().copied());
        Ok(command.output()?)
    }

    /// Writes one of the shipped scripts into the shared folder as a user would edit it: each text to be replaced must be
    /// in it once.
    ///
    /// # Errors
    /// If one is not.
    pub fn edit(&self, script: &str, replacements: &[(&str, &str)]) -> Result<()> {
        let mut text = fs::read_to_string(root().join("slurm").join(script))?;
        for (old, new) in replacements {
            ensure!(text.matches(old).count() == 1, "slurm/{script}: `{old}` is not in it once");
            text = text.replace(old, new);
        }
        Ok(fs::write(self.home().join(script), text)?)
    }

    /// The binary as the user sees it.
    pub fn halfstep(&self) -> String {
        self.text("halfstep")
    }

    /// Submits a script; returns the job's number. What it prints goes to `LOG` in the shared folder, `%j`, `%a` as Slurm has
    /// them.
    ///
    /// # Errors
    /// If Slurm refuses.
    pub fn sbatch(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Result<u32> {
        let words = [&["sbatch", "--parsable"][..], arguments].concat();
        let said = self.user(&words, variables)?;
        said.parse().with_context(|| format!("sbatch said `{said}`"))
    }

    /// State of a job as `scontrol` names it, such as RUNNING; with its exit code where it is over.
    ///
    /// # Errors
    /// If Slurm knows no such job.
    pub fn state(&self, job: u32) -> Result<String> {
        let text = self.user(&["scontrol", "--oneliner", "show", "job", &job.to_string()], &[])?;
        let field = |name: &str| {
            let words = text.split_whitespace();
            words.filter_map(|word| word.strip_prefix(name)).next().unwrap_or_default().to_string()
        };
        Ok(format!("{} {}", field("JobState="), field("ExitCode=")))
    }

    /// Waits until a job is over, as `STATE CODE:SIGNAL`.
    ///
    /// # Errors
    /// If it is not in time: carries the tails of all logs.
    pub fn wait_over(&mut self, job: u32, limit: Duration) -> Result<String> {
        let going = ["PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "PREEMPTED"];
        self.expect(&format!("job {job} to be over"), limit, |slurm| {
            let state = slurm.state(job)?;
            Ok((!going.iter().any(|going| state.starts_with(going))).then_some(state))
        })
    }

    /// Waits until a file in the shared folder has `count` lines with these words.
    ///
    /// # Errors
    /// If it has not in time: carries the tails of all logs.
    pub fn wait_lines(&mut self, file: &str, words: &str, count: usize, limit: Duration) -> Result<()> {
        self.expect(&format!("`{words}` {count} times in {file}"), limit, |slurm| {
            Ok((slurm.lines(file, words).len() >= count).then_some(()))
        })
    }

    /// Lines with these words in a file of the shared folder so far.
    pub fn lines(&self, file: &str, words: &str) -> Vec<String> {
        let text = fs::read(self.home().join(file)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        text.lines().filter(|line| line.contains(words)).map(str::to_string).collect()
    }

    /// Shows a file of the shared folder when something goes wrong.
    pub fn show(&self, file: &str) {
        self.logs.add(file, &self.home().join(file));
    }

    /// Kills all that runs on a host at once, its slurmd included.
    ///
    /// # Errors
    /// If that cannot be done.
    pub fn kill_host(&mut self, host: &str) -> Result<()> {
        self.bench.kill_all(host)?;
        self.daemons.remove(host).map_or(Ok(()), |mut daemon| daemon.kill())
    }

    /// SIGKILL to the binary that runs as `command` on a host, such as `coordinator`, and to nothing around it.
    ///
    /// # Errors
    /// If there is not one.
    pub fn kill_command(&self, host: &str, command: &str) -> Result<()> {
        let binary = self.halfstep();
        let is_it = |pid: &String| {
            let words = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words.starts_with(&format!("{binary}\0{command}\0"))
        };
        let found: Vec<String> = self.bench.pids(host)?.into_iter().filter(is_it).collect();
        ensure!(found.len() == 1, "{command} runs {} times on {host}\n{}", found.len(), self.logs.tails());
        run("kill", &["-KILL", &found[0]])
    }

    /// Breaks a host's link.
    ///
    /// # Errors
    /// If the fault cannot be made.
    pub fn cut_off(&self, host: &str) -> Result<()> {
        self.bench.apply(host, NetworkFault::Partition)
    }

    /// Mends a host's link.
    pub fn heal(&self, host: &str) {
        self.bench.heal(host);
    }

    /// All jobs, and why they wait.
    fn queue(&self) -> String {
        let output = self.user_output(&["squeue", "--format=%i %j %T %r %N"], &[]);
        output.map_or_else(
            |error| error.to_string(),
            |output| String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    }

    fn wait_idle(&mut self) -> Result<()> {
        let all = self.hosts.len().to_string();
        self.expect("all hosts to be idle", START, |slurm| {
            let words = ["sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D"];
            let output = slurm.user_output(&words, &[])?;
            Ok((String::from_utf8_lossy(&output.stdout).trim() == all).then_some(()))
        })
    }

    /// Waits until `look` finds something; a look asks a daemon, so not too often.
    ///
    /// # Errors
    /// If it does not within `limit`: carries the tails of all logs.
    pub fn expect<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        const PAUSE: Duration = Duration::from_millis(100);
        let found = until(limit, || {
            let found = look(self)?;
            if found.is_none() {
                std::thread::sleep(PAUSE);
            }
            Ok(found)
        })?;
        match found {
            Some(found) => Ok(found),
            None => bail!("expected {what} within {limit:?}\n{}\n{}", self.queue(), self.logs.tails()),
        }
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        // What slurmd started has sessions of its own: found by its namespace.
        for host in self.hosts.iter().map(String::as_str).chain([CONTROLLER]) {
            let _ = self.bench.kill_all(host);
        }
    }
}

/// User and group number of a user, from the system's list.
fn ids(name: &str) -> Result<(u32, u32)> {
    let list = fs::read_to_string("/etc/passwd")?;
    let fields = list.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let found = fields.filter(|fields| fields.len() > 3).find(|fields| fields[0] == name);
    let fields = found.with_context(|| format!("no user {name}"))?;
    Ok((fields[2].parse()?, fields[3].parse()?))
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
