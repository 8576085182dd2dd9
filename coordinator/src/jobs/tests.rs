//! Intake, placing, resuming and finishing, with a real model and made-up roundings.

use super::*;
use crate::artefacts::Artefacts;
use crate::dataset::DatasetOptions;
use crate::store::{Change, FileRole, InputFile, JobRecord, JobStage, ResultFile, Store};
use crate::{EncodingsVersion, JobConfig, LanguageConfig};
use halfstep_proto::{BlobName, rounding, tensors};
use halfstep_quant::{Encodings, Granularity, GridSpec, RangeEstimator, Scheme};
use halfstep_work::{
    ChunkId, ChunkReport, Failure, FailureClass, LayerId, Objective, Partition, Plan, Propagation, Rounding,
    ShardId, SolverSettings, StartPoint,
};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/fashion-mnist").join(name)
}

fn config(model: PathBuf, calibration: PathBuf) -> JobConfig {
    let solver = SolverSettings {
        objective: Objective::Gram,
        iterations: 0,
        learning_rate: 0.01,
        beta: (20.0, 2.0),
        warm_start: 0.2,
        lambda: 0.01,
        batch: 32,
        damping: 0.001,
        start: StartPoint::Nearest,
        refine_sweeps: 1,
        scale_fits: 0,
        seed: 1,
        positions_per_shard: 16,
        positions_fraction: 1.0,
    };
    JobConfig {
        model,
        calibration,
        dataset: DatasetOptions { samples: Some(64), ..DatasetOptions::default() },
        output: PathBuf::new(),
        force: false,
        grid: GridSpec {
            bits: 4,
            scheme: Scheme::Symmetric,
            granularity: Granularity::PerChannel,
            range: RangeEstimator::Mse,
        },
        rules: Vec::new(),
        solver,
        propagation: Propagation::Sequential,
        partition: Partition::Batches,
        shard_size: None,
        fold_batch_norm: true,
        encodings: vec![EncodingsVersion::V1_0_0],
        language: LanguageConfig::default(),
    }
}

struct Bench {
    folder: tempfile::TempDir,
    artefacts: Arc<Artefacts>,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let artefacts = Arc::new(Artefacts::open(&folder.path().join("state/artefacts")).unwrap());
        Self { folder, artefacts }
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn prepare(&self, record: &JobRecord) -> Result<ActiveJob, crate::CoordinatorError> {
        ActiveJob::prepare(&self.state(), &self.artefacts, record)
    }
}

fn record(collected: &Collected) -> JobRecord {
    JobRecord {
        id: collected.id,
        order: 0,
        submitted_unix_ms: 0,
        spec: collected.spec.clone(),
        files: collected.files.clone(),
        stage: JobStage::Running,
        computed_by: None,
        counts: Default::default(),
    }
}

fn made_up(plan: &Plan, layer: LayerId, chunk: ChunkId) -> Rounding {
    let entry = plan.layer(layer);
    let (rows, cols) = (entry.chunks[chunk.index()].len(), entry.cols);
    let encodings = Encodings {
        bits: entry.grid.bits,
        scheme: entry.grid.scheme,
        granularity: Granularity::PerChannel,
        rows,
        cols,
        scale: vec![0.125; rows],
        zero_point: vec![0; rows],
    };
    let q = (0..rows * cols).map(|i| (i % 7) as i32 - 3).collect();
    Rounding {
        layer,
        chunk,
        encodings,
        q,
        report: ChunkReport { objective: 1.0, signal: 4.0, ..Default::default() },
    }
}

fn all_chunks(plan: &Plan) -> Vec<(LayerId, ChunkId)> {
    plan.layers.iter().flat_map(|entry| plan.chunk_ids(entry.id).map(|chunk| (entry.id, chunk))).collect()
}

fn kind() -> (String, String) {
    ("test device".into(), "test engine".into())
}

#[test]
fn the_same_job_has_the_same_id_wherever_its_files_lie() {
    let collected = collect(&config(example("model.onnx"), example("calibration.npz"))).unwrap();
    let mut moved = collected.files.clone();
    moved.iter_mut().for_each(|file| file.path = None);
    moved.reverse();
    assert_eq!(job_id(&collected.spec, &moved), collected.id);
    moved[0].size += 1;
    assert_ne!(job_id(&collected.spec, &moved), collected.id);
    let mut other = config(example("model.onnx"), example("calibration.npz"));
    other.solver.seed = 2;
    assert_ne!(collect(&other).unwrap().id, collected.id);
}

