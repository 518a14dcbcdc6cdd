use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;
use base::testing::shared;

mod foreign;
mod padding;
mod templates;

const KINDS: [TokenizerKind; 4] =
    [TokenizerKind::Bpe, TokenizerKind::Wordpiece, TokenizerKind::Char, TokenizerKind::Byte];

/// Text with every character the tests use, so that the `char` tokenizer knows them.
const TEXT: &str = "The fox found a red boat, and the fox's boat was naïve. 🦊 <|bos|><|pad|><|system|><|user|><|assistant|><|end|> [UNK]\n\t";

fn fixture_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

fn fixture(name: &str) -> Value {
    serde_json::from_slice(&fs::read(fixture_path(name)).unwrap()).unwrap()
}

fn strings(value: &Value) -> Vec<String> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The tokenizers of the fixtures: learned from the oracle's documents.
fn of_fixture(kind: TokenizerKind) -> Tokenizer {
    let fixture = fixture("tokenizer.json");
    let vocab_size = match kind {
        TokenizerKind::Bpe => 400,
        _ => 200,
    };
    let config = TokenizerConfig { kind, vocab_size, ..TokenizerConfig::default() };
    let mut texts = strings(&fixture["documents"]);
    texts.push(TEXT.to_owned());
    if matches!(kind, TokenizerKind::Bpe | TokenizerKind::Wordpiece) {
        texts.pop();
    }
    Tokenizer::train(&config, texts.iter(), true).unwrap()
}

/// A tokenizer of these two files.
fn load(file: &Value, settings: &Value) -> Result<Tokenizer, TokenizerError> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    Tokenizer::load(dir.path())
}

fn model(tokenizer: &Tokenizer) -> Value {
    serde_json::to_value(&tokenizer.library).unwrap()["model"].clone()
}

#[test]
fn bpe_learns_the_merges_that_python_learns() {
    let fixture = fixture("tokenizer.json");
    let tokenizer = of_fixture(TokenizerKind::Bpe);
    assert_eq!(model(&tokenizer)["merges"], fixture["bpe"]["merges"]);
    assert_eq!(tokenizer.vocab_size(), 400);
    for (text, ids) in strings(&fixture["probes"]).iter().zip(fixture["bpe"]["ids"].as_array().unwrap()) {
        assert_eq!(json!(tokenizer.encode(text).unwrap()), *ids, "{text:?}");
    }
}

#[test]
fn bpe_learns_from_stories_what_python_learns() {
    let Some(path) = shared("data/stories/pretrain.val.txt") else {
        return;
    };
    let recorded = &fixture("tokenizer.json")["stories"];
    let text = fs::read_to_string(path).unwrap();
    let texts = text.split("<|endoftext|>").map(|part| part.trim_matches(['\r', '\n'])).filter(|part| !part.is_empty());
    let vocab_size = recorded["vocab_size"].as_u64().unwrap() as usize;
    let config = TokenizerConfig { vocab_size, ..TokenizerConfig::default() };
    let tokenizer = Tokenizer::train(&config, texts, true).unwrap();
    let merges: Vec<Vec<String>> = serde_json::from_value(model(&tokenizer)["merges"].clone()).unwrap();
    let merges: Vec<String> = merges.iter().map(|pair| pair.join(" ")).collect();
    assert_eq!(sha256_of(merges.join("\n").as_bytes()), recorded["merges_sha256"]);
}

#[test]
fn wordpiece_learns_the_words_that_python_learns() {
    let fixture = fixture("tokenizer.json");
    let tokenizer = of_fixture(TokenizerKind::Wordpiece);
    let ours: BTreeMap<String, u32> = tokenizer.library.get_vocab(true).into_iter().collect();
    assert_eq!(
        json!(ours),
        json!(serde_json::from_value::<BTreeMap<String, u32>>(fixture["wordpiece"]["vocab"].clone()).unwrap())
    );
    let recorded = &fixture["wordpiece"];
    for (i, text) in strings(&fixture["probes"]).iter().enumerate() {
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(json!(ids), recorded["ids"][i], "{text:?}");
        assert_eq!(json!(tokenizer.decode(&ids)), recorded["texts"][i], "{text:?}");
    }
}

