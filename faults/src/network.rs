//! A coordinator and two nodes, each on a host of its own, joined by a network that can be made to fail; with TLS, as on
//! real hosts.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::bench::Bench;
use crate::capacity::Permit;
use crate::cluster::{Cluster, Launch, Settings, Submission};
use crate::job::Job;

const PORT: u16 = 7421;
/// Certificates take milliseconds; this is for a machine that is busy.
const CERTS: Duration = Duration::from_secs(60);

/// See the module. The hosts are called `coord`, `a` and `b`, the nodes as theirs.
#[derive(Debug)]
pub struct Network {
    // Processes go before the hosts they run on.
    /// The processes.
    pub cluster: Cluster,
    /// The hosts.
    pub bench: Bench,
}

impl Network {
    /// Both nodes are attached.
    ///
    /// # Errors
    /// If something fails that should work; `Ok(Err(reason))` where it cannot work.
    pub fn up(lease: Duration, permit: Permit) -> Result<Result<Self, String>> {
        let bench = match Bench::up(&["coord", "a", "b"])? {
            Ok(bench) => bench,
            Err(reason) => return Ok(Err(reason)),
        };
        let listen = SocketAddr::new(bench.ip("coord")?.parse()?, PORT);
        let settings = Settings { lease, listen: Some(listen), ..Settings::default() };
        let mut network = Self { cluster: Cluster::empty(settings, permit)?, bench };
        network.make_certs()?;
        network.start()?;
        Ok(Ok(network))
    }

    fn make_certs(&mut self) -> Result<()> {
        let certs = self.cluster.folder().join("certs");
        let folder = certs.to_string_lossy().into_owned();
        let hosts = [self.bench.ip("coord")?, self.bench.ip("a")?, self.bench.ip("b")?];
        let mut arguments = vec!["certs", "--dir", &folder];
        hosts.iter().for_each(|host| arguments.extend(["--host", host]));
        let mut made = self.cluster.bare("certs", &arguments)?;
        ensure!(made.wait(CERTS)? == 0, "certs: {}", made.stderr());
        self.cluster.settings.certs = Some(certs);
        Ok(())
    }

    fn start(&mut self) -> Result<()> {
        let launch = Launch { prefix: self.bench.prefix("coord"), ..Launch::default() };
        self.cluster.start_coordinator_as(launch)?;
        for host in ["a", "b"] {
            let address = format!("{}:{PORT}", self.bench.ip(host)?);
            let args = ["--listen", &address, "--advertise", &address].map(str::to_string).to_vec();
            let prefix = self.bench.prefix(host);
            self.cluster.start_node_as(host, Launch { args, prefix, ..Launch::default() })?;
        }
        ["a", "b"].into_iter().try_for_each(|host| self.cluster.wait_attached(host, 1).map(drop))
    }

    /// Hands in a job on the coordinator's host.
    ///
    /// # Errors
    /// If its undisturbed results cannot be made or the client does not start.
    pub fn submit(&mut self, job: &Job) -> Result<Submission> {
        job.golden()?;
        let launch = Launch { prefix: self.bench.prefix("coord"), ..Launch::default() };
        self.cluster.submit_as(job, &launch)
    }
}
