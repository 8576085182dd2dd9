//! Text and ids as files: the ids that transformers gives, windows, padding, each refusal.

use std::collections::BTreeMap;
use std::fs;

use super::*;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokens").join(name)
}

fn options(tokenizer: &str) -> TokenOptions {
    TokenOptions {
        positions: None,
        tokenizer: Some(golden(tokenizer)),
        vocabulary: 320,
        sequence_length: Some(4096),
        samples: None,
        seed: 0,
        field: "text".into(),
    }
}

/// Ids of every window, padding included.
fn rows(data: &Dataset) -> Vec<Vec<i64>> {
    let rows = data.slice(0..data.samples()).unwrap().remove(0);
    assert_eq!((rows.name.as_str(), rows.dtype, rows.shape[0]), ("input_ids", DType::I64, data.samples()));
    let ids: Vec<i64> = rows.bytes.as_chunks().0.iter().map(|id| i64::from_le_bytes(*id)).collect();
    ids.chunks(rows.shape[1]).map(<[i64]>::to_vec).collect()
}

fn unpadded(data: &Dataset) -> Vec<Vec<i64>> {
    rows(data).into_iter().map(|row| row.into_iter().take_while(|id| *id != -1).collect()).collect()
}

/// What transformers gives for every document; an empty one is none here.
fn expected(tokenizer: &str) -> Vec<Vec<i64>> {
    let all: BTreeMap<String, Vec<Vec<i64>>> =
        serde_json::from_slice(&fs::read(golden("ids.json")).unwrap()).unwrap();
    all[tokenizer].iter().enumerate().filter(|(index, _)| *index != 1).map(|(_, ids)| ids.clone()).collect()
}

fn problem(path: &Path, options: &TokenOptions) -> String {
    open(path, options).unwrap_err().to_string()
}

#[test]
fn documents_get_the_ids_that_transformers_gives() {
    for tokenizer in ["tokenizer", "tokenizer_begin"] {
        for file in ["documents.jsonl", "documents.parquet"] {
            let data = open(&golden(file), &options(&format!("{tokenizer}.json"))).unwrap();
            assert_eq!(unpadded(&data), expected(tokenizer), "{tokenizer} {file}");
            assert!(data.notes()[0].starts_with("7 documents, 6 windows"), "{:?}", data.notes());
            assert_eq!(data.notes()[1], "1 document without text");
        }
    }
}

#[test]
fn a_text_file_is_one_document() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.txt");
    let line = fs::read_to_string(golden("documents.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(line.lines().next().unwrap()).unwrap();
    fs::write(&path, first["text"].as_str().unwrap()).unwrap();
    let data = open(&path, &options("tokenizer_begin.json")).unwrap();
    assert_eq!(unpadded(&data), expected("tokenizer_begin")[..1]);
}

#[test]
fn windows_never_cross_documents_and_short_ends_are_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jsonl");
    // One letter is one token here.
    let letters = |letter: &str, count: usize| format!("{{\"body\": \"{}\"}}\n", letter.repeat(count));
    fs::write(&path, letters("q ", 150) + &letters("z ", 5) + &letters("z ", 64)).unwrap();
    let options =
        TokenOptions { sequence_length: Some(130), field: "body".into(), ..options("tokenizer.json") };
    let data = open(&path, &options).unwrap();
    let all = unpadded(&data);
    let lengths: Vec<usize> = all.iter().map(Vec::len).collect();
    let first = open(&path, &TokenOptions { sequence_length: Some(4096), ..options.clone() }).unwrap();
    let whole = unpadded(&first);
    let expect: Vec<usize> = whole
        .iter()
        .flat_map(|document| {
            let tail = document.len() % 130;
            std::iter::repeat_n(130, document.len() / 130)
                .chain((tail >= 64 || document.len() < 130).then_some(tail))
        })
        .collect();
    assert_eq!(lengths, expect);
    assert!(lengths.len() > 3 && lengths.contains(&whole[1].len()), "{lengths:?}");
    assert_eq!(rows(&data)[0].len(), 130);
    assert_eq!(all[0], whole[0][..130]);
}

#[test]
fn samples_are_spread_over_what_is_read_and_reading_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jsonl");
    let lines: Vec<String> = (0..100).map(|n| format!("{{\"text\": \"number {n}\"}}")).collect();
    // Beyond what four samples need nothing is looked at.
    fs::write(&path, lines.join("\n") + "\nnot json").unwrap();
    let some = |samples, seed| {
        let options = TokenOptions { samples: Some(samples), seed, ..options("tokenizer.json") };
        open(&path, &options)
    };
    let data = some(4, 1).unwrap();
    assert_eq!(data.samples(), 4);
    assert_eq!(rows(&data), rows(&some(4, 1).unwrap()));
    assert_ne!(rows(&data), rows(&some(4, 2).unwrap()));
    assert_eq!(data.notes()[1], "reading ended after 16 windows, 4 per sample");
    assert!(some(100, 1).unwrap_err().to_string().contains("line 101 is not JSON"));
    fs::write(&path, lines.join("\n")).unwrap();
    let all = some(101, 1).unwrap();
    assert_eq!((all.samples(), all.notes()[1].as_str()), (100, "101 samples were asked for, there are 100"));
}

#[test]
fn the_beginning_of_a_large_text_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.txt");
    fs::write(&path, "the ship é ".repeat(10_000)).unwrap();
    let some = TokenOptions { samples: Some(2), sequence_length: Some(64), ..options("tokenizer.json") };
    let (part, whole) =
        (open(&path, &some).unwrap(), open(&path, &TokenOptions { samples: None, ..some }).unwrap());
    assert_eq!((part.samples(), rows(&part)[0].len()), (2, 64));
    let all = rows(&whole);
    assert!(rows(&part).iter().all(|row| all[..8].contains(row)));
    assert!(part.notes()[1].starts_with("reading ended after"), "{:?}", part.notes());
}