#[test]
fn training_does_not_depend_on_the_order_of_the_texts() {
    let mut texts = strings(&fixture("tokenizer.json")["documents"]);
    for kind in KINDS {
        let config = TokenizerConfig { kind, vocab_size: 350, ..TokenizerConfig::default() };
        let forwards = Tokenizer::train(&config, texts.iter(), true).unwrap().sha256();
        texts.reverse();
        assert_eq!(forwards, Tokenizer::train(&config, texts.iter(), true).unwrap().sha256(), "{kind:?}");
    }
}

#[test]
fn text_never_yields_a_special_token() {
    for kind in KINDS {
        let tokenizer = of_fixture(kind);
        let specials = SPECIAL_TOKENS.map(|token| tokenizer.token_id(token).unwrap());
        for token in SPECIAL_TOKENS {
            for text in
                [token.to_owned(), format!("a{token}b"), format!(" {token} "), token.repeat(3), format!("<|{token}|>")]
            {
                let ids = tokenizer.encode(&text).unwrap();
                assert!(ids.iter().all(|id| !specials.contains(id)), "{kind:?} {text:?} {ids:?}");
                if kind != TokenizerKind::Wordpiece {
                    assert_eq!(tokenizer.decode(&ids), text, "{kind:?}");
                }
            }
        }
        // However the text is cut in two, neither part becomes one.
        let text = SPECIAL_TOKENS.concat();
        for middle in 0..=text.len() {
            let (left, right) = text.split_at(middle);
            for ids in tokenizer.encode_batch(&[left, right]).unwrap() {
                assert!(ids.iter().all(|id| !specials.contains(id)), "{kind:?} at {middle}");
            }
        }
    }
}

#[test]
fn a_vocabulary_with_a_special_token_among_its_words_does_not_yield_it_either() {
    // Words between spaces, `<|user|>` among them: the library finds it as a word though not as a special token.
    let mut vocab = Map::new();
    for (id, word) in ["<|user|>", "hello", "[UNK]"].into_iter().enumerate() {
        vocab.insert(word.to_owned(), json!(id));
    }
    let library = Library::from_bytes(
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null,
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]" },
        })
        .to_string(),
    )
    .unwrap();
    let tokenizer = Tokenizer::new(library, Map::new()).unwrap();
    assert!(matches!(tokenizer.try_specials(), Err(TokenizerError::MissingSpecials(m)) if m.len() == 5));
    let (tokenizer, n_added) = tokenizer.with_special_tokens_added().unwrap();
    assert_eq!((n_added, tokenizer.specials().user, tokenizer.vocab_size()), (5, 0, 8));
    let ids = tokenizer.encode("hello <|user|> hello").unwrap();
    assert!(!ids.contains(&0), "{ids:?}");
    assert_eq!((ids.first(), ids.last()), (Some(&1), Some(&1)));
}

#[test]
fn special_tokens_follow_the_learned_ones() {
    let tokenizer = of_fixture(TokenizerKind::Byte);
    let Specials { bos, pad, system, user, assistant, end } = tokenizer.specials();
    assert_eq!([bos, pad, system, user, assistant, end], [256, 257, 258, 259, 260, 261]);
    assert_eq!(tokenizer.encode("A\n").unwrap(), [65, 10]);
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(bos), Some(end)));
    assert_eq!(tokenizer.decode(&[bos, 65, end]), "A");
    assert_eq!(tokenizer.decode_with_specials(&[bos, 65, end]), "<|bos|>A<|end|>");
}

