//! What the files of a finished job say: objectives of layers, seconds of phases, and whether two folders hold the same.
//!
//! Not here: measuring models (`halfstep eval`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

/// The one file that may differ between runs.
const TIMING: &str = "timing.json";

/// Squared output errors of the layers that were solved: with their roundings, and with every weight rounded to nearest.
pub(crate) type Objectives = BTreeMap<String, (f64, f64)>;

/// Phases of a job.
pub(crate) struct Timing {
    /// Names and wall-clock seconds, as far as threads shared the work evenly.
    pub(crate) phases: [(&'static str, f64); 4],
    /// Most memory of the process, 0 where the system does not say.
    pub(crate) host_bytes: u64,
}

impl Timing {
    /// Of a results folder.
    ///
    /// # Errors
    /// If it has no readable `timing.json`.
    pub(crate) fn read(folder: &Path) -> Result<Self, String> {
        let timing = json(&folder.join(TIMING))?;
        let of = |key: &str| timing[key].as_f64().unwrap_or(0.0);
        let threads = of("threads").max(1.0);
        let phases = ["forward", "statistics", "solve", "refine"]
            .map(|name| (name, of(&format!("{name}_thread_seconds")) / threads));
        Ok(Self { phases, host_bytes: timing["peak_resident_bytes"].as_u64().unwrap_or(0) })
    }

    /// `forward 3.2, statistics 2.1, ..` in seconds.
    pub(crate) fn sentence(&self) -> String {
        let said: Vec<String> =
            self.phases.iter().map(|(name, seconds)| format!("{name} {seconds:.1}")).collect();
        format!("{} s", said.join(", "))
    }
}

/// Bytes in GiB for a remark, or that nobody knows.
pub(crate) fn gib(bytes: Option<u64>) -> String {
    bytes.map_or("-".to_owned(), |bytes| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)))
}

/// Of a results folder.
///
/// # Errors
/// If its `report.json` cannot be read or names no layer that was solved.
pub(crate) fn objectives(folder: &Path) -> Result<Objectives, String> {
    let path = folder.join("report.json");
    let report = json(&path)?;
    let of_layer = |layer: &Value| {
        let of = |key: &str| layer["solved"][key].as_f64();
        Some((layer["name"].as_str()?.to_owned(), (of("objective")?, of("objective_nearest")?)))
    };
    let all: Objectives = report["layers"].as_array().into_iter().flatten().filter_map(of_layer).collect();
    match all.is_empty() {
        true => Err(format!("{}: no layer was solved", path.display())),
        false => Ok(all),
    }
}

/// Geometric mean over objectives in ratio to nearest rounding's.
pub(crate) fn over_nearest(objectives: &Objectives) -> f64 {
    mean_ratio(objectives.values().copied())
}

/// Geometric mean over layers of one job's objectives in ratio to another's.
///
/// # Errors
/// If not the same layers were solved.
pub(crate) fn over(these: &Objectives, those: &Objectives) -> Result<f64, String> {
    if let Some(name) = these
        .keys()
        .chain(those.keys())
        .find(|name| !(these.contains_key(*name) && those.contains_key(*name)))
    {
        return Err(format!("layer `{name}` was solved on one device and not on the other"));
    }
    Ok(mean_ratio(these.values().zip(those.values()).map(|((one, _), (other, _))| (*one, *other))))
}

/// Objectives of 0 count as tiny ones.
fn mean_ratio(pairs: impl Iterator<Item = (f64, f64)>) -> f64 {
    let tiny = |value: f64| value.max(1e-30);
    let (count, sum) = pairs
        .fold((0.0, 0.0), |(count, sum), (one, other)| (count + 1.0, sum + (tiny(one) / tiny(other)).ln()));
    f64::exp(sum / count)
}

