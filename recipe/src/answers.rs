//! Answers of a model to prompts, many at a time.

use std::ops::ControlFlow;

use anyhow::{Context, Result};
use common::conversation::{self, Message};
use common::generate::SamplingConfig;
use common::group::Group;
use common::interrupt::Interrupt;
use common::logging::Progress;
use common::model::{Gpt, ScalarGpt};
use common::pace::Pace;
use common::rng::Streams;
use common::score::{Response, Sampling, score_rows_watched};
use common::tokenizer::Tokenizer;

use crate::config::BasePrompt;

/// A model that answers, with how it is asked.
pub struct PromptSampler<'a> {
    /// The model, on a plain device.
    pub gpt: &'a Gpt,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The form of the prompt.
    pub form: BasePrompt,
    /// How to sample; the stop tokens are filled in.
    pub sampling: SamplingConfig,
    /// Answers decoded together.
    pub batch_size: usize,
}

impl PromptSampler<'_> {
    /// Answers each of `prompts`; `None` if the user asked to stop.
    ///
    /// The answer to prompt `i` draws from sampling stream `first_row + i`, whatever the batch size.
    ///
    /// # Errors
    /// If a prompt cannot be encoded or does not fit the model's window.
    pub fn answer(
        &self,
        prompts: &[Vec<Message>],
        streams: Streams,
        first_row: u64,
        what: &str,
        interrupt: Interrupt,
    ) -> Result<Option<Vec<Response>>> {
        let stop = self.tokenizer.end_ids().into_iter().chain(self.tokenizer.bos()).collect();
        let sampling = Sampling {
            config: SamplingConfig { stop, ..self.sampling.clone() },
            streams,
            tokenizer: self.tokenizer,
            batch_size: self.batch_size,
            past_end: false,
            batch_invariant: false,
            group: Group::alone(),
        };
        let ids = prompts.iter().map(|prompt| self.encode(prompt)).collect::<Result<Vec<_>>>()?;
        let mut progress = Progress::new(what, ids.len(), "answers");
        let mut answers = Vec::with_capacity(ids.len());
        // A few batches at a time, so that those of like length still meet and the bar moves.
        let n_at_a_time = self.batch_size.max(1) * 8;
        for (chunk_idx, chunk) in ids.chunks(n_at_a_time).enumerate() {
            let row = first_row + (chunk_idx * n_at_a_time) as u64;
            let mut stop_if_asked =
                |_, _| if interrupt.requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
            let responses = sampling
                .answer_watched(self.gpt, chunk, row, Some(&mut stop_if_asked))
                .with_context(|| format!("failed to sample answers from prompt {} on", answers.len() + 1))?;
            if interrupt.requested() {
                return Ok(None);
            }
            answers.extend(responses);
            progress.add(chunk.len());
        }
        Ok(Some(answers))
    }

    fn encode(&self, prompt: &[Message]) -> Result<Vec<u32>> {
        match self.form {
            BasePrompt::Chat => Ok(conversation::encode_prompt(self.tokenizer, prompt)?),
            BasePrompt::Raw => {
                let mut ids = Vec::from_iter(self.tokenizer.bos());
                let text: Vec<&str> = prompt.iter().map(|message| message.content.as_str()).collect();
                ids.extend(self.tokenizer.encode(&format!("{}\n", text.join("\n")))?);
                Ok(ids)
            }
        }
    }
}

/// The reward model's score of each answer; `None` for one that does not fit its window.
///
/// # Errors
/// If a text cannot be encoded, the device not be read, or `interrupt` ends it.
pub fn scores(
    model: &ScalarGpt,
    tokenizer: &Tokenizer,
    prompts: &[Vec<Message>],
    answers: &[Response],
    form: BasePrompt,
    batch_size: usize,
    interrupt: Interrupt,
) -> Result<Vec<Option<f64>>> {
    let rows = prompts
        .iter()
        .zip(answers)
        .map(|(prompt, answer)| {
            let mut row = conversation::encode_prompt(tokenizer, prompt)?;
            match form {
                // As PPO scores it: the very tokens that were sampled.
                BasePrompt::Chat => row.extend(&answer.ids),
                BasePrompt::Raw => row.extend(conversation::encode_response(tokenizer, &answer.text)?),
            }
            Ok(row)
        })
        .collect::<Result<Vec<Vec<u32>>>>()?;
    let fits = |row: &[u32]| row.len() <= model.config().max_seq_len;
    let fitting: Vec<&[u32]> = rows.iter().map(Vec::as_slice).filter(|row| fits(row)).collect();
    let pace = Pace::new("scoring answers", fitting.len(), "answers", interrupt);
    let scored = score_rows_watched(model, &fitting, batch_size, &|n| pace.done(n));
    let mut scored = scored.context("failed to score answers")?.into_iter();
    Ok(rows.iter().map(|row| if fits(row) { scored.next().map(f64::from) } else { None }).collect())
}