#[test]
fn char_tokens_are_the_texts_characters_in_order() {
    let config = TokenizerConfig { kind: TokenizerKind::Char, ..TokenizerConfig::default() };
    let tokenizer = Tokenizer::train(&config, ["cab\n"].iter(), true).unwrap();
    assert_eq!(tokenizer.encode("a\nbc").unwrap(), [1, 0, 2, 3]);
    assert_eq!(tokenizer.vocab_size(), 10);
    let error = tokenizer.encode("abd").unwrap_err();
    assert!(matches!(error, TokenizerError::UnknownCharacter { character: 'd', index: 2 }));
}

#[test]
fn direct_paths_equal_the_library() {
    for kind in [TokenizerKind::Char, TokenizerKind::Byte] {
        let tokenizer = of_fixture(kind);
        assert!(!matches!(tokenizer.codec, Codec::Library));
        let library = tokenizer.library.encode_fast(TEXT, false).unwrap();
        assert_eq!(tokenizer.encode(TEXT).unwrap(), library.get_ids());
    }
}

#[test]
fn a_saved_tokenizer_loads_as_itself() {
    for kind in KINDS {
        let tokenizer = of_fixture(kind);
        let dir = tempfile::tempdir().unwrap();
        tokenizer.save(dir.path()).unwrap();
        let loaded = Tokenizer::load(dir.path()).unwrap();
        assert_eq!(loaded.sha256(), tokenizer.sha256());
        assert_eq!(loaded.chat_template(), CHAT_TEMPLATE);
        assert_eq!(loaded.chat_template_sha256(), tokenizer.chat_template_sha256());
        assert_eq!(loaded.settings, tokenizer.settings);
        assert_eq!(loaded.specials(), tokenizer.specials());
        assert_eq!(loaded.encode(TEXT).unwrap(), tokenizer.encode(TEXT).unwrap());
        assert_eq!(loaded.with_special_tokens_added().unwrap().1, 0);
    }
}

/// Writes the tokenizers that `tests/oracles/transformers_tokenizer.py` loads.
#[test]
#[ignore = "writes to $KINDLING_ORACLE_DIR for the oracle in Python"]
fn write_for_the_oracle() {
    let dir = PathBuf::from(std::env::var("KINDLING_ORACLE_DIR").unwrap());
    for kind in KINDS {
        of_fixture(kind).save(&dir.join(format!("{kind:?}").to_lowercase())).unwrap();
    }
}

#[test]
fn transformers_renders_the_same_ids() {
    use crate::conversation::{Message, encode, encode_prompt};
    let recorded = fixture("transformers_tokenizer.json");
    for kind in KINDS {
        let tokenizer = of_fixture(kind);
        let record = &recorded["kinds"][format!("{kind:?}").to_lowercase()];
        assert_eq!(record["chat_template_sha256"], tokenizer.chat_template_sha256());
        let chats: Vec<Vec<Message>> = serde_json::from_value(recorded["chats"].clone()).unwrap();
        for (i, chat) in chats.iter().enumerate() {
            assert_eq!(json!(encode(&tokenizer, chat).unwrap().ids), record["conversations"][i], "{kind:?} {i}");
            let prompt = encode_prompt(&tokenizer, &chat[..chat.len() - 1]).unwrap();
            assert_eq!(json!(prompt), record["prompts"][i], "{kind:?} {i}");
        }
        let named = &record["special_tokens"];
        let specials = tokenizer.specials();
        assert_eq!(*named, json!({ "bos": specials.bos, "eos": specials.end, "pad": specials.pad }));
    }
}

