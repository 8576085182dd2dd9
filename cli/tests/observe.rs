//! What a running fleet shows of itself, seen from outside: real processes, real clients.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test may stop, and says what it saw"
)]

#[path = "support/process.rs"]
mod process;
#[path = "support/scrape.rs"]
mod scrape;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use halfstep_proto::{Role, Security, Transport};
use process::Process;
use scrape::{Scrape, get};
use serde_json::Value;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

const LIMIT: Duration = Duration::from_secs(120);
/// Startup, readiness, the empty name, liveness.
const SERVICES: [&str; 4] = ["startup", "readiness", "", "liveness"];

/// Waits until something is there.
fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < LIMIT, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// What a probe is answered for each service.
fn probe(address: &str) -> [bool; 4] {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let channel = Transport::tcp(Security::Plaintext).connector(address, Role::Node).channel();
        let mut client = HealthClient::new(channel);
        let mut serving = [false; 4];
        for (answer, service) in serving.iter_mut().zip(SERVICES) {
            let request = HealthCheckRequest { service: service.into() };
            let said = client.check(request).await.unwrap().into_inner().status();
            *answer = said == ServingStatus::Serving;
        }
        serving
    })
}

fn probed(address: &str, what: &str, expect: [bool; 4]) {
    until(what, || (probe(address) == expect).then_some(()));
}

/// A coordinator and its address.
fn coordinator(folder: &Path, listen: &str, more: &[&str]) -> (Process, String) {
    let state = folder.join("state");
    let arguments = ["coordinator", "--listen", listen, "--insecure", "--state-dir", state.to_str().unwrap()];
    let mut process = Process::start(&[&arguments[..], more].concat());
    let address = process.said("Listening on ");
    (process, address)
}

fn node(coordinator: &str, name: &str, more: &[&str]) -> Process {
    let arguments = ["node", "--coordinator", coordinator, "--insecure", "--threads", "1", "--name", name];
    Process::start(&[&arguments[..], more].concat())
}

/// Exit code and stdout of a command for people.
fn ask(coordinator: &str, arguments: &[&str]) -> (Option<i32>, String) {
    Process::start(&[arguments, &["--coordinator", coordinator, "--insecure"]].concat()).finish()
}

fn asked_json(coordinator: &str, arguments: &[&str]) -> Value {
    let (code, out) = ask(coordinator, &[arguments, &["--json"]].concat());
    assert_eq!(code, Some(0), "{arguments:?}: {out}");
    serde_json::from_str(&out).unwrap()
}

/// Submits the example; the job's id.
fn submit(coordinator: &str, options: &[&str]) -> String {
    let example = repository().join("examples/fashion-mnist");
    let (model, data) = (example.join("model.onnx"), example.join("calibration.npz"));
    let arguments =
        ["submit", model.to_str().unwrap(), "--calibration", data.to_str().unwrap(), "--bits", "3"];
    let (code, out) = ask(coordinator, &[&arguments[..], options].concat());
    assert_eq!(code, Some(0), "{out}");
    out.trim().to_owned()
}

const SHORT: [&str; 6] = ["--samples", "64", "--shard-size", "16", "--iterations", "20"];

fn wait_for(coordinator: &str, job: &str) {
    until("the job is finished", || {
        let state = asked_json(coordinator, &["status", job])[0]["state"].as_str().unwrap().to_owned();
        assert!(state != "failed", "{job}");
        (state == "finished").then_some(())
    });
}

#[test]
fn probes_tell_a_process_that_lives_from_one_that_takes_part() {
    let folder = tempfile::tempdir().unwrap();
    let health = ["--health", "127.0.0.1:0"];
    let (mut first, address) = coordinator(folder.path(), "127.0.0.1:0", &health);
    let public = first.said("Health on ");
    probed(&public, "a coordinator is ready", [true; 4]);
    // The port is open to anybody, and tells nothing else.
    let mut curious = Process::start(&["status", "--coordinator", &public, "--insecure"]);
    assert_eq!(curious.wait(LIMIT), Some(78));
    assert!(curious.stderr().contains("not for a process that nothing is known of"), "{}", curious.stderr());

    let mut node = node(&address, "n", &health);
    let place = node.said("Health on ");
    probed(&place, "a node is attached", [true; 4]);
    first.signal("-KILL");
    probed(&place, "without its coordinator a node lives and is not ready", [true, false, false, true]);
    let (mut second, _) = coordinator(folder.path(), &address, &[]);
    probed(&place, "it is attached again", [true; 4]);

    // A frozen coordinator answers nothing, and that is no reason to restart the node.
    second.signal("-STOP");
    assert!(probe(&place)[3]);
    second.signal("-CONT");
    node.signal("-TERM");
    assert_eq!(node.wait(LIMIT), Some(0));
    second.signal("-TERM");
    assert_eq!(second.wait(LIMIT), Some(0));
}

