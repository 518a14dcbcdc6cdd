//! Text to token ids and back: byte-level BPE, `WordPiece`, characters and bytes.
//!
//! The vocabulary, its files and its training are those of the `tokenizers` library, so a directory written here loads
//! in `AutoTokenizer` and the other way round. What is added: the special tokens that conversations need, the promise
//! that text never becomes one of them, and direct paths for bytes and characters.

mod config;
mod error;
mod files;
mod foreign;
mod guard;
mod jinja;
mod marks;
mod padding;
mod prompt;
mod stream;
mod template;
mod train;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, OnceLock};

use rayon::prelude::*;
use serde_json::{Map, Value, json};
use tokenizers::{AddedToken, Tokenizer as Library};

pub use config::{TokenizerConfig, TokenizerKind};
pub use error::TokenizerError;
pub use prompt::EncodedChat;
pub use stream::StreamDecoder;
pub use template::CHAT_TEMPLATE;

use base::hash::sha256_of;
use marks::Marks;
use prompt::Chat;

/// The special tokens, in the order of their ids in a tokenizer trained here.
pub const SPECIAL_TOKENS: [&str; 6] = ["<|bos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"];

/// Ids of the special tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Specials {
    /// `<|bos|>`: a document or a conversation begins.
    pub bos: u32,
    /// `<|pad|>`: nothing; never `<|end|>`.
    pub pad: u32,
    /// `<|system|>`: instructions follow.
    pub system: u32,
    /// `<|user|>`: the user's text follows.
    pub user: u32,
    /// `<|assistant|>`: the assistant's text follows.
    pub assistant: u32,
    /// `<|end|>`: the message is over.
    pub end: u32,
}

/// A vocabulary and the rules for cutting text into it.
#[derive(Clone)]
pub struct Tokenizer {
    library: Library,
    /// Encodes text in the place of `library`, where that would make marks of it.
    twin: Option<Arc<Library>>,
    /// `tokenizer_config.json`, with whatever a foreign one holds.
    settings: Map<String, Value>,
    codec: Codec,
    specials: Result<Specials, Vec<&'static str>>,
    /// The tokens that text must not yield.
    marks: Marks,
    vocab_size: usize,
    sha256: String,
    /// Ids at which the model's configuration ends an answer.
    end_ids: Vec<u32>,
    /// Whether the chat templates came in files of their own, and are saved to such.
    has_template_files: bool,
    /// The value of the template's switch `enable_thinking`, where it is set.
    thinking: Option<bool>,
    /// The writer of conversations by the tokenizer's own template, set up when the first is written.
    chat: Arc<OnceLock<Chat>>,
}

/// How text becomes ids.
#[derive(Clone)]
enum Codec {
    /// By the library.
    Library,
    /// One token a byte.
    Bytes(Box<[u32; 256]>),
    /// One token a character.
    Chars(HashMap<char, u32>),
}

impl Tokenizer {
    /// A tokenizer over the library's, which has its special tokens already.
    fn new(mut library: Library, settings: Map<String, Value>) -> Result<Self, TokenizerError> {
        // Text that spells a special token is text. The switch is not part of tokenizer.json.
        library.set_encode_special_tokens(true);
        let named = marks::named(&library, &settings);
        if !named.is_empty() {
            call(|| library.add_special_tokens(named), "add the named tokens")?;
        }
        let parts = parts(&library)?;
        let id_of = |token: &str| library.token_to_id(token);
        let missing: Vec<_> = SPECIAL_TOKENS.into_iter().filter(|token| id_of(token).is_none()).collect();
        let specials = match SPECIAL_TOKENS.map(id_of) {
            [Some(bos), Some(pad), Some(system), Some(user), Some(assistant), Some(end)] => {
                Ok(Specials { bos, pad, system, user, assistant, end })
            }
            _ => Err(missing),
        };
        let marks = Marks::find(&library, &parts, &settings);
        let twin = if marks.can_be_spelled(&library, &parts) {
            let mut twin = marks.twin(&parts)?;
            twin.set_encode_special_tokens(true);
            Some(Arc::new(twin))
        } else {
            None
        };
        let vocab_size = library.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let json = library.to_string(false).map_err(|e| TokenizerError::library("write the tokenizer", &*e))?;
        Ok(Self {
            twin,
            codec: codec(&parts),
            settings,
            specials,
            marks,
            vocab_size,
            sha256: sha256_of(json.as_bytes()),
            end_ids: vec![],
            has_template_files: false,
            thinking: None,
            chat: Arc::default(),
            library,
        })
    }

