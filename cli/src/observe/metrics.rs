//! Counts and gauges of this process, as Prometheus reads them at `/metrics`.
//!
//! Libraries count through the `metrics` facade; here is who collects, and what only the process as a whole knows: its
//! build, its memory and time, the space on its disks. Looking at a disk can take for ever where it is a network's, so a
//! scrape waits for it for a moment only and shows what was seen last.
//! Not here: what is counted (`telemetry` in the crates that count).

use std::future::pending;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use halfstep_proto::transport::{Connection, Incoming};
use halfstep_proto::{Listener, VERSION, telemetry};
use metrics::{Unit, describe_gauge, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use metrics_process::Collector as Process;
use tokio::sync::Semaphore;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_stream::StreamExt;

use crate::exit::CliError;

const BUILD: &str = "halfstep_build_info";
const DISK_FREE: &str = "halfstep_disk_free_bytes";
const DISK_SIZE: &str = "halfstep_disk_size_bytes";

/// What Prometheus' text is called.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Upper bounds in seconds, of calls, transactions and tasks alike.
const BUCKETS: [f64; 14] =
    [0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 300.0, 1800.0];
/// Observations wait in memory until they are sorted into buckets, by a scrape or this often.
const SORT: Duration = Duration::from_secs(5);
/// A scrape waits so long for disks.
const DISKS: Duration = Duration::from_millis(500);

/// Folders whose disks are looked at, under these labels.
pub(crate) type Folders = Vec<(&'static str, PathBuf)>;

/// Collects what is counted, for as long as the process lives.
pub(super) struct Collector {
    handle: PrometheusHandle,
    process: Process,
    folders: Folders,
    /// At most one look at the disks at a time.
    looking: Arc<Semaphore>,
}

/// Says what this process is; of no effect before somebody collects. `device` and `engine`: a node's, as it says them.
pub(crate) fn describe(role: &'static str, device: &str, engine: &str) {
    describe_gauge!(BUILD, "Always 1: version and role of this process, device and engine of a node");
    let (device, engine) = (device.to_owned(), engine.to_owned());
    gauge!(BUILD, "version" => VERSION, "role" => role, "device" => device, "engine" => engine).set(1.0);
}

impl Collector {
    /// Begins to collect. Once per process.
    ///
    /// # Errors
    /// Internal if somebody collects already.
    pub(super) fn install(folders: Folders) -> Result<Self, CliError> {
        let builder = PrometheusBuilder::new().set_buckets(&BUCKETS).map_err(CliError::internal)?;
        let handle = builder.install_recorder().map_err(CliError::internal)?;
        telemetry::describe();
        describe_gauge!(
            DISK_FREE,
            Unit::Bytes,
            "Space that this process may still use, by what its folder is for"
        );
        describe_gauge!(
            DISK_SIZE,
            Unit::Bytes,
            "Size of the disk that a folder is on, by what the folder is for"
        );
        let process = Process::default();
        process.describe();
        Ok(Self { handle, process, folders, looking: Arc::new(Semaphore::new(1)) })
    }

    /// Answers for as long as the process lives.
    pub(super) async fn serve(self, listener: Listener) {
        let collector = Arc::new(self);
        let shown = Arc::clone(&collector);
        let metrics = move || {
            let shown = Arc::clone(&shown);
            async move { ([(CONTENT_TYPE, TEXT)], shown.show().await) }
        };
        let router = Router::new().route("/metrics", get(metrics));
        let accepting = Accepting { address: listener.address(), incoming: listener.incoming() };
        tokio::select! {
            served = async { axum::serve(accepting, router).await } => {
                if let Err(error) = served {
                    tracing::error!(%error, "metrics are not shown any more");
                }
            }
            () = sort(&collector.handle) => {}
        }
    }

    async fn show(&self) -> String {
        self.process.collect();
        if let Ok(permit) = Arc::clone(&self.looking).try_acquire_owned() {
            let folders = self.folders.clone();
            let look = tokio::task::spawn_blocking(move || {
                folders.iter().for_each(|(label, folder)| look_at(label, folder));
                drop(permit);
            });
            // Too late: the next scrape shows it.
            let _ = timeout(DISKS, look).await;
        }
        self.handle.render()
    }
}

/// A folder that is not there yet is on the disk of the one it will be in.
fn look_at(label: &'static str, folder: &std::path::Path) {
    let there = folder.ancestors().find_map(|folder| match folder.as_os_str().is_empty() {
        true => rustix::fs::statvfs(".").ok(),
        false => rustix::fs::statvfs(folder).ok(),
    });
    if let Some(disk) = there {
        let bytes = |blocks: u64| blocks.saturating_mul(disk.f_frsize) as f64;
        gauge!(DISK_FREE, "folder" => label).set(bytes(disk.f_bavail));
        gauge!(DISK_SIZE, "folder" => label).set(bytes(disk.f_blocks));
    }
}

async fn sort(handle: &PrometheusHandle) {
    let mut ticks = interval(SORT);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        handle.run_upkeep();
    }
}

/// Connections of our own transport, whose bounds hold here too, for axum.
struct Accepting {
    incoming: Incoming,
    address: String,
}

impl axum::serve::Listener for Accepting {
    type Io = Connection;
    type Addr = String;

    async fn accept(&mut self) -> (Connection, String) {
        match self.incoming.next().await {
            Some(Ok(connection)) => (connection, String::new()),
            // Neither happens while the transport accepts, and it accepts until it is dropped.
            Some(Err(_)) | None => pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<String> {
        Ok(self.address.clone())
    }
}
