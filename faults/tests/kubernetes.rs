//! The life of a Job's pods without a cluster: evicted, scaled 4 -> 6 -> 3, index 0 killed, certificates renewed (P1, P4, P10).
//!
//! Command, environment, user and files are those of the rendered manifest; `Kubelet` says what is substituted. Skipped,
//! saying why, without root or the tools that render.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may stop, and says what it measured")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use faults::{Consequence, JobManifest, Kubelet, Logs, Outputs, Permit, Process, binary, example};

const LIMIT: Duration = Duration::from_secs(600);
/// A pod hands its work back and ends within 5 s of SIGTERM; this is for a machine that is busy.
const SLACK: Duration = Duration::from_secs(10);
/// Certificates are looked at again after so long.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// A job with a middle in which things can happen.
const JOB: &str = "model = '/data/model.onnx'\ncalibration = '/data/calibration.npz'\noutput = '/data/output'\n\
                   bits = 3\nsamples = 256\nshard-size = 16\niterations = 36000\n";

/// The pods that run, by index, and how often each index has failed.
struct Pods {
    // Processes go before the hosts they run on.
    running: BTreeMap<u32, Process>,
    kubelet: Kubelet,
    failures: BTreeMap<u32, u32>,
    // Not more at a time than the machine can take.
    _permit: Permit,
}

impl Pods {
    /// Volumes and certificates, no pod yet; `None`, said aloud, where that cannot be had.
    fn up(pods: u32, job: &str) -> Result<Option<Self>> {
        let permit = Permit::one();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../k8s/overlays/cpu");
        let skipped = |reason: String| {
            eprintln!("SKIPPED: {reason}");
            Ok(None)
        };
        let manifest = match JobManifest::render(&folder)? {
            Ok(manifest) => manifest,
            Err(reason) => return skipped(reason),
        };
        let mut kubelet = match Kubelet::up(manifest, pods, job)? {
            Ok(kubelet) => kubelet,
            Err(reason) => return skipped(reason),
        };
        for name in ["model.onnx", "calibration.npz"] {
            fs::copy(example(name), kubelet.claim().join(name))?;
        }
        let certs = certificates(&kubelet, "certs")?;
        kubelet.set_secret(&certs)?;
        Ok(Some(Self { kubelet, running: BTreeMap::new(), failures: BTreeMap::new(), _permit: permit }))
    }

    /// As the Job controller does: the count of failures goes with the pod.
    fn start(&mut self, index: u32) -> Result<()> {
        let failures = self.failures.get(&index).copied().unwrap_or(0);
        let pod = self.kubelet.start(index, failures)?;
        self.running.insert(index, pod);
        Ok(())
    }

    fn pod(&mut self, index: u32) -> Result<&mut Process> {
        self.running.get_mut(&index).with_context(|| format!("pod {index} does not run"))
    }

    /// Waits until index 0 has told of a layer.
    fn first_layer(&mut self) -> Result<()> {
        let told = faults::until(LIMIT, || {
            let pod = self.running.get_mut(&0).context("index 0 does not run")?;
            ensure!(pod.ended()?.is_none(), "index 0 ended: {}", pod.stderr());
            Ok(pod.stdout().contains("\"layer-solved\"").then_some(()))
        })?;
        told.with_context(|| format!("no layer within {LIMIT:?}\n{}", self.kubelet.logs().tails()))
    }

    /// What an exit means for the Job; a failure that counts is counted.
    fn ended(&mut self, index: u32, exit: i32, disrupted: bool) -> Consequence {
        self.running.remove(&index);
        let consequence = self.kubelet.manifest().consequence(exit, disrupted);
        if consequence == Consequence::Counted {
            *self.failures.entry(index).or_default() += 1;
        }
        eprintln!("pod {index} ended with {exit}: {consequence:?}");
        consequence
    }

