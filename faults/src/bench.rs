//! Hosts on one machine: network namespaces on a bridge of their own, and faults on their links. Root only.
//!
//! The bridge lives in a namespace too, so the machine's own network gets no interface, route or rule. A fault is a
//! table of nftables or a queueing discipline inside the namespace of the host concerned; healing removes it.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::binary::{install, is_root};

const TABLE: &str = "halfstep_fault";

/// What is done to a host's link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkFault {
    /// Nothing in, nothing out, no answer: a cable that was pulled.
    Partition,
    /// It hears, but nobody hears it.
    Mute,
    /// Every TCP segment is answered by a reset.
    Reset,
    /// This percentage of what arrives is dropped.
    Loss(u8),
    /// This many kilobits a second, each way.
    Slow(u32),
}

/// Hosts that can reach each other until a fault says otherwise; gone when dropped, with everything that runs in them.
#[derive(Debug)]
pub struct Bench {
    tag: String,
    hosts: Vec<String>,
}

impl Bench {
    /// Makes these hosts.
    ///
    /// # Errors
    /// If something fails that should work; `Ok(Err(reason))` where it cannot work.
    pub fn up(hosts: &[&str]) -> Result<Result<Self, String>> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        if !is_root() {
            return Ok(Err("network namespaces need root".into()));
        }
        for (program, package) in [("ip", "iproute2"), ("tc", "iproute2"), ("nft", "nftables")] {
            if let Err(reason) = install(program, package) {
                return Ok(Err(reason));
            }
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let tag = format!("hs{:x}-{number}", std::process::id());
        if let Err(error) = run("ip", &["netns", "add", &format!("{tag}-sw")]) {
            return Ok(Err(format!("network namespaces cannot be made: {error:#}")));
        }
        let bench = Self { tag, hosts: hosts.iter().map(|host| (*host).to_string()).collect() };
        bench.connect()?;
        Ok(Ok(bench))
    }

    fn connect(&self) -> Result<()> {
        let switch = self.namespace("sw");
        run("ip", &["-n", &switch, "link", "add", "bridge", "type", "bridge"])?;
        run("ip", &["-n", &switch, "link", "set", "bridge", "up"])?;
        for host in &self.hosts {
            let (space, port) = (self.namespace(host), format!("to-{host}"));
            run("ip", &["netns", "add", &space])?;
            run("ip", &["-n", &space, "link", "set", "lo", "up"])?;
            let pair = [
                "link", "add", &port, "netns", &switch, "type", "veth", "peer", "name", "eth0", "netns",
                &space,
            ];
            run("ip", &pair)?;
            run("ip", &["-n", &switch, "link", "set", &port, "master", "bridge", "up"])?;
            run("ip", &["-n", &space, "addr", "add", &format!("{}/24", self.ip(host)?), "dev", "eth0"])?;
            run("ip", &["-n", &space, "link", "set", "eth0", "up"])?;
        }
        Ok(())
    }

    /// Names of the hosts.
    pub fn hosts(&self) -> impl Iterator<Item = &str> {
        self.hosts.iter().map(String::as_str)
    }

    /// Name of a host's namespace.
    pub fn namespace(&self, host: &str) -> String {
        format!("{}-{host}", self.tag)
    }

    /// Words that run a command on a host.
    pub fn prefix(&self, host: &str) -> Vec<String> {
        ["ip", "netns", "exec", &self.namespace(host)].map(str::to_string).to_vec()
    }

    /// Address of a host.
    ///
    /// # Errors
    /// If there is no such host.
    pub fn ip(&self, host: &str) -> Result<String> {
        let index =
            self.hosts.iter().position(|name| name == host).with_context(|| format!("no host {host}"))?;
        Ok(format!("10.199.7.{}", index + 1))
    }

