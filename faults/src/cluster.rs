//! A coordinator, nodes and clients as real processes in a folder of their own.
//!
//! The coordinator keeps its port across restarts, as it would in a data centre. The port is taken from outside the range
//! of outgoing connections: a node that knocks on a port in that range while nobody listens can reach itself.
//! Not here: what is done to them, and when (`killer`, the tests).

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::acknowledged::Acknowledged;
use crate::binary::{NO_DEVICES, binary};
use crate::capacity::Permit;
use crate::damage::files_below;
use crate::job::Job;
use crate::logs::Logs;
use crate::outputs::Outputs;
use crate::process::Process;
use crate::wait::until;

/// Starting takes tens of milliseconds; this is for a machine that is busy.
const START: Duration = Duration::from_secs(20);
/// Same for commands that ask one question.
const ANSWER: Duration = Duration::from_secs(30);
/// Keeps the folder of a cluster for inspection when set.
const KEEP: &str = "HALFSTEP_FAULTS_KEEP";
/// Below the range of outgoing connections on Linux.
const PORTS: std::ops::Range<u16> = 12_000..32_000;

/// Times and places of a cluster.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Between heartbeats.
    pub heartbeat: Duration,
    /// Silence after which a node is lost.
    pub lease: Duration,
    /// How long a job waits when there is no node.
    pub no_nodes: Duration,
    /// Without progress for this long, a task is hung.
    pub hung: Duration,
    /// Threads of each node.
    pub threads: usize,
    /// Certificates; plaintext without.
    pub certs: Option<PathBuf>,
    /// Where the coordinator listens; loopback and any port if `None`.
    pub listen: Option<SocketAddr>,
    /// Where the coordinator keeps its state; inside the cluster's folder if `None`.
    pub state_dir: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(100),
            lease: Duration::from_secs(1),
            no_nodes: Duration::from_secs(60),
            hung: Duration::from_secs(60),
            threads: 1,
            certs: None,
            listen: None,
            state_dir: None,
        }
    }
}

/// What is special about one process.
#[derive(Clone, Debug, Default)]
pub struct Launch {
    /// Words before the binary's name, such as `ip netns exec NAME`.
    pub prefix: Vec<String>,
    /// Environment.
    pub env: Vec<(String, String)>,
    /// Arguments after all others.
    pub args: Vec<String>,
}

impl Launch {
    /// With failpoints set, in the syntax of crate `fail`.
    pub fn failing(points: &str) -> Self {
        Self { env: vec![("FAILPOINTS".into(), points.into())], ..Self::default() }
    }

    /// With more arguments.
    pub fn arguments(args: &[&str]) -> Self {
        Self { args: args.iter().map(|arg| (*arg).to_string()).collect(), ..Self::default() }
    }

    /// With a prefix.
    #[must_use]
    pub fn within(mut self, prefix: &[&str]) -> Self {
        self.prefix = prefix.iter().map(|word| (*word).to_string()).collect();
        self
    }
}

/// A running `submit --wait`.
#[derive(Debug)]
pub struct Submission {
    /// The client.
    pub process: Process,
    /// What it was asked to do.
    pub job: Job,
    /// Where results will appear.
    pub output: PathBuf,
}

/// A finished submission.
#[derive(Debug)]
pub struct Finished {
    /// Exit code of the client.
    pub exit: i32,
    /// Since the client was started.
    pub took: Duration,
    /// Where results are.
    pub output: PathBuf,
    /// What the client wrote to standard error.
    pub stderr: String,
}

/// What a one-shot command answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Exit code.
    pub exit: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// The processes, all killed when dropped.
#[derive(Debug)]
pub struct Cluster {
    /// Times and places.
    pub settings: Settings,
    /// All logs.
    pub logs: Logs,
    address: SocketAddr,
    coordinator: Option<Process>,
    coordinator_launch: Launch,
    nodes: BTreeMap<String, Process>,
    launches: BTreeMap<String, Launch>,
    started: usize,
    // Dropped after the processes.
    folder: TempDir,
    _permit: Permit,
}

impl Cluster {
    /// Starts a coordinator with ordinary settings.
    ///
    /// # Errors
    /// If it does not listen in time.
    pub fn new() -> Result<Self> {
        Self::with(Settings::default())
    }

    /// Starts a coordinator.
    ///
    /// # Errors
    /// If it does not listen in time.
    pub fn with(settings: Settings) -> Result<Self> {
        Self::launched(settings, Launch::default(), Permit::one())
    }

    /// Starts a coordinator when the permit says so.
    ///
    /// # Errors
    /// If it does not listen in time.
    pub fn launched(settings: Settings, launch: Launch, permit: Permit) -> Result<Self> {
        let mut cluster = Self::empty(settings, permit)?;
        cluster.start_coordinator_as(launch)?;
        Ok(cluster)
    }

