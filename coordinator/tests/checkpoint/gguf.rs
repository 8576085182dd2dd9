//! GGUF: the file holds what was solved, in the places where its readers look, or nothing is written.
//!
//! The export reads its file back by itself. Here the bytes are looked up in the file; with `HALFSTEP_PYTHON` naming a Python
//! that has torch, transformers and `gguf`, that library must read the same weights, and llama-cpp-python, where
//! it is installed, must compute the same logits (`load.py`).

use super::*;
use halfstep_quant::blocks::BlockType;

/// Byte-level BPE of 62 tokens for 64 rows.
fn tokenizer() -> serde_json::Value {
    let letters = ('a'..='z').chain('A'..='Z').chain(['Ġ', 'Ċ', '.', ',']).map(String::from);
    let tokens = letters.chain(["th", "he", "Ġt", "the"].map(String::from));
    let vocab: serde_json::Map<String, serde_json::Value> =
        tokens.enumerate().map(|(id, token)| (token, id.into())).collect();
    let bytes = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
    serde_json::json!({
        "version": "1.0",
        "added_tokens": [
            {"id": 60, "content": "<s>", "special": true, "normalized": false, "single_word": false, "lstrip": false, "rstrip": false},
            {"id": 61, "content": "</s>", "special": true, "normalized": false, "single_word": false, "lstrip": false, "rstrip": false},
        ],
        "normalizer": null, "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [["t", "h"], ["h", "e"], ["Ġ", "t"], ["th", "e"]],
        },
    })
}

/// The tiny Llama as another of its relatives, with a tokenizer.
fn relative(dtype: Dtype, changes: serde_json::Value) -> TempDir {
    let folder = llama(dtype);
    let mut config: serde_json::Value = serde_json::from_str(CONFIG).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    let mut shapes = tensors();
    for block in 0..2 {
        let name = |part: &str| format!("model.layers.{block}.self_attn.{part}");
        match config["model_type"].as_str().unwrap() {
            "qwen2" => shapes.extend([
                (name("q_proj.bias"), vec![HIDDEN]),
                (name("k_proj.bias"), vec![KV]),
                (name("v_proj.bias"), vec![KV]),
            ]),
            "qwen3" => {
                shapes.extend([(name("q_norm.weight"), vec![16]), (name("k_norm.weight"), vec![16])]);
            }
            _ => {}
        }
    }
    if config["tie_word_embeddings"] == true {
        shapes.remove("lm_head.weight");
    }
    write_weights(folder.path(), dtype, &shapes);
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    fs::write(folder.path().join("tokenizer.json"), tokenizer().to_string()).unwrap();
    let settings = r#"{"bos_token": "<s>", "eos_token": "</s>"}"#;
    fs::write(folder.path().join("tokenizer_config.json"), settings).unwrap();
    folder
}

fn plain() -> serde_json::Value {
    serde_json::json!({})
}

/// What the first block of a layer's row looks like in the file.
fn row_block(rounded: &Rounded, name: &str, row: usize, block: BlockType) -> Vec<u8> {
    let (form, encodings, q) = rounded.layers.iter().find(|layer| layer.0.name == name).unwrap();
    let (one, q) = (encodings.slice_rows(row..row + 1), &q[row * encodings.cols..(row + 1) * encodings.cols]);
    assert_eq!(form.name, name);
    block.pack(&one, q).unwrap()[..block.bytes()].to_vec()
}

fn place(file: &[u8], bytes: &[u8]) -> usize {
    let mut found = file.windows(bytes.len()).enumerate().filter(|(_, window)| *window == bytes);
    let at = found.next().expect("the bytes are in the file").0;
    assert!(found.next().is_none(), "once");
    at
}

