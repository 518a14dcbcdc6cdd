//! `tokenizer.json`, from elsewhere or trained here, and texts through it.
//!
//! An input is `{"tokenizer", "config", "text"}`: two files and a text; `{"kind", "vocab_size", "train", "text"}`: a
//! tokenizer to train; or, if it is no such JSON, the file itself.

#![no_main]

use fuzz::{check_error, file, mutate, put};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use serde_json::{Value, json};
use text::tokenizer::{SPECIAL_TOKENS, StreamDecoder, Tokenizer, TokenizerConfig};

/// Texts that many a tokenizer stumbles over.
const TEXTS: [&str; 6] = [
    "",
    "Hello,  world!\n\n\t 12",
    "<|bos|><|user|>é字🦊\u{fffd}<|end|><|im_end|></s>[INST]<|endoftext|><0x0A>",
    "\u{0}\u{1}\r\n\u{a0}\u{200b}\u{feff}▁Ġ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    " a b  c<s> </s> [CLS][MASK]",
];

const WORDS: [&str; 72] = [
    "added_tokens",
    "model",
    "vocab",
    "merges",
    "type",
    "BPE",
    "WordPiece",
    "WordLevel",
    "Unigram",
    "unk_token",
    "unk_id",
    "byte_fallback",
    "fuse_unk",
    "ignore_merges",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "dropout",
    "max_input_chars_per_word",
    "normalizer",
    "NFC",
    "NFKC",
    "BertNormalizer",
    "Replace",
    "Prepend",
    "Strip",
    "StripAccents",
    "Lowercase",
    "Nmt",
    "Precompiled",
    "precompiled_charsmap",
    "Sequence",
    "normalizers",
    "pretokenizers",
    "decoders",
    "pre_tokenizer",
    "ByteLevel",
    "add_prefix_space",
    "use_regex",
    "trim_offsets",
    "Metaspace",
    "replacement",
    "prepend_scheme",
    "always",
    "first",
    "split",
    "Whitespace",
    "WhitespaceSplit",
    "Split",
    "pattern",
    "Regex",
    "String",
    "behavior",
    "Isolated",
    "invert",
    "Punctuation",
    "Digits",
    "decoder",
    "ByteFallback",
    "Fuse",
    "CTC",
    "BPEDecoder",
    "post_processor",
    "TemplateProcessing",
    "special",
    "normalized",
    "lstrip",
    "rstrip",
    "single_word",
    "<|end|>",
    "</s>",
    "▁",
    "(a+)+$",
];

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(data, size, max_size, seed, &WORDS)
});

fuzz_target!(|data: &[u8]| {
    let input: Value = serde_json::from_slice(data).unwrap_or_default();
    let mut texts = TEXTS.map(str::to_owned).to_vec();
    texts.extend(input["text"].as_str().map(str::to_owned));
    if input.get("kind").is_some() {
        return trained(&input, &texts);
    }
    let dir = file("tokenizer");
    std::fs::create_dir_all(&dir).expect("a folder");
    let json = input.get("tokenizer").map_or(data.to_vec(), |json| json.to_string().into_bytes());
    put(&dir, "tokenizer.json", Some(&json));
    put(&dir, "tokenizer_config.json", input.get("config").map(|json| json.to_string().into_bytes()).as_deref());
    match Tokenizer::load(&dir) {
        Err(error) => check_error(&error),
        Ok(tokenizer) => {
            let parts: Value = serde_json::from_slice(&json).expect("loaded");
            check(&tokenizer, &texts, keeps_every_byte(&parts));
            check_saved(&tokenizer, &texts);
            match tokenizer.with_special_tokens_added() {
                Err(error) => check_error(&error),
                Ok((grown, _)) => {
                    assert!(grown.try_specials().is_ok(), "special tokens were added");
                    check(&grown, &texts, false);
                }
            }
        }
    }
});