    /// Nothing is started yet.
    ///
    /// # Errors
    /// If there is no place for files or no free port.
    pub fn empty(settings: Settings, permit: Permit) -> Result<Self> {
        let mut folder = TempDir::with_prefix("halfstep-faults-")?;
        if std::env::var_os(KEEP).is_some() {
            folder.disable_cleanup(true);
        }
        let address = match settings.listen {
            Some(address) => address,
            None => SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?)),
        };
        Ok(Self {
            settings,
            logs: Logs::default(),
            address,
            coordinator: None,
            coordinator_launch: Launch::default(),
            nodes: BTreeMap::new(),
            launches: BTreeMap::new(),
            started: 0,
            folder,
            _permit: permit,
        })
    }

    /// A folder that is removed with the cluster.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where the coordinator keeps its state.
    pub fn state_dir(&self) -> PathBuf {
        self.settings.state_dir.clone().unwrap_or_else(|| self.folder().join("state"))
    }

    /// `HOST:PORT` of the coordinator.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Starts the coordinator again, as it was started before, and waits until it listens; returns how long that took.
    ///
    /// # Errors
    /// If it does not listen in time.
    pub fn start_coordinator(&mut self) -> Result<Duration> {
        self.start_coordinator_as(self.coordinator_launch.clone())
    }

    /// Same, in this way; later restarts are ordinary ones in the same place.
    ///
    /// # Errors
    /// If it does not listen in time.
    pub fn start_coordinator_as(&mut self, launch: Launch) -> Result<Duration> {
        let mut process = self.spawn_coordinator(&launch)?;
        process.wait_line("Listening on", START)?;
        let took = process.age();
        self.coordinator = Some(process);
        self.coordinator_launch = Launch { env: without_failpoints(launch.env), ..launch };
        Ok(took)
    }

    /// Starts a coordinator without waiting for anything. It is the caller's.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn_coordinator(&mut self, launch: &Launch) -> Result<Process> {
        let mut command = self.command(launch)?;
        command.arg("coordinator").arg("--state-dir").arg(self.state_dir());
        command.arg("--listen").arg(self.address.to_string());
        self.secure(&mut command);
        command.args(&launch.args);
        self.start("coordinator", &mut command)
    }

    /// The coordinator.
    ///
    /// # Errors
    /// If there is none.
    pub fn coordinator(&mut self) -> Result<&mut Process> {
        self.coordinator.as_mut().context("the coordinator is not running")
    }

    /// Takes over a coordinator that was spawned apart.
    pub fn adopt_coordinator(&mut self, process: Process) {
        self.coordinator = Some(process);
    }

    /// SIGKILL to the coordinator; nothing if there is none.
    ///
    /// # Errors
    /// If it does not go.
    pub fn kill_coordinator(&mut self) -> Result<()> {
        self.coordinator.take().map_or(Ok(()), |mut process| process.kill())
    }

    /// Whether a coordinator was started and has not ended.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn has_coordinator(&mut self) -> Result<bool> {
        match &mut self.coordinator {
            Some(process) => Ok(process.ended()?.is_none()),
            None => Ok(false),
        }
    }

    /// Starts an ordinary node.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_node(&mut self, name: &str) -> Result<()> {
        self.start_node_as(name, Launch::default())
    }

    /// Starts several ordinary nodes, named by letters from `a`.
    ///
    /// # Errors
    /// If one cannot be started.
    pub fn start_nodes(&mut self, count: u8) -> Result<()> {
        (0..count).try_for_each(|index| self.start_node(&letter(index)))
    }

    /// Starts a node in this way. It attaches in its own time.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_node_as(&mut self, name: &str, launch: Launch) -> Result<()> {
        let mut command = self.command(&launch)?;
        command.args(["node", "--coordinator", &self.address.to_string(), "--name", name]);
        command.args(["--threads", &self.settings.threads.to_string()]);
        let spill = self.folder().join(format!("spill-{name}"));
        fs::create_dir_all(&spill)?;
        command.arg("--spill-dir").arg(spill);
        self.secure(&mut command);
        command.args(&launch.args);
        let process = self.start(&format!("node-{name}"), &mut command)?;
        self.nodes.insert(name.into(), process);
        self.launches.insert(name.into(), launch);
        Ok(())
    }

    /// Starts a node that was killed, as it was started before.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn restart_node(&mut self, name: &str) -> Result<()> {
        let launch = self.launches.get(name).cloned().unwrap_or_default();
        self.start_node_as(name, Launch { env: without_failpoints(launch.env), ..launch })
    }

    /// A node.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn node(&mut self, name: &str) -> Result<&mut Process> {
        self.nodes.get_mut(name).with_context(|| format!("node {name} is not running"))
    }

    /// Waits until a node has attached for the `times`th time.
    ///
    /// # Errors
    /// If it does not in time.
    pub fn wait_attached(&mut self, name: &str, times: usize) -> Result<()> {
        self.node(name)?.wait_lines("Attached to", times, START).map(drop)
    }

    /// SIGKILL to a node, which is forgotten.
    ///
    /// # Errors
    /// If it does not go.
    pub fn kill_node(&mut self, name: &str) -> Result<()> {
        self.nodes.remove(name).map_or(Ok(()), |mut process| process.kill())
    }

    /// Hands a node's process to the caller.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn take_node(&mut self, name: &str) -> Result<Process> {
        self.nodes.remove(name).with_context(|| format!("node {name} is not running"))
    }

    /// Names of the nodes that were started and neither killed nor taken.
    pub fn node_names(&self) -> Vec<String> {
        self.nodes.keys().cloned().collect()
    }

    /// Starts `submit --wait`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn submit(&mut self, job: &Job) -> Result<Submission> {
        self.submit_as(job, &Launch::default())
    }

    /// Starts `submit --wait` in this way.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn submit_as(&mut self, job: &Job, launch: &Launch) -> Result<Submission> {
        let output = self.folder().join(format!("results-{}", self.started));
        let mut command = self.command(launch)?;
        command.arg("submit").args(job.arguments()).arg("--wait").arg("--output").arg(&output);
        command.args(["--coordinator", &self.address.to_string()]);
        self.secure(&mut command);
        command.args(&launch.args);
        let process = self.start("submit", &mut command)?;
        Ok(Submission { process, job: job.clone(), output })
    }

    /// Waits for the end of a submission, whatever it is.
    ///
    /// # Errors
    /// If it still runs after `limit`.
    pub fn end(&mut self, mut submission: Submission, limit: Duration) -> Result<Finished> {
        let exit = submission.process.wait(limit)?;
        let (took, stderr) = (submission.process.age(), submission.process.stderr());
        Ok(Finished { exit, took, output: submission.output, stderr })
    }

    /// Waits for a submission to succeed with the bytes of an undisturbed run; returns how long it took.
    ///
    /// # Errors
    /// If it takes longer than `limit`, fails or differs.
    pub fn finish(&mut self, submission: Submission, limit: Duration) -> Result<Duration> {
        let job = submission.job.clone();
        let end = self.end(submission, limit)?;
        ensure!(end.exit == 0, "submit: expected exit 0, got {}\n{}", end.exit, self.logs.tails());
        self.assert_identical(&job, &end.output)?;
        Ok(end.took)
    }

    /// Runs a job to its end and compares.
    ///
    /// # Errors
    /// As [`finish`](Self::finish).
    pub fn run(&mut self, job: &Job, limit: Duration) -> Result<Duration> {
        let submission = self.submit(job)?;
        self.finish(submission, limit)
    }

    /// Every rounding that any process of the coordinator has said to be durable.
    ///
    /// # Errors
    /// If its logs cannot be read.
    pub fn acknowledged(&self) -> Result<Acknowledged> {
        let mut acknowledged = Acknowledged::default();
        // Names begin with the number of the process.
        for path in files_below(self.folder())?
            .iter()
            .filter(|path| path.to_string_lossy().ends_with("-coordinator.err"))
        {
            acknowledged.add(&String::from_utf8_lossy(&fs::read(path)?));
        }
        Ok(acknowledged)
    }

    /// Compares a folder of results with those of an undisturbed run.
    ///
    /// # Errors
    /// If a file differs, is missing or is too many.
    pub fn assert_identical(&self, job: &Job, output: &Path) -> Result<()> {
        let differences = Outputs::of(output)?.differences(&*job.golden()?);
        ensure!(differences.is_empty(), "{}\n{}", differences.join("\n"), self.logs.tails());
        Ok(())
    }

    /// Asks the coordinator something: `arguments` are a client command and what belongs to it.
    ///
    /// # Errors
    /// If it takes too long.
    pub fn ask(&mut self, arguments: &[&str]) -> Result<Answer> {
        self.ask_as(arguments, &Launch::default())
    }

    /// Same, in this way.
    ///
    /// # Errors
    /// If it takes too long.
    pub fn ask_as(&mut self, arguments: &[&str], launch: &Launch) -> Result<Answer> {
        let mut command = self.command(launch)?;
        command.args(arguments).args(["--coordinator", &self.address.to_string()]);
        self.secure(&mut command);
        command.args(&launch.args);
        let mut process = self.start(arguments[0], &mut command)?;
        let exit = process.wait(ANSWER)?;
        Ok(Answer { exit, stdout: process.stdout(), stderr: process.stderr() })
    }

    /// What `nodes --json` says: one object a node.
    ///
    /// # Errors
    /// If it says nothing of the kind.
    pub fn nodes(&mut self) -> Result<Vec<Value>> {
        let answer = self.ask(&["nodes", "--json"])?;
        objects(&answer.stdout)
            .with_context(|| format!("nodes --json: exit {}: {}", answer.exit, answer.stderr))
    }

    /// What `status --json` says: one object a job.
    ///
    /// # Errors
    /// If it says nothing of the kind.
    pub fn jobs(&mut self) -> Result<Vec<Value>> {
        let answer = self.ask(&["status", "--json"])?;
        objects(&answer.stdout)
            .with_context(|| format!("status --json: exit {}: {}", answer.exit, answer.stderr))
    }

    /// What `nodes --json` says of one node, by name.
    ///
    /// # Errors
    /// If it says nothing of the kind.
    pub fn node_status(&mut self, name: &str) -> Result<Option<Value>> {
        let named = |node: &Value| node["name"] == name || node["description"]["name"] == name;
        Ok(self.nodes()?.into_iter().rfind(named))
    }

    /// Waits until `look` finds something.
    ///
    /// # Errors
    /// If it does not within `limit`: carries the tails of all logs.
    pub fn expect<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let start = Instant::now();
        match until(limit, || look(self))? {
            Some(found) => Ok(found),
            None => bail!(
                "expected {what} within {limit:?}, waited {:.1?}\n{}",
                start.elapsed(),
                self.logs.tails()
            ),
        }
    }

    /// A process that belongs to the cluster, started with `arguments` alone.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn bare(&mut self, name: &str, arguments: &[&str]) -> Result<Process> {
        self.bare_as(name, arguments, &Launch::default())
    }

    /// Same, in this way.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn bare_as(&mut self, name: &str, arguments: &[&str], launch: &Launch) -> Result<Process> {
        let mut command = self.command(launch)?;
        command.args(arguments).args(&launch.args);
        self.start(name, &mut command)
    }

    fn start(&mut self, name: &str, command: &mut Command) -> Result<Process> {
        self.started += 1;
        let name = format!("{:03}-{name}", self.started);
        Process::start(&name, command, self.folder.path(), &self.logs)
    }

    fn command(&self, launch: &Launch) -> Result<Command> {
        let mut words = launch.prefix.iter();
        let mut command = match words.next() {
            Some(first) => {
                let mut command = Command::new(first);
                command.args(words).arg(binary()?);
                command
            }
            None => Command::new(binary()?),
        };
        for name in
            ["FAILPOINTS", "HALFSTEP_LOG", "HALFSTEP_COORDINATOR", "HALFSTEP_CERTS", "HALFSTEP_ONNXRUNTIME"]
        {
            command.env_remove(name);
        }
        let millis = |time: Duration| time.as_millis().to_string();
        command.env("HALFSTEP_HEARTBEAT_MS", millis(self.settings.heartbeat));
        command.env("HALFSTEP_LEASE_MS", millis(self.settings.lease));
        command.env("HALFSTEP_NO_NODES_MS", millis(self.settings.no_nodes));
        command.env("HALFSTEP_HUNG_MS", millis(self.settings.hung));
        command.env("HALFSTEP_LOG", "info").env(NO_DEVICES.0, NO_DEVICES.1);
        command.envs(launch.env.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }

    fn secure(&self, command: &mut Command) {
        match &self.settings.certs {
            Some(folder) => command.arg("--certs").arg(folder),
            None => command.arg("--insecure"),
        };
    }
}

