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
        if is_byte(&token) {
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

/// Whether a token is a single byte, spelled `<0x0A>`, to which `SentencePiece` falls back.
fn is_byte(token: &str) -> bool {
    token.len() == 6
        && token
            .strip_prefix("<0x")
            .and_then(|rest| rest.strip_suffix('>'))
            .is_some_and(|hex| u8::from_str_radix(hex, 16).is_ok())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

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
