//! The direction of knowledge between crates and what is absent where, from `cargo metadata` and the sources.
//!
//! Each rule is an absence, so it holds until somebody breaks it. Changing a rule here needs a reason in `docs/adr`.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, MetadataCommand, Package};

/// Who may depend on whom, among our crates. `halfstep-benches` may use all.
const MAY_USE: [(&str, &[&str]); 12] = [
    ("halfstep-quant", &[]),
    ("halfstep-compute", &[]),
    ("halfstep-model", &["halfstep-quant"]),
    ("halfstep-work", &["halfstep-quant"]),
    ("halfstep-proto", &["halfstep-quant", "halfstep-work"]),
    ("halfstep-solver", &["halfstep-compute", "halfstep-quant"]),
    ("halfstep-exec", &["halfstep-compute", "halfstep-model", "halfstep-quant"]),
    (
        "halfstep-agent",
        &[
            "halfstep-compute",
            "halfstep-exec",
            "halfstep-model",
            "halfstep-proto",
            "halfstep-quant",
            "halfstep-solver",
            "halfstep-work",
        ],
    ),
    ("halfstep-coordinator", &["halfstep-model", "halfstep-proto", "halfstep-quant", "halfstep-work"]),
    // Only sees what users see: processes, files, sockets.
    ("halfstep-faults", &[]),
    (
        "halfstep-fuzz",
        &[
            "halfstep-agent",
            "halfstep-coordinator",
            "halfstep-exec",
            "halfstep-model",
            "halfstep-proto",
            "halfstep-quant",
            "halfstep-work",
        ],
    ),
    (
        "halfstep",
        &["halfstep-agent", "halfstep-coordinator", "halfstep-proto", "halfstep-quant", "halfstep-work"],
    ),
];
const BENCHES: &str = "halfstep-benches";
const NODE: [&str; 4] = ["halfstep-compute", "halfstep-solver", "halfstep-exec", "halfstep-agent"];
const PURE: [&str; 3] = ["halfstep-quant", "halfstep-work", "halfstep-solver"];

/// What pure crates never name: files, sockets, clocks, processes.
const IMPURE: [&str; 6] = ["std::fs", "std::net", "std::process", "std::env", "Instant", "SystemTime"];
/// What pure crates never depend on.
const IMPURE_CRATES: [&str; 7] = ["tokio", "tonic", "clap", "memmap2", "tempfile", "metrics", "tracing"];
/// Who counts names the facade alone; who collects and shows is the binary.
const COLLECTORS: [&str; 5] =
    ["axum", "metrics-exporter-prometheus", "metrics-process", "metrics-util", "tracing-subscriber"];

/// Outside `compute`, crates that may map files, load libraries or (fuzz) count allocations, each place under `#[expect(unsafe_code)]`.
const UNSAFE_BY_EXPECTATION: [&str; 3] = ["halfstep-model", "halfstep-exec", "halfstep-fuzz"];
/// A `SAFETY:` comment stands at most this many lines above its `unsafe`.
const SAFETY_LINES: usize = 8;

struct Source {
    path: PathBuf,
    /// Lines without comments; tests cut off.
    code: Vec<String>,
    /// Lines as they are.
    lines: Vec<String>,
}

fn packages() -> BTreeMap<String, Package> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let metadata = MetadataCommand::new().manifest_path(manifest).no_deps().exec().unwrap();
    metadata.packages.into_iter().map(|package| (package.name.to_string(), package)).collect()
}

fn dependencies(package: &Package, kinds: &[DependencyKind]) -> BTreeSet<String> {
    let wanted = package.dependencies.iter().filter(|dependency| kinds.contains(&dependency.kind));
    wanted.map(|dependency| dependency.name.clone()).collect()
}

const SHIPPED: [DependencyKind; 2] = [DependencyKind::Normal, DependencyKind::Build];
const ALL: [DependencyKind; 3] = [DependencyKind::Normal, DependencyKind::Build, DependencyKind::Development];