#[test]
fn blocks_lie_in_rows_and_heads_of_llama_alternate() {
    let folder = relative(Dtype::F32, plain());
    let original = Checkpoint::open(folder.path()).unwrap();
    let kind = scale_type(&original, Format::Gguf);
    let out = tempfile::tempdir().unwrap();
    for (bits, scheme, block) in [
        (4, Scheme::Symmetric, BlockType::Q4_0),
        (4, Scheme::Asymmetric, BlockType::Q4_1),
        (8, Scheme::Symmetric, BlockType::Q8_0),
    ] {
        let rounded = Rounded::all(&original, kind, |_| Some(grid(bits, scheme, G32)));
        let to = out.path().join(format!("{block:?}"));
        write(&original, &rounded, Format::Gguf, &to).unwrap();
        let file = fs::read(to.join("model.gguf")).unwrap();
        let names: Vec<_> = fs::read_dir(&to).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["model.gguf"], "the header has the tokenizer and the numbers of the model");
        // Two blocks of 32 to a row of 64 inputs, three to one of 96.
        let at = |name: &str, row: usize| place(&file, &row_block(&rounded, name, row, block));
        let first = at("model.layers.1.mlp.down_proj", 0);
        assert_eq!(first % 32, 0);
        assert_eq!(at("model.layers.1.mlp.down_proj", 5), first + 5 * 3 * block.bytes());
        let first = at("model.layers.1.self_attn.v_proj", 0);
        assert_eq!(at("model.layers.1.self_attn.v_proj", 1), first + 2 * block.bytes());
        // Heads of 16: row 8 is the partner of row 0 and comes next, row 1 after it; the second head begins at 16.
        for name in ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"] {
            let first = at(name, 0);
            for (row, place) in [(8, 1), (1, 2), (15, 15), (16, 16), (24, 17)] {
                assert_eq!(at(name, row), first + place * 2 * block.bytes(), "{name} {row}");
            }
        }
    }
}

#[test]
fn kept_matrices_keep_their_type_and_vectors_become_single_precision() {
    let folder = relative(Dtype::Bf16, plain());
    let original = Checkpoint::open(folder.path()).unwrap();
    let kind = scale_type(&original, Format::Gguf);
    let kept = "model.layers.0.self_attn.k_proj";
    let rounded =
        Rounded::all(&original, kind, |name| (name != kept).then(|| grid(4, Scheme::Symmetric, G32)));
    let out = tempfile::tempdir().unwrap();
    write(&original, &rounded, Format::Gguf, &out.path().join("out")).unwrap();
    let file = fs::read(out.path().join("out/model.gguf")).unwrap();
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        place(&file, &original.stored(name).unwrap().2);
    }
    let norm = original.tensor("model.norm.weight").unwrap();
    place(&file, &norm.as_f32().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>());
    let keys = original.stored(&format!("{kept}.weight")).unwrap().2;
    let row = |row: usize| &keys[row * HIDDEN * 2..(row + 1) * HIDDEN * 2];
    let first = place(&file, row(0));
    assert_eq!(place(&file, row(8)), first + HIDDEN * 2);
    assert_eq!(place(&file, row(31)), first + 31 * HIDDEN * 2);
}

