//! Learning a vocabulary from text.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use tokenizers::decoders::wordpiece::WordPiece as WordPieceDecoder;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::wordpiece::{WordPiece, WordPieceTrainer};
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer as Library, Trainer,
};

use super::{CHAT_TEMPLATE, SPECIAL_TOKENS, Tokenizer, TokenizerConfig, TokenizerError, TokenizerKind};

/// `WordPiece`'s token for a word with a character it does not know.
const UNKNOWN: &str = "[UNK]";

/// The longest word, in characters, that a vocabulary is learned from.
///
/// The library moves the rest of a word at each merge, so that a text without white space (DNA, base64, minified JSON)
/// would take time with the square of its length. No word of a language is as long, and merges that reach over a cut
/// are as frequent inside the parts. nanochat cuts documents at 10,000 characters for the like reason.
const MAX_WORD_CHARS: usize = 1024;

impl Tokenizer {
    /// Learns a tokenizer from `texts`, one item a document.
    ///
    /// The same texts in any order give the same tokenizer, and merges equal those that the Python side of the
    /// `tokenizers` library learns from the same documents, unless they have stretches of more than 1,024 characters
    /// without a break, which are cut. The special tokens come after the learned ones.
    /// `quiet` hides the progress bar, which only a terminal shows anyway.
    ///
    /// # Errors
    /// If the configuration is invalid or there is no text (`byte` needs none).
    pub fn train<I, S>(config: &TokenizerConfig, texts: I, quiet: bool) -> Result<Self, TokenizerError>
    where
        I: Iterator<Item = S> + Send,
        S: AsRef<str> + Send,
    {
        config.validate()?;
        let library = match config.kind {
            TokenizerKind::Bpe => bpe(config, texts, quiet)?,
            TokenizerKind::Wordpiece => wordpiece(config, texts, quiet)?,
            TokenizerKind::Char => chars(texts)?,
            TokenizerKind::Byte => bytes()?,
        };
        let tokenizer = Self::new(library, settings(config.kind))?.with_special_tokens_added()?.0;
        let expects_size = matches!(config.kind, TokenizerKind::Bpe | TokenizerKind::Wordpiece);
        if expects_size && tokenizer.vocab_size() != config.vocab_size {
            tracing::warn!(
                "the text gives a vocabulary of {}, not the {} asked for",
                tokenizer.vocab_size(),
                config.vocab_size
            );
        }
        Ok(tokenizer)
    }
}

fn bpe<I, S>(config: &TokenizerConfig, texts: I, quiet: bool) -> Result<Library, TokenizerError>
where
    I: Iterator<Item = S> + Send,
    S: AsRef<str> + Send,
{
    // GPT-2 puts no space before the first word: with one, decoding would not give the text back.
    let byte_level = ByteLevel::new(false, false, true);
    let mut trainer = BpeTrainer::builder()
        .vocab_size(config.vocab_size - SPECIAL_TOKENS.len())
        .min_frequency(config.min_frequency)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build();
    feed(&mut trainer, &byte_level, texts, quiet)?;
    let mut model = BPE::default();
    trainer.train(&mut model).map_err(|e| TokenizerError::library("learn merges", &*e))?;
    let mut library = Library::new(model);
    library.with_pre_tokenizer(Some(byte_level));
    library.with_decoder(Some(byte_level));
    library.with_post_processor(Some(byte_level));
    Ok(library)
}

fn wordpiece<I, S>(config: &TokenizerConfig, texts: I, quiet: bool) -> Result<Library, TokenizerError>
where
    I: Iterator<Item = S> + Send,
    S: AsRef<str> + Send,
{
    let unknown = AddedToken::from(UNKNOWN, true);
    let mut trainer = WordPieceTrainer::builder()
        .vocab_size(config.vocab_size - SPECIAL_TOKENS.len())
        .min_frequency(config.min_frequency)
        .show_progress(false)
        .build();
    let inner_chars = feed(&mut trainer, &BertPreTokenizer, texts, quiet)?;
    // The library numbers the characters inside words in the order of a randomly seeded hash map, and breaks ties
    // between pairs by these numbers: every run would learn another vocabulary. Tokens that are named beforehand are
    // numbered in the order given.
    let inner_chars = inner_chars.into_iter().map(|c| AddedToken::from(format!("##{c}"), false));
    trainer.set_special_tokens(std::iter::once(unknown.clone()).chain(inner_chars).collect());
    let model = WordPiece::builder().unk_token(UNKNOWN.to_owned()).build();
    let mut model = model.map_err(|e| TokenizerError::library("set up WordPiece", &*e))?;
    trainer.train(&mut model).map_err(|e| TokenizerError::library("learn words", &*e))?;
    let mut library = Library::new(model);
    library.with_pre_tokenizer(Some(BertPreTokenizer));
    library.with_decoder(Some(WordPieceDecoder::default()));
    library.add_special_tokens([unknown]).map_err(|e| TokenizerError::library("add `[UNK]`", &*e))?;
    Ok(library)
}

