//! Text as its tokens come.

use super::Tokenizer;

/// Turns tokens into text one at a time, for printing while the model writes.
///
/// The pieces, with that of [`finish`](Self::finish), joined are what [`Tokenizer::decode`] makes of all the tokens. So
/// text comes out once no later token can change it: a character whose bytes are spread over several tokens with its last
/// byte, and bytes that stand for themselves (`<0x0A>`) with the first token that is none, because one that is wrong makes
/// U+FFFD of its whole run.
#[derive(Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens whose text is not wholly out, after some that are: a token's spaces depend on its neighbour.
    window: Vec<u32>,
    /// How many bytes of the window's text are out.
    n_out: usize,
}

impl<'a> StreamDecoder<'a> {
    /// A decoder at the beginning of a text.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, window: Vec::new(), n_out: 0 }
    }

    /// Takes the next token and returns the text that is now certain; special tokens and ids outside the vocabulary have
    /// none.
    pub fn push(&mut self, id: u32) -> String {
        let Some(token) = self.tokenizer.token_text(id).filter(|_| !self.tokenizer.is_special(id)) else {
            return String::new();
        };
        self.window.push(id);
        if byte(&token).is_some() {
            return String::new();
        }
        let text = self.tokenizer.decode(&self.window);
        let certain = text.trim_end_matches(char::REPLACEMENT_CHARACTER).len();
        if certain <= self.n_out {
            return String::new();
        }
        let piece = text.get(self.n_out..certain).unwrap_or_default().to_owned();
        self.n_out = certain;
        if certain == text.len() {
            // The beginning of a text has no space, nor has that of the window: it must hold text.
            let begins = self.tokenizer.decode(&[id]).len();
            if begins > 0 {
                self.window.clear();
                self.window.push(id);
                self.n_out = begins;
            }
        }
        piece
    }

    /// The text still held back: what an unfinished character decodes to.
    pub fn finish(self) -> String {
        let text = self.tokenizer.decode(&self.window);
        text.get(self.n_out..).unwrap_or_default().to_owned()
    }
}

impl Tokenizer {
    /// The bytes that a token adds to a text, which need not be whole characters; a special token's are those of its
    /// spelling. Empty for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.token_text(id) else { return Vec::new() };
        if self.is_special(id) {
            return token.into_bytes();
        }
        if let Some(byte) = byte(&token) {
            return vec![byte];
        }
        let text = self.decode(&[id]);
        if text.contains(char::REPLACEMENT_CHARACTER)
            && let Some(bytes) = token.chars().map(byte_of_level).collect()
        {
            return bytes;
        }
        // The decoder takes the space from the beginning of a text.
        let lost_space = token.starts_with('▁') && !text.starts_with(' ');
        if lost_space { format!(" {text}").into_bytes() } else { text.into_bytes() }
    }
}

/// The byte of a token that is a single byte, spelled `<0x0A>`, to which `SentencePiece` falls back.
fn byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>').filter(|hex| hex.len() == 2)?;
    u8::from_str_radix(hex, 16).ok()
}

/// The byte that a character stands for in a byte-level vocabulary.
///
/// # Source
/// GPT-2's `bytes_to_unicode`: printable characters of Latin-1 stand for themselves, those from U+0100 on for the other
/// bytes in their order.
fn byte_of_level(c: char) -> Option<u8> {
    let is_itself = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match u8::try_from(c) {
        Ok(byte) => Some(byte).filter(is_itself),
        Err(_) => (0..=u8::MAX).filter(|byte| !is_itself(byte)).nth(c as usize - 256),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::tokenizer::{TokenizerConfig, TokenizerKind};

    /// Words, spaces, line breaks and all bytes, decoded by `decoder`.
    fn tokenizer(decoder: &Value) -> Tokenizer {
        let words =
            ["<unk>", "▁", "▁▁", "a", "▁a", "##b", "b", "\n", "▁\n", ".", "é", "▁é", "\u{fffd}", "fox</w>", "</w>"];
        let bytes = (0..=255u8).map(|byte| format!("<0x{byte:02X}>"));
        let vocab: serde_json::Map<String, Value> =
            words.iter().map(|&word| word.to_owned()).chain(bytes).zip((0..).map(Value::from)).collect();
        let model = json!({ "type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>", "byte_fallback": true });
        let dir = tempfile::tempdir().unwrap();
        let json = json!({ "version": "1.0", "added_tokens": [], "model": model, "decoder": decoder });
        std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), "{}").unwrap();
        Tokenizer::load(dir.path()).unwrap()
    }

    /// Those of Llama 2, T5, BERT and GPT.
    fn decoders() -> [Value; 5] {
        let space = json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " });
        let fallback = json!({ "type": "ByteFallback" });
        let strip = json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 });
        let metaspace = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true });
        [
            json!({ "type": "Sequence", "decoders": [space, fallback, { "type": "Fuse" }, strip] }),
            json!({ "type": "Sequence", "decoders": [fallback, metaspace] }),
            metaspace.clone(),
            json!({ "type": "WordPiece", "prefix": "##", "cleanup": true }),
            json!({ "type": "BPEDecoder", "suffix": "</w>" }),
        ]
    }

    fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
        let mut decoder = StreamDecoder::new(tokenizer);
        let text: String = ids.iter().map(|&id| decoder.push(id)).collect();
        text + &decoder.finish()
    }

    #[test]
    fn characters_of_several_byte_tokens_come_out_whole() {
        let tokenizer = tokenizer(&decoders()[0]);
        let ids: Vec<u32> = "好你\n".bytes().map(|byte| 15 + u32::from(byte)).chain([3]).collect();
        assert_eq!(streamed(&tokenizer, &ids), "好你\na");
    }

    #[test]
    fn a_token_has_its_bytes_whole_character_or_not() {
        let tokenizer = tokenizer(&decoders()[1]);
        // `▁a` begins with a space that decoding it alone does not give; 0x0A is spelled `<0x0A>`.
        assert_eq!([4, 3, 25].map(|id| tokenizer.token_bytes(id)), [b" a".to_vec(), b"a".to_vec(), vec![10]]);
        assert!(tokenizer.token_bytes(9_999).is_empty());
        let bytes = TokenizerConfig { kind: TokenizerKind::Byte, ..TokenizerConfig::default() };
        let tokenizer = Tokenizer::train(&bytes, std::iter::empty::<&str>(), true).unwrap();
        let ids = tokenizer.encode("é\n\u{ad} ").unwrap();
        assert_eq!(
            ids.iter().map(|&id| tokenizer.token_bytes(id)).collect::<Vec<_>>().concat(),
            "é\n\u{ad} ".as_bytes()
        );
        assert!(tokenizer.token_bytes(tokenizer.specials().end) == b"<|end|>");
        let level: Vec<u8> = "ĠâĢĵĊ".chars().filter_map(byte_of_level).collect();
        assert_eq!(level, " –\n".as_bytes());
    }

    #[test]
    fn an_id_without_a_token_changes_no_space() {
        let tokenizer = tokenizer(&decoders()[2]);
        assert_eq!(streamed(&tokenizer, &[4, 9_999, 4]), tokenizer.decode(&[4, 9_999, 4]));
    }

    proptest! {
        #[test]
        fn the_pieces_are_the_whole_text(
            ids in prop::collection::vec(prop_oneof![3 => 0..15u32, 2 => 15..271u32, 1 => 200..215u32], 0..30),
        ) {
            for decoder in decoders() {
                let tokenizer = tokenizer(&decoder);
                prop_assert_eq!(streamed(&tokenizer, &ids), tokenizer.decode(&ids), "{}", decoder);
            }
        }
    }
}