fn sources(package: &Package) -> Vec<Source> {
    let folder = package.manifest_path.parent().unwrap().as_std_path().join("src");
    let mut files = Vec::new();
    walk(&folder, &mut files);
    assert!(!files.is_empty(), "no sources in {}", folder.display());
    files.into_iter().map(|path| Source::read(&path)).collect()
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        // A file of tests only is a module under `#[cfg(test)]`.
        if path.is_dir() {
            walk(&path, files);
        } else if path.extension().is_some_and(|end| end == "rs") && !path.ends_with("tests.rs") {
            files.push(path);
        }
    }
}

impl Source {
    fn read(path: &Path) -> Self {
        Self::parse(path, &fs::read_to_string(path).unwrap())
    }

    fn parse(path: &Path, text: &str) -> Self {
        let lines: Vec<String> = text.lines().map(str::to_string).collect();
        let test_module = |pair: &[String]| {
            pair[0].trim() == "#[cfg(test)]" && pair[1].contains("mod ") && pair[1].ends_with('{')
        };
        let end = lines.windows(2).position(test_module).unwrap_or(lines.len());
        let uncommented = |line: &String| line.split("//").next().unwrap_or("").to_string();
        Self { path: path.into(), code: lines[..end].iter().map(uncommented).collect(), lines }
    }

    /// Line numbers, from 0, of code that has `word` as a whole word.
    fn places(&self, word: &str) -> Vec<usize> {
        let numbered = self.code.iter().enumerate();
        numbered.filter(|(_, line)| has_word(line, word)).map(|(number, _)| number).collect()
    }

    fn assert_without(&self, word: &str) {
        let found = self.places(word);
        assert!(found.is_empty(), "{}:{}: `{word}`", self.path.display(), found[0] + 1);
    }
}

fn has_word(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        !before.is_some_and(part) && !after.is_some_and(part)
    })
}

#[test]
fn crates_depend_one_way_only() {
    let packages = packages();
    let known: BTreeSet<&str> = MAY_USE.iter().map(|(name, _)| *name).chain([BENCHES]).collect();
    let found: BTreeSet<&str> = packages.keys().map(String::as_str).collect();
    assert_eq!(found, known, "every crate of the workspace has its place in this table");
    for (name, allowed) in MAY_USE {
        let ours =
            dependencies(&packages[name], &SHIPPED).into_iter().filter(|dep| dep.starts_with("halfstep"));
        for dependency in ours {
            assert!(allowed.contains(&dependency.as_str()), "{name} depends on {dependency}");
        }
    }
}

#[test]
fn coordinator_and_node_never_know_each_other() {
    let packages = packages();
    let of = |name: &str| dependencies(&packages[name], &ALL);
    assert!(of("halfstep-coordinator").iter().all(|dep| !NODE.contains(&dep.as_str())));
    for name in NODE {
        assert!(!of(name).contains("halfstep-coordinator"), "{name} depends on the coordinator");
    }
}

#[test]
fn pure_crates_do_no_io_and_read_no_clock() {
    let packages = packages();
    for name in PURE {
        let shipped = dependencies(&packages[name], &SHIPPED);
        for banned in IMPURE_CRATES {
            assert!(!shipped.contains(banned), "{name} depends on {banned}");
        }
        for source in sources(&packages[name]) {
            IMPURE.iter().for_each(|word| source.assert_without(word));
        }
    }
}

#[test]
fn what_libraries_count_and_log_the_binary_alone_collects() {
    for (name, package) in packages() {
        let shipped = dependencies(&package, &SHIPPED);
        for collector in COLLECTORS.iter().filter(|_| name != "halfstep") {
            assert!(!shipped.contains(*collector), "{name} depends on {collector}");
        }
        for source in sources(&package).iter().filter(|source| !source.path.ends_with("telemetry.rs")) {
            // What is counted can be read in one place per crate.
            for word in ["counter", "histogram"] {
                assert!(
                    !source.code.iter().any(|line| line.contains(&format!("{word}!("))),
                    "{}: `{word}!` outside telemetry.rs",
                    source.path.display()
                );
            }
        }
    }
}

