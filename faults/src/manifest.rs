//! A Kubernetes Job as its manifest says, as far as a rehearsal without a cluster needs it.
//!
//! Read from what `kubectl kustomize` renders. What is not understood is an error: a rehearsal of something else proves
//! nothing. Not here: carrying it out (`kubelet`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Names the Python that has the packages of k8s/requirements.txt.
const PYTHON: &str = "HALFSTEP_K8S_PYTHON";
const TO_JSON: &str =
    "import json, sys, yaml; json.dump([d for d in yaml.safe_load_all(sys.stdin) if d], sys.stdout)";
const FAILURES: &str = "metadata.annotations['batch.kubernetes.io/job-index-failure-count']";

/// What the Job controller does about a pod that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consequence {
    /// Another takes its place.
    Ignored,
    /// Another takes its place, and its index has one failure more.
    Counted,
    /// The whole Job has failed.
    FailsJob,
    /// The index is done.
    Succeeded,
}

/// Where files of a pod come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Volume {
    /// The claim, which all pods share.
    Claim,
    /// The config map.
    Config,
    /// The secret: its keys and the files they become, with their mode.
    Secret(Vec<(String, String)>, u32),
    /// Empty when the pod starts.
    Scratch,
    /// Same, in memory.
    Memory,
}

/// A place in a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Absolute.
    pub path: PathBuf,
    /// Whether the pod may only read there.
    pub read_only: bool,
    /// What is there.
    pub volume: Volume,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct JobManifest {
    /// Its name and the service's: pods are NAME-INDEX.SERVICE.
    pub name: String,
    /// See `name`.
    pub service: String,
    /// How many pods.
    pub completions: u32,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Places.
    pub mounts: Vec<Mount>,
    /// Whom it runs as.
    pub user: u32,
    /// Its group, and that of its volumes.
    pub group: u32,
    /// Seconds from the decision to end it until it is killed.
    pub grace_seconds: u64,
    /// Seconds of these before it is asked to stop.
    pub pre_stop_seconds: u64,
    env: Vec<(String, Option<String>)>,
    rules: Vec<Value>,
}