#[test]
fn ports_that_cannot_be_had_are_named_before_anything_is_begun() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    for flag in ["--health", "--metrics"] {
        let arguments =
            ["coordinator", "--listen", "127.0.0.1:0", "--insecure", flag, &address, "--state-dir"];
        let mut refused = Process::start(&[&arguments[..], &[state.to_str().unwrap()]].concat());
        assert_eq!(refused.wait(LIMIT), Some(78));
        assert!(refused.stderr().contains(&format!("cannot listen on `{address}`")), "{}", refused.stderr());
        assert!(!state.exists());
    }
}

/// The tool that Prometheus' users check with; none where it is not installed.
fn promtool() -> Option<Command> {
    let name = std::env::var("HALFSTEP_PROMTOOL").unwrap_or_else(|_| "promtool".into());
    let found = Command::new(&name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if found.is_err() {
        eprintln!("skipped: no promtool, neither by HALFSTEP_PROMTOOL nor on the PATH (Debian: prometheus)");
        return None;
    }
    Some(Command::new(name))
}

fn lint(scrape: &Scrape) {
    let Some(mut tool) = promtool() else { return };
    let tool =
        tool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = tool.spawn().unwrap();
    child.stdin.take().unwrap().write_all(scrape.text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && said.trim().is_empty(), "{said}\n{}", scrape.text);
}

/// Names of metrics in a text: words that begin as ours do, or as those of every process.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let ours = words.filter(|word| word.starts_with("halfstep_") || word.starts_with("process_"));
    let series = |word: &str| {
        let suffix = ["_bucket", "_sum", "_count"].into_iter().find_map(|end| word.strip_suffix(end));
        suffix.unwrap_or(word).to_owned()
    };
    ours.map(series).collect()
}

/// Only where there is a CUDA device.
const OF_CUDA: &str = "halfstep_gpu_memory_used_bytes";
/// Words of the pages that begin like metrics and are none.
const OTHER_WORDS: [&str; 2] = ["halfstep_coordinator", "process_"];

