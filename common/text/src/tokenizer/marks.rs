//! Which tokens are marks, and a twin of the library's tokenizer whose text cannot spell one.
//!
//! A mark structures what a model reads: where a document begins, who speaks, where a turn ends. Flags do not tell: an
//! added token need not be `special`, and a mark can be a plain word of the vocabulary. Text that spells a mark is
//! text, whatever tokens it takes.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};
use tokenizers::{AddedToken, Tokenizer as Library};

use super::foreign::pair;
use super::{SPECIAL_TOKENS, TokenizerError, template};

/// Around an id: the name of a mark in the twin. The last two private-use characters, which no text has.
const NAME: [char; 2] = ['\u{10fffc}', '\u{10fffd}'];

/// Keys of `tokenizer_config.json` that name a token each.
const NAMED: [&str; 6] = ["bos_token", "eos_token", "pad_token", "sep_token", "cls_token", "mask_token"];

/// Ids and spellings of the marks of a vocabulary.
#[derive(Debug, Clone, Default)]
pub(super) struct Marks {
    by_id: BTreeMap<u32, String>,
}

impl Marks {
    /// Finds the marks of `library`, whose parts are `parts`.
    ///
    /// They are: special added tokens; other added tokens, unless white space or plain words, that are bracketed or
    /// stand in a chat template; bracketed words of the vocabulary that a template or the six special tokens name. A
    /// token for unknown text alone is none: unknown text yields it.
    pub(super) fn find(library: &Library, parts: &Value, settings: &Map<String, Value>) -> Self {
        let templates = template::sources(settings);
        let in_template = |content: &str| templates.iter().any(|(_, template)| template.contains(content));
        let mut by_id = BTreeMap::new();
        for (id, token) in library.get_added_tokens_decoder() {
            let is_symbol = token.content.chars().any(|c| !c.is_alphanumeric() && !is_blank(c));
            if token.special || is_symbol && (is_bracketed(&token.content) || in_template(&token.content)) {
                by_id.insert(id, token.content);
            }
        }
        for (word, id) in words(&parts["model"]) {
            let is_named = || word.starts_with("<|") || SPECIAL_TOKENS.contains(&word) || in_template(word);
            if is_bracketed(word) && is_named() {
                by_id.entry(id).or_insert_with(|| word.to_owned());
            }
        }
        let is_named =
            |token: &str| NAMED.iter().any(|key| settings.get(*key).and_then(content).as_deref() == Some(token));
        if let Some(unknown) = unknown(library, parts)
            && !by_id.get(&unknown).is_some_and(|token| is_named(token))
        {
            by_id.remove(&unknown);
        }
        Self { by_id }
    }

    /// Whether `id` is a mark's.
    pub(super) fn contains(&self, id: u32) -> bool {
        self.by_id.contains_key(&id)
    }

    /// How the mark `id` is spelled.
    pub(super) fn spelling(&self, id: u32) -> Option<&str> {
        self.by_id.get(&id).map(String::as_str)
    }

    /// All spellings.
    pub(super) fn spellings(&self) -> impl Iterator<Item = &str> {
        self.by_id.values().map(String::as_str)
    }

    /// The name of the mark `id` in the [`twin`](Self::twin).
    pub(super) fn name(id: u32) -> String {
        format!("{}{id}{}", NAME[0], NAME[1])
    }

    /// Whether the library makes marks of text although it is told to leave special tokens alone.
    pub(super) fn can_be_spelled(&self, library: &Library, parts: &Value) -> bool {
        let added = library.get_added_tokens_decoder();
        let is_plain = |id: &u32| added.get(id).is_some_and(|token| !token.special);
        if self.by_id.keys().any(is_plain) {
            return true;
        }
        let model = &parts["model"];
        let spellings: BTreeSet<&str> = self.spellings().collect();
        let in_model: BTreeSet<&str> = words(model).map(|(word, _)| word).filter(|w| spellings.contains(w)).collect();
        if in_model.is_empty() {
            return false;
        }
        // Of byte-pair encoding's words only those are found that merges lead to.
        model["type"] != "BPE"
            || model["ignore_merges"] == true
            || in_model.iter().any(|word| word.chars().count() == 1)
            || merged(model).any(|(_, _, word)| in_model.contains(word.as_str()))
    }

    /// A tokenizer that gives text the same ids, but knows marks by [`name`](Self::name) alone.
    ///
    /// # Errors
    /// If the library does not take it, or numbers the marks otherwise.
    pub(super) fn twin(&self, parts: &Value) -> Result<Library, TokenizerError> {
        let failed = |reason: String| TokenizerError::Library { doing: "set up the tokenizer for text", reason };
        let mut parts = parts.clone();
        let names: BTreeMap<&str, String> =
            self.by_id.iter().map(|(id, word)| (word.as_str(), Self::name(*id))).collect();
        rename(&mut parts["model"], &names);
        let mut tokens: Vec<Value> = parts["added_tokens"].as_array().cloned().unwrap_or_default();
        let mut plain_words: BTreeMap<&str, u32> = self.by_id.iter().map(|(id, word)| (word.as_str(), *id)).collect();
        for token in &mut tokens {
            let content = token["content"].as_str().unwrap_or_default().to_owned();
            if let Some(name) = names.get(content.as_str()) {
                plain_words.remove(content.as_str());
                token["content"] = json!(name);
                token["special"] = json!(true);
                token["normalized"] = json!(false);
            }
        }
        parts["added_tokens"] = Value::Array(tokens);
        let mut twin = Library::from_bytes(parts.to_string()).map_err(|e| failed(e.to_string()))?;
        let plain_words = plain_words.into_values().map(|id| AddedToken::from(Self::name(id), true));
        twin.add_special_tokens(plain_words).map_err(|e| failed(e.to_string()))?;
        match self.by_id.iter().find(|(id, _)| twin.token_to_id(&Self::name(**id)) != Some(**id)) {
            Some((id, word)) => Err(failed(format!("`{word}` is not at {id}"))),
            None => Ok(twin),
        }
    }
}

