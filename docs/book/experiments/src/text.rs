//! Text as token ids.

use std::path::Path;

use anyhow::Result;
use common::conversation::{Message, Role, encode};
use common::tokenizer::Tokenizer;

/// One token a line, then how many there are.
pub(crate) fn tokens(dir: &Path, text: &str) -> Result<String> {
    let tokenizer = Tokenizer::load(dir)?;
    let ids = tokenizer.encode(text)?;
    let lines: String = ids.iter().map(|&id| format!("{id:>5}  {:?}\n", tokenizer.decode(&[id]))).collect();
    Ok(format!("{lines}{} bytes, {} tokens of {}\n", text.len(), ids.len(), tokenizer.vocab_size()))
}

/// One token a line, with a mark where the model is trained to predict it.
pub(crate) fn conversation(dir: &Path, prompt: &str, response: &str) -> Result<String> {
    let tokenizer = Tokenizer::load(dir)?;
    let messages = [Message::new(Role::User, prompt), Message::new(Role::Assistant, response)];
    let encoded = encode(&tokenizer, &messages)?;
    let lines = encoded.ids.iter().zip(&encoded.trained).map(|(&id, &trained)| {
        let token = tokenizer.decode_with_specials(&[id]);
        format!("{id:>5}  {:<9} {token:?}\n", if trained { "trained" } else { "read" })
    });
    Ok(lines.collect())
}
