//! Language models: the same checkpoint from any number of nodes as from one process.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may stop, and says what it measured")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use faults::{Cluster, Job};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(120);
const VOCABULARY: u64 = 37;
const SEQUENCES: usize = 12;
const LENGTH: usize = 16;

/// A tiny checkpoint of a family.
fn checkpoint(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../common/model/tests/decoders").join(name)
}

/// Token ids without pattern, every third sequence shorter than the others.
fn tokens(folder: &Path) -> PathBuf {
    let header = format!("{{'descr': '<i8', 'fortran_order': False, 'shape': ({SEQUENCES}, {LENGTH}), }}");
    let padded = format!("{header:<117}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((padded.len() as u16).to_le_bytes());
    bytes.extend(padded.as_bytes());
    let mut state = 1u64;
    for sequence in 0..SEQUENCES {
        for place in 0..LENGTH {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let ended = sequence % 3 == 2 && place >= LENGTH - sequence / 3 - 1;
            let id = if ended { -1 } else { ((state >> 33) % VOCABULARY) as i64 };
            bytes.extend(id.to_le_bytes());
        }
    }
    let path = folder.join("tokens.npy");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn check(family: &str, options: &[&str]) -> Result<()> {
    let folder = TempDir::new()?;
    let job = Job::on(&checkpoint(family), &tokens(folder.path()))
        .with(&["--shard-size", "2", "--iterations", "20", "--group-size", "4"])
        .with(options);
    for count in [1, 3] {
        let mut cluster = Cluster::new()?;
        cluster.start_nodes(count)?;
        let took = cluster.run(&job, LIMIT)?;
        eprintln!("{family}, {count} nodes: identical after {took:.1?}");
    }
    Ok(())
}

#[test]
fn a_llama_is_the_same_from_1_and_3_nodes() -> Result<()> {
    check("llama", &[])
}

#[test]
fn half_precision_carries_and_layers_are_the_same_from_1_and_3_nodes() -> Result<()> {
    check("gemma3", &["--carries", "bf16", "--partition", "layers:2", "--format", "fake-quant"])
}

#[test]
fn a_mixture_of_experts_is_the_same_from_1_and_3_nodes() -> Result<()> {
    check("qwen3_moe", &["--format", "fake-quant"])
}
