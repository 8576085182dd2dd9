//! One process of the real binary, with what it says; killed when dropped.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test file uses a part; a test may stop"
)]

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long anything may take that is waited for.
const LIMIT: Duration = Duration::from_secs(60);

/// See the module.
pub struct Process {
    child: Child,
    said: Arc<Mutex<String>>,
    stderr: Option<JoinHandle<()>>,
    stdout: Option<JoinHandle<String>>,
}

impl Process {
    /// The binary with these arguments and none of the caller's settings.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_with(arguments, &[])
    }

    /// Also with these variables.
    pub fn start_with(arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_halfstep"));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HALFSTEP_")) {
            command.env_remove(name);
        }
        let mut child = command.envs(variables.iter().copied()).spawn().unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let (err, mut out, lines) =
            (child.stderr.take().unwrap(), child.stdout.take().unwrap(), Arc::clone(&said));
        let stderr = std::thread::spawn(move || {
            for line in BufReader::new(err).lines().map_while(Result::ok) {
                let mut said = lines.lock().unwrap();
                said.push_str(&line);
                said.push('\n');
            }
        });
        let stdout = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = out.read_to_string(&mut text);
            text
        });
        Self { child, said, stderr: Some(stderr), stdout: Some(stdout) }
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// The rest of the first line of standard error that begins so, up to a space; waits for it. Of a line of JSON its
    /// message.
    pub fn said(&mut self, beginning: &str) -> String {
        let began = Instant::now();
        loop {
            let text = self.stderr();
            let rest = |line: &str| {
                let record: Option<serde_json::Value> = serde_json::from_str(line).ok();
                let message = record.map(|record| record["message"].as_str().unwrap_or("").to_owned());
                let line = message.unwrap_or_else(|| line.to_owned());
                Some(line.strip_prefix(beginning)?.split(' ').next().unwrap().to_owned())
            };
            if let Some(rest) = text.lines().find_map(rest) {
                return rest;
            }
            let ended = self.child.try_wait().unwrap();
            assert!(
                ended.is_none() && began.elapsed() < LIMIT,
                "`{beginning}` was not said ({ended:?}): {text}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// As `kill` does.
    pub fn signal(&self, signal: &str) {
        assert!(
            Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap().success()
        );
    }

    /// Its exit code; none if a signal ended it.
    pub fn wait(&mut self, limit: Duration) -> Option<i32> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                if let Some(stderr) = self.stderr.take() {
                    stderr.join().unwrap();
                }
                return status.code();
            }
            assert!(began.elapsed() < limit, "still there after {limit:?}: {}", self.stderr());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Exit code and standard output of a process that ends by itself.
    pub fn finish(mut self) -> (Option<i32>, String) {
        let code = self.wait(LIMIT);
        let out = self.stdout.take().map_or_else(String::new, |out| out.join().unwrap());
        (code, out)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