/// A tokenizer of ours: what it promises is promised for every text.
fn trained(input: &Value, texts: &[String]) {
    let mut fields = json!({ "kind": input["kind"] });
    for key in ["vocab_size", "min_frequency"] {
        if let Some(value) = input.get(key) {
            fields[key] = value.clone();
        }
    }
    let Ok(config) = serde_json::from_value::<TokenizerConfig>(fields) else { return };
    if config.vocab_size > 2000 {
        return;
    }
    let train: Vec<&str> = input["train"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    match Tokenizer::train(&config, train.iter().copied(), true) {
        Err(error) => check_error(&error),
        Ok(tokenizer) => {
            let is_lossless = input["kind"] != "wordpiece";
            check(&tokenizer, texts, is_lossless);
            check_saved(&tokenizer, texts);
            for text in &train {
                assert!(tokenizer.encode(text).is_ok(), "a text of the training is refused");
            }
        }
    }
}

fn check(tokenizer: &Tokenizer, texts: &[String], is_lossless: bool) {
    for text in texts {
        let ids = match tokenizer.encode(text) {
            Err(error) => {
                check_error(&error);
                continue;
            }
            Ok(ids) => ids,
        };
        for id in &ids {
            assert!((*id as usize) < tokenizer.vocab_size(), "{text:?} yields id {id}");
            assert!(!tokenizer.is_mark(*id), "{text:?} yields the mark {:?}", tokenizer.token_text(*id));
        }
        let decoded = tokenizer.decode(&ids);
        if is_lossless {
            assert_eq!(decoded, *text, "{ids:?}");
        }
        let _ = tokenizer.decode_with_specials(&ids);
        let mut stream = StreamDecoder::new(tokenizer);
        let pieces: String = ids.iter().map(|id| stream.push(*id)).collect();
        assert_eq!(pieces + &stream.finish(), decoded, "as a stream: {ids:?}");
    }
    let any: Vec<u32> = (0..tokenizer.vocab_size().min(600) as u32).chain([u32::MAX]).collect();
    let _ = tokenizer.decode(&any);
    let _ = (tokenizer.bos(), tokenizer.eos(), tokenizer.end_of_turn(), tokenizer.chat_template_sha256());
    if let Ok(specials) = tokenizer.try_specials() {
        for token in SPECIAL_TOKENS {
            assert!(tokenizer.token_id(token).is_some_and(|id| tokenizer.is_mark(id)), "{token} is no mark");
        }
        assert_ne!(specials.pad, specials.end);
    }
}

/// What is written is read again as the same tokenizer.
fn check_saved(tokenizer: &Tokenizer, texts: &[String]) {
    let dir = file("saved");
    tokenizer.save(&dir).expect("saved");
    let again = Tokenizer::load(&dir).unwrap_or_else(|error| panic!("what was saved is refused: {error}"));
    assert_eq!(again.sha256(), tokenizer.sha256());
    assert_eq!(again.vocab_size(), tokenizer.vocab_size());
    for text in texts {
        assert_eq!(again.encode(text).ok(), tokenizer.encode(text).ok(), "{text:?}, saved and read again");
    }
}

/// Whether the file is byte-level BPE that can spell every text, and nothing around it changes the text.
fn keeps_every_byte(file: &Value) -> bool {
    let (model, pre_tokenizer) = (&file["model"], &file["pre_tokenizer"]);
    let is_absent = |value: &Value| value.is_null() || *value == "";
    let Some(vocab) = model["vocab"].as_object() else { return false };
    let mut ids: Vec<&Value> = vocab.values().collect();
    ids.sort_by_key(|id| id.as_u64());
    ids.dedup();
    model["type"] == "BPE"
        && ids.len() == vocab.len()
        && ["continuing_subword_prefix", "end_of_word_suffix", "unk_token"].iter().all(|key| is_absent(&model[*key]))
        && model["byte_fallback"] != true
        && file["normalizer"].is_null()
        && pre_tokenizer["type"] == "ByteLevel"
        && pre_tokenizer["add_prefix_space"] == false
        && file["decoder"]["type"] == "ByteLevel"
        && file["added_tokens"].as_array().is_none_or(|tokens| {
            tokens
                .iter()
                .all(|token| token["special"] == true && token["content"].as_str().is_some_and(|t| t.len() > 6))
        })
        && (0..=255).all(|byte| vocab.contains_key(char_of_byte(byte).encode_utf8(&mut [0; 4])))
}

/// The character that byte-level BPE writes for a byte.
fn char_of_byte(byte: u8) -> char {
    let is_printed = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if is_printed(byte) {
        return char::from(byte);
    }
    let n_before = (0..byte).filter(|other| !is_printed(*other)).count() as u32;
    char::from_u32(256 + n_before).expect("a letter")
}