#[test]
fn gpt2s_own_files_load_and_round_trip() {
    let Some(dir) = shared("data/gpt2-vocab") else {
        return;
    };
    let tokenizer = Tokenizer::load(&dir).unwrap();
    assert_eq!(tokenizer.vocab_size(), 50257);
    // From the README of openai/gpt-2's successor tiktoken and transformers' documentation.
    assert_eq!(tokenizer.encode("Hello world").unwrap(), [15496, 995]);
    assert_eq!(tokenizer.encode("Hello, my dog is cute").unwrap(), [15496, 11, 616, 3290, 318, 13779]);
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(50256), Some(50256)));
    assert!(!tokenizer.encode("<|endoftext|>").unwrap().contains(&50256));
    assert_eq!(tokenizer.decode(&tokenizer.encode(TEXT).unwrap()), TEXT);

    let (grown, n_added) = tokenizer.with_special_tokens_added().unwrap();
    assert_eq!((n_added, grown.vocab_size(), grown.specials().bos), (6, 50263, 50257));
    assert_eq!(grown.chat_template(), CHAT_TEMPLATE);
    let saved = tempfile::tempdir().unwrap();
    grown.save(saved.path()).unwrap();
    let loaded = Tokenizer::load(saved.path()).unwrap();
    assert_eq!((loaded.sha256(), loaded.eos()), (grown.sha256(), Some(50262)));
}

#[test]
fn a_foreign_chat_template_is_kept_and_prompts_by_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = Map::new();
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    settings.insert("chat_template".to_owned(), json!(template));
    settings.insert("eos_token".to_owned(), json!({ "content": "<|im_end|>" }));
    let mut library = of_fixture(TokenizerKind::Bpe).library;
    library.with_added_vocabulary(tokenizers::tokenizer::AddedVocabulary::new());
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"].map(|t| AddedToken::from(t, true))).unwrap();
    Tokenizer::new(library, settings).unwrap().save(dir.path()).unwrap();

    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(tokenizer.chat_template(), template);
    let start = tokenizer.token_id("<|im_start|>").unwrap();
    let end = tokenizer.eos().unwrap();
    let ids = tokenizer.encode_chat_template(&[("user", "hi<|im_end|>")], true).unwrap().ids;
    assert_eq!(
        tokenizer.decode_with_specials(&ids),
        "<|im_start|>user\nhi<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(ids.iter().filter(|&&id| id == start).count(), 2);
    assert_eq!(ids.iter().filter(|&&id| id == end).count(), 1, "the user's is text");
}

#[test]
fn padding_truncation_and_dropout_of_foreign_files_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    of_fixture(TokenizerKind::Bpe).save(dir.path()).unwrap();
    let path = dir.path().join("tokenizer.json");
    let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    value["truncation"] = json!({ "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0 });
    value["model"]["dropout"] = json!(0.9);
    fs::write(&path, value.to_string()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(tokenizer.sha256(), of_fixture(TokenizerKind::Bpe).sha256());
}

#[test]
fn broken_directories_are_errors_that_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let load = || Tokenizer::load(dir.path()).unwrap_err().to_string();
    assert!(Tokenizer::load(&dir.path().join("none")).unwrap_err().to_string().starts_with("no tokenizer directory"));
    assert!(load().starts_with("no tokenizer in"));
    let json = dir.path().join("tokenizer.json");
    let whole = of_fixture(TokenizerKind::Bpe).library.to_string(false).unwrap();
    for (text, expected) in [
        (String::new(), "EOF"),
        ("{}".to_owned(), "no `model`"),
        (whole[..whole.len() / 2].to_owned(), "EOF"),
        (whole.replacen("[\"Ġ\",", "[\"ĠĠĠĠĠĠĠĠĠĠĠĠĠĠĠĠĠĠĠ\",", 1), "not of tokens in the vocabulary"),
        (whole.replace("\"BPE\"", "\"Magic\""), "tokenizer.json"),
    ] {
        fs::write(&json, text).unwrap();
        let error = load();
        assert!(
            error.contains(expected) && error.contains("is not a tokenizer") && error.contains("\nhint: "),
            "{error}"
        );
    }
    fs::write(&json, whole).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), "[1").unwrap();
    assert!(load().contains("tokenizer_config.json"));
}

