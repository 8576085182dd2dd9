//! The real binary with the variables that Slurm sets: what it takes from them, and how it ends. No Slurm is needed.
//!
//! Not here: what the variables mean (`fleet::slurm`), the scripts on a real Slurm (`halfstep-faults`).

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::{NamedTempFile, TempDir};

/// Starting takes milliseconds; this is for a machine that is busy.
const LIMIT: Duration = Duration::from_secs(60);

fn halfstep(arguments: &[&str], variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_halfstep"));
    command.args(arguments).envs(variables.iter().copied()).stdin(Stdio::null());
    let ours = ["HALFSTEP_COORDINATOR", "HALFSTEP_CERTS", "CUDA_VISIBLE_DEVICES"];
    for inherited in ours.into_iter().chain(["SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_RESTART_COUNT"]) {
        if !variables.iter().any(|(name, _)| *name == inherited) {
            command.env_remove(inherited);
        }
    }
    command
}

fn ended(arguments: &[&str], variables: &[(&str, &str)]) -> (i32, String) {
    let output = halfstep(arguments, variables).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn what_cannot_be_in_a_slurm_job_is_refused_in_one_sentence() {
    let node = ["node", "--slurm", "--insecure", "--coordinator", "127.0.0.1:1"];
    let coordinator =
        ["coordinator", "--slurm", "--insecure", "--requeue-limit", "2", "--state-dir", "/nowhere"];
    let job = ("SLURM_JOB_ID", "17");
    for (arguments, variables, exit, said) in [
        (&node[..], &[][..], 78, "--slurm: SLURM_JOB_ID is not set, expected to run inside a Slurm job"),
        (&node, &[("SLURM_JOB_ID", "x")], 78, "SLURM_JOB_ID is `x`, expected a number as Slurm sets it"),
        (
            &node,
            &[job, ("CUDA_VISIBLE_DEVICES", "0,1"), ("SLURM_LOCALID", "2")],
            78,
            "SLURM_LOCALID is 2, but CUDA_VISIBLE_DEVICES lists 2 devices, expected one for each task",
        ),
        (
            &coordinator,
            &[job, ("SLURM_RESTART_COUNT", "3")],
            1,
            "Slurm job 17: not started again after 3 restarts, expected at most 2",
        ),
        (
            &["status", "--insecure"],
            &[job, ("SLURM_JOB_NODELIST", "n[1-")],
            78,
            "SLURM_JOB_NODELIST: host list `n[1-`: has `[` without `]`",
        ),
        (&["status", "--insecure"], &[], 2, "no coordinator is named"),
    ] {
        let (code, stderr) = ended(arguments, variables);
        assert_eq!(code, exit, "{stderr}");
        assert!(
            stderr.contains(&format!("error: {said}\nhint: ")) || stderr.ends_with(&format!("{said}\n")),
            "{stderr}"
        );
        assert!(!Path::new("/nowhere").exists());
    }
    assert_eq!(ended(&["node", "--requeue-limit", "2"], &[]).0, 2, "a limit without --slurm");
}

#[test]
fn a_coordinator_is_looked_for_where_the_flag_a_variable_or_slurm_says_in_this_order() {
    let step = ("SLURM_STEP_NODELIST", "localhost,n[2-3]");
    let job = [("SLURM_JOB_ID", "20007"), ("SLURM_JOB_NODELIST", "127.0.0.1,n[2-3]")];
    let own = ("HALFSTEP_COORDINATOR", "127.0.0.1:2");
    for (flags, variables, address) in [
        (&[][..], vec![job[0], job[1]], "127.0.0.1:20007"),
        (&[], vec![job[0], job[1], step], "localhost:20007"),
        (&[], vec![job[0], job[1], step, own], "127.0.0.1:2"),
        (&["--coordinator", "127.0.0.1:3"], vec![job[0], job[1], step, own], "127.0.0.1:3"),
    ] {
        let (code, stderr) = ended(&[&["status", "--insecure"], flags].concat(), &variables);
        assert_eq!(code, 75, "{stderr}");
        assert!(stderr.starts_with(&format!("error: coordinator {address}: ")), "{address}: {stderr}");
    }
}

#[test]
fn certificates_are_made_for_the_hosts_of_a_list() {
    let folder = TempDir::new().unwrap();
    let certs = folder.path().join("certs").to_string_lossy().into_owned();
    assert_eq!(ended(&["certs", "--dir", &certs, "--host", "n[08-11]"], &[]).0, 0);
    let certificate = fs::read_to_string(Path::new(&certs).join("coordinator.pem")).unwrap();
    let (_, pem) = x509_parser::pem::parse_x509_pem(certificate.as_bytes()).unwrap();
    let certificate = pem.parse_x509().unwrap();
    let names = format!("{:?}", certificate.subject_alternative_name().unwrap().unwrap().value);
    for host in ["n08", "n09", "n10", "n11"] {
        assert!(names.contains(&format!("DNSName(\"{host}\")")), "{names}");
    }
    let (code, stderr) = ended(&["certs", "--dir", &certs, "--host", "n[3-1]"], &[]);
    assert_eq!((code, stderr.starts_with("error: host list `n[3-1]`: has the range")), (2, true), "{stderr}");
}

/// A process that is killed with the test, and the file that it writes its messages to.
struct Running(Child, NamedTempFile);

impl Running {
    fn start(arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let said = NamedTempFile::new().unwrap();
        let child = halfstep(arguments, variables).stderr(said.reopen().unwrap()).spawn().unwrap();
        Self(child, said)
    }

    fn said(&self) -> String {
        fs::read_to_string(self.1.path()).unwrap()
    }

    fn signal(&self, name: &str) {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    fn end(mut self) -> (i32, String) {
        let since = Instant::now();
        while self.0.try_wait().unwrap().is_none() {
            if since.elapsed() > LIMIT {
                self.0.kill().unwrap();
            }
            sleep(Duration::from_millis(10));
        }
        (self.0.wait().unwrap().code().unwrap(), self.said())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_until(what: &str, mut look: impl FnMut() -> bool) {
    let since = Instant::now();
    while !look() {
        assert!(since.elapsed() < LIMIT, "{what}");
        sleep(Duration::from_millis(20));
    }
}

#[test]
fn told_to_stop_they_hand_back_and_ask_to_be_requeued() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (state, file, place) = (path("state"), path("address"), format!("@{}", path("address")));
    let slurm = [("SLURM_JOB_ID", "17"), ("SLURMD_NODENAME", "n1"), ("SLURM_RESTART_COUNT", "1")];
    let node =
        ["node", "--slurm", "--insecure", "--threads", "1", "--device", "cpu", "--coordinator", &place];
    // The node comes first, and waits.
    let node = Running::start(&node, &slurm);
    wait_until("the node does not wait", || node.said().contains("Waiting: "));
    let coordinator =
        ["coordinator", "--slurm", "--insecure", "--listen", "127.0.0.1:0", "--state-dir", &state];
    let coordinator = Running::start(&[&coordinator[..], &["--publish", &file]].concat(), &slurm);
    wait_until("the node is not among the coordinator's", || {
        let output =
            halfstep(&["nodes", "--insecure", "--json", "--coordinator", &place], &[]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).contains("\"name\": \"n1\"")
            || String::from_utf8_lossy(&output.stdout).contains("\"name\":\"n1\"")
    });
    // As Slurm preempts: twice, and nothing comes of the second.
    for name in ["CONT", "TERM", "CONT", "TERM"] {
        node.signal(name);
    }
    let (code, said) = node.end();
    let asking = "Handed back: exit 75 asks for restart 2 of at most 20\n";
    assert_eq!((code, said.ends_with(&format!("Draining\n{asking}"))), (75, true), "{said}");
    assert!(
        said.starts_with("Slurm job 17, task 0 of 1 on n1, restarted once\nWaiting: coordinator `@"),
        "{said}"
    );
    coordinator.signal("USR1");
    let (code, said) = coordinator.end();
    assert_eq!((code, said.ends_with(asking)), (75, true), "{said}");
}

#[test]
fn a_node_without_a_coordinator_gives_up_when_asked_to() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("address");
    let place = format!("@{}", file.display());
    let node = ["node", "--insecure", "--give-up-after", "1", "--device", "cpu", "--coordinator"];
    // No file, and nobody at the address.
    for address in [place.as_str(), "127.0.0.1:9"] {
        let (code, said) = ended(&[&node[..], &[address]].concat(), &[]);
        assert_eq!(code, 75, "{said}");
        assert!(said.contains("error: no coordinator was reached for 1 s: given up\nhint: "), "{said}");
    }
    fs::write(&file, "over\n").unwrap();
    let (code, said) = ended(&[&node[..], &[&place]].concat(), &[]);
    assert_eq!((code, said.as_str()), (0, "Nothing left to do\n"));
}
