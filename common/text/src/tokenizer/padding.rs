//! The ids that end answers, and one that pads rows and is none of them.
//!
//! Many models from elsewhere are padded with the token that ends a turn. transformers' classes with a score look for the
//! padding id to find the end of a row: there such a model is scored before its answer ends, or in its prompt. So what is
//! trained here gets a padding id of its own, although nothing here ever looks for it.

use base::once::is_new;
use serde_json::json;

use super::{SPECIAL_TOKENS, Tokenizer, TokenizerError};

/// Tokens of well-known vocabularies that no text and no chat has, in the order in which they are taken for padding.
const UNUSED: [&str; 7] =
    ["<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|vision_pad|>", "<|endoftext|>"];

impl Tokenizer {
    /// Every id that ends an answer: the end token, the one that the chat template writes after a turn, and those of
    /// [`with_end_ids`](Self::with_end_ids). A model from elsewhere may name them in any of these.
    pub fn end_ids(&self) -> Vec<u32> {
        let mut ids = Vec::new();
        for id in [self.eos(), self.end_of_turn()].into_iter().flatten().chain(self.end_ids.iter().copied()) {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids
    }

    /// The tokenizer of a model whose configuration ends answers at `ids`, too.
    #[must_use]
    pub fn with_end_ids(mut self, ids: Vec<u32>) -> Self {
        self.end_ids = ids;
        self
    }

    /// The id for padding: `<|pad|>`, or what a foreign `tokenizer_config.json` names unless that ends an answer.
    pub fn pad(&self) -> Option<u32> {
        self.named(|specials| specials.pad, "pad_token").filter(|id| !self.end_ids().contains(id))
    }

    /// The tokenizer with an id for [`pad`](Self::pad), and by how many ids its vocabulary grew.
    ///
    /// Where it has none, a token is taken that nothing else uses: one of [`UNUSED`], or the one for unknown text where
    /// no text is unknown. Else `<|pad|>` is appended.
    ///
    /// # Errors
    /// If the vocabulary has gaps that a new id would fall into.
    pub fn with_pad_token(mut self) -> Result<(Self, usize), TokenizerError> {
        if self.pad().is_some() {
            return Ok((self, 0));
        }
        let parts = self.parts()?;
        let unknown = parts["model"]["unk_token"].as_str().filter(|_| parts["model"]["byte_fallback"] == true);
        let (used, template) = (self.end_ids(), self.chat_template());
        let is_unused = |token: &&str| {
            let id = self.token_id(token).filter(|id| self.is_special(*id) && !used.contains(id));
            id.is_some_and(|id| self.bos() != Some(id)) && !template.contains(*token)
        };
        let found = UNUSED.into_iter().chain(unknown).find(is_unused).map(str::to_owned);
        let token = found.unwrap_or_else(|| SPECIAL_TOKENS[1].to_owned());
        if is_new(&format!("padding {token}")) {
            tracing::info!("rows are padded with `{token}`: a padding id must not end answers");
        }
        self.settings.insert("pad_token".to_owned(), json!(token));
        self.with_added(&[&token])
    }
}