#[test]
fn a_spec_comes_back_and_unknown_keys_are_refused() {
    let json = collect(&config(example("model.onnx"), example("calibration.npz"))).unwrap().spec;
    let spec = JobSpec::from_json(&json).unwrap();
    assert_eq!(spec.to_json().unwrap(), json);
    let text = String::from_utf8(json).unwrap().replacen("\"grid\"", "\"gird\"", 1);
    assert!(JobSpec::from_json(text.as_bytes()).unwrap_err().to_string().contains("unknown field `gird`"));
}

#[test]
fn files_are_used_in_place_or_from_uploads_with_the_same_plan() {
    let bench = Bench::new();
    let collected = collect(&config(example("model.onnx"), example("calibration.npz"))).unwrap();
    let here = bench.prepare(&record(&collected)).unwrap();
    assert!(here.config.model.ends_with("examples/fashion-mnist/model.onnx"));
    let mut elsewhere = collected.clone();
    elsewhere.files.iter_mut().for_each(|file| file.path = Some("/nowhere/model.onnx".into()));
    let error = bench.prepare(&record(&elsewhere)).err().unwrap().to_string();
    assert!(error.starts_with("input `model.onnx`: neither was it uploaded"), "{error}");
    for file in &collected.files {
        let bytes = fs::read(file.path.as_ref().unwrap()).unwrap();
        assert_eq!(bench.artefacts.put(&bytes).unwrap(), file.hash);
    }
    let uploaded = bench.prepare(&record(&elsewhere)).unwrap();
    assert!(uploaded.config.model.starts_with(bench.state()), "{}", uploaded.config.model.display());
    assert_eq!(uploaded.plan, here.plan);
    assert_eq!(uploaded.source.plan_hash(), here.source.plan_hash());
}

#[test]
fn a_changed_file_is_not_used() {
    let bench = Bench::new();
    let model = bench.folder.path().join("model.onnx");
    fs::copy(example("model.onnx"), &model).unwrap();
    let collected = collect(&config(model.clone(), example("calibration.npz"))).unwrap();
    assert!(bench.prepare(&record(&collected)).is_ok());
    let mut bytes = fs::read(&model).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&model, bytes).unwrap();
    assert!(
        bench.prepare(&record(&collected)).err().unwrap().to_string().contains("neither was it uploaded")
    );
}

#[test]
fn a_folder_with_other_data_in_it_is_not_used_in_place() {
    let bench = Bench::new();
    let data = bench.folder.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::copy(example("calibration.npz"), data.join("a.npz")).unwrap();
    let mut asked = config(example("model.onnx"), data.clone());
    asked.dataset.samples = None;
    let collected = collect(&asked).unwrap();
    let before = bench.prepare(&record(&collected)).unwrap();
    assert_eq!(before.config.calibration, data);
    fs::copy(example("calibration.npz"), data.join("b.npz")).unwrap();
    let after = bench.prepare(&record(&collected)).unwrap();
    assert!(after.config.calibration.starts_with(bench.state()));
    assert_eq!(after.plan.samples(), before.plan.samples());
}

