//! The tokenizer in GGUF's words: tokens with their kinds, merges, special tokens, and the name of how text is split.
//!
//! Byte-level BPE only, and only splittings that llama.cpp has a name for: with another it would read text differently and
//! say nothing. Sources: `tokenizer.json` and `tokenizer_config.json` as the Hugging Face libraries document them. Not
//! here: splitting text ([`crate::dataset::tokens`]).

use super::architecture::refused;
use super::file::Value;
use crate::CoordinatorError;
use halfstep_model::checkpoint::Checkpoint;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;

/// Larger files are no tokenizer.
const FILE_BYTES_MAX: u64 = 1 << 28;

/// Kinds of tokens.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// Pieces of the patterns below: contractions, then words, then the rest.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

#[derive(Deserialize)]
struct Tokenizer {
    model: Model,
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<Normalizer>,
    pre_tokenizer: Option<Step>,
    post_processor: Option<Processor>,
}

#[derive(Deserialize)]
struct Model {
    r#type: Option<String>,
    vocab: BTreeMap<String, u32>,
    merges: Vec<Merge>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

/// Newer files have pairs, older ones a text with a space.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Text(String),
    Pair([String; 2]),
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
}

#[derive(Deserialize)]
struct Normalizer {
    r#type: String,
}

/// A step of splitting text.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(tag = "type")]
enum Step {
    ByteLevel {
        add_prefix_space: bool,
        #[serde(default = "yes")]
        use_regex: bool,
    },
    Split {
        pattern: Pattern,
        behavior: String,
        invert: bool,
    },
    Digits {
        individual_digits: bool,
    },
    Sequence {
        pretokenizers: Vec<Step>,
    },
    #[serde(other)]
    Unknown,
}

fn yes() -> bool {
    true
}

#[derive(Debug, PartialEq, Deserialize)]
enum Pattern {
    Regex(String),
    String(String),
}

/// What is added around a text.
#[derive(Deserialize)]
#[serde(tag = "type")]
enum Processor {
    ByteLevel {},
    TemplateProcessing {
        single: Vec<Piece>,
    },
    Sequence {
        processors: Vec<Processor>,
    },
    #[serde(other)]
    Unknown,
}

#[derive(Deserialize)]
enum Piece {
    SpecialToken { id: String },
    Sequence {},
}

/// What is read of `tokenizer_config.json`.
#[derive(Default, Deserialize)]
struct Settings {
    bos_token: Option<Named>,
    eos_token: Option<Named>,
    unk_token: Option<Named>,
    pad_token: Option<Named>,
    chat_template: Option<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Named {
    Text(String),
    Token { content: String },
}

impl Named {
    fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Token { content: text } => text,
        }
    }
}

/// The values that describe the checkpoint's tokenizer, for a model with `vocabulary` rows.
///
/// # Errors
/// `Configuration` if there is none or it is of a kind that has no name; `Storage`; `BadInput` for files that are not what
/// they should be.
pub(super) fn entries(
    checkpoint: &Checkpoint,
    vocabulary: usize,
) -> Result<Vec<(String, Value)>, CoordinatorError> {
    let files: BTreeMap<String, _> = checkpoint.companions()?.into_iter().collect();
    let read = |name: &str| files.get(name).map(|path| text(path)).transpose();
    let json = read("tokenizer.json")?.ok_or_else(|| refused("a checkpoint without `tokenizer.json`"))?;
    let tokenizer: Tokenizer = parsed("tokenizer.json", &json)?;
    let settings: Settings = match read("tokenizer_config.json")? {
        Some(json) => parsed("tokenizer_config.json", &json)?,
        None => Settings::default(),
    };
    let template = read("chat_template.jinja")?;
    describe(&tokenizer, &settings, template, checkpoint.config(), vocabulary)
}

fn text(path: &std::path::Path) -> Result<String, CoordinatorError> {
    let io = |e| CoordinatorError::storage(path, "read", e);
    let mut text = String::new();
    let file = File::open(path).map_err(io)?;
    // One more than allowed, to see that there is more.
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(io)?;
    match text.len() as u64 > FILE_BYTES_MAX {
        true => {
            let shown = path.display();
            Err(CoordinatorError::BadInput(format!(
                "{shown}: expected at most {FILE_BYTES_MAX} bytes, found more"
            )))
        }
        false => Ok(text),
    }
}