    /// What runs on a host, daemons included.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn pids(&self, host: &str) -> Result<Vec<String>> {
        let output = Command::new("ip").args(["netns", "pids", &self.namespace(host)]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).split_whitespace().map(str::to_string).collect())
    }

    /// SIGKILL to all that runs on a host, until nothing does.
    ///
    /// # Errors
    /// If something remains.
    pub fn kill_all(&self, host: &str) -> Result<()> {
        for _ in 0..100 {
            let pids = self.pids(host)?;
            if pids.is_empty() {
                return Ok(());
            }
            let _ = Command::new("kill").arg("-KILL").args(&pids).stderr(Stdio::null()).status()?;
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("{host}: processes remain")
    }

    /// Breaks a host's link.
    ///
    /// # Errors
    /// If the fault cannot be made.
    pub fn apply(&self, host: &str, fault: NetworkFault) -> Result<()> {
        let (input, output) = match fault {
            NetworkFault::Partition => ("drop", "drop"),
            NetworkFault::Mute => ("", "drop"),
            NetworkFault::Reset => {
                ("meta l4proto tcp reject with tcp reset", "meta l4proto tcp reject with tcp reset")
            }
            NetworkFault::Loss(percent) => {
                return self.rules(host, -300, &format!("numgen random mod 100 < {percent} drop"), "");
            }
            NetworkFault::Slow(kilobits) => return self.slow(host, kilobits),
        };
        // Rejecting is allowed in the ordinary hooks only.
        self.rules(host, if fault == NetworkFault::Reset { 0 } else { -300 }, input, output)
    }

    /// Mends a host's link.
    pub fn heal(&self, host: &str) {
        let (space, switch, port) = (self.namespace(host), self.namespace("sw"), format!("to-{host}"));
        let _ = run("ip", &["netns", "exec", &space, "nft", "delete", "table", "inet", TABLE]);
        let _ = run("ip", &["netns", "exec", &space, "tc", "qdisc", "del", "dev", "eth0", "root"]);
        let _ = run("ip", &["netns", "exec", &switch, "tc", "qdisc", "del", "dev", &port, "root"]);
    }

    fn rules(&self, host: &str, priority: i32, input: &str, output: &str) -> Result<()> {
        let chain = |hook: &str, interface: &str, rule: &str| {
            format!(
                "chain {hook} {{ type filter hook {hook} priority {priority}; {interface} lo accept; {rule}; }}"
            )
        };
        let mut table = format!("table inet {TABLE} {{\n");
        for (hook, interface, rule) in [("input", "iif", input), ("output", "oif", output)] {
            if !rule.is_empty() {
                table += &chain(hook, interface, rule);
                table.push('\n');
            }
        }
        table.push_str("}\n");
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(host), "nft", "-f", "-"]).stdin(Stdio::piped());
        let mut child = command.stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("nft has no input")?.write_all(table.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "nft: {}\n{table}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn slow(&self, host: &str, kilobits: u32) -> Result<()> {
        let rate = format!("{kilobits}kbit");
        for (space, device) in
            [(self.namespace(host), "eth0".to_string()), (self.namespace("sw"), format!("to-{host}"))]
        {
            let shape = ["tc", "qdisc", "replace", "dev", &device, "root", "tbf"];
            let bounds = ["rate", &rate, "burst", "16kb", "latency", "300ms"];
            run("ip", &[&["netns", "exec", &space][..], &shape, &bounds].concat())?;
        }
        Ok(())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for host in self.hosts.iter().map(String::as_str).chain(["sw"]) {
            let _ = run("ip", &["netns", "del", &self.namespace(host)]);
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output()?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether `from` gets any answer from `to`: nothing listens there, so a refusal is one.
    fn reaches(bench: &Bench, from: &str, to: &str) -> bool {
        let knock = format!("exec 3<>/dev/tcp/{}/9", bench.ip(to).unwrap());
        let words = bench.prefix(from);
        let mut command = Command::new(&words[0]);
        let output =
            command.args(&words[1..]).args(["timeout", "0.5", "bash", "-c", &knock]).output().unwrap();
        output.status.code() == Some(1)
    }

    #[test]
    #[allow(clippy::print_stderr, reason = "a skipped test says why")]
    fn faults_cut_what_they_say_and_healing_mends_it() {
        let bench = match Bench::up(&["a", "b", "c"]).unwrap() {
            Ok(bench) => bench,
            Err(reason) => return eprintln!("SKIPPED: {reason}"),
        };
        assert!(reaches(&bench, "a", "b"));
        for fault in [NetworkFault::Partition, NetworkFault::Mute] {
            bench.apply("b", fault).unwrap();
            assert!(!reaches(&bench, "a", "b") && !reaches(&bench, "b", "a"), "{fault:?}");
            assert!(reaches(&bench, "a", "c"), "{fault:?}");
            bench.heal("b");
            assert!(reaches(&bench, "a", "b") && reaches(&bench, "b", "a"), "{fault:?}");
        }
        for fault in [NetworkFault::Reset, NetworkFault::Loss(20), NetworkFault::Slow(1000)] {
            bench.apply("b", fault).unwrap();
            bench.heal("b");
            assert!(reaches(&bench, "a", "b"), "{fault:?}");
        }
    }
}