/// A tokenizer may have the name of the checkpoint's own, and lies in a folder of its own where it was uploaded.
#[test]
fn a_tokenizer_is_used_in_place_or_from_an_upload() {
    let bench = Bench::new();
    let path = |name: &str| bench.folder.path().join(name);
    let words: Vec<String> = (0..37).map(|id| format!("\"t{id}\": {id}")).collect();
    let json = format!(
        r#"{{"version": "1.0", "added_tokens": [], "pre_tokenizer": {{"type": "WhitespaceSplit"}},
            "model": {{"type": "WordLevel", "vocab": {{{}}}, "unk_token": "t0"}}}}"#,
        words.join(", ")
    );
    fs::write(path("tokenizer.json"), json).unwrap();
    fs::write(path("text.txt"), "t1 t2 t3 t4 t5").unwrap();
    let llama = Path::new(env!("CARGO_MANIFEST_DIR")).join("../common/model/tests/decoders/llama");
    let mut asked = config(llama, path("text.txt"));
    asked.dataset.samples = None;
    asked.encodings = Vec::new();
    assert!(
        collect(&asked).is_ok_and(|found| found.files.iter().all(|file| file.role != FileRole::Tokenizer))
    );
    asked.language.tokenizer = Some(path("tokenizer.json"));
    let mut collected = collect(&asked).unwrap();
    let here = bench.prepare(&record(&collected)).unwrap();
    assert_eq!(here.config.language.tokenizer, asked.language.tokenizer);
    for file in &mut collected.files {
        bench.artefacts.put(&fs::read(file.path.take().unwrap()).unwrap()).unwrap();
    }
    let uploaded = bench.prepare(&record(&collected)).unwrap();
    assert!(uploaded.config.language.tokenizer.unwrap().starts_with(bench.state()));
    assert_eq!(uploaded.plan, here.plan);
    let spec = JobSpec::from_json(&collected.spec).unwrap();
    let own = InputFile { role: FileRole::ModelData, ..collected.files.last().unwrap().clone() };
    let other = InputFile { name: "other.json".into(), ..collected.files.last().unwrap().clone() };
    collected.files.push(own);
    folder::check_files(&spec, &collected.files).unwrap();
    collected.files.push(other);
    let error = folder::check_files(&spec, &collected.files).unwrap_err().to_string();
    assert!(error.contains("expected at most one tokenizer, found 2"), "{error}");
}