fn parsed<'t, T: Deserialize<'t>>(name: &str, json: &'t str) -> Result<T, CoordinatorError> {
    serde_json::from_str(json)
        .map_err(|e| CoordinatorError::Configuration(format!("gguf output: {name} is not understood: {e}")))
}

fn describe(
    tokenizer: &Tokenizer,
    settings: &Settings,
    template: Option<String>,
    config: &serde_json::Value,
    vocabulary: usize,
) -> Result<Vec<(String, Value)>, CoordinatorError> {
    check_model(&tokenizer.model)?;
    if let Some(Normalizer { r#type }) = tokenizer.normalizer.as_ref().filter(|n| n.r#type != "NFC") {
        return Err(refused(format!("the tokenizer's normalizer `{}`", r#type)));
    }
    let (tokens, kinds) = tokens(tokenizer, vocabulary)?;
    let special = Special { tokenizer, settings, config };
    let (add_bos, add_eos) = special.added_around()?;
    let mut entries = vec![
        ("model", Value::Text("gpt2".into())),
        ("pre", Value::Text(split_name(tokenizer)?.into())),
        ("tokens", Value::Texts(tokens)),
        ("token_type", Value::Integers(kinds)),
        ("merges", Value::Texts(tokenizer.model.merges.iter().map(merge).collect::<Result<_, _>>()?)),
        ("add_bos_token", Value::Flag(add_bos)),
        ("add_eos_token", Value::Flag(add_eos)),
    ];
    let ids = [
        ("bos_token_id", special.id(&settings.bos_token, "bos_token_id")?),
        ("eos_token_id", special.id(&settings.eos_token, "eos_token_id")?),
        ("unknown_token_id", special.id(&settings.unk_token, "unk_token_id")?),
        ("padding_token_id", special.id(&settings.pad_token, "pad_token_id")?),
    ];
    entries.extend(ids.into_iter().filter_map(|(key, id)| Some((key, Value::Count(id?)))));
    let mut entries: Vec<(String, Value)> =
        entries.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
    // Several templates by name are for programs that choose one; readers of GGUF do not.
    let own = settings.chat_template.as_ref().and_then(|template| template.as_str()).map(str::to_owned);
    entries.extend(own.or(template).map(|text| ("tokenizer.chat_template".to_owned(), Value::Text(text))));
    Ok(entries)
}

fn check_model(model: &Model) -> Result<(), CoordinatorError> {
    let kind = model.r#type.as_deref().unwrap_or("BPE");
    let affix = |affix: &Option<String>| affix.as_deref().is_some_and(|affix| !affix.is_empty());
    match () {
        () if kind != "BPE" => Err(refused(format!("a tokenizer of type `{kind}`, expected byte-level BPE"))),
        () if model.byte_fallback => {
            Err(refused("a SentencePiece tokenizer (`byte_fallback`), expected byte-level BPE"))
        }
        () if affix(&model.continuing_subword_prefix) || affix(&model.end_of_word_suffix) => {
            Err(refused("a tokenizer whose tokens have prefixes or suffixes"))
        }
        () => Ok(()),
    }
}

/// Text and kind of every row of the embedding.
fn tokens(tokenizer: &Tokenizer, vocabulary: usize) -> Result<(Vec<String>, Vec<i32>), CoordinatorError> {
    let mut tokens: Vec<String> = (0..vocabulary).map(|id| format!("[PAD{id}]")).collect();
    let mut kinds = vec![UNUSED; vocabulary];
    let mut put =
        |id: u32, text: &str, kind: i32| match tokens.get_mut(id as usize).zip(kinds.get_mut(id as usize)) {
            Some((token, known)) if *known != UNUSED && token != text => {
                Err(refused(format!("a tokenizer with two tokens of index {id}, `{token}` and `{text}`")))
            }
            Some((token, known)) => {
                text.clone_into(token);
                *known = kind;
                Ok(())
            }
            None => Err(refused(format!(
                "token `{text}` of index {id}, expected less than {vocabulary}, the rows of the embedding"
            ))),
        };
    for (text, id) in &tokenizer.model.vocab {
        put(*id, text, NORMAL)?;
    }
    for added in &tokenizer.added_tokens {
        if added.single_word || added.lstrip || added.rstrip {
            return Err(refused(format!(
                "token `{}`, which takes spaces or whole words with it",
                added.content
            )));
        }
        put(added.id, &added.content, if added.special { CONTROL } else { USER_DEFINED })?;
    }
    Ok((tokens, kinds))
}

fn merge(merge: &Merge) -> Result<String, CoordinatorError> {
    match merge {
        Merge::Text(text) if text.split(' ').count() == 2 => Ok(text.clone()),
        Merge::Pair([first, second]) if !first.contains(' ') && !second.contains(' ') => {
            Ok(format!("{first} {second}"))
        }
        Merge::Text(text) => Err(refused(format!("merge `{text}`, expected two parts and a space between"))),
        Merge::Pair([first, second]) => {
            Err(refused(format!("merge of `{first}` and `{second}`, expected no spaces in either")))
        }
    }
}

/// What llama.cpp calls this splitting.
fn split_name(tokenizer: &Tokenizer) -> Result<&'static str, CoordinatorError> {
    let mut steps = Vec::new();
    if let Some(step) = &tokenizer.pre_tokenizer {
        flatten(step, &mut steps);
    }
    let bytes = |regex: bool, step: &Step| matches!(step, Step::ByteLevel { add_prefix_space: false, use_regex } if *use_regex == regex);
    let known = match steps[..] {
        [only] if bytes(true, only) => Some(("gpt-2", false)),
        [Step::Digits { individual_digits: true }, last] if bytes(true, last) => Some(("smollm", false)),
        [Step::Split { pattern: Pattern::Regex(regex), behavior, invert: false }, last]
            if behavior == "Isolated" && bytes(false, last) =>
        {
            match regex.as_str() {
                LLAMA3 => Some(("llama-bpe", true)),
                QWEN2 => Some(("qwen2", false)),
                _ => None,
            }
        }
        _ => None,
    };
    match known {
        Some((name, ignore_merges)) if ignore_merges == tokenizer.model.ignore_merges => Ok(name),
        Some((name, ignore_merges)) => Err(refused(format!(
            "a tokenizer that splits like `{name}` with `ignore_merges` {}, expected {ignore_merges}",
            tokenizer.model.ignore_merges
        ))),
        None => Err(refused(
            "how this tokenizer splits text: known are those of GPT-2, SmolLM, Llama 3, and Qwen2 and 3",
        )),
    }
}

fn flatten<'s>(step: &'s Step, steps: &mut Vec<&'s Step>) {
    match step {
        Step::Sequence { pretokenizers } => pretokenizers.iter().for_each(|step| flatten(step, steps)),
        other => steps.push(other),
    }
}

/// Special tokens, by what the files say of them.
struct Special<'a> {
    tokenizer: &'a Tokenizer,
    settings: &'a Settings,
    config: &'a serde_json::Value,
}

impl Special<'_> {
    /// Index of a named token; else the one that `config.json` has under `key`, the first of several.
    fn id(&self, named: &Option<Named>, key: &str) -> Result<Option<u32>, CoordinatorError> {
        if let Some(named) = named {
            let text = named.text();
            let added = self.tokenizer.added_tokens.iter().find(|added| added.content == text);
            let id = added.map(|added| added.id).or_else(|| self.tokenizer.model.vocab.get(text).copied());
            let none = || refused(format!("special token `{text}`, which the tokenizer does not have"));
            return id.map(Some).ok_or_else(none);
        }
        let stated =
            self.config.get(key).and_then(|value| value.as_array().map_or(Some(value), |all| all.first()));
        Ok(stated.and_then(|value| u32::try_from(value.as_u64()?).ok()))
    }

    /// Whether a text gets the first token before and the last behind it.
    fn added_around(&self) -> Result<(bool, bool), CoordinatorError> {
        let (mut before, mut behind) = (false, false);
        let mut processors: Vec<&Processor> = self.tokenizer.post_processor.iter().collect();
        while let Some(processor) = processors.pop() {
            match processor {
                Processor::ByteLevel {} => {}
                Processor::Sequence { processors: more } => processors.extend(more),
                Processor::TemplateProcessing { single } => {
                    let is = |piece: &Piece, named: &Option<Named>| match piece {
                        Piece::SpecialToken { id } => named.as_ref().is_some_and(|named| named.text() == id),
                        Piece::Sequence {} => false,
                    };
                    let (bos, eos) = (&self.settings.bos_token, &self.settings.eos_token);
                    (before, behind) = match &single[..] {
                        [Piece::Sequence {}] => (false, false),
                        [first, Piece::Sequence {}] if is(first, bos) => (true, false),
                        [Piece::Sequence {}, last] if is(last, eos) => (false, true),
                        [first, Piece::Sequence {}, last] if is(first, bos) && is(last, eos) => (true, true),
                        _ => {
                            return Err(refused("the special tokens that this tokenizer puts around a text"));
                        }
                    };
                }
                Processor::Unknown => return Err(refused("this tokenizer's post-processor")),
            }
        }
        Ok((before, behind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const BYTES: &str = "ByteLevel";

    fn tiny() -> serde_json::Value {
        json!({
            "added_tokens": [
                {"id": 3, "content": "<s>", "special": true},
                {"id": 4, "content": "<tool>", "special": false},
            ],
            "normalizer": null,
            "pre_tokenizer": {"type": BYTES, "add_prefix_space": false, "trim_offsets": true},
            "post_processor": null,
            "model": {
                "type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3}, "merges": [["a", "b"]],
                "byte_fallback": false, "ignore_merges": false, "unk_token": null,
            },
        })
    }

    fn described(
        tokenizer: &serde_json::Value,
        settings: serde_json::Value,
    ) -> Result<BTreeMap<String, Value>, CoordinatorError> {
        let tokenizer: Tokenizer = parsed("tokenizer.json", &tokenizer.to_string())?;
        let settings: Settings = parsed("tokenizer_config.json", &settings.to_string())?;
        let config = json!({"eos_token_id": [2, 1]});
        let entries = describe(&tokenizer, &settings, Some("template".into()), &config, 6)?;
        Ok(entries.into_iter().collect())
    }

    #[test]
    fn tokens_have_their_kinds_and_rows_without_one_are_unused() {
        let found = described(&tiny(), json!({"bos_token": {"content": "<s>"}})).unwrap();
        let texts = |list: &[&str]| Value::Texts(list.iter().map(|text| (*text).to_owned()).collect());
        let expected = [
            ("tokenizer.chat_template", Value::Text("template".into())),
            ("tokenizer.ggml.add_bos_token", Value::Flag(false)),
            ("tokenizer.ggml.add_eos_token", Value::Flag(false)),
            ("tokenizer.ggml.bos_token_id", Value::Count(3)),
            ("tokenizer.ggml.eos_token_id", Value::Count(2)),
            ("tokenizer.ggml.merges", texts(&["a b"])),
            ("tokenizer.ggml.model", Value::Text("gpt2".into())),
            ("tokenizer.ggml.pre", Value::Text("gpt-2".into())),
            ("tokenizer.ggml.token_type", Value::Integers(vec![1, 1, 1, 3, 4, 5])),
            ("tokenizer.ggml.tokens", texts(&["a", "b", "ab", "<s>", "<tool>", "[PAD5]"])),
        ];
        assert_eq!(found, expected.map(|(key, value)| (key.to_owned(), value)).into());
    }

    #[test]
    fn every_known_splitting_has_its_name_and_others_are_refused() {
        let split = |regex: &str| {
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
                {"type": BYTES, "add_prefix_space": false, "use_regex": false},
            ]})
        };
        let digits = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true}, {"type": BYTES, "add_prefix_space": false},
        ]});
        for (pre_tokenizer, ignore_merges, expected) in [
            (digits.clone(), false, Ok("smollm")),
            (split(LLAMA3), true, Ok("llama-bpe")),
            (split(QWEN2), false, Ok("qwen2")),
            (split(LLAMA3), false, Err("`ignore_merges` false, expected true")),
            (split("x"), false, Err("how this tokenizer splits text")),
            (json!({"type": BYTES, "add_prefix_space": true}), false, Err("how this tokenizer splits text")),
            (json!({"type": "Metaspace"}), false, Err("how this tokenizer splits text")),
            (json!(null), false, Err("how this tokenizer splits text")),
        ] {
            let mut tokenizer = tiny();
            tokenizer["pre_tokenizer"] = pre_tokenizer.clone();
            tokenizer["model"]["ignore_merges"] = ignore_merges.into();
            match (described(&tokenizer, json!({})), expected) {
                (Ok(found), Ok(name)) => assert_eq!(found["tokenizer.ggml.pre"], Value::Text(name.into())),
                (Err(error), Err(expect)) => assert!(error.to_string().contains(expect), "{error}"),
                (found, expected) => panic!("{pre_tokenizer}: {found:?}, expected {expected:?}"),
            }
        }
    }

    #[test]
    fn tokens_around_a_text_are_said_or_refused() {
        let special = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
        let text = json!({"Sequence": {"id": "A", "type_id": 0}});
        for (single, expected) in [
            (json!([special("<s>"), text]), Some((true, false))),
            (json!([text, special("ab")]), Some((false, true))),
            (json!([special("<s>"), text, special("ab")]), Some((true, true))),
            (json!([special("<tool>"), text]), None),
            (json!([text, special("<s>")]), None),
        ] {
            let mut tokenizer = tiny();
            tokenizer["post_processor"] = json!({"type": "Sequence", "processors": [
                {"type": BYTES, "add_prefix_space": true}, {"type": "TemplateProcessing", "single": single},
            ]});
            let found = described(&tokenizer, json!({"bos_token": "<s>", "eos_token": "ab"}));
            match expected {
                Some((bos, eos)) => {
                    let found = found.unwrap();
                    assert_eq!(found["tokenizer.ggml.add_bos_token"], Value::Flag(bos), "{single}");
                    assert_eq!(found["tokenizer.ggml.add_eos_token"], Value::Flag(eos), "{single}");
                }
                None => assert!(found.unwrap_err().to_string().contains("around a text"), "{single}"),
            }
        }
    }

    #[test]
    fn what_a_reader_would_take_for_something_else_is_refused_by_name() {
        let changed = |path: &str, value: serde_json::Value| {
            let mut tokenizer = tiny();
            *tokenizer.pointer_mut(path).unwrap() = value;
            described(&tokenizer, json!({})).unwrap_err().to_string()
        };
        for (path, value, expect) in [
            ("/model/type", json!("Unigram"), "type `Unigram`"),
            ("/model/byte_fallback", json!(true), "SentencePiece"),
            ("/model/vocab", json!({"a": 0, "c": 6}), "token `c` of index 6, expected less than 6"),
            ("/model/vocab", json!({"a": 0, "c": 0}), "two tokens of index 0"),
            ("/model/merges", json!(["a b c"]), "merge `a b c`"),
            ("/model/merges", json!([["a ", "b"]]), "no spaces"),
            ("/added_tokens/0", json!({"id": 3, "content": "<m>", "lstrip": true}), "takes spaces"),
            ("/normalizer", json!({"type": "Lowercase"}), "normalizer `Lowercase`"),
            ("/post_processor", json!({"type": "BertProcessing"}), "post-processor"),
            ("/model", json!(3), "not understood"),
        ] {
            let error = changed(path, value);
            assert!(error.contains(expect), "{error}: expected `{expect}`");
        }
        let error = described(&tiny(), json!({"bos_token": "<x>"})).unwrap_err().to_string();
        assert!(error.contains("special token `<x>`"), "{error}");
    }
}