#[test]
fn impossible_configurations_are_errors() {
    let train = |kind, vocab_size, texts: &[&str]| {
        Tokenizer::train(&TokenizerConfig { kind, vocab_size, ..TokenizerConfig::default() }, texts.iter(), true)
            .unwrap_err()
            .to_string()
    };
    assert!(train(TokenizerKind::Bpe, 261, &["a"]).contains("expected at least 262"));
    assert!(train(TokenizerKind::Wordpiece, 7, &["a"]).contains("expected at least 8"));
    for kind in [TokenizerKind::Bpe, TokenizerKind::Wordpiece, TokenizerKind::Char] {
        assert!(train(kind, 300, &["", ""]).contains("the text is empty"));
    }
    assert!(toml::from_str::<TokenizerConfig>("kind = \"bpe\"\nsize = 3").is_err());
}

#[test]
fn long_runs_without_a_break_round_trip() {
    let tokenizer = of_fixture(TokenizerKind::Bpe);
    for text in [" ".repeat(300_000), "\n".repeat(100_000) + "x", "a".repeat(100_000)] {
        assert!(tokenizer.decode(&tokenizer.encode(&text).unwrap()) == text);
    }
}

#[test]
fn wordpiece_gives_words_back() {
    let tokenizer = of_fixture(TokenizerKind::Wordpiece);
    let ids = tokenizer.encode("the  fox\nfound the key , and slept .").unwrap();
    assert_eq!(tokenizer.decode(&ids), "the fox found the key, and slept.");
}

#[test]
fn a_character_in_pieces_comes_out_with_its_last_byte() {
    let tokenizer = of_fixture(TokenizerKind::Byte);
    let mut decoder = StreamDecoder::new(&tokenizer);
    let pieces: Vec<String> = "é🦊!".bytes().map(|byte| decoder.push(u32::from(byte))).collect();
    assert_eq!(pieces, ["", "é", "", "", "", "🦊", "!"]);
    assert_eq!(decoder.push(tokenizer.specials().end), "");
    assert_eq!(decoder.push(0xf0), "");
    assert_eq!(decoder.finish(), "\u{fffd}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn decoding_inverts_encoding(text in "\\PC{0,40}|[ \\n\\t'a-z<|>]{0,40}|.{0,20}") {
        for tokenizer in lossless() {
            prop_assert_eq!(&tokenizer.decode(&tokenizer.encode(&text).unwrap()), &text);
        }
    }

    #[test]
    fn decoding_inverts_encoding_of_known_characters(indices in prop::collection::vec(0..TEXT.chars().count(), 0..40)) {
        let known: Vec<char> = TEXT.chars().collect();
        let text: String = indices.iter().map(|&i| known[i]).collect();
        let tokenizer = char_tokenizer();
        prop_assert_eq!(&tokenizer.decode(&tokenizer.encode(&text).unwrap()), &text);
    }

    #[test]
    fn a_stream_of_pieces_is_the_whole(ids in prop::collection::vec(0..406u32, 0..30)) {
        for tokenizer in lossless() {
            let mut decoder = StreamDecoder::new(tokenizer);
            let mut text: String = ids.iter().map(|&id| decoder.push(id)).collect();
            text += &decoder.finish();
            prop_assert_eq!(&text, &tokenizer.decode(&ids));
        }
    }
}

fn lossless() -> &'static [Tokenizer; 2] {
    static TOKENIZERS: std::sync::LazyLock<[Tokenizer; 2]> =
        std::sync::LazyLock::new(|| [of_fixture(TokenizerKind::Bpe), of_fixture(TokenizerKind::Byte)]);
    &TOKENIZERS
}

fn char_tokenizer() -> &'static Tokenizer {
    static TOKENIZER: std::sync::LazyLock<Tokenizer> = std::sync::LazyLock::new(|| of_fixture(TokenizerKind::Char));
    &TOKENIZER
}