    /// Evicted, drained or scaled away; `grace` is cut short where it would be waited for in vain. Returns exit codes.
    fn evict(&mut self, indexes: &[u32], grace: Duration) -> Result<Vec<i32>> {
        let pod = |index| self.running.remove(index).with_context(|| format!("pod {index} does not run"));
        let mut pods = indexes.iter().map(pod).collect::<Result<Vec<_>>>()?;
        let began = Instant::now();
        let exits = self.kubelet.end(&mut pods, grace)?;
        let took =
            began.elapsed().saturating_sub(Duration::from_secs(self.kubelet.manifest().pre_stop_seconds));
        eprintln!("pods {indexes:?} were gone {took:.1?} after they were asked");
        ensure!(exits.contains(&137) || took < Duration::from_secs(5) + SLACK);
        for (index, exit) in indexes.iter().zip(&exits) {
            ensure!(self.ended(*index, *exit, true) == Consequence::Ignored);
        }
        Ok(exits)
    }

    fn grace(&self) -> Duration {
        Duration::from_secs(self.kubelet.manifest().grace_seconds)
    }

    /// What one process makes of the same job, in a pod's place.
    fn golden(&mut self, index: u32) -> Result<Outputs> {
        let words = ["halfstep", "quantize", "--config", "/etc/halfstep/job/job.toml", "--device", "cpu"];
        let mut command: Vec<String> = words.map(str::to_string).to_vec();
        command.extend(["--output".into(), "/data/golden".into()]);
        let mut process = self.kubelet.start_command(index, 0, &command)?;
        ensure!(process.wait(LIMIT)? == 0, "{}", process.stderr());
        Outputs::of(&self.kubelet.claim().join("golden"))
    }
}

/// A new authority and certificates for the pod that coordinates, as the guide says to make them.
fn certificates(kubelet: &Kubelet, name: &str) -> Result<std::path::PathBuf> {
    let folder = kubelet.claim().with_file_name(name);
    let mut command = std::process::Command::new(binary()?);
    command.args(["certs", "--host", &kubelet.manifest().host(0), "--dir"]).arg(&folder);
    let beside = folder.parent().context("a folder of its own")?;
    let mut made = Process::start(name, &mut command, beside, &Logs::default())?;
    ensure!(made.wait(LIMIT)? == 0, "{}", made.stderr());
    Ok(folder)
}

#[test]
fn pods_are_evicted_scaled_and_killed_and_the_results_are_those_of_one_process() -> Result<()> {
    let Some(mut pods) = Pods::up(6, JOB)? else { return Ok(()) };
    let golden = pods.golden(5)?;
    let before = pods.kubelet.manifest().completions;
    ensure!(before == 4, "the manifest starts {before} pods");
    (0..before).try_for_each(|index| pods.start(index))?;
    pods.first_layer()?;

    // A drained machine: not the pod's fault, and another takes its place.
    let grace = pods.grace();
    ensure!(pods.evict(&[2], grace)? == [75]);
    pods.start(2)?;

    // 4 -> 6.
    (before..6).try_for_each(|index| pods.start(index))?;
    for index in before..6 {
        pods.pod(index)?.wait_line("Attached to", LIMIT)?;
    }

    // Out of memory, say: counted, and the next pod of this index goes on.
    pods.pod(0)?.kill()?;
    ensure!(pods.ended(0, 137, false) == Consequence::Counted);
    pods.start(0)?;
    pods.pod(0)?.wait_line("Resuming", LIMIT)?;
    ensure!(pods.failures[&0] == 1);

    // 6 -> 3: the highest go; one of them does not listen and is killed when its grace is over.
    pods.pod(5)?.freeze()?;
    ensure!(pods.evict(&[5, 4, 3], Duration::from_secs(7))? == [137, 75, 75]);
    ensure!(pods.pod(0)?.ended()?.is_none(), "the job was over before anything could happen to it");

    let exit = pods.pod(0)?.wait(LIMIT)?;
    ensure!(exit == 0, "index 0 ended with {exit}\n{}", pods.kubelet.logs().tails());
    ensure!(pods.ended(0, exit, false) == Consequence::Succeeded);
    for index in [1, 2] {
        ensure!(pods.pod(index)?.ended()?.is_none(), "pod {index} ended before it was told to");
    }
    ensure!(pods.evict(&[1, 2], grace)? == [75, 75]);
    let output = pods.kubelet.claim().join("output");
    let differences = Outputs::of(&output)?.differences(&golden);
    ensure!(differences.is_empty(), "{}\n{}", differences.join("\n"), pods.kubelet.logs().tails());

    // A pod that died after it had placed the results and before it could say so.
    let placed = fs::metadata(output.join("report.json"))?.modified()?;
    pods.start(0)?;
    ensure!(pods.pod(0)?.wait(LIMIT)? == 0, "{}", pods.pod(0)?.stderr());
    ensure!(fs::metadata(output.join("report.json"))?.modified()? == placed, "placed again");
    Ok(())
}