#[test]
fn device_libraries_are_named_in_compute_only() {
    for (name, package) in packages() {
        let used = dependencies(&package, &ALL);
        assert!(name == "halfstep-compute" || !used.contains("cudarc"), "{name} depends on cudarc");
        for source in sources(&package).iter().filter(|_| name != "halfstep-compute") {
            source.assert_without("cudarc");
        }
    }
}

#[test]
fn the_model_crate_knows_no_adaround_and_the_solver_no_models() {
    let packages = packages();
    for source in sources(&packages["halfstep-model"]) {
        ["adaround", "AdaRound", "rectified_sigmoid", "warm_start"]
            .iter()
            .for_each(|word| source.assert_without(word));
    }
    for source in sources(&packages["halfstep-solver"]) {
        ["ModelProto", "halfstep_model", "PathBuf"].iter().for_each(|word| source.assert_without(word));
    }
}

#[test]
fn the_binary_reads_variables_in_one_place() {
    // Options have theirs by way of clap; all others are Slurm's, but for one of the fault tests' own binary.
    let of_fault_tests =
        |source: &Source, line: usize| source.lines[line].contains("HALFSTEP_NCCL_HOST_MEMORY");
    let (here, elsewhere): (Vec<_>, Vec<_>) = sources(&packages()["halfstep"])
        .into_iter()
        .partition(|source| source.path.ends_with("fleet/slurm/mod.rs"));
    let words = ["env::var", "env::var_os", "env::vars", "env::vars_os"];
    assert!(here.iter().any(|source| words.iter().any(|word| !source.places(word).is_empty())));
    for (source, word) in elsewhere.iter().flat_map(|source| words.iter().map(move |word| (source, word))) {
        let found = source.places(word).into_iter().find(|line| !of_fault_tests(source, *line));
        assert!(found.is_none(), "{}: `{word}` in line {}", source.path.display(), found.unwrap_or(0) + 1);
    }
}

#[test]
fn unsafe_code_stands_where_it_may_and_says_why() {
    for (name, package) in packages() {
        for source in sources(&package) {
            // `unsafe_code` is another word: the lint's name does not count.
            let places = source.places("unsafe");
            let expected = source.lines.iter().any(|line| line.contains("expect(unsafe_code"));
            let allowed =
                name == "halfstep-compute" || (UNSAFE_BY_EXPECTATION.contains(&name.as_str()) && expected);
            assert!(
                places.is_empty() || allowed,
                "{}: unsafe code is not expected here",
                source.path.display()
            );
            for place in places {
                assert!(
                    is_explained(&source, place),
                    "{}:{}: no SAFETY comment",
                    source.path.display(),
                    place + 1
                );
            }
        }
    }
}

/// A block or impl has `SAFETY:` just above or on its line; an `unsafe fn` or trait has `# Safety` in its docs.
fn is_explained(source: &Source, place: usize) -> bool {
    let declares =
        ["unsafe fn", "unsafe trait", "unsafe extern"].iter().any(|word| source.code[place].contains(word));
    // Doc comments are longer than remarks, and attributes stand between.
    let reach = if declares { 40 } else { SAFETY_LINES };
    let above = &source.lines[place.saturating_sub(reach)..=place];
    above.iter().any(|line| line.contains("SAFETY:") || (declares && line.contains("# Safety")))
}

#[test]
fn every_file_opens_by_saying_what_it_does() {
    for package in packages().into_values() {
        for source in sources(&package) {
            let first = source.lines.first().map_or("", String::as_str);
            assert!(first.starts_with("//! "), "{}: opens with `{first}`", source.path.display());
        }
    }
}

#[test]
fn the_checks_see_code_but_neither_comments_nor_tests() {
    let text = "// std::fs in a comment\nuse std::fs; // yes\nlet unsafe_code = 1;\n#[cfg(test)]\nmod tests {\nunsafe {}\n";
    let source = Source::parse(Path::new("x.rs"), text);
    assert_eq!(source.places("std::fs"), [1]);
    assert!(source.places("unsafe").is_empty());
}