/// Name of the `index`th node.
pub(crate) fn letter(index: u8) -> String {
    char::from(b'a' + index % 26).to_string()
}

fn without_failpoints(env: Vec<(String, String)>) -> Vec<(String, String)> {
    env.into_iter().filter(|(name, _)| name != "FAILPOINTS").collect()
}

/// A JSON array, an object with one array in it, or one object a line.
fn objects(text: &str) -> Result<Vec<Value>> {
    match serde_json::from_str::<Value>(text) {
        Ok(Value::Array(values)) => Ok(values),
        Ok(Value::Object(fields)) => match fields.values().find_map(Value::as_array) {
            Some(values) => Ok(values.clone()),
            None => Ok(vec![Value::Object(fields)]),
        },
        _ => {
            let lines = text.lines().filter(|line| !line.trim().is_empty());
            Ok(lines.map(serde_json::from_str).collect::<Result<_, _>>()?)
        }
    }
}

fn free_port() -> Result<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let spread = u16::try_from(std::process::id() % 997)? * 19;
    for _ in 0..PORTS.len() {
        let offset = NEXT.fetch_add(1, Ordering::Relaxed).wrapping_add(spread) % (PORTS.end - PORTS.start);
        let port = PORTS.start + offset;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no free port in {PORTS:?}")
}