#[test]
fn what_a_fleet_counts_is_true_and_what_is_watched_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let metrics = ["--metrics", "127.0.0.1:0"];
    let (mut lead, address) = coordinator(folder.path(), "127.0.0.1:0", &metrics);
    let url = lead.said("Metrics on ");
    let mut nodes = [node(&address, "a", &metrics), node(&address, "b", &metrics)];
    let urls = [nodes[0].said("Metrics on "), nodes[1].said("Metrics on ")];
    until("both are attached", || (Scrape::of(&url).sum("halfstep_nodes", "working") == 2.0).then_some(()));
    let before = Scrape::of(&url);
    assert_eq!(before.sum("halfstep_task_attempts_total", ""), 0.0);
    assert!(before.text.contains("halfstep_task_attempts_total{outcome=\"node_lost\"} 0"), "{}", before.text);

    let job = submit(&address, &SHORT);
    wait_for(&address, &job);
    let finished = "halfstep_jobs{state=\"finished\"} 1";
    let scrape =
        until("the end is seen", || Some(Scrape::of(&url)).filter(|seen| seen.text.contains(finished)));
    // As the coordinator counts them for `nodes`, one by one as they are accepted.
    let listed = asked_json(&address, &["nodes"]);
    let listed = listed.as_array().unwrap();
    let sum = |key: &str| listed.iter().map(|node| node[key].as_u64().unwrap()).sum::<u64>() as f64;
    let ok = scrape.sum("halfstep_task_attempts_total", "\"ok\"");
    assert!(ok > 80.0, "10 stages of 4 shards, captured and summed: {ok}");
    assert_eq!(ok, sum("tasks_done"));
    assert_eq!(ok, scrape.sum("halfstep_task_duration_seconds_count", ""));
    let raced = scrape.sum("halfstep_task_attempts_total", "") - ok;
    let seen: Vec<Scrape> = urls.iter().map(|url| Scrape::of(url)).collect();
    let done: f64 = seen.iter().map(|node| node.sum("halfstep_node_tasks_total", "\"ok\"")).sum();
    assert!((ok..=ok + raced).contains(&done), "{done} by nodes, {ok} accepted, {raced} raced");
    let calls =
        scrape.sum("halfstep_rpc_server_duration_seconds_count", "method=\"halfstep.v1.Fleet/Commit\"");
    assert!(calls >= ok, "{calls} commits");
    // Seconds, as the job's own account of its time has them.
    let out = folder.path().join("out");
    assert_eq!(ask(&address, &["fetch", &job, "--output", out.to_str().unwrap()]).0, Some(0));
    let timing: Value = serde_json::from_slice(&std::fs::read(out.join("timing.json")).unwrap()).unwrap();
    let seconds = |name: &str, phases: &[&str]| {
        let told = timing[name].as_f64().unwrap();
        let phases = phases.iter().map(|phase| scrape.sum("halfstep_task_duration_seconds_sum", phase));
        let counted: f64 = phases.sum();
        assert!((told - counted).abs() <= 1e-6 * told.max(1.0), "{name}: {told} told, {counted} counted");
    };
    seconds("forward_thread_seconds", &["capture", "forward"]);
    seconds("statistics_thread_seconds", &["accumulate", "reduce"]);
    let fetched = |url: &String| Scrape::of(url).sum("halfstep_data_bytes_total", "received");
    assert_eq!(urls.iter().map(fetched).sum::<f64>() as u64, until_still(&address));
    for (name, part, value) in [
        ("halfstep_coordinator_starts_total", "", 1.0),
        ("halfstep_tasks", "", 0.0),
        ("halfstep_build_info", "coordinator", 1.0),
        ("halfstep_task_duplicates_total", "different", 0.0),
        ("halfstep_fenced_writes_total", "", 0.0),
        ("halfstep_nodes", "", 2.0),
    ] {
        assert_eq!(scrape.sum(name, part), value, "{name}");
    }
    assert!(scrape.sum("halfstep_disk_free_bytes", "state") > 0.0);
    assert!(seen[0].sum("process_resident_memory_bytes", "") > 1e6);

    // Nothing in it tells what the work is about.
    for scrape in seen.iter().chain([&scrape]) {
        for secret in [&job[..], "fashion", folder.path().to_str().unwrap(), "Conv", "calibration"] {
            assert!(!scrape.text.contains(secret), "{secret}");
        }
        lint(scrape);
    }
    assert_eq!(get(&url.replace("/metrics", "/")).0, 404);

    let mut exported: BTreeSet<String> = seen.iter().chain([&scrape]).flat_map(Scrape::names).collect();
    exported.insert(OF_CUDA.into());
    for file in ["k8s/monitoring/dashboard.json", "k8s/monitoring/halfstep.rules.yaml", "docs/operations.md"]
    {
        let mut names = named(&std::fs::read_to_string(repository().join(file)).unwrap());
        names.retain(|name| !OTHER_WORDS.contains(&name.as_str()));
        let unknown: Vec<&String> = names.difference(&exported).collect();
        assert!(names.len() > 10 && unknown.is_empty(), "{file} names what is not exported: {unknown:?}");
        let missing: Vec<&String> =
            exported.difference(&names).filter(|name| name.starts_with("halfstep_")).collect();
        assert!(file != "docs/operations.md" || missing.is_empty(), "not explained in {file}: {missing:?}");
    }
    nodes.iter_mut().for_each(|node| {
        node.signal("-TERM");
        assert_eq!(node.wait(LIMIT), Some(0));
    });
}

/// Bytes that nodes have fetched, as their heartbeats say, once that does not change any more.
fn until_still(address: &str) -> u64 {
    let told = || {
        let nodes = asked_json(address, &["nodes"]);
        nodes.as_array().unwrap().iter().map(|node| node["bytes_fetched"].as_u64().unwrap()).sum::<u64>()
    };
    let mut last = told();
    until("heartbeats have told all", || {
        std::thread::sleep(Duration::from_millis(1_500));
        let now = told();
        (std::mem::replace(&mut last, now) == now).then_some(now)
    })
}

#[test]
fn alert_rules_are_sound_and_fire_when_they_should() {
    let folder = repository().join("k8s/monitoring");
    for arguments in
        [["check", "rules", "halfstep.rules.yaml"], ["test", "rules", "halfstep.rules.test.yaml"]]
    {
        let Some(mut tool) = promtool() else { return };
        let output = tool.args(arguments).current_dir(&folder).output().unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success() && said.contains("SUCCESS"), "{said}");
    }
}

