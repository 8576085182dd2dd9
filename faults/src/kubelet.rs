//! Pods of a Job on one machine, as a kubelet would start and end them, without Kubernetes.
//!
//! Every pod has a network, processes and mounts of its own: the manifest's command and environment, its user without
//! capabilities, a root that cannot be written, volumes at the manifest's paths, secrets as links that change together.
//! Substituted are the image (this machine's /usr and the binary), the DNS (a hosts file), the network policy, limits of
//! CPU and memory, and who decides what happens (a test). Root only.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::bench::Bench;
use crate::binary::binary;
use crate::logs::Logs;
use crate::manifest::{JobManifest, Mount, Volume};
use crate::process::Process;

/// Within the pod's own mounts: ROOT, then pairs of a source and a place, then `--` and the command.
const ENTER: &str = r#"
set -e
root=$1; user=$2; group=$3; shift 3
mount --make-rprivate /
mount --bind "$root" "$root"
mount --bind /usr "$root/usr"
mount --bind "$root/../bin" "$root/usr/local/bin"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -o remount,bind,ro "$root/usr"
while [ "$1" != -- ]; do
    if [ "$1" = memory ]; then mount -t tmpfs -o "mode=1777" tmpfs "$root$2"; else mount --bind "$1" "$root$2"; fi
    if [ "$3" = ro ]; then mount -o remount,bind,ro "$root$2"; fi
    shift 3
done
shift
mount -o remount,bind,ro "$root"
exec chroot "$root" setpriv --reuid "$user" --regid "$group" --groups "$group" --bounding-set=-all \
    --inh-caps=-all --no-new-privs "$@"
"#;

/// See the module.
#[derive(Debug)]
pub struct Kubelet {
    manifest: JobManifest,
    bench: Bench,
    logs: Logs,
    started: usize,
    versions: usize,
    folder: TempDir,
}

impl Kubelet {
    /// Prepares the volumes that all pods share, and room for `pods` at a time. `job`: content of the job file.
    ///
    /// # Errors
    /// If something fails that should work; `Ok(Err(reason))` where it cannot work.
    pub fn up(manifest: JobManifest, pods: u32, job: &str) -> Result<Result<Self, String>> {
        let hosts: Vec<String> = (0..pods).map(|index| index.to_string()).collect();
        let bench = match Bench::up(&hosts.iter().map(String::as_str).collect::<Vec<_>>())? {
            Ok(bench) => bench,
            Err(reason) => return Ok(Err(reason)),
        };
        let folder = TempDir::with_prefix("halfstep-pods-")?;
        // Its path ends at the pods' root, but for this folder.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        let kubelet = Self { manifest, bench, logs: Logs::default(), started: 0, versions: 0, folder };
        for name in ["claim", "config", "secret", "bin"] {
            fs::create_dir(kubelet.path(name))?;
        }
        chown(kubelet.path("claim"), Some(kubelet.manifest.user), Some(kubelet.manifest.group))?;
        fs::write(kubelet.path("config/job.toml"), job)?;
        fs::copy(binary()?, kubelet.path("bin/halfstep"))?;
        Ok(Ok(kubelet))
    }

    /// The manifest.
    pub fn manifest(&self) -> &JobManifest {
        &self.manifest
    }

    /// The folder behind the claim.
    pub fn claim(&self) -> PathBuf {
        self.path("claim")
    }

    /// All logs.
    pub fn logs(&self) -> &Logs {
        &self.logs
    }

    /// Puts these files behind the keys of the secret, all at once, as a kubelet does when a secret has changed.
    ///
    /// # Errors
    /// If there is no such file.
    pub fn set_secret(&mut self, files: &Path) -> Result<()> {
        self.versions += 1;
        let secret = |mount: &Mount| match &mount.volume {
            Volume::Secret(items, mode) => Some((items.clone(), *mode)),
            _ => None,
        };
        let (items, mode) = self.manifest.mounts.iter().find_map(secret).context("no secret")?;
        let (shown, version) = (self.path("secret"), format!("..{}", self.versions));
        fs::create_dir(shown.join(&version))?;
        for (key, path) in &items {
            let file = shown.join(&version).join(path);
            fs::copy(files.join(key), &file).with_context(|| format!("key {key}"))?;
            fs::set_permissions(&file, fs::Permissions::from_mode(mode))?;
            chown(&file, Some(0), Some(self.manifest.group))?;
            let link = shown.join(path);
            if link.symlink_metadata().is_err() {
                symlink(Path::new("..data").join(path), link)?;
            }
        }
        symlink(&version, shown.join("..data_tmp"))?;
        Ok(fs::rename(shown.join("..data_tmp"), shown.join("..data"))?)
    }