#[test]
fn stored_ids_are_rows_or_one_long_document() {
    let at = |key: &str| PathBuf::from(format!("{}:{key}", golden("ids.npz").display()));
    let none = TokenOptions { tokenizer: None, sequence_length: None, ..options("") };
    assert_eq!(rows(&open(&at("two"), &none).unwrap()), [[5, 6, 7], [8, 9, -1]]);
    assert_eq!(rows(&open(&at("one"), &none).unwrap()), [(0..10).collect::<Vec<i64>>()]);
    let four = TokenOptions { sequence_length: Some(4), ..none.clone() };
    // The end, two ids, is too short to be a window.
    assert_eq!(rows(&open(&at("one"), &four).unwrap()), [[0, 1, 2, 3], [4, 5, 6, 7]]);
    let error = problem(&golden("ids.npz"), &none);
    assert!(error.ends_with("expected one array, as FILE.npz:ARRAY, it has `two`, `one`"), "{error}");
    // No window is longer than the model's positions: longer rows are the user's to cut.
    let bound =
        |positions, options: &TokenOptions| TokenOptions { positions: Some(positions), ..options.clone() };
    assert_eq!(rows(&open(&at("one"), &bound(4, &four)).unwrap()), [[0, 1, 2, 3], [4, 5, 6, 7]]);
    let error = problem(&at("one"), &bound(3, &four));
    assert!(error.contains("sequence length is 4, expected at most the 3 positions"), "{error}");
    assert_eq!(rows(&open(&at("two"), &bound(3, &none)).unwrap()), [[5, 6, 7], [8, 9, -1]]);
    let error = problem(&at("two"), &bound(2, &none));
    assert!(
        error.ends_with(
            "row 0 has 3 ids, expected at most the 2 positions of the model; a sequence length of 2 cuts rows"
        ),
        "{error}"
    );
    let few = TokenOptions { vocabulary: 9, ..none };
    assert!(problem(&at("two"), &few).ends_with("document 2: token 1 is 9, expected 0 to 8"));
}

#[test]
fn what_cannot_be_used_is_refused_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let plain = options("tokenizer.json");
    let write = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        path
    };
    for (name, content, expect) in [
        ("a.jsonl", &b"{\"text\": 1}"[..], "line 1 has a `text` that is not a string"),
        ("b.jsonl", b"\n[1]", "line 2 is not a JSON object"),
        ("c.jsonl", b"{\"a\": 1, \"b\": 2}", "line 1 has no field `text`, it has `a`, `b`"),
        ("d.jsonl", b"{\"text\": \"\"}", "has no tokens; documents: 1"),
        ("e.jsonl", b"", "has no tokens; documents: 0"),
        ("f.txt", b"ab\xff", "is not UTF-8 text at byte 2"),
        ("g.csv", b"a", "unknown kind, expected .txt, .jsonl, .parquet, .npy, .npz or FILE.npz:ARRAY"),
        ("h.parquet", b"PAR1", "is not a readable parquet file"),
        ("i.npz", b"PK", "is not a readable .npz (zip) file"),
    ] {
        let error = problem(&write(name, content), &plain);
        assert!(error.contains(expect) && !error.contains('\n'), "{name}: {error}");
    }
    let path = write("ok.txt", b"the ship");
    let no_tokenizer = TokenOptions { tokenizer: None, ..plain.clone() };
    assert!(problem(&path, &no_tokenizer).contains("is missing, expected the model's"));
    let broken = TokenOptions { tokenizer: Some(write("t.json", b"{}")), ..plain.clone() };
    assert!(problem(&path, &broken).contains("is no tokenizer that can be used"));
    let short = TokenOptions { sequence_length: Some(1), ..plain.clone() };
    assert!(problem(&path, &short).contains("sequence length is 1, expected 2 to 1048576"));
    let small = TokenOptions { vocabulary: 3, ..plain.clone() };
    assert!(problem(&path, &small).contains("expected 0 to 2"));
    let other = TokenOptions { field: "id".into(), ..plain.clone() };
    assert!(
        problem(&golden("documents.parquet"), &other).contains("column `id` is of INT64, expected strings")
    );
    let absent = TokenOptions { field: "body".into(), ..plain };
    assert!(
        problem(&golden("documents.parquet"), &absent).ends_with("no column `body`, it has `id`, `text`")
    );
}

#[test]
fn damaged_files_are_errors_never_panics() {
    let folder = tempfile::tempdir().unwrap();
    let (data, tokenizer) = (folder.path().join("a.parquet"), folder.path().join("tokenizer.json"));
    let plain = TokenOptions { tokenizer: Some(tokenizer.clone()), ..options("") };
    let (good, json) =
        (fs::read(golden("documents.parquet")).unwrap(), fs::read(golden("tokenizer_begin.json")).unwrap());
    fs::write(&tokenizer, &json).unwrap();
    for at in (0..good.len()).step_by(5) {
        let mut bad = good.clone();
        bad[at] ^= 0xff;
        fs::write(&data, &bad).unwrap();
        let _ = open(&data, &plain);
        if at % 35 == 0 {
            fs::write(&data, &good[..at]).unwrap();
            assert!(open(&data, &plain).is_err(), "cut at {at}");
        }
    }
    fs::write(&data, &good).unwrap();
    for at in (0..json.len()).step_by(19) {
        let mut bad = json.clone();
        bad[at] ^= 1;
        fs::write(&tokenizer, &bad).unwrap();
        let _ = open(&data, &plain);
    }
}