impl JobManifest {
    /// Renders a folder of `k8s` and reads its Job.
    ///
    /// # Errors
    /// If it is not understood; `Ok(Err(reason))` where there are no tools to render it.
    pub fn render(folder: &Path) -> Result<Result<Self, String>> {
        let Some(python) = std::env::var_os(PYTHON) else {
            return Ok(Err(format!("{PYTHON} names no Python with the packages of k8s/requirements.txt")));
        };
        let kubectl = std::env::var_os("KUBECTL").unwrap_or("kubectl".into());
        let rendered = match Command::new(&kubectl).arg("kustomize").arg(folder).output() {
            Ok(output) => output,
            Err(error) => return Ok(Err(format!("{}: {error}", kubectl.display()))),
        };
        ensure!(rendered.status.success(), "{}", String::from_utf8_lossy(&rendered.stderr));
        let mut reader = Command::new(&python);
        reader.args(["-c", TO_JSON]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = reader.spawn().with_context(|| format!("{PYTHON}: {}", python.display()))?;
        std::io::Write::write_all(&mut child.stdin.take().context("no input")?, &rendered.stdout)?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{}: cannot read YAML", python.display());
        let objects: Vec<Value> = serde_json::from_slice(&output.stdout)?;
        let job = objects.iter().find(|object| object["kind"] == "Job").context("there is no Job")?;
        Self::read(job).map(Ok)
    }

    fn read(job: &Value) -> Result<Self> {
        let (spec, pod) = (&job["spec"], &job["spec"]["template"]["spec"]);
        let [container] = pod["containers"].as_array().context("no containers")?.as_slice() else {
            bail!("expected one container");
        };
        let number = |value: &Value| value.as_u64().with_context(|| format!("{value} is no number"));
        let mut command = words(&container["command"])?;
        command.extend(words(&container["args"])?);
        let volumes = volumes(pod)?;
        let mounts = container["volumeMounts"].as_array().context("no mounts")?.iter().map(|mount| {
            let volume = volumes.get(&text(&mount["name"])?).context("a mount without a volume")?.clone();
            let read_only = mount["readOnly"].as_bool().unwrap_or(false);
            Ok(Mount { path: text(&mount["mountPath"])?.into(), read_only, volume })
        });
        Ok(Self {
            name: text(&job["metadata"]["name"])?,
            service: text(&pod["subdomain"])?,
            completions: u32::try_from(number(&spec["completions"])?)?,
            command,
            mounts: mounts.collect::<Result<_>>()?,
            user: u32::try_from(number(&pod["securityContext"]["runAsUser"])?)?,
            group: u32::try_from(number(&pod["securityContext"]["fsGroup"])?)?,
            grace_seconds: number(&pod["terminationGracePeriodSeconds"])?,
            pre_stop_seconds: number(&container["lifecycle"]["preStop"]["sleep"]["seconds"])?,
            env: container["env"]
                .as_array()
                .context("no env")?
                .iter()
                .map(variable)
                .collect::<Result<_>>()?,
            rules: spec["podFailurePolicy"]["rules"].as_array().context("no podFailurePolicy")?.clone(),
        })
    }

    /// The name that a pod has in the DNS.
    pub fn host(&self, index: u32) -> String {
        format!("{}-{index}.{}", self.name, self.service)
    }

    /// The environment of a pod, what the Job and the kubelet add to it included.
    pub fn environment(&self, index: u32, failures: u32) -> Vec<(String, String)> {
        let own = |(name, value): &(String, Option<String>)| {
            (name.clone(), value.clone().unwrap_or_else(|| failures.to_string()))
        };
        let mut env: Vec<_> = self.env.iter().map(own).collect();
        env.push(("JOB_COMPLETION_INDEX".into(), index.to_string()));
        env.push(("HOSTNAME".into(), format!("{}-{index}", self.name)));
        env.push(("PATH".into(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into()));
        env
    }

    /// What comes of a pod that ended with `exit`; `disrupted`: it was evicted, preempted or drained.
    pub fn consequence(&self, exit: i32, disrupted: bool) -> Consequence {
        if exit == 0 {
            return Consequence::Succeeded;
        }
        for rule in &self.rules {
            let condition = |condition: &Value| disrupted && condition["type"] == "DisruptionTarget";
            let conditions = rule["onPodConditions"].as_array();
            let codes = &rule["onExitCodes"];
            let listed = codes["values"].as_array().is_some_and(|values| values.contains(&exit.into()));
            let by_code = !codes.is_null() && listed == (codes["operator"] == "In");
            if by_code || conditions.is_some_and(|all| all.iter().any(condition)) {
                return match rule["action"].as_str() {
                    Some("Ignore") => Consequence::Ignored,
                    Some("FailJob") => Consequence::FailsJob,
                    _ => Consequence::Counted,
                };
            }
        }
        Consequence::Counted
    }
}

fn text(value: &Value) -> Result<String> {
    value.as_str().map(str::to_string).with_context(|| format!("{value} is no text"))
}

fn words(value: &Value) -> Result<Vec<String>> {
    value.as_array().context("no arguments")?.iter().map(text).collect()
}

/// A value of its own, or none for the count of failures.
fn variable(entry: &Value) -> Result<(String, Option<String>)> {
    let name = text(&entry["name"])?;
    match (&entry["value"], &entry["valueFrom"]["fieldRef"]["fieldPath"]) {
        (Value::String(value), _) => Ok((name, Some(value.clone()))),
        (_, Value::String(path)) if path == FAILURES => Ok((name, None)),
        _ => bail!("variable {name} has a source that is not understood: {entry}"),
    }
}

fn volumes(pod: &Value) -> Result<BTreeMap<String, Volume>> {
    let of = |volume: &Value| {
        let kind = if volume["persistentVolumeClaim"].is_object() {
            Volume::Claim
        } else if volume["configMap"].is_object() {
            Volume::Config
        } else if volume["secret"].is_object() {
            let mode = volume["secret"]["defaultMode"].as_u64().context("no mode")?;
            let items = volume["secret"]["items"].as_array().context("no items")?;
            let pair = |item: &Value| Ok((text(&item["key"])?, text(&item["path"])?));
            Volume::Secret(items.iter().map(pair).collect::<Result<_>>()?, u32::try_from(mode)?)
        } else if volume["emptyDir"]["medium"] == "Memory" {
            Volume::Memory
        } else if volume["emptyDir"].is_object() {
            Volume::Scratch
        } else {
            bail!("a volume that is not understood: {volume}")
        };
        Ok((text(&volume["name"])?, kind))
    };
    pod["volumes"].as_array().context("no volumes")?.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rules_are_tried_in_their_order() {
        let rules = json!([
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "FailJob", "onExitCodes": {"containerName": "halfstep", "operator": "In", "values": [65, 78]}},
        ]);
        let job = json!({
            "metadata": {"name": "a"},
            "spec": {"completions": 1, "podFailurePolicy": {"rules": rules}, "template": {"spec": {
                "subdomain": "b", "terminationGracePeriodSeconds": 60, "volumes": [],
                "securityContext": {"runAsUser": 1, "fsGroup": 2},
                "containers": [{"command": ["x"], "args": ["y"], "env": [], "volumeMounts": [],
                    "lifecycle": {"preStop": {"sleep": {"seconds": 2}}}}],
            }}},
        });
        let job = JobManifest::read(&job).unwrap();
        assert_eq!((job.host(3), job.command.clone()), ("a-3.b".into(), vec!["x".into(), "y".into()]));
        for (exit, disrupted, expected) in [
            (0, false, Consequence::Succeeded),
            (75, true, Consequence::Ignored),
            (78, true, Consequence::Ignored),
            (78, false, Consequence::FailsJob),
            (75, false, Consequence::Counted),
            (137, false, Consequence::Counted),
        ] {
            assert_eq!(job.consequence(exit, disrupted), expected, "{exit} {disrupted}");
        }
    }
}