    /// Starts a pod of this index whose predecessors have failed so often.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(&mut self, index: u32, failures: u32) -> Result<Process> {
        self.start_command(index, failures, &self.manifest.command.clone())
    }

    /// Starts a pod with another command.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_command(&mut self, index: u32, failures: u32, command: &[String]) -> Result<Process> {
        self.started += 1;
        let name = format!("{:03}-pod-{index}", self.started);
        let root = self.root(&name)?;
        let mut words = self.bench.prefix(&index.to_string());
        let enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "sh", "-c", ENTER, "sh"];
        words.extend(enter.map(str::to_string));
        words.push(root.to_string_lossy().into_owned());
        words.extend([self.manifest.user, self.manifest.group].map(|id| id.to_string()));
        for mount in &self.manifest.mounts {
            words.push(self.source(mount, &name)?);
            words.push(mount.path.to_string_lossy().into_owned());
            words.push(if mount.read_only { "ro" } else { "rw" }.into());
        }
        words.push("--".into());
        words.extend(command.iter().cloned());
        let mut started = Command::new(&words[0]);
        started.args(&words[1..]).env_clear().envs(self.manifest.environment(index, failures));
        Process::start(&name, &mut started, self.folder.path(), &self.logs)
    }

    /// Ends pods as a kubelet does, together: the hook, SIGTERM, and SIGKILL when `grace` is over. Returns their exit codes.
    ///
    /// # Errors
    /// If one cannot be signalled.
    pub fn end(&self, pods: &mut [Process], grace: Duration) -> Result<Vec<i32>> {
        let hook = Duration::from_secs(self.manifest.pre_stop_seconds).min(grace);
        sleep(hook);
        pods.iter().try_for_each(Process::terminate)?;
        let killed = Instant::now() + grace.saturating_sub(hook);
        let exit = |pod: &mut Process| {
            let left = killed.saturating_duration_since(Instant::now());
            if let Some(exit) = crate::wait::until(left, || pod.ended())? {
                return Ok(exit);
            }
            pod.kill()?;
            pod.ended()?.context("it was killed")
        };
        pods.iter_mut().map(exit).collect()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What a pod sees as `/`: links and places as on this machine, and the names of all pods.
    fn root(&self, name: &str) -> Result<PathBuf> {
        let root = self.path(&format!("{name}.root"));
        fs::create_dir(&root)?;
        for place in ["usr", "proc", "dev", "etc"] {
            fs::create_dir(root.join(place))?;
        }
        for link in ["bin", "lib", "lib64"] {
            let target = fs::read_link(Path::new("/").join(link)).with_context(|| format!("/{link}"))?;
            symlink(target, root.join(link))?;
        }
        let mut hosts = String::new();
        for index in self.bench.hosts() {
            hosts += &format!("{} {}\n", self.bench.ip(index)?, self.manifest.host(index.parse()?));
        }
        fs::write(root.join("etc/hosts"), hosts)?;
        fs::write(root.join("etc/nsswitch.conf"), "hosts: files\n")?;
        for mount in &self.manifest.mounts {
            // That of memory is below /dev, which is there already.
            if !mount.path.starts_with("/dev") {
                fs::create_dir_all(root.join(mount.path.strip_prefix("/")?))?;
            }
        }
        Ok(root)
    }

    fn source(&self, mount: &Mount, name: &str) -> Result<String> {
        let path = match &mount.volume {
            Volume::Memory => return Ok("memory".into()),
            Volume::Claim => self.path("claim"),
            Volume::Config => self.path("config"),
            Volume::Secret(..) => self.path("secret"),
            Volume::Scratch => {
                let scratch = self.path(&format!("{name}.scratch"));
                fs::create_dir(&scratch)?;
                chown(&scratch, Some(self.manifest.user), Some(self.manifest.group))?;
                scratch
            }
        };
        Ok(path.to_string_lossy().into_owned())
    }
}
