//! A language model of one block with random weights, as a Hugging Face checkpoint, and random tokens for it.
//!
//! Weights have the spread that trained ones have, and the vocabulary is small: times and memory of quantizing it mean something,
//! accuracy does not. Drawn on all threads, the same for any number of them. Not here: running it (`blocks`).

use std::fs::File;
use std::io::Write;
use std::path::Path;

use halfstep_compute::random::Stream;
use serde_json::{Map, Value, json};

use crate::block::Sizes;

/// A block, and of how many of them the model consists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) sizes: Sizes,
    pub(crate) blocks: u32,
}

/// Ids of tokens are below this.
const VOCABULARY: usize = 1024;
/// Rows and columns differ in size by factors of about `exp(SPREAD)`.
const SPREAD: f32 = 0.3;
/// Seeds of weights, of the sizes of rows and of columns, and of tokens.
const SEEDS: [u64; 4] = [0, 1, 2, 3];

/// The shapes there are names for.
pub(crate) const SHAPES: [Shape; 4] = [
    shape("tiny", 256, 768, (8, 4, 32), 2),
    shape("llama-1b", 2048, 8192, (32, 8, 64), 16),
    shape("llama-8b", 4096, 14336, (32, 8, 128), 32),
    shape("llama-70b", 8192, 28672, (64, 8, 128), 80),
];

const fn shape(
    name: &'static str,
    hidden: usize,
    inner: usize,
    (heads, kv_heads, head_dim): (usize, usize, usize),
    blocks: u32,
) -> Shape {
    Shape { sizes: Sizes { name, hidden, inner, heads, kv_heads, head_dim }, blocks }
}

/// Tensors by name: rows (none: a vector of ones), columns, and what to multiply the usual size by.
fn tensors(sizes: Sizes) -> Vec<(String, Option<usize>, usize, f32)> {
    let Sizes { hidden, inner, heads, kv_heads, head_dim, .. } = sizes;
    let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
    let inside = |name: &str| format!("model.layers.0.{name}.weight");
    vec![
        ("model.embed_tokens.weight".to_owned(), Some(VOCABULARY), hidden, (hidden as f32).sqrt()),
        (inside("input_layernorm"), None, hidden, 1.0),
        (inside("self_attn.q_proj"), Some(queries), hidden, 1.0),
        (inside("self_attn.k_proj"), Some(keys), hidden, 1.0),
        (inside("self_attn.v_proj"), Some(keys), hidden, 1.0),
        (inside("self_attn.o_proj"), Some(hidden), queries, 1.0),
        (inside("post_attention_layernorm"), None, hidden, 1.0),
        (inside("mlp.gate_proj"), Some(inner), hidden, 1.0),
        (inside("mlp.up_proj"), Some(inner), hidden, 1.0),
        (inside("mlp.down_proj"), Some(hidden), inner, 1.0),
        ("model.norm.weight".to_owned(), None, hidden, 1.0),
        ("lm_head.weight".to_owned(), Some(VOCABULARY), hidden, 1.0),
    ]
}

/// The upper half of a float's word, rounded to nearest.
fn bf16(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) as u16).to_le_bytes()
}

/// Normal numbers of variance `scale^2 / cols`, then rows and columns of different size, as training leaves them: bf16.
fn weights(tensor: u64, rows: usize, cols: usize, scale: f32) -> Vec<u8> {
    let spread = |seed: u64, len: usize| -> Vec<f32> {
        let mut stream = Stream::new(seed, tensor, 0);
        (0..len).map(|_| (SPREAD * stream.normal_f32()).exp()).collect()
    };
    let (row_sizes, col_sizes) = (spread(SEEDS[1], rows), spread(SEEDS[2], cols));
    let usual = scale / (cols as f32).sqrt();
    let mut bytes = vec![0; rows * cols * 2];
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let rows_each = rows.div_ceil(threads);
    let draw = |first: usize, part: &mut [u8]| {
        for (row, out) in (first..).zip(part.chunks_exact_mut(cols * 2)) {
            let mut stream = Stream::new(SEEDS[0], tensor, row as u32);
            let size = usual * row_sizes[row];
            for (out, col_size) in out.chunks_exact_mut(2).zip(&col_sizes) {
                out.copy_from_slice(&bf16(stream.normal_f32() * size * col_size));
            }
        }
    };
    std::thread::scope(|scope| {
        for (part, out) in bytes.chunks_mut(rows_each * cols * 2).enumerate() {
            scope.spawn(move || draw(part * rows_each, out));
        }
    });
    bytes
}

fn header(sizes: Sizes) -> Vec<u8> {
    let (mut entries, mut offset) = (Map::new(), 0);
    for (name, rows, cols, _) in tensors(sizes) {
        let shape: Vec<usize> = rows.into_iter().chain([cols]).collect();
        let end = offset + 2 * shape.iter().product::<usize>();
        entries.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    text
}

fn config(sizes: Sizes, positions: usize) -> Value {
    let Sizes { hidden, inner, heads, kv_heads, head_dim, .. } = sizes;
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
    })
}