/// Counts the words of `texts` for `trainer`, and returns the characters that stand inside words, not first.
///
/// The progress bar is our own: the library's prints to stdout.
fn feed<T, P, I, S>(trainer: &mut T, pre_tokenizer: &P, texts: I, quiet: bool) -> Result<BTreeSet<char>, TokenizerError>
where
    T: Trainer,
    P: PreTokenizer + Sync,
    I: Iterator<Item = S> + Send,
    S: AsRef<str> + Send,
{
    let progress = if quiet { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
    if let Ok(style) = ProgressStyle::with_template("{spinner} tokenizer: {pos} documents read in {elapsed}") {
        progress.set_style(style);
    }
    let inner_chars = Mutex::new(BTreeSet::new());
    let n_cut = AtomicUsize::new(0);
    let mut has_text = false;
    let counted = texts.inspect(|text| {
        has_text |= !text.as_ref().is_empty();
        progress.inc(1);
    });
    let fed = trainer.feed(counted, |text| {
        let mut cut = PreTokenizedString::from(text);
        pre_tokenizer.pre_tokenize(&mut cut)?;
        let words = cut.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let mut parts: Vec<String> = Vec::with_capacity(words.len());
        for (word, ..) in words {
            let n_before = parts.len();
            parts.extend(cut_word(word).map(str::to_owned));
            n_cut.fetch_add(usize::from(parts.len() > n_before + 1), Ordering::Relaxed);
        }
        let words = parts;
        let inner: BTreeSet<char> = words.iter().flat_map(|word| word.chars().skip(1)).collect();
        inner_chars.lock().unwrap_or_else(PoisonError::into_inner).extend(inner);
        Ok(words)
    });
    progress.finish_and_clear();
    fed.map_err(|e| TokenizerError::library("read the text", &*e))?;
    if n_cut.load(Ordering::Relaxed) > 0 {
        tracing::warn!(
            "{} stretches of text without a break have more than {MAX_WORD_CHARS} characters: the vocabulary is learned \
             from their parts of that length",
            n_cut.into_inner()
        );
    }
    if !has_text {
        return Err(TokenizerError::NoText);
    }
    Ok(inner_chars.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Cuts `word` into parts of [`MAX_WORD_CHARS`], the last one shorter.
fn cut_word(word: &str) -> impl Iterator<Item = &str> {
    let mut rest = word;
    std::iter::from_fn(move || {
        let end = match rest.len() {
            0 => return None,
            n if n <= MAX_WORD_CHARS => n,
            n => rest.char_indices().nth(MAX_WORD_CHARS).map_or(n, |(at, _)| at),
        };
        let (part, after) = rest.split_at(end);
        rest = after;
        Some(part)
    })
}

/// One token a character, in the order of their code points, as in nanoGPT.
fn chars<I, S>(texts: I) -> Result<Library, TokenizerError>
where
    I: Iterator<Item = S>,
    S: AsRef<str>,
{
    let mut alphabet = BTreeSet::new();
    for text in texts {
        alphabet.extend(text.as_ref().chars());
    }
    if alphabet.is_empty() {
        return Err(TokenizerError::NoText);
    }
    let vocab: Map<String, Value> = alphabet.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
    from_json(&json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": super::one_character_pre_tokenizer(),
        "post_processor": null,
        "decoder": { "type": "Fuse" },
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": UNKNOWN },
    }))
}

/// One token a byte, whose id is the byte.
fn bytes() -> Result<Library, TokenizerError> {
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false });
    let vocab: Map<String, Value> = (0..=255u8).map(|b| (super::char_of_byte(b).to_string(), json!(b))).collect();
    from_json(&json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [],
        },
    }))
}

fn from_json(value: &Value) -> Result<Library, TokenizerError> {
    Library::from_bytes(value.to_string()).map_err(|e| TokenizerError::library("set up the tokenizer", &*e))
}

/// The `tokenizer_config.json` of a tokenizer trained here; the special tokens come in when they are added.
fn settings(kind: TokenizerKind) -> Map<String, Value> {
    let mut settings = Map::new();
    settings.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
    settings.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
    if kind == TokenizerKind::Wordpiece {
        settings.insert("unk_token".to_owned(), json!(UNKNOWN));
    }
    settings.insert("chat_template".to_owned(), json!(CHAT_TEMPLATE));
    settings
}