#[test]
fn impossible_file_lists_are_refused() {
    let collected = collect(&config(example("model.onnx"), example("calibration.npz"))).unwrap();
    let spec = JobSpec::from_json(&collected.spec).unwrap();
    let (model, data) = (collected.files[0].clone(), collected.files[1].clone());
    let out = InputFile { name: "../model.onnx".into(), ..model.clone() };
    let second = InputFile { name: "b.npz".into(), ..data.clone() };
    for (files, expected) in [
        (vec![data.clone()], "expected one model, found 0"),
        (vec![model.clone(), model.clone(), data.clone()], "is there twice"),
        (vec![model.clone()], "found 0 files"),
        (vec![model.clone(), data.clone(), second], "found 2 files"),
        (vec![out, data], "leaves its folder"),
    ] {
        let error = folder::check_files(&spec, &files).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_job_resumes_from_its_verified_roundings_and_finishes_with_the_same_bytes() {
    let bench = Bench::new();
    let collected = collect(&config(example("model.onnx"), example("calibration.npz"))).unwrap();
    let job = bench.prepare(&record(&collected)).unwrap();
    let store = Store::open(&bench.state()).unwrap();
    let mut changes = Vec::new();
    for (layer, chunk) in all_chunks(&job.plan) {
        let blob = rounding::encode(&made_up(&job.plan, layer, chunk)).unwrap();
        changes.push(Change::Rounding {
            job: job.id,
            layer,
            chunk,
            hash: bench.artefacts.put(&blob).unwrap(),
        });
    }
    store.commit(&changes).unwrap();
    // One damaged, one gone, one of another layer.
    let place = |change: &Change| match change {
        Change::Rounding { hash, .. } => bench.artefacts.path(hash),
        _ => unreachable!(),
    };
    let kept = fs::read(place(&changes[0])).unwrap();
    let gone = fs::read(place(&changes[1])).unwrap();
    fs::write(place(&changes[0]), &kept[..kept.len() - 1]).unwrap();
    fs::remove_file(place(&changes[1])).unwrap();
    let resumed = job.resume(&store, &bench.artefacts).unwrap();
    assert_eq!(resumed.outcome.receipts.len(), changes.len() - 2);
    let lost: Vec<_> = resumed.lost.iter().map(|c| matches!(c, Change::ForgetRounding { .. })).collect();
    assert_eq!(lost, [true, true]);
    bench.artefacts.put(&kept).unwrap();
    bench.artefacts.put(&gone).unwrap();
    let resumed = job.resume(&store, &bench.artefacts).unwrap();
    assert!(resumed.lost.is_empty());
    let first = job.finish(&resumed.outcome, &kind(), &serde_json::json!({})).unwrap();
    let names: Vec<_> = first.results.iter().map(|file| file.name.as_str()).collect();
    let expected =
        ["manifest.json", "model.encodings", "model.onnx", "model.qdq.onnx", "report.json", "timing.json"];
    assert_eq!((first.exit, names.as_slice()), (0, &expected[..]));
    let again = job.finish(&resumed.outcome, &kind(), &serde_json::json!({})).unwrap();
    // timing.json has the peak memory of this process, which other tests add to.
    let lasting = |results: &[ResultFile]| -> Vec<ResultFile> {
        results.iter().filter(|file| file.name != "timing.json").cloned().collect()
    };
    assert_eq!(lasting(&again.results), lasting(&first.results));
    let manifest =
        fs::read_to_string(bench.state().join(format!("jobs/{}/results/manifest.json", job.id))).unwrap();
    assert!(manifest.contains("examples/fashion-mnist/calibration.npz"), "{manifest}");
}

#[test]
fn a_layer_given_up_is_kept_and_the_exit_code_says_so() {
    let bench = Bench::new();
    let collected = collect(&config(example("model.onnx"), example("calibration.npz"))).unwrap();
    let job = bench.prepare(&record(&collected)).unwrap();
    let store = Store::open(&bench.state()).unwrap();
    let failure = Failure::new(FailureClass::NonFinite, "statistics hold a NaN");
    let mut changes = vec![Change::GivenUp { job: job.id, layer: LayerId(0), failure }];
    for (layer, chunk) in all_chunks(&job.plan).into_iter().filter(|(layer, _)| layer.0 != 0) {
        let blob = rounding::encode(&made_up(&job.plan, layer, chunk)).unwrap();
        changes.push(Change::Rounding {
            job: job.id,
            layer,
            chunk,
            hash: bench.artefacts.put(&blob).unwrap(),
        });
    }
    store.commit(&changes).unwrap();
    let resumed = job.resume(&store, &bench.artefacts).unwrap();
    let finished = job.finish(&resumed.outcome, &kind(), &serde_json::json!({})).unwrap();
    assert_eq!(finished.exit, 4);
    let name = BlobName::Rounding { layer: LayerId(0), chunk: ChunkId(0) };
    assert_eq!(job.source.blob(&name).unwrap(), None);
}

#[test]
fn blobs_have_the_hash_of_their_bytes_and_say_when_they_are_not_there_yet() {
    let bench = Bench::new();
    let collected = collect(&config(example("model.onnx"), example("calibration.npz"))).unwrap();
    let job = bench.prepare(&record(&collected)).unwrap();
    let inputs = BlobName::Inputs(ShardId(0));
    assert_eq!(job.source.known_hash(&inputs), None);
    let blob = job.source.blob(&inputs).unwrap().unwrap();
    assert_eq!(job.source.known_hash(&inputs), Some(blob.hash));
    assert_eq!(halfstep_proto::BlobHash::of(&blob.bytes), blob.hash);
    let tensors = tensors::decode(&blob.bytes).unwrap();
    assert_eq!(tensors[0].shape[0], job.plan.shards[0].len());
    let plan = job.source.blob(&BlobName::Artefact(job.source.plan_hash())).unwrap().unwrap();
    assert_eq!(serde_json::from_slice::<Plan>(&plan.bytes).unwrap(), *job.plan);
    let rounding = BlobName::Rounding { layer: LayerId(0), chunk: ChunkId(0) };
    assert_eq!(job.source.blob(&rounding).unwrap_err().class, FailureClass::PeerLost);
    assert_eq!(job.source.blob(&BlobName::Inputs(ShardId(999))).unwrap_err().class, FailureClass::Internal);
    let constant = BlobName::Constant("no such tensor".into());
    assert_eq!(job.source.blob(&constant).unwrap_err().class, FailureClass::BadInput);
}

#[test]
fn roles_have_their_names() {
    for role in [FileRole::Model, FileRole::ModelData, FileRole::Calibration, FileRole::Tokenizer] {
        assert_eq!(FileRole::parse(role.text()), Some(role));
    }
    assert_eq!(FileRole::parse("weights"), None);
}