#[test]
fn expressions_of_the_dashboard_are_promql() {
    let text = std::fs::read_to_string(repository().join("k8s/monitoring/dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let expressions: Vec<&str> = targets.map(|target| target["expr"].as_str().unwrap()).collect();
    assert!(expressions.len() > 20);
    let Some(mut tool) = promtool() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rules.json");
    let rules: Vec<Value> = (0..)
        .zip(&expressions)
        .map(|(nth, expr)| serde_json::json!({ "record": format!("dashboard:panel{nth}"), "expr": expr }))
        .collect();
    let groups = serde_json::json!({ "groups": [{ "name": "dashboard", "rules": rules }] });
    std::fs::write(&path, groups.to_string()).unwrap();
    let output = tool.args(["check", "rules"]).arg(&path).output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{said}");
}

/// Every line of a log as JSON.
fn records(process: &Process) -> Vec<Value> {
    let text = process.stderr();
    let parsed =
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}")));
    parsed.collect()
}

#[test]
fn json_logs_name_job_task_attempt_epoch_and_node_on_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let json = ["--log-format", "json"];
    let (mut lead, address) = coordinator(folder.path(), "127.0.0.1:0", &json);
    let mut worker = node(&address, "n", &json);
    let job = submit(&address, &SHORT);
    wait_for(&address, &job);
    for process in [&mut worker, &mut lead] {
        process.signal("-TERM");
        assert_eq!(process.wait(LIMIT), Some(0));
    }
    let told = |record: &&Value, message: &str| record["message"] == message && record["level"] == "INFO";
    let (lead, worker) = (records(&lead), records(&worker));
    let solved: Vec<&Value> = worker.iter().filter(|record| told(record, "chunk solved")).collect();
    let committed: Vec<&Value> = lead.iter().filter(|record| told(record, "rounding committed")).collect();
    assert!(!solved.is_empty() && solved.len() == committed.len(), "{} {}", solved.len(), committed.len());
    for record in solved {
        let span = &record["span"];
        assert_eq!(
            (&span["job"], &span["epoch"], &span["attempt"]),
            (&job.as_str().into(), &1.into(), &1.into())
        );
        assert_eq!(span["node"], "node-1");
        assert!(span["task"].as_str().unwrap().starts_with("solve:"), "{span}");
        assert!(record["seconds"].is_f64() && record["timestamp"].is_string(), "{record}");
        let same = committed.iter().filter(|other| other["span"] == *span);
        assert_eq!(same.count(), 1, "the coordinator says the same of it: {span}");
    }
    assert!(lead.iter().any(|record| told(&record, &format!("Listening on {address}"))));
}

#[test]
fn what_ends_a_process_is_a_record_too() {
    let arguments = ["node", "--coordinator", "192.0.2.1:7421", "--insecure", "--log-format", "json"];
    let mut refused = Process::start(&arguments);
    assert_eq!(refused.wait(LIMIT), Some(78));
    let records = records(&refused);
    let last = records.last().unwrap();
    assert_eq!((&last["level"], &last["exit"]), (&"ERROR".into(), &78.into()), "{last}");
    assert!(last["message"].as_str().unwrap().contains("not a loopback address"), "{last}");
}

/// Hours of work, were it not cancelled.
const LONG: [&str; 6] = ["--samples", "16", "--shard-size", "16", "--iterations", "100000000"];

#[test]
fn a_task_is_explained_and_its_node_drained() {
    let folder = tempfile::tempdir().unwrap();
    let (_lead, address) = coordinator(folder.path(), "127.0.0.1:0", &[]);
    let mut worker = node(&address, "gpu-7", &[]);
    let job = submit(&address, &LONG);
    let explained = until("a chunk is being solved", || {
        let explained = asked_json(&address, &["explain", &job]);
        let task = explained["tasks"].as_array().unwrap().first()?["task"].as_str()?.to_owned();
        task.starts_with("solve:").then_some(explained)
    });
    let task = explained["tasks"][0]["task"].as_str().unwrap();
    assert_eq!((&explained["job"]["state"], &explained["counts"]["leased"]), (&"running".into(), &1.into()));
    let (code, text) = ask(&address, &["explain", &job, task]);
    assert_eq!(code, Some(0));
    for part in [&format!("job {job} is running: 1 tasks")[..], "worked on by node-1 `gpu-7`", "under way"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let (code, _) = ask(&address, &["explain", &job, "solve:nothing:0"]);
    assert_eq!(code, Some(65));

    assert_eq!(ask(&address, &["drain", "gpu-8"]).0, Some(65));
    let (code, text) = ask(&address, &["drain", "gpu-7"]);
    assert_eq!(
        (code, text.as_str()),
        (Some(0), "node-1 `gpu-7` has left; leases in its hands when it was asked: 1\n")
    );
    assert_eq!(worker.wait(LIMIT), Some(0), "{}", worker.stderr());
    assert!(worker.stderr().contains("Draining"));
    let explained = asked_json(&address, &["explain", &job, task]);
    let account = &explained["tasks"][0];
    assert_eq!(account["attempts"][0]["outcome"], "handed_back", "{account}");
    assert_eq!(account["state"], "ready", "{account}");
    assert!(account["attempts"][0]["took_ms"].is_u64() && account["why"].is_string(), "{account}");
    assert_eq!(ask(&address, &["cancel", &job]).0, Some(0));
}