    /// Token ids of `text`.
    ///
    /// Text that spells a special token, `<|user|>` say, becomes ordinary tokens.
    ///
    /// # Errors
    /// If a `char` tokenizer does not know a character.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        match &self.codec {
            Codec::Bytes(id_of) => Ok(text.bytes().map(|byte| id_of[usize::from(byte)]).collect()),
            Codec::Chars(id_of) => {
                let unknown = |(index, character)| TokenizerError::UnknownCharacter { character, index };
                let ids = text.chars().enumerate().map(|at| id_of.get(&at.1).copied().ok_or_else(|| unknown(at)));
                ids.collect()
            }
            Codec::Library => self.encode_by_library(text),
        }
    }

    /// Token ids of each of `texts`, in parallel, in their order.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_batch<S: AsRef<str> + Sync>(&self, texts: &[S]) -> Result<Vec<Vec<u32>>, TokenizerError> {
        texts.par_iter().map(|text| self.encode(text.as_ref())).collect()
    }

    fn encode_by_library(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let library = self.twin.as_deref().unwrap_or(&self.library);
        let encoding = call(|| library.encode_fast(text, false), "encode the text")?;
        let ids = encoding.get_ids();
        match ids.iter().find_map(|id| self.marks.spelling(*id)) {
            None => Ok(ids.to_vec()),
            Some(mark) => Err(TokenizerError::Reserved(mark.to_owned())),
        }
    }

    /// The text of `ids`, special tokens left out.
    ///
    /// `decode(encode(text)) == text` for `bpe`, `byte` and `char`. `wordpiece` gives the words back with single
    /// spaces, none before `.,!?`, and leaves out words it does not know. Bytes that are no UTF-8 become U+FFFD, ids
    /// outside the vocabulary nothing.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.text(ids, true)
    }

    /// The text of `ids`, special tokens spelled out.
    pub fn decode_with_specials(&self, ids: &[u32]) -> String {
        self.text(ids, false)
    }

    fn text(&self, ids: &[u32], skip_specials: bool) -> String {
        // A decoder of the library fails on no sequence that it knows of; should one, the bare tokens are better than nothing.
        call(|| self.library.decode(ids, skip_specials), "decode tokens")
            .unwrap_or_else(|_| ids.iter().filter_map(|&id| self.token_text(id)).collect())
    }

    /// Number of ids: the largest plus one.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token as the vocabulary spells it (`Ġthe` for " the" in byte-level BPE).
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.library.id_to_token(id)
    }

    /// The id of a token as the vocabulary spells it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.library.token_to_id(token)
    }

    /// Whether text never yields `id`: it is a special token, or another that structures conversations.
    pub fn is_mark(&self, id: u32) -> bool {
        self.marks.contains(id)
    }

    /// Whether `id` is a special token, which decoding leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.library.get_added_vocabulary().get_added_tokens_decoder().get(&id).is_some_and(|t| t.special)
    }

    /// Ids of the special tokens.
    ///
    /// # Panics
    /// If the tokenizer lacks one: see [`try_specials`](Self::try_specials) for tokenizers from elsewhere.
    pub fn specials(&self) -> Specials {
        match &self.specials {
            Ok(specials) => *specials,
            Err(missing) => panic!("the tokenizer lacks {missing:?}; `with_special_tokens_added` was not called"),
        }
    }

    /// Ids of the special tokens.
    ///
    /// # Errors
    /// If a tokenizer from elsewhere lacks one, naming it.
    pub fn try_specials(&self) -> Result<Specials, TokenizerError> {
        self.specials.clone().map_err(TokenizerError::MissingSpecials)
    }

    /// The token that begins a document: `<|bos|>`, or what a foreign `tokenizer_config.json` names.
    pub fn bos(&self) -> Option<u32> {
        self.named(|specials| specials.bos, "bos_token")
    }

    /// The token that ends an answer: `<|end|>`, or what a foreign `tokenizer_config.json` names.
    pub fn eos(&self) -> Option<u32> {
        self.named(|specials| specials.end, "eos_token")
    }

    /// One of the six special tokens where all are there, else the one under `key` of `tokenizer_config.json`.
    fn named(&self, of_ours: impl Fn(&Specials) -> u32, key: &str) -> Option<u32> {
        self.specials.as_ref().ok().map(of_ours).or_else(|| self.token_id(&self.configured(key)?))
    }

    /// The tokenizer with those of the special tokens that it lacked, and by how many ids its vocabulary grew.
    ///
    /// New ids follow the old ones. If it grew, conversations are written our way from now on, so the chat template
    /// and the begin, end and padding tokens become ours too.
    ///
    /// # Errors
    /// If the vocabulary has gaps that new ids would fall into.
    pub fn with_special_tokens_added(mut self) -> Result<(Self, usize), TokenizerError> {
        if self.specials.is_err() {
            for (name, token) in [("bos_token", "<|bos|>"), ("eos_token", "<|end|>"), ("pad_token", "<|pad|>")] {
                self.settings.insert(name.to_owned(), json!(token));
            }
            self.settings.insert("chat_template".to_owned(), json!(CHAT_TEMPLATE));
            self.has_template_files = false;
            self.end_ids.clear();
        }
        self.with_added(&SPECIAL_TOKENS)
    }

    /// The tokenizer with those of `tokens` that it lacked, as special ones, and by how many ids its vocabulary grew.
    fn with_added(self, tokens: &[&str]) -> Result<(Self, usize), TokenizerError> {
        let Self { mut library, settings, vocab_size, end_ids, has_template_files, thinking, .. } = self;
        if library.get_vocab_size(true) != vocab_size {
            return Err(TokenizerError::Library {
                doing: "add the special tokens",
                reason: format!(
                    "the vocabulary has {} tokens but ids up to {}",
                    library.get_vocab_size(true),
                    vocab_size.saturating_sub(1)
                ),
            });
        }
        let added = library.add_special_tokens(tokens.iter().map(|token| AddedToken::from(*token, true)));
        added.map_err(|e| TokenizerError::library("add the special tokens", &*e))?;
        let grown = Self { end_ids, has_template_files, thinking, ..Self::new(library, settings)? };
        let n_added = grown.vocab_size - vocab_size;
        Ok((grown, n_added))
    }

    /// The Jinja template that renders conversations; empty if a foreign tokenizer has none, or several of which none
    /// is the default.
    pub fn chat_template(&self) -> &str {
        template::chosen(&self.settings).ok().flatten().unwrap_or_default()
    }

    /// Whether conversations are written by a template of the tokenizer's own, and not as ours are.
    pub fn writes_by_template(&self) -> bool {
        let templates = template::sources(&self.settings);
        match templates.as_slice() {
            [] => false,
            [(_, template)] => self.specials.is_err() || *template != CHAT_TEMPLATE,
            _ => true,
        }
    }

    fn chat(&self) -> Result<&Chat, TokenizerError> {
        if let Some(chat) = self.chat.get() {
            Ok(chat)
        } else {
            let chat = Chat::new(self)?;
            Ok(self.chat.get_or_init(|| chat))
        }
    }

    /// The parts of the library's tokenizer, as `tokenizer.json` has them.
    fn parts(&self) -> Result<Value, TokenizerError> {
        parts(&self.library)
    }

    /// SHA-256 of the vocabulary and its rules, in hexadecimal: of `tokenizer.json` in its shortest form.
    pub fn sha256(&self) -> String {
        self.sha256.clone()
    }

    /// SHA-256 of [`chat_template`](Self::chat_template), in hexadecimal.
    pub fn chat_template_sha256(&self) -> String {
        sha256_of(self.chat_template().as_bytes())
    }

    /// A token that `tokenizer_config.json` names.
    fn configured(&self, name: &str) -> Option<String> {
        marks::content(self.settings.get(name)?)
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size).finish_non_exhaustive()
    }
}

