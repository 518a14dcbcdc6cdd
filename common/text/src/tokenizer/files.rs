//! The tokenizer's directory, ours and Hugging Face's.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use base::files::{FileError, write_whole};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer as Library;

use super::guard::guarded;
use super::{Tokenizer, TokenizerError, call, foreign, template};

/// The end of a document in GPT-2's vocabulary.
const END_OF_TEXT: &str = "<|endoftext|>";

/// The largest file that is read, in bytes. Gemma's `tokenizer.json` has 33 MB.
const MAX_BYTES: u64 = 256 << 20;

/// Texts that every tokenizer must take without a panic.
const PROBES: [&str; 5] = ["", " ", "a", "Hello,  world! 12\n\tx", "é字🦊\u{fffd}"];

impl Tokenizer {
    /// Reads the tokenizer in `dir`: a tokenizer directory, a checkpoint, or a directory that transformers wrote.
    ///
    /// The vocabulary comes from `tokenizer.json`, else from `vocab.json` and `merges.txt`, else from `encoder.json`
    /// and `vocab.bpe` (GPT-2's own names). `tokenizer_config.json` may be absent; special tokens that it does not name
    /// are those of its class in transformers. A template in `chat_template.jinja` goes before one there. Truncation,
    /// padding and merge dropout written in `tokenizer.json` are left out: they would change the text's tokens.
    ///
    /// # Errors
    /// If `dir` or its files are missing, unreadable or not a tokenizer; if the library would change ids; if the files
    /// could take more time or memory than a tokenizer needs.
    pub fn load(dir: &Path) -> Result<Self, TokenizerError> {
        if !dir.is_dir() {
            return Err(TokenizerError::NoDirectory(dir.to_owned()));
        }
        let (mut settings, has_template_files) = settings(dir)?;
        let class = class(dir, &settings)?;
        let json = dir.join("tokenizer.json");
        if json.is_file() {
            add_defaults(&mut settings, &class);
            return Ok(Self { has_template_files, ..build(&json, parse(&json)?, settings)? });
        }
        for (vocab, merges) in [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")] {
            let (vocab, merges) = (dir.join(vocab), dir.join(merges));
            if vocab.is_file() && merges.is_file() {
                if !matches!(class.as_str(), "" | "GPT2" | "PreTrained") {
                    let reason = format!("without a `tokenizer.json` it would be GPT-2's, but its class is `{class}`");
                    return Err(invalid(&vocab, reason));
                }
                add_defaults(&mut settings, "GPT2");
                return Ok(Self { has_template_files, ..build(&vocab, gpt2(&vocab, &merges)?, settings)? });
            }
        }
        Err(TokenizerError::NoFiles(dir.to_owned()))
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json` to `dir`, which is created if need be, and chat templates to
    /// files of their own if they came in such.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), TokenizerError> {
        fs::create_dir_all(dir).map_err(FileError::write(dir))?;
        let path = dir.join("tokenizer.json");
        let text = self.library.to_string(true);
        let text = text.map_err(|e| TokenizerError::library("write the tokenizer", &*e))?;
        write_whole(&path, text)?;
        let mut settings = self.settings.clone();
        if self.has_template_files {
            for (name, template) in template::sources(&self.settings) {
                let path = template_path(dir, name);
                let folder = path.parent().unwrap_or(dir);
                fs::create_dir_all(folder).map_err(FileError::write(folder))?;
                write_whole(&path, template)?;
            }
            settings.remove("chat_template");
        }
        let settings = serde_json::to_string_pretty(&settings);
        let settings = settings.map_err(|e| TokenizerError::library("write the settings", &e))?;
        Ok(write_whole(&dir.join("tokenizer_config.json"), settings + "\n")?)
    }
}

/// The file of the chat template `name`, where templates are in files.
fn template_path(dir: &Path, name: &str) -> PathBuf {
    match name {
        "default" => dir.join("chat_template.jinja"),
        name => dir.join("additional_chat_templates").join(format!("{name}.jinja")),
    }
}

/// `tokenizer_config.json`, with what other files of the directory say in its place, and whether chat templates are
/// among that.
fn settings(dir: &Path) -> Result<(Map<String, Value>, bool), TokenizerError> {
    let mut settings: Map<String, Value> = parse_if_there(&dir.join("tokenizer_config.json"))?;
    if !settings.contains_key("added_tokens_decoder") {
        // Older versions of transformers name the special tokens here.
        let named: Map<String, Value> = parse_if_there(&dir.join("special_tokens_map.json"))?;
        settings.extend(named);
    }
    // Newer ones write templates to files of their own.
    let mut templates = Map::new();
    let further = fs::read_dir(dir.join("additional_chat_templates")).into_iter().flatten().flatten();
    for path in further.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "jinja")) {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        templates.insert(name, Value::String(text(&path)?));
    }
    let default = template_path(dir, "default");
    if default.is_file() {
        let template = Value::String(text(&default)?);
        if templates.is_empty() {
            settings.insert("chat_template".to_owned(), template);
            return Ok((settings, true));
        }
        templates.insert("default".to_owned(), template);
    }
    let has_files = !templates.is_empty();
    if has_files {
        settings.insert("chat_template".to_owned(), Value::Object(templates));
    }
    Ok((settings, has_files))
}

/// The tokenizer's class in transformers, without `Tokenizer` or `TokenizerFast`: as the settings name it, else as the
/// model's `config.json` beside them implies; empty if neither does.
fn class(dir: &Path, settings: &Map<String, Value>) -> Result<String, TokenizerError> {
    if let Some(name) = settings.get("tokenizer_class").and_then(Value::as_str) {
        let name = name.strip_suffix("Fast").unwrap_or(name);
        return Ok(name.strip_suffix("Tokenizer").unwrap_or(name).to_owned());
    }
    let config: Map<String, Value> = parse_if_there(&dir.join("config.json"))?;
    let class = match config.get("model_type").and_then(Value::as_str) {
        Some("gpt2") => "GPT2",
        Some("gpt_neox") => "GPTNeoX",
        Some("llama") => "Llama",
        Some("qwen2" | "qwen3") => "Qwen2",
        _ => "",
    };
    Ok(class.to_owned())
}

/// Names the special tokens that `settings` do not, as transformers' class does.
///
/// # Source
/// The defaults of `__init__` of the classes in transformers 5.23.0.
fn add_defaults(settings: &mut Map<String, Value>, class: &str) {
    let defaults: &[(&str, &str)] = match class {
        "GPT2" | "GPTNeoX" => &[("bos_token", END_OF_TEXT), ("eos_token", END_OF_TEXT), ("unk_token", END_OF_TEXT)],
        "Qwen2" => &[("eos_token", END_OF_TEXT), ("unk_token", END_OF_TEXT), ("pad_token", END_OF_TEXT)],
        "Llama" => &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")],
        _ => &[],
    };
    for (name, token) in defaults {
        settings.entry(*name).or_insert_with(|| json!(token));
    }
}

/// The tokenizer of `file`, which was read from `path`.
fn build(path: &Path, mut file: Value, settings: Map<String, Value>) -> Result<Tokenizer, TokenizerError> {
    foreign::prepare(&mut file, &settings).map_err(|reason| invalid(path, reason))?;
    let library = call(|| Library::from_bytes(file.to_string()), "read the tokenizer");
    let tokenizer = library.and_then(|library| Tokenizer::new(library, settings)).map_err(|error| match error {
        TokenizerError::Library { reason, .. } => invalid(path, reason),
        other => other,
    })?;
    for token in file["added_tokens"].as_array().into_iter().flatten() {
        let (id, content) = (token["id"].as_u64(), token["content"].as_str().unwrap_or_default());
        if id != tokenizer.token_id(content).map(u64::from) {
            let reason = format!("the library gives added token `{content}` another id than {}", token["id"]);
            return Err(invalid(path, reason));
        }
    }
    for library in [Some(&tokenizer.library), tokenizer.twin.as_deref()].into_iter().flatten() {
        for probe in PROBES {
            let round_trip = || {
                // A vocabulary without a token for unknown text may refuse one.
                let ids = library.encode_fast(probe, false).map_or(vec![], |encoding| encoding.get_ids().to_vec());
                tokenizer.library.decode(&ids, true).ok()
            };
            guarded(round_trip).map_err(|reason| invalid(path, reason))?;
        }
    }
    Ok(tokenizer)
}

/// GPT-2's byte-level BPE from its two files, in the form of `tokenizer.json`.
fn gpt2(vocab: &Path, merges: &Path) -> Result<Value, TokenizerError> {
    let entries: Map<String, Value> = parse(vocab)?;
    if entries.keys().any(|token| token.ends_with("</w>")) {
        return Err(invalid(vocab, "this is not a byte-level vocabulary: its words end in `</w>`"));
    }
    let merges = text(merges)?;
    let pairs: Vec<&str> = merges.lines().filter(|line| !line.is_empty() && !line.starts_with("#version")).collect();
    let end_of_text = entries.get(END_OF_TEXT).map(|id| {
        json!({
            "id": id, "content": END_OF_TEXT, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    });
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true });
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": Vec::from_iter(end_of_text),
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": entries, "merges": pairs,
        },
    }))
}

fn parse<T: DeserializeOwned>(path: &Path) -> Result<T, TokenizerError> {
    serde_json::from_slice(&read(path)?).map_err(|error| invalid(path, error.to_string()))
}

/// The content of `path`, or nothing if there is no such file.
fn parse_if_there(path: &Path) -> Result<Map<String, Value>, TokenizerError> {
    if path.exists() { parse(path) } else { Ok(Map::new()) }
}

fn text(path: &Path) -> Result<String, TokenizerError> {
    String::from_utf8(read(path)?).map_err(|_| invalid(path, "it is not UTF-8"))
}

fn read(path: &Path) -> Result<Vec<u8>, TokenizerError> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes));
    read.map_err(FileError::read(path))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(invalid(path, format!("it has more than {MAX_BYTES} bytes")));
    }
    Ok(bytes)
}

fn invalid(path: &Path, reason: impl Into<String>) -> TokenizerError {
    TokenizerError::Invalid { path: path.to_owned(), reason: reason.into() }
}
