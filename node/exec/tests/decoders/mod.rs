//! Golden decoders: tiny checkpoints of every family and what `transformers` computed for them
//! (`common/model/tests/decoders/make.py`).
#![allow(dead_code, reason = "each test file uses a part")]
#![allow(unreachable_pub, reason = "a module of tests")]

use halfstep_model::checkpoint::Checkpoint;
use halfstep_model::decoder::{Decoder, DescribeOptions, LOGITS, describe};
use halfstep_model::{Data, Tensor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Largest `|ours - theirs| / |theirs|` of a whole tensor: both compute in f32, in another order.
pub const RELATIVE_ERROR_MAX: f64 = 1e-4;

/// Where they are; below the working folder if the tests were carried to another machine.
pub fn folder() -> PathBuf {
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../common/model/tests/decoders");
    if built_from.exists() { built_from } else { "common/model/tests/decoders".into() }
}

/// All of them.
pub fn cases() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path());
    let mut cases: Vec<PathBuf> = entries.filter(|path| path.join("config.json").exists()).collect();
    cases.sort();
    assert!(cases.len() > 20, "found {} cases", cases.len());
    cases
}

/// A checkpoint, tokens, and what they give.
pub struct Golden {
    pub name: String,
    pub checkpoint: Checkpoint,
    pub decoder: Decoder,
    pub tokens: Tensor,
    /// By tensor of the decoder.
    pub expected: BTreeMap<String, Tensor>,
}

/// Reads one.
pub fn open(case: &Path, options: DescribeOptions) -> Golden {
    let checkpoint = Checkpoint::open(case).unwrap();
    let decoder = describe(checkpoint.config(), options).unwrap();
    let stored = Checkpoint::open(&case.join("expected")).unwrap();
    let (_, shape, bytes) = stored.stored("tokens").unwrap();
    let tokens = bytes.chunks_exact(8).map(|eight| i64::from_le_bytes(eight.try_into().unwrap())).collect();
    let expected =
        stored.names().filter_map(|name| Some((tensor_of(&decoder, name)?, stored.tensor(name).unwrap())));
    Golden {
        name: case.file_name().unwrap().to_string_lossy().into_owned(),
        expected: expected.collect(),
        tokens: Tensor::new(shape, Data::I64(tokens)).unwrap(),
        checkpoint,
        decoder,
    }
}

/// The decoder's tensor that `logits`, `input:NODE` or `output:NODE` is about.
fn tensor_of(decoder: &Decoder, golden: &str) -> Option<String> {
    let node = |name: &str| decoder.nodes.iter().find(|node| node.name == name).unwrap();
    match golden.split_once(':') {
        Some(("input", name)) => Some(node(name).inputs[0].clone()),
        Some((_, name)) => Some(node(name).outputs[0].clone()),
        None => (golden == "logits").then(|| LOGITS.to_owned()),
    }
}

/// Of a whole tensor.
pub fn relative_error(ours: &Tensor, theirs: &Tensor, subject: &str) -> f64 {
    assert_eq!(ours.shape, theirs.shape, "{subject}");
    let (ours, theirs) = (values(ours), values(theirs));
    let distance: f64 = ours.iter().zip(&theirs).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    let size: f64 = theirs.iter().map(|b| f64::from(*b).powi(2)).sum();
    (distance / size.max(f64::MIN_POSITIVE)).sqrt()
}

/// The numbers of an f32 tensor.
pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.as_f32().unwrap().to_vec()
}
