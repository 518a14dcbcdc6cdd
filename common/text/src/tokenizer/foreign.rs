//! `tokenizer.json` from elsewhere: its ids kept, and refused where it could hang or exhaust us.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

/// The largest id: far above any vocabulary there is, far below what would overflow 32 bits.
const MAX_ID: u64 = (1 << 24) - 1;

/// How many ids without a token may lie between added tokens.
const MAX_GAP: u64 = 1 << 16;

/// How many times longer a text may become by normalising or by decoding it.
const MAX_GROWTH: f64 = 4096.0;

/// The longest text, in bytes, that a part of the tokenizer may insert at a time.
const MAX_INSERTED: usize = 1024;

/// Prepares a `tokenizer.json` for the library.
///
/// Truncation, padding and merge dropout are taken out; tokens that only `tokenizer_config.json` lists are added, as
/// transformers does; added tokens keep their ids, with placeholders where ids are left out.
///
/// # Errors
/// If the file is no tokenizer, or one that the library would renumber, or that could take unbounded time or memory.
pub(super) fn prepare(file: &mut Value, settings: &Map<String, Value>) -> Result<(), String> {
    if file.get("model").is_none_or(|model| !model.is_object()) {
        return Err("it has no `model`".to_owned());
    }
    file["truncation"] = Value::Null;
    file["padding"] = Value::Null;
    if file["model"].get("dropout").is_some() {
        file["model"]["dropout"] = Value::Null;
    }
    for part in ["normalizer", "pre_tokenizer", "decoder"] {
        let growth = growth(&file[part]).map_err(|reason| format!("its `{part}` {reason}"))?;
        if growth > MAX_GROWTH {
            return Err(format!(
                "its `{part}` could make a text {growth:.0} times longer, at most {MAX_GROWTH} is taken"
            ));
        }
    }
    check_merges(&file["model"])?;
    add_listed_tokens(file, settings);
    keep_ids(file)
}

/// By which factor `part` can lengthen a text at most.
fn growth(part: &Value) -> Result<f64, String> {
    let sequence = ["normalizers", "pretokenizers", "decoders"].iter().find_map(|key| part[*key].as_array());
    if let Some(parts) = sequence {
        return parts.iter().try_fold(1.0, |product, part| Ok(product * growth(part)?));
    }
    let inserted = part["content"].as_str().or_else(|| part["prepend"].as_str()).unwrap_or_default().len();
    if inserted > MAX_INSERTED {
        return Err(format!("inserts a text of {inserted} bytes, at most {MAX_INSERTED} are taken"));
    }
    Ok(match part["type"].as_str().unwrap_or_default() {
        "Replace" => match part["pattern"]["String"].as_str() {
            Some(text) if !text.is_empty() => (inserted as f64 / text.len() as f64).max(1.0),
            // An expression can match nothing, before every character.
            _ => 1.0 + inserted as f64,
        },
        "ByteLevel" => 2.0,
        "NFC" | "NFD" | "NFKC" | "NFKD" | "BertNormalizer" | "Precompiled" => 3.0,
        _ => 1.0,
    })
}

/// The library panics on a merge whose result is longer than every token of the vocabulary.
fn check_merges(model: &Value) -> Result<(), String> {
    let (Some(merges), Some(vocab)) = (model["merges"].as_array(), model["vocab"].as_object()) else {
        return Ok(());
    };
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
    for merge in merges {
        let known = pair(merge).and_then(|(a, b)| {
            let joined = format!("{a}{}", b.strip_prefix(prefix)?);
            (vocab.contains_key(a) && vocab.contains_key(b)).then(|| vocab.contains_key(&joined))
        });
        if known != Some(true) {
            return Err(format!("merge {merge} is not of tokens in the vocabulary"));
        }
    }
    Ok(())
}

/// The two tokens of a merge: `"a b"`, or `["a", "b"]` since version 0.20 of the library.
pub(super) fn pair(merge: &Value) -> Option<(&str, &str)> {
    match merge {
        Value::String(pair) => pair.split_once(' '),
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(a), Value::String(b)] => Some((a.as_str(), b.as_str())),
            _ => None,
        },
        _ => None,
    }
}