#[test]
fn what_gguf_has_no_words_for_is_refused_and_nothing_is_written() {
    let per_group = |group_size| Granularity::PerGroup { group_size };
    let q4 = grid(4, Scheme::Symmetric, G32);
    let json = |value: serde_json::Value| value;
    let window = json(serde_json::json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}));
    let uneven = serde_json::json!({"model_type": "qwen2", "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}});
    for (changes, grid, expect) in [
        (
            plain(),
            grid(3, Scheme::Symmetric, G32),
            "gguf has no 3 bits symmetric per-group:32, expected groups of 32",
        ),
        (plain(), grid(8, Scheme::Asymmetric, G32), "gguf has no 8 bits asymmetric"),
        (plain(), grid(4, Scheme::Symmetric, per_group(64)), "gguf has no 4 bits symmetric per-group:64"),
        (window, q4, "gguf output has no words for a rotation that changes with the length"),
        (uneven, q4, "no words for a rotation that is stretched unevenly"),
    ] {
        let folder = relative(Dtype::F32, changes);
        let original = Checkpoint::open(folder.path()).unwrap();
        let rounded = Rounded::all(&original, scale_type(&original, Format::Gguf), |_| Some(grid));
        let out = tempfile::tempdir().unwrap();
        for error in [
            check(&original, &rounded.forms(), Format::Gguf).unwrap_err(),
            write(&original, &rounded, Format::Gguf, &out.path().join("out")).unwrap_err(),
        ] {
            assert!(error.to_string().contains(expect), "{error}: expected `{expect}`");
        }
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "nothing is left behind");
    }
    let folder = llama(Dtype::F32);
    let original = Checkpoint::open(folder.path()).unwrap();
    let error = check(&original, &[], Format::Gguf).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json is not understood"), "{error}");
    fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    let error = check(&original, &[], Format::Gguf).unwrap_err().to_string();
    assert!(error.contains("a checkpoint without `tokenizer.json`"), "{error}");
    let other = CONFIG.replace("llama", "phi3");
    fs::write(folder.path().join("config.json"), other).unwrap();
    let error = check(&Checkpoint::open(folder.path()).unwrap(), &[], Format::Gguf).unwrap_err().to_string();
    // Whatever comes first: its tensors are not Phi-3's, or it is not a family with a name.
    assert!(error.contains("qkv_proj") || error.contains("`phi3`, expected one of llama"), "{error}");
}

#[test]
fn results_that_are_not_what_was_planned_never_become_gguf() {
    let folder = relative(Dtype::F32, plain());
    let original = Checkpoint::open(folder.path()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let kind = scale_type(&original, Format::Gguf);
    let good = |kind| Rounded::all(&original, kind, |_| Some(grid(4, Scheme::Asymmetric, G32)));
    let refused = |rounded: &Rounded, expect: &str| {
        let error = write(&original, rounded, Format::Gguf, &out.path().join("out")).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}: expected `{expect}`");
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "nothing is left behind");
    };
    refused(&good(ScaleType::F16), "which F16AndMinimum stores as");
    let mut rounded = good(kind);
    rounded.layers[3].2[7] = 16;
    refused(&rounded, "integer 7 is 16");
    let mut rounded = good(kind);
    rounded.layers[5].2.pop();
    refused(&rounded, "elements, expected");
    let mut rounded = good(kind);
    rounded.layers[3].1.scheme = Scheme::Symmetric;
    refused(&rounded, "symmetric per-group:32, expected");
}

/// Everything that other programs are asked to read, for `load.py`; how many folders.
pub(super) fn pairs(out: &Path) -> usize {
    let llama3 = serde_json::json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16});
    let linear = serde_json::json!({"rope_type": "linear", "factor": 4.0});
    let relatives = [
        ("llama", plain()),
        ("llama-tied", serde_json::json!({"tie_word_embeddings": true})),
        ("llama3", serde_json::json!({"rope_scaling": llama3, "rope_theta": 500_000.0})),
        ("llama-linear", serde_json::json!({"rope_scaling": linear})),
        (
            "mistral",
            serde_json::json!({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}),
        ),
        (
            "qwen2",
            serde_json::json!({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_scaling": linear}),
        ),
        (
            "qwen3",
            serde_json::json!({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rms_norm_eps": 1e-3}),
        ),
    ];
    let grids = [(4, Scheme::Symmetric), (4, Scheme::Asymmetric), (8, Scheme::Symmetric)];
    let mut count = 0;
    for (name, changes) in relatives {
        let folder = relative(Dtype::F32, changes);
        let original = Checkpoint::open(folder.path()).unwrap();
        for (bits, scheme) in grids {
            let kind = scale_type(&original, Format::Gguf);
            // One that stays, whose rows have to be put in order as well.
            let rounded = Rounded::all(&original, kind, |layer| {
                (layer != "model.layers.0.self_attn.q_proj").then(|| grid(bits, scheme, G32))
            });
            pair(&original, &rounded, Format::Gguf, &out.join(format!("gguf-{name}-{bits}-{scheme}")));
            count += 1;
        }
    }
    count
}