#[test]
fn what_another_pod_would_not_do_better_fails_the_job_and_the_rest_is_tried_again() -> Result<()> {
    let Some(mut pods) =
        Pods::up(2, "model = '/data/none.onnx'\ncalibration = '/data/calibration.npz'\noutput = '/data/o'")?
    else {
        return Ok(());
    };
    pods.start(0)?;
    let exit = pods.pod(0)?.wait(LIMIT)?;
    ensure!(
        exit == 65 && pods.pod(0)?.stderr().contains("/data/none.onnx"),
        "{exit}: {}",
        pods.pod(0)?.stderr()
    );
    ensure!(pods.ended(0, exit, false) == Consequence::FailsJob);

    pods.failures.insert(0, 20);
    pods.start(0)?;
    let exit = pods.pod(0)?.wait(LIMIT)?;
    ensure!(
        exit == 78 && pods.pod(0)?.stderr().contains("failed 20 times"),
        "{exit}: {}",
        pods.pod(0)?.stderr()
    );
    ensure!(pods.ended(0, exit, false) == Consequence::FailsJob);

    // Without a coordinator a pod waits; asked to stop, it never says that it is done.
    pods.start(1)?;
    pods.pod(1)?.wait_line("Waiting for", LIMIT)?;
    pods.pod(1)?.terminate()?;
    let exit = pods.pod(1)?.wait(LIMIT)?;
    ensure!(exit == 75, "{exit}: {}", pods.pod(1)?.stderr());
    ensure!(pods.ended(1, exit, false) == Consequence::Counted);
    Ok(())
}

#[test]
fn renewed_certificates_are_taken_up_by_pods_that_run() -> Result<()> {
    let Some(mut pods) = Pods::up(2, JOB)? else { return Ok(()) };
    let listen = "0.0.0.0:7421";
    // It has nothing to do but listen.
    let words = ["halfstep", "coordinator", "--state-dir", "/data/state", "--certs", "/etc/halfstep/certs"];
    let mut command: Vec<String> = words.map(str::to_string).to_vec();
    command.extend(["--listen".into(), listen.into()]);
    let mut coordinator = pods.kubelet.start_command(0, 0, &command)?;
    coordinator.wait_line("Listening on", LIMIT)?;
    let loaded = Instant::now();

    // The new authority is believed beside the old one, as in a rotation.
    let (old, new) = (pods.kubelet.claim().with_file_name("certs"), certificates(&pods.kubelet, "renewed")?);
    let both = fs::read_to_string(old.join("ca.pem"))? + &fs::read_to_string(new.join("ca.pem"))?;
    fs::write(new.join("ca.pem"), both)?;
    pods.kubelet.set_secret(&new)?;
    faults::now_or_by(loaded + LOOK_AGAIN, || Ok(coordinator.ended()?.is_some()))?;
    pods.start(1)?;
    pods.pod(1)?.wait_line("Attached to", Duration::from_secs(5) + SLACK)?;
    ensure!(coordinator.stderr().contains("certificates renewed"), "{}", coordinator.stderr());
    Ok(())
}