/// Adds what `added_tokens_decoder` of `tokenizer_config.json` has and `added_tokens` lacks.
fn add_listed_tokens(file: &mut Value, settings: &Map<String, Value>) {
    let Some(listed) = settings.get("added_tokens_decoder").and_then(Value::as_object) else { return };
    let known: BTreeSet<String> = added(file).filter_map(|token| Some(token["content"].as_str()?.to_owned())).collect();
    let mut further = Vec::new();
    for (id, token) in listed {
        let (Ok(id), Some(content)) = (id.parse::<u64>(), token["content"].as_str()) else { continue };
        if known.contains(content) {
            continue;
        }
        let flag = |name: &str, default: bool| token[name].as_bool().unwrap_or(default);
        let special = flag("special", false);
        further.push(json!({
            "id": id, "content": content, "single_word": flag("single_word", false), "lstrip": flag("lstrip", false),
            "rstrip": flag("rstrip", false), "normalized": flag("normalized", !special), "special": special,
        }));
    }
    if !further.is_empty() {
        let all: Vec<Value> = added(file).cloned().chain(further).collect();
        file["added_tokens"] = Value::Array(all);
    }
}

fn added(file: &Value) -> impl Iterator<Item = &Value> {
    file["added_tokens"].as_array().into_iter().flatten()
}

/// Sees to it that the library numbers added tokens as the file does.
///
/// The library does not read the ids: a token that the model does not have gets the next one, counted from the size of
/// the model's vocabulary. So the tokens are put in the order of their ids, with a placeholder for each id left out.
fn keep_ids(file: &mut Value) -> Result<(), String> {
    let vocab = vocabulary(&file["model"])?;
    let n_model = vocab.len() as u64;
    let mut tokens = BTreeMap::new();
    for token in added(file) {
        let (Some(id), Some(content)) = (token["id"].as_u64(), token["content"].as_str()) else {
            return Err(format!("added token {token} has no `id` or no `content`"));
        };
        if id > MAX_ID {
            return Err(format!("added token `{content}` has id {id}, at most {MAX_ID} is taken"));
        }
        if let Some(other) = tokens.insert(id, token.clone()) {
            return Err(format!("added tokens {} and `{content}` have the same id {id}", other["content"]));
        }
        if vocab.get(content).is_some_and(|&known| known != id) {
            return Err(format!(
                "added token `{content}` has id {id}, but the vocabulary has it as {}",
                vocab[content]
            ));
        }
    }
    let n_ids = vocab.values().max().map_or(0, |id| id + 1);
    let beyond: Vec<u64> = tokens.iter().filter(|(_, t)| !is_in(&vocab, t)).map(|(id, _)| *id).collect();
    let Some((&first, &last)) = beyond.first().zip(beyond.last()) else { return Ok(()) };
    if n_ids != n_model {
        return Err(format!(
            "its vocabulary has {n_model} tokens but ids up to {}: the ids of added tokens would change",
            n_ids.saturating_sub(1)
        ));
    }
    if first < n_model {
        return Err(format!("added token {} has id {first}, which the vocabulary uses", tokens[&first]["content"]));
    }
    let n_gaps = last + 1 - n_model - beyond.len() as u64;
    if n_gaps > MAX_GAP {
        return Err(format!("{n_gaps} ids before {last} have no token, at most {MAX_GAP} is taken"));
    }
    for id in n_model..last {
        tokens.entry(id).or_insert_with(|| {
            json!({
                "id": id, "content": format!("<|unused-{id}|>"), "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true,
            })
        });
    }
    if n_gaps > 0 {
        tracing::info!("{n_gaps} ids of the vocabulary have no token: placeholders keep the others' ids");
    }
    file["added_tokens"] = tokens.into_values().collect();
    Ok(())
}

fn is_in(vocab: &BTreeMap<&str, u64>, token: &Value) -> bool {
    token["content"].as_str().is_some_and(|content| vocab.contains_key(content))
}

/// The model's tokens and their ids.
fn vocabulary(model: &Value) -> Result<BTreeMap<&str, u64>, String> {
    let mut vocab = BTreeMap::new();
    let mut words = BTreeMap::new();
    match &model["vocab"] {
        Value::Object(entries) => {
            for (token, id) in entries {
                let id = id.as_u64().filter(|id| *id <= MAX_ID);
                let id =
                    id.ok_or_else(|| format!("token `{token}` has id {}, at most {MAX_ID} is taken", entries[token]))?;
                if let Some(other) = words.insert(id, token) {
                    return Err(format!("tokens `{other}` and `{token}` have the same id {id}"));
                }
                vocab.insert(token.as_str(), id);
            }
        }
        Value::Array(pieces) => {
            for (id, piece) in pieces.iter().enumerate() {
                vocab.insert(piece[0].as_str().unwrap_or_default(), id as u64);
            }
        }
        _ => {}
    }
    Ok(vocab)
}
