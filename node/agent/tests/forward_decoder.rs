//! Decoders run block by block for evaluation, against logits that `transformers` computed
//! (`common/model/tests/decoders/make.py`): every family.
#![expect(clippy::print_stdout, reason = "says why a test was skipped")]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

#[path = "../../compute/tests/device/mod.rs"]
mod device;

use halfstep_agent::cuda::Precision;
use halfstep_agent::{DecoderForward, DeviceChoice, Devices, Scores};
use halfstep_model::checkpoint::Checkpoint;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Relative, of a sum of log likelihoods: both compute logits in f32, in another order.
const RELATIVE_ERROR_MAX: f64 = 1e-4;

fn cases() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../common/model/tests/decoders");
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let cases: Vec<PathBuf> = entries.filter(|path| path.join("config.json").exists()).collect();
    assert!(cases.len() > 20, "found {} cases", cases.len());
    cases
}

/// Windows without padding, and logits `[tokens of all windows, vocabulary]`.
fn expected(case: &Path) -> (Vec<Vec<i64>>, Vec<Vec<f32>>) {
    let stored = Checkpoint::open(&case.join("expected")).unwrap();
    let (_, shape, bytes) = stored.stored("tokens").unwrap();
    let ids: Vec<i64> = bytes.chunks_exact(8).map(|id| i64::from_le_bytes(id.try_into().unwrap())).collect();
    let row = |row: &[i64]| row.iter().copied().filter(|id| *id >= 0).collect();
    let logits = stored.tensor("logits").unwrap();
    let vocabulary = *logits.shape.last().unwrap();
    let rows = logits.as_f32().unwrap().chunks(vocabulary).map(<[f32]>::to_vec).collect();
    (ids.chunks(shape[1]).map(row).collect(), rows)
}

/// Negative log likelihood and hits of all tokens but the first of each window, in f64.
fn plain_scores(windows: &[Vec<i64>], logits: &[Vec<f32>]) -> (f64, u64) {
    let (mut nll, mut correct, mut row) = (0.0, 0, 0);
    for window in windows {
        for next in &window[1..] {
            let next = usize::try_from(*next).unwrap();
            let sum: f64 = logits[row].iter().map(|x| f64::from(*x).exp()).sum();
            nll += sum.ln() - f64::from(logits[row][next]);
            correct += u64::from(logits[row].iter().all(|x| *x <= logits[row][next]));
            row += 1;
        }
        // The last token of a window predicts nothing that is there.
        row += 1;
    }
    assert_eq!(row, logits.len());
    (nll, correct)
}

fn check_likelihoods(devices: &Arc<Devices>, threads: usize) {
    for case in cases() {
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        let (windows, logits) = expected(&case);
        let (nll, correct) = plain_scores(&windows, &logits);
        let forward = DecoderForward::open(&case).unwrap().on(Arc::clone(devices));
        let scores = forward.run(&windows, threads).unwrap().score(None, threads).unwrap();
        assert!(((scores.nll - nll) / nll).abs() < RELATIVE_ERROR_MAX, "{name}: {scores:?}, expected {nll}");
        assert_eq!(scores.correct, correct, "{name}");
        assert_eq!(scores.tokens as usize, logits.len() - windows.len(), "{name}");
    }
}

#[test]
fn likelihoods_are_those_of_transformers() {
    check_likelihoods(&Arc::new(Devices::cpu()), 2);
}

/// On the first CUDA device; on machines without one the host pretends to be one.
#[test]
fn likelihoods_on_a_cuda_device_are_those_of_transformers() {
    if device::cuda_of(Precision::F32).is_some() {
        let devices = Devices::open(&DeviceChoice::Cuda(vec![0]), Precision::F32).unwrap();
        check_likelihoods(&Arc::new(devices), 3);
    }
}

#[test]
fn a_model_compared_with_itself_differs_by_nothing_on_any_number_of_threads() {
    let case = cases().into_iter().find(|case| case.ends_with("llama")).unwrap();
    let forward = DecoderForward::open(&case).unwrap();
    let (mut windows, _) = expected(&case);
    windows.push(vec![3]);
    let windows: Vec<Vec<i64>> = windows.iter().cycle().take(300).cloned().collect();
    let of = |threads| {
        let predictions = forward.run(&windows, threads).unwrap();
        predictions.score(Some(&predictions), threads).unwrap()
    };
    let one: Scores = of(1);
    assert_eq!((one.divergence, one.agreed), (0.0, one.tokens));
    assert_eq!(one, of(3));
}

#[test]
fn what_cannot_be_compared_or_run_is_refused() {
    let all = cases();
    let open =
        |name: &str| DecoderForward::open(all.iter().find(|case| case.ends_with(name)).unwrap()).unwrap();
    let llama = open("llama");
    let outside = llama.run(&[vec![1, 1 << 40]], 1).err().unwrap().to_string();
    assert!(outside.starts_with("token 1099511627776, expected 0 to "), "{outside}");
    assert!(llama.run(&[vec![1], vec![]], 1).is_err());
    let (one, other) = (llama.run(&[vec![1, 2]], 1).unwrap(), llama.run(&[vec![1, 3]], 1).unwrap());
    assert!(one.score(Some(&other), 1).unwrap_err().to_string().contains("other windows"));
    assert!(DecoderForward::open(Path::new("/nowhere")).is_err());
}
