//! One child process in a process group of its own, with its output in files.
//!
//! Killed with its group when dropped, so that no test leaves anything behind.

use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::logs::Logs;
use crate::wait::until;

/// A signal's number is added to this, as shells do.
const SIGNALLED: i32 = 128;

/// A running or finished child.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pid: u32,
    started: Instant,
    stdout: PathBuf,
    stderr: PathBuf,
    logs: Logs,
    ended: Option<i32>,
}

impl Process {
    /// Starts `command`; its output goes to `NAME.out` and `NAME.err` in `folder`, which must be new names.
    ///
    /// # Errors
    /// If files or process cannot be made.
    pub fn start(name: &str, command: &mut Command, folder: &Path, logs: &Logs) -> Result<Self> {
        let stdout = folder.join(format!("{name}.out"));
        let stderr = folder.join(format!("{name}.err"));
        let create = |path: &Path| File::create_new(path).with_context(|| format!("log {}", path.display()));
        command.stdin(Stdio::null()).stdout(create(&stdout)?).stderr(create(&stderr)?).process_group(0);
        let child = command.spawn().with_context(|| format!("{name}: cannot start {command:?}"))?;
        logs.add(&format!("{name} stdout"), &stdout);
        logs.add(&format!("{name} stderr"), &stderr);
        let (pid, logs) = (child.id(), logs.clone());
        Ok(Self { name: name.into(), child, pid, started: Instant::now(), stdout, stderr, logs, ended: None })
    }

    /// The name it was started under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Since it was started.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        text(&self.stderr)
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> String {
        text(&self.stdout)
    }

    /// SIGKILL, and waits until it is gone.
    ///
    /// # Errors
    /// If it cannot be signalled or does not go.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.wait(Duration::from_secs(10)).map(drop)
    }

    /// SIGTERM.
    ///
    /// # Errors
    /// If it cannot be signalled.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// SIGSTOP: it neither runs nor answers, its connections stay open.
    ///
    /// # Errors
    /// If it cannot be signalled.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// If it cannot be signalled.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        if self.ended.is_some() {
            return Ok(());
        }
        let group = Pid::from_raw(self.pid.cast_signed()).context("process id is 0")?;
        match kill_process_group(group, signal) {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            sent => sent.with_context(|| format!("{}: cannot be signalled", self.name)),
        }
    }

    /// Its exit code if it has ended; 128 + n if signal n ended it.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn ended(&mut self) -> Result<Option<i32>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?.map(code);
        }
        Ok(self.ended)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it still runs after `limit`: carries the tails of all logs.
    pub fn wait(&mut self, limit: Duration) -> Result<i32> {
        match until(limit, || self.ended())? {
            Some(code) => Ok(code),
            None => self.expired(&format!("to end within {limit:?}")),
        }
    }

    /// Waits for a line on standard error that contains `words`; returns it.
    ///
    /// # Errors
    /// If it does not come within `limit` or the process ends without it: carries the tails of all logs.
    pub fn wait_line(&mut self, words: &str, limit: Duration) -> Result<String> {
        self.wait_lines(words, 1, limit)
    }

    /// Waits for the `count`th line on standard error that contains `words`; returns it.
    ///
    /// # Errors
    /// As [`wait_line`](Self::wait_line).
    pub fn wait_lines(&mut self, words: &str, count: usize, limit: Duration) -> Result<String> {
        let stderr = self.stderr.clone();
        let found = until(limit, || {
            let ended = self.ended()?.is_some();
            let text = text(&stderr);
            let line = text.lines().filter(|line| line.contains(words)).nth(count - 1).map(str::to_string);
            Ok(if line.is_none() && ended { Some(None) } else { line.map(Some) })
        })?;
        match found.flatten() {
            Some(line) => Ok(line),
            None => self.expired(&format!("to say `{words}` {count} times within {limit:?}")),
        }
    }

    /// Fails, with the tails of all logs, because this process was expected to do `what` and has not.
    ///
    /// # Errors
    /// Always.
    pub fn expired<T>(&self, what: &str) -> Result<T> {
        let state = self.ended.map_or("still runs".to_string(), |code| format!("ended with {code}"));
        bail!("{}: expected {what}, {state} after {:.1?}\n{}", self.name, self.age(), self.logs.tails())
    }

    /// Memory it has now, in bytes.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kibibytes: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
        Ok(kibibytes * 1024)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.signal(Signal::KILL);
        let _ = self.child.wait();
    }
}

fn code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| SIGNALLED + signal)).unwrap_or(-1)
}

fn text(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    fn shell(script: &str, folder: &TempDir) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::start("sh", &mut command, folder.path(), &Logs::default()).unwrap()
    }

    #[test]
    fn an_expired_wait_shows_the_log() {
        let folder = TempDir::new().unwrap();
        let mut process = shell("echo working >&2; sleep 60", &folder);
        process.wait_line("working", Duration::from_secs(5)).unwrap();
        let error = process.wait(Duration::from_millis(20)).unwrap_err().to_string();
        assert!(error.contains("still runs") && error.contains("working"), "{error}");
    }

    #[test]
    fn a_process_that_ends_early_fails_the_wait_at_once() {
        let folder = TempDir::new().unwrap();
        let mut process = shell("exit 7", &folder);
        let error = process.wait_line("never", Duration::from_secs(60)).unwrap_err().to_string();
        assert!(error.contains("ended with 7"), "{error}");
    }

    #[test]
    fn a_drop_kills_the_whole_group() {
        let folder = TempDir::new().unwrap();
        let mut process = shell("sleep 60 & echo $! >&2; wait", &folder);
        let line = until(Duration::from_secs(5), || Ok(process.stderr().lines().next().map(str::to_string)));
        let grandchild = line.unwrap().unwrap();
        drop(process);
        let gone = || {
            let status = fs::read_to_string(format!("/proc/{grandchild}/stat")).unwrap_or_default();
            Ok((status.is_empty() || status.contains(") Z ")).then_some(()))
        };
        assert!(until(Duration::from_secs(5), gone).unwrap().is_some());
        process = shell_again(&folder);
        process.kill().unwrap();
        assert_eq!(process.ended().unwrap(), Some(137));
    }

    fn shell_again(folder: &TempDir) -> Process {
        let other = folder.path().join("again");
        fs::create_dir(&other).unwrap();
        let mut command = Command::new("sleep");
        command.arg("60");
        Process::start("sleep", &mut command, &other, &Logs::default()).unwrap()
    }
}
