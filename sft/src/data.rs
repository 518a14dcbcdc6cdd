//! Conversations to batches.

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use burn::tensor::{Device, Int, Tensor, TensorData};
use common::conversation::{self, EncodedConversation, Message};
use common::data::collate::{self, Example, TrainingRows};
use common::data::records;
use common::logging::counted;
use common::model::Layout;
use common::session::DataConfig;
use common::tokenizer::Tokenizer;

use crate::config::TooLong;

/// Tokenised conversations.
pub(crate) struct Conversations {
    pub(crate) encoded: Vec<EncodedConversation>,
    /// The same conversations as text, for samples.
    pub(crate) messages: Vec<Vec<Message>>,
}

/// A batch of conversations, several in a row, none seeing another.
pub(crate) struct Batch {
    rows: TrainingRows,
    /// Indices into `[batch · seq]` of the positions whose next token is trained on.
    positions: Vec<i64>,
}

/// Reads `files` as training does, to find what it cannot use before it begins.
///
/// # Errors
/// If a file cannot be read, or none of its records can be used.
pub fn check_data(
    files: &[PathBuf],
    tokenizer: &Tokenizer,
    max_seq_len: usize,
    data: &DataConfig<TooLong>,
) -> anyhow::Result<()> {
    Conversations::read(files, tokenizer, max_seq_len, data).map(drop)
}

impl Conversations {
    /// Reads and tokenises `files`; conversations without a trained token are left out.
    pub(crate) fn read(
        files: &[PathBuf],
        tokenizer: &Tokenizer,
        max_seq_len: usize,
        data: &DataConfig<TooLong>,
    ) -> anyhow::Result<Self> {
        let mut all = Self { encoded: Vec::new(), messages: Vec::new() };
        let (mut n_too_long, mut n_cut_off, mut n_unanswered) = (0, 0, 0);
        for file in files {
            for conversation in records::read_conversations(file, data.read_options())? {
                let mut encoded = conversation::encode(tokenizer, &conversation.messages)
                    .with_context(|| format!("failed to encode a conversation of `{}`", file.display()))?;
                let has_answer = encoded.has_target();
                if encoded.ids.len() > max_seq_len {
                    n_too_long += 1;
                    match data.on_too_long {
                        TooLong::Truncate => {
                            encoded.ids.truncate(max_seq_len);
                            encoded.trained.truncate(max_seq_len);
                        }
                        TooLong::Skip => continue,
                        TooLong::Fail => bail!(
                            "a conversation of `{}` has {} tokens, the context {max_seq_len}\nhint: set \
                             `data.on_too_long` to \"truncate\" or \"skip\"",
                            file.display(),
                            encoded.ids.len()
                        ),
                    }
                }
                if encoded.has_target() {
                    all.encoded.push(encoded);
                    all.messages.push(conversation.messages);
                } else if has_answer {
                    n_cut_off += 1;
                } else {
                    n_unanswered += 1;
                }
            }
        }
        if n_too_long > 0 {
            let done = if data.on_too_long == TooLong::Skip { "left out" } else { "cut to fit" };
            let are = counted(n_too_long, "conversation is", "conversations are");
            tracing::warn!("{are} longer than {max_seq_len} tokens: {done} (data.on_too_long)");
        }
        if n_cut_off > 0 {
            let have = counted(n_cut_off, "conversation has", "conversations have");
            tracing::warn!("{have} no token of an answer in the first {max_seq_len}: left out");
        }
        if n_unanswered > 0 {
            let have = counted(n_unanswered, "conversation has", "conversations have");
            tracing::warn!("{have} no answer to learn: left out");
        }
        ensure!(!all.encoded.is_empty(), "no conversation has a token to train on");
        Ok(all)
    }

    /// Whether a token at which generation stops is trained on anywhere.
    pub(crate) fn teach_an_end(&self, tokenizer: &Tokenizer) -> bool {
        let ends = tokenizer.end_ids();
        let mut tokens = self.encoded.iter().flat_map(|encoded| encoded.ids.iter().zip(&encoded.trained));
        tokens.any(|(id, trained)| *trained && ends.contains(id))
    }
}

impl Batch {
    /// Packs `conversations` into rows of at most `seq_len` tokens.
    pub(crate) fn new(conversations: &[&EncodedConversation], seq_len: usize) -> Self {
        let examples: Vec<Example<'_>> =
            conversations.iter().map(|c| Example { ids: &c.ids, trained: &c.trained }).collect();
        // The padding id is arbitrary: a padded position sees itself alone and is not trained on.
        let rows = collate::pack(&examples, seq_len, 0);
        let positions = (0..).zip(&rows.trained).filter_map(|(i, &trained)| trained.then_some(i)).collect();
        Self { rows, positions }
    }

    /// How many tokens are trained on.
    pub(crate) fn n_targets(&self) -> usize {
        self.positions.len()
    }

    /// `[batch, seq]`
    pub(crate) fn inputs(&self, device: &Device) -> Tensor<2, Int> {
        Tensor::from_data(TensorData::new(self.rows.ids.clone(), [self.rows.batch, self.rows.seq]), device)
    }

    /// Which tokens see which.
    pub(crate) fn layout(&self) -> Layout {
        Layout::packed(self.rows.first_key.clone(), self.rows.seq)
    }

    /// Indices of the predicting positions and the tokens they predict, both `[n_targets]`.
    pub(crate) fn targets(&self, device: &Device) -> (Tensor<1, Int>, Tensor<1, Int>) {
        let n = self.n_targets();
        let targets: Vec<i32> = self.positions.iter().map(|&i| self.rows.targets[i as usize]).collect();
        (
            Tensor::from_data(TensorData::new(self.positions.clone(), [n]), device),
            Tensor::from_data(TensorData::new(targets, [n]), device),
        )
    }
}