fn parts(library: &Library) -> Result<Value, TokenizerError> {
    serde_json::to_value(library)
        .map_err(|e| TokenizerError::Library { doing: "read the tokenizer", reason: e.to_string() })
}

/// Calls the library while `doing` something; a panic of it is an error too.
fn call<T>(library: impl FnOnce() -> tokenizers::Result<T>, doing: &'static str) -> Result<T, TokenizerError> {
    match guard::guarded(library) {
        Ok(result) => result.map_err(|error| TokenizerError::library(doing, &*error)),
        Err(reason) => Err(TokenizerError::Library { doing, reason }),
    }
}

/// Finds the tokenizers that need no library to encode.
fn codec(parts: &Value) -> Codec {
    let (model, pre_tokenizer) = (&parts["model"], &parts["pre_tokenizer"]);
    let plain_words = parts["added_tokens"].as_array().is_some_and(|t| t.iter().any(|t| t["special"] != true));
    let Some(vocab) = model["vocab"].as_object().filter(|_| parts["normalizer"].is_null() && !plain_words) else {
        return Codec::Library;
    };
    let id_of = |token: &str| vocab.get(token)?.as_u64().map(|id| id as u32);
    let is_bytes = model["type"] == "BPE"
        && model["merges"].as_array().is_some_and(Vec::is_empty)
        && pre_tokenizer["type"] == "ByteLevel"
        && pre_tokenizer["add_prefix_space"] == false
        && pre_tokenizer["use_regex"] == false;
    if is_bytes {
        let mut ids = [0; 256];
        for byte in 0..=255u8 {
            let Some(id) = id_of(char_of_byte(byte).encode_utf8(&mut [0; 4])) else {
                return Codec::Library;
            };
            ids[usize::from(byte)] = id;
        }
        return Codec::Bytes(Box::new(ids));
    }
    let knows_unknown = model["unk_token"].as_str().is_some_and(|token| vocab.contains_key(token));
    if model["type"] == "WordLevel" && !knows_unknown && *pre_tokenizer == one_character_pre_tokenizer() {
        let one_character = |token: &str| {
            let mut chars = token.chars();
            chars.next().filter(|_| chars.next().is_none())
        };
        return Codec::Chars(vocab.keys().filter_map(|t| Some((one_character(t)?, id_of(t)?))).collect());
    }
    Codec::Library
}

/// Cuts a text into its characters. `[\s\S]`, not a dot: the regex libraries disagree on how a dot takes newlines.
fn one_character_pre_tokenizer() -> Value {
    json!({ "type": "Split", "pattern": { "Regex": "[\\s\\S]" }, "behavior": "Isolated", "invert": false })
}

/// The printable character that stands for `byte` in byte-level vocabularies.
///
/// # Source
/// `bytes_to_unicode` in GPT-2's encoder.py: printable Latin-1 stands for itself, the rest follow from U+0100 on.
fn char_of_byte(byte: u8) -> char {
    let stands_for_itself = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if stands_for_itself(byte) {
        return char::from(byte);
    }
    let nth = (0..byte).filter(|&b| !stands_for_itself(b)).count() as u32;
    char::from_u32(0x100 + nth).expect("U+0100 to U+0143 are characters")
}