/// Tokens that `tokenizer_config.json` names and the vocabulary has, where they are bracketed as marks are.
///
/// transformers makes them special tokens as it loads; so do the six of ours where all are there.
pub(super) fn named(library: &Library, settings: &Map<String, Value>) -> Vec<AddedToken> {
    let mut named: Vec<String> = NAMED.iter().filter_map(|key| content(settings.get(*key)?)).collect();
    for key in ["additional_special_tokens", "extra_special_tokens"] {
        let listed = settings.get(key).and_then(Value::as_array).into_iter().flatten();
        named.extend(listed.filter_map(content));
    }
    if SPECIAL_TOKENS.iter().all(|token| library.token_to_id(token).is_some()) {
        named.extend(SPECIAL_TOKENS.map(str::to_owned));
    }
    let added: BTreeMap<String, AddedToken> =
        library.get_added_tokens_decoder().into_values().map(|token| (token.content.clone(), token)).collect();
    named.retain(|token| is_bracketed(token) && library.token_to_id(token).is_some());
    named.retain(|token| added.get(token).is_none_or(|added| !added.special));
    let special = |token: String| match added.get(&token) {
        Some(added) => added.clone().special(true),
        None => AddedToken::from(token, true),
    };
    named.into_iter().map(special).collect()
}

/// A token of `tokenizer_config.json`: a string, or an object with its `content`.
pub(super) fn content(token: &Value) -> Option<String> {
    token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned)
}

/// The token that text unknown to the model becomes.
fn unknown(library: &Library, parts: &Value) -> Option<u32> {
    let model = &parts["model"];
    let by_name = model["unk_token"].as_str().and_then(|token| library.token_to_id(token));
    by_name.or_else(|| model["unk_id"].as_u64().map(|id| id as u32))
}

/// The model's words and their ids.
fn words(model: &Value) -> impl Iterator<Item = (&str, u32)> {
    let by_word = model["vocab"].as_object().into_iter().flatten();
    let by_word = by_word.filter_map(|(word, id)| Some((word.as_str(), id.as_u64()? as u32)));
    let listed = model["vocab"].as_array().into_iter().flatten().enumerate();
    by_word.chain(listed.filter_map(|(id, piece)| Some((piece[0].as_str()?, id as u32))))
}

/// The merges of byte-pair encoding: two words and what they become.
fn merged(model: &Value) -> impl Iterator<Item = (&str, &str, String)> {
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
    let pairs = model["merges"].as_array().into_iter().flatten().filter_map(pair);
    pairs.map(move |(a, b)| (a, b, format!("{a}{}", b.strip_prefix(prefix).unwrap_or(b))))
}

/// Gives the words of `names` their new name, and takes out the merges that they are in.
fn rename(model: &mut Value, names: &BTreeMap<&str, String>) {
    let kept: Option<Vec<Value>> = model["merges"].as_array().map(|merges| {
        let is_kept =
            merged(model).map(|(a, b, joined)| [a, b, joined.as_str()].iter().all(|w| !names.contains_key(w)));
        merges.iter().zip(is_kept).filter(|(_, kept)| *kept).map(|(merge, _)| merge.clone()).collect()
    });
    if let Some(kept) = kept {
        model["merges"] = Value::Array(kept);
    }
    if let Some(name) = model["unk_token"].as_str().and_then(|token| names.get(token)) {
        model["unk_token"] = json!(name);
    }
    match &mut model["vocab"] {
        Value::Object(vocab) => {
            let renamed = std::mem::take(vocab).into_iter().map(|(word, id)| match names.get(word.as_str()) {
                Some(name) => (name.clone(), id),
                None => (word, id),
            });
            *vocab = renamed.collect();
        }
        Value::Array(pieces) => {
            for piece in pieces {
                if let Some(name) = piece[0].as_str().and_then(|word| names.get(word)) {
                    piece[0] = json!(name);
                }
            }
        }
        _ => {}
    }
}

/// Whether `word` looks like a mark: `<...>` or `[...]` without white space.
fn is_bracketed(word: &str) -> bool {
    let inner = |open, close| word.strip_prefix(open).and_then(|rest| rest.strip_suffix(close));
    inner('<', '>').or_else(|| inner('[', ']')).is_some_and(|inner| !inner.is_empty() && !inner.chars().any(is_blank))
}

/// White space, as `SentencePiece` writes it too.
fn is_blank(c: char) -> bool {
    c.is_whitespace() || c == '▁'
}
