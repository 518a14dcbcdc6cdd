//! Text as its tokens come.

use super::Tokenizer;

/// Turns tokens into text one at a time, for printing while the model writes.
///
/// A character whose bytes are spread over several tokens comes out with its last byte. The pieces, with that of
/// [`finish`](Self::finish), joined are what [`Tokenizer::decode`] makes of all the tokens.
#[derive(Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens whose text is not wholly out, and one before them: a token's spaces depend on its neighbour.
    window: Vec<u32>,
    /// How many bytes of the window's text are out.
    n_out: usize,
}

impl<'a> StreamDecoder<'a> {
    /// A decoder at the beginning of a text.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, window: Vec::new(), n_out: 0 }
    }

    /// Takes the next token and returns the text that is now certain; special tokens have none.
    pub fn push(&mut self, id: u32) -> String {
        if self.tokenizer.is_special(id) {
            return String::new();
        }
        self.window.push(id);
        let text = self.tokenizer.decode(&self.window);
        let certain = text.trim_end_matches(char::REPLACEMENT_CHARACTER).len();
        if certain <= self.n_out {
            return String::new();
        }
        let piece = text.get(self.n_out..certain).unwrap_or_default().to_owned();
        self.n_out = certain;
        if certain == text.len() {
            self.window.clear();
            self.window.push(id);
            self.n_out = self.tokenizer.decode(&self.window).len();
        }
        piece
    }

    /// The text still held back: what an unfinished character decodes to.
    pub fn finish(self) -> String {
        let text = self.tokenizer.decode(&self.window);
        text.get(self.n_out..).unwrap_or_default().to_owned()
    }
}