/// Writes `config.json` and `model.safetensors` into a folder, for windows of up to so many tokens; bytes of the weights.
///
/// # Errors
/// If a file cannot be written.
pub(crate) fn write(folder: &Path, sizes: Sizes, positions: usize) -> std::io::Result<usize> {
    std::fs::write(folder.join("config.json"), config(sizes, positions).to_string())?;
    let mut file = File::create(folder.join("model.safetensors"))?;
    let header = header(sizes);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut written = 0;
    for (number, (_, rows, cols, scale)) in (0..).zip(tensors(sizes)) {
        let bytes = match rows {
            Some(rows) => weights(number, rows, cols, scale),
            None => bf16(1.0).repeat(cols),
        };
        file.write_all(&bytes)?;
        written += bytes.len();
    }
    Ok(written)
}

/// Writes random token ids `[samples, length]` as a NumPy file.
///
/// # Errors
/// If it cannot be written.
pub(crate) fn write_tokens(path: &Path, samples: usize, length: usize) -> std::io::Result<()> {
    const MAGIC: &[u8] = b"\x93NUMPY\x01\x00";
    let shape = format!("{{'descr': '<i8', 'fortran_order': False, 'shape': ({samples}, {length}), }}");
    let start = MAGIC.len() + 2;
    let width = (start + shape.len() + 1).next_multiple_of(64) - start - 1;
    let mut bytes = MAGIC.to_vec();
    bytes.extend(((width + 1) as u16).to_le_bytes());
    bytes.extend(format!("{shape:<width$}\n").into_bytes());
    let mut stream = Stream::new(SEEDS[3], 0, 0);
    for _ in 0..samples * length {
        bytes.extend(u64::from(stream.index(VOCABULARY as u32)).to_le_bytes());
    }
    std::fs::write(path, bytes)
}

#[cfg(test)]
mod tests {
    use halfstep_coordinator::dataset::tokens::{TokenOptions, open};
    use halfstep_model::checkpoint::Checkpoint;

    use super::*;

    #[test]
    fn the_checkpoint_reads_back_with_the_spread_that_was_drawn() {
        let folder = tempfile::tempdir().unwrap();
        let sizes = SHAPES[0].sizes;
        let written = write(folder.path(), sizes, 64).unwrap();
        let read = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(read.config()["intermediate_size"], 768);
        let all = tensors(sizes);
        assert_eq!(read.names().count(), all.len());
        let sum: usize = read.names().map(|name| read.info(name).unwrap().bytes).sum();
        assert_eq!(sum, written);
        for (name, rows, cols, scale) in all {
            let tensor = read.tensor(&name).unwrap();
            let shape: Vec<usize> = rows.into_iter().chain([cols]).collect();
            assert_eq!(tensor.shape, shape, "{name}");
            let halfstep_model::Data::F32(values) = &tensor.data else { panic!("{name}: not floats") };
            if rows.is_none() {
                assert!(values.iter().all(|value| *value == 1.0), "{name}");
                continue;
            }
            let squares: f32 = values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32;
            // Both spreads multiply the variance by exp(2 * 0.3^2) in the mean.
            let ratio = squares * cols as f32 / (scale * scale) / (4.0 * SPREAD * SPREAD).exp();
            assert!((0.8..1.25).contains(&ratio), "{name}: {ratio} of the variance expected");
        }
    }

    #[test]
    fn weights_are_those_of_their_row_and_tensor_whoever_draws_them() {
        let (few, more) = (weights(3, 2, 10, 1.0), weights(3, 7, 10, 1.0));
        assert_eq!(few, more[..40]);
        assert_ne!(more[..20], more[20..40]);
        assert_ne!(weights(4, 2, 10, 1.0), few);
        assert_eq!(bf16(1.0), [0x80, 0x3F]);
        // Halfway between two: to the even one.
        assert_eq!(
            [bf16(f32::from_bits(0x3F80_8000)), bf16(f32::from_bits(0x3F81_8000))],
            [[0x80, 0x3F], [0x82, 0x3F]]
        );
    }

    #[test]
    fn tokens_read_back_in_their_shape() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.npy");
        write_tokens(&path, 3, 70).unwrap();
        let options = TokenOptions {
            tokenizer: None,
            vocabulary: VOCABULARY,
            positions: Some(70),
            sequence_length: None,
            samples: None,
            seed: 0,
            field: String::new(),
        };
        let read = open(&path, &options).unwrap();
        assert_eq!(read.samples(), 3);
        let array = &read.arrays[0];
        assert_eq!(array.shape, [3, 70]);
    }
}
