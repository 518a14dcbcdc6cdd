//! The tokenizer's directory, ours and Hugging Face's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as Library};

use super::{Tokenizer, TokenizerError};

/// The end of a document in GPT-2's vocabulary.
const END_OF_TEXT: &str = "<|endoftext|>";

impl Tokenizer {
    /// Reads the tokenizer in `dir`: a tokenizer directory, a checkpoint, or a directory that transformers wrote.
    ///
    /// The vocabulary comes from `tokenizer.json`, else from `vocab.json` and `merges.txt`, else from `encoder.json`
    /// and `vocab.bpe` (GPT-2's own names). `tokenizer_config.json` may be absent; a chat template may stand there or
    /// in `chat_template.jinja`. Truncation, padding and merge dropout written in `tokenizer.json` are left out: they
    /// would change the text's tokens.
    ///
    /// # Errors
    /// If `dir` or its files are missing, unreadable or not a tokenizer.
    pub fn load(dir: &Path) -> Result<Self, TokenizerError> {
        if !dir.is_dir() {
            return Err(TokenizerError::NoDirectory(dir.to_owned()));
        }
        let mut settings = settings(dir)?;
        let json = dir.join("tokenizer.json");
        if json.is_file() {
            let library = library(&json)?;
            return Self::new(library, settings).map_err(|error| invalid(&json, error));
        }
        for (vocab, merges) in [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")] {
            let (vocab, merges) = (dir.join(vocab), dir.join(merges));
            if vocab.is_file() && merges.is_file() {
                let library = gpt2(&vocab, &merges)?;
                for name in ["bos_token", "eos_token"] {
                    settings.entry(name).or_insert_with(|| json!(END_OF_TEXT));
                }
                return Self::new(library, settings).map_err(|error| invalid(&vocab, error));
            }
        }
        Err(TokenizerError::NoFiles(dir.to_owned()))
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json` to `dir`, which is created if need be.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), TokenizerError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| TokenizerError::Write { path, source }
        };
        fs::create_dir_all(dir).map_err(failed(dir))?;
        let path = dir.join("tokenizer.json");
        let text = self.library.to_string(true);
        let text = text.map_err(|e| TokenizerError::library("write the tokenizer", &*e))?;
        fs::write(&path, text).map_err(failed(&path))?;
        let path = dir.join("tokenizer_config.json");
        let text = serde_json::to_string_pretty(&self.settings).map_err(io::Error::from).map_err(failed(&path))?;
        fs::write(&path, text + "\n").map_err(failed(&path))
    }
}

fn settings(dir: &Path) -> Result<Map<String, Value>, TokenizerError> {
    let path = dir.join("tokenizer_config.json");
    let mut settings = match read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| TokenizerError::Invalid { path, reason: error.to_string() })?,
        Err(TokenizerError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Map::new(),
        Err(error) => return Err(error),
    };
    // Newer transformers write the template beside.
    let path = dir.join("chat_template.jinja");
    if path.is_file() && !settings.contains_key("chat_template") {
        let template = fs::read_to_string(&path).map_err(|source| TokenizerError::Read { path, source })?;
        settings.insert("chat_template".to_owned(), Value::String(template));
    }
    Ok(settings)
}

fn library(path: &Path) -> Result<Library, TokenizerError> {
    let invalid = |reason: String| TokenizerError::Invalid { path: path.to_owned(), reason };
    let mut value: Value = serde_json::from_slice(&read(path)?).map_err(|error| invalid(error.to_string()))?;
    if value.get("model").is_none_or(|model| !model.is_object()) {
        return Err(invalid("it has no `model`".to_owned()));
    }
    value["truncation"] = Value::Null;
    value["padding"] = Value::Null;
    if value["model"].get("dropout").is_some() {
        value["model"]["dropout"] = Value::Null;
    }
    check_merges(&value["model"]).map_err(invalid)?;
    Library::from_bytes(value.to_string()).map_err(|error| invalid(error.to_string()))
}

/// The library panics on a merge whose result is longer than every token of the vocabulary.
fn check_merges(model: &Value) -> Result<(), String> {
    let (Some(merges), Some(vocab)) = (model["merges"].as_array(), model["vocab"].as_object()) else {
        return Ok(());
    };
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
    for merge in merges {
        let pair = match merge {
            Value::String(pair) => pair.split_once(' '),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(a), Value::String(b)] => Some((a.as_str(), b.as_str())),
                _ => None,
            },
            _ => None,
        };
        let known = pair.and_then(|(a, b)| {
            let joined = format!("{a}{}", b.strip_prefix(prefix)?);
            (vocab.contains_key(a) && vocab.contains_key(b)).then(|| vocab.contains_key(&joined))
        });
        if known != Some(true) {
            return Err(format!("merge {merge} is not of tokens in the vocabulary"));
        }
    }
    Ok(())
}

/// GPT-2's byte-level BPE from its two files.
fn gpt2(vocab: &Path, merges: &Path) -> Result<Library, TokenizerError> {
    let invalid =
        |path: &Path, reason: &str| TokenizerError::Invalid { path: path.to_owned(), reason: reason.to_owned() };
    let entries: Map<String, Value> =
        serde_json::from_slice(&read(vocab)?).map_err(|error| invalid(vocab, &error.to_string()))?;
    let text = String::from_utf8(read(merges)?).map_err(|_| invalid(merges, "it is not UTF-8"))?;
    if entries.keys().any(|token| token.ends_with("</w>")) {
        return Err(invalid(vocab, "this is not a byte-level vocabulary: its words end in `</w>`"));
    }
    let pairs: Vec<&str> = text.lines().filter(|line| !line.is_empty() && !line.starts_with("#version")).collect();
    let ends_a_text = entries.contains_key(END_OF_TEXT);
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": entries, "merges": pairs,
    });
    check_merges(&model).map_err(|reason| invalid(merges, &reason))?;
    // Through text: the library's model reads borrowed strings only.
    let model: BPE = serde_json::from_str(&model.to_string()).map_err(|error| invalid(vocab, &error.to_string()))?;
    let byte_level = ByteLevel::new(false, false, true);
    let mut library = Library::new(model);
    library.with_pre_tokenizer(Some(byte_level));
    library.with_decoder(Some(byte_level));
    library.with_post_processor(Some(byte_level));
    if ends_a_text {
        let added = library.add_special_tokens([AddedToken::from(END_OF_TEXT, true)]);
        added.map_err(|error| invalid(vocab, &error.to_string()))?;
    }
    Ok(library)
}

fn read(path: &Path) -> Result<Vec<u8>, TokenizerError> {
    fs::read(path).map_err(|source| TokenizerError::Read { path: path.to_owned(), source })
}

/// Names the file in an error about its content.
fn invalid(path: &Path, error: TokenizerError) -> TokenizerError {
    match error {
        TokenizerError::Library { reason, .. } => TokenizerError::Invalid { path: PathBuf::from(path), reason },
        other => other,
    }
}