/// How many files two folders hold, and which of them are not the same byte for byte; `timing.json` does not count.
///
/// # Errors
/// If a folder or file cannot be read.
pub(crate) fn different(one: &Path, other: &Path) -> Result<(usize, Vec<String>), String> {
    let all: BTreeSet<String> = names(one)?.union(&names(other)?).cloned().collect();
    let mut found = Vec::new();
    for name in &all {
        let (one, other) = (one.join(name), other.join(name));
        let same = one.is_file() && other.is_file() && bytes(&one)? == bytes(&other)?;
        if !same {
            found.push(name.clone());
        }
    }
    Ok((all.len(), found))
}

fn names(folder: &Path) -> Result<BTreeSet<String>, String> {
    let entries = std::fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.map(|entry| entry.file_name().to_string_lossy().into_owned())
    };
    let mut all = entries.map(name).collect::<Result<BTreeSet<_>, _>>().map_err(|error| error.to_string())?;
    all.remove(TIMING);
    Ok(all)
}

fn bytes(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn json(path: &Path) -> Result<Value, String> {
    serde_json::from_slice(&bytes(path)?).map_err(|error| format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_geometric_means_over_the_same_layers() {
        let of = |pairs: &[(&str, f64, f64)]| -> Objectives {
            pairs.iter().map(|(name, now, nearest)| ((*name).to_owned(), (*now, *nearest))).collect()
        };
        let (these, those) =
            (of(&[("a", 2.0, 4.0), ("b", 1.0, 8.0)]), of(&[("a", 1.0, 4.0), ("b", 2.0, 8.0)]));
        assert!((over(&these, &those).unwrap() - 1.0).abs() < 1e-12);
        assert!((over_nearest(&these) - 0.25).abs() < 1e-12);
        let error = over(&these, &of(&[("a", 1.0, 4.0)])).unwrap_err();
        assert!(error.starts_with("layer `b` was solved on one"), "{error}");
        assert!(over_nearest(&of(&[("a", 0.0, 0.0)])).is_finite());
    }

    #[test]
    fn files_that_differ_or_are_missing_are_named_and_times_are_not_compared() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (name, in_one, in_other) in [
            ("model.onnx", Some("same"), Some("same")),
            ("model.encodings", Some("this"), Some("that")),
            ("report.json", None, Some("{}")),
            (TIMING, Some("1"), Some("2")),
        ] {
            for (folder, text) in [(&one, in_one), (&other, in_other)] {
                if let Some(text) = text {
                    std::fs::write(folder.path().join(name), text).unwrap();
                }
            }
        }
        let (files, found) = different(one.path(), other.path()).unwrap();
        assert_eq!((files, found), (3, vec!["model.encodings".to_owned(), "report.json".to_owned()]));
        assert_eq!(different(one.path(), one.path()).unwrap(), (2, Vec::new()));
    }

    #[test]
    fn phases_are_wall_clock_and_layers_that_were_kept_have_no_objective() {
        let folder = tempfile::tempdir().unwrap();
        let timing = r#"{"threads": 4, "forward_thread_seconds": 8.0, "peak_resident_bytes": 3221225472}"#;
        std::fs::write(folder.path().join(TIMING), timing).unwrap();
        let timing = Timing::read(folder.path()).unwrap();
        assert_eq!(timing.sentence(), "forward 2.0, statistics 0.0, solve 0.0, refine 0.0 s");
        assert_eq!((gib(Some(timing.host_bytes)), gib(None)), ("3.0 GiB".to_owned(), "-".to_owned()));
        let report = r#"{"layers": [{"name": "a", "outcome": "solved", "solved": {"objective": 1.0, "objective_nearest": 2.0}},
            {"name": "b", "outcome": "kept", "reason": "recurrent"}]}"#;
        std::fs::write(folder.path().join("report.json"), report).unwrap();
        let found = objectives(folder.path()).unwrap();
        assert_eq!(found, BTreeMap::from([("a".to_owned(), (1.0, 2.0))]));
        std::fs::write(folder.path().join("report.json"), "{}").unwrap();
        assert!(objectives(folder.path()).unwrap_err().ends_with("no layer was solved"));
    }
}
