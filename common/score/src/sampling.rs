//! Responses of a policy to prompts.

use base::rng::Streams;
use model::Gpt;
use model::generate::{Finish, GenerateOptions, OnToken, SamplingConfig, generate};
use text::tokenizer::Tokenizer;

use crate::ScoreError;

/// A response to a prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Response {
    /// The sampled tokens, with the stop token where there is one; at least one.
    pub ids: Vec<u32>,
    /// Of each token under the policy that sampled it, at the sampling temperature, in nats.
    pub log_probs: Vec<f32>,
    /// The text, special tokens left out.
    pub text: String,
    /// Whether a stop token was sampled, rather than the length limit reached.
    pub ended: bool,
}

/// How prompts are answered.
#[derive(Debug)]
pub struct Sampling<'a> {
    /// Temperature, truncation, length limit and stop tokens.
    pub config: SamplingConfig,
    /// Seeds the tokens.
    pub streams: Streams,
    /// Turns responses into text.
    pub tokenizer: &'a Tokenizer,
    /// Most responses decoded at a time, see [`GenerateOptions::max_batch`]; memory for keys and values grows with it.
    pub batch_size: usize,
}

impl<'a> Sampling<'a> {
    /// The policy's own distribution at a temperature, up to `<|end|>` or `max_tokens`; `batch_size` responses at a
    /// time.
    pub fn new(
        temperature: f64,
        max_tokens: usize,
        streams: Streams,
        tokenizer: &'a Tokenizer,
        batch_size: usize,
    ) -> Self {
        let stop = vec![tokenizer.specials().end];
        let config = SamplingConfig { temperature, max_tokens, stop, ..SamplingConfig::default() };
        Self { config, streams, tokenizer, batch_size }
    }

    /// Answers `prompts`; row `i` draws from sampling stream `first_row + i`, whatever the batch size.
    ///
    /// The policy should be on a plain device: on an autodiff device every step would be recorded.
    ///
    /// # Errors
    /// If a setting or a prompt is not valid, or the policy's logits are not finite.
    pub fn answer<P: AsRef<[u32]>>(
        &self,
        policy: &Gpt,
        prompts: &[P],
        first_row: u64,
    ) -> Result<Vec<Response>, ScoreError> {
        self.answer_watched(policy, prompts, first_row, None)
    }

    /// [`answer`](Self::answer), with `on_token` called for every new token; it can break a response off.
    ///
    /// # Errors
    /// As [`answer`](Self::answer).
    pub fn answer_watched<P: AsRef<[u32]>>(
        &self,
        policy: &Gpt,
        prompts: &[P],
        first_row: u64,
        on_token: Option<OnToken<'_>>,
    ) -> Result<Vec<Response>, ScoreError> {
        let ids: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.as_ref().to_vec()).collect();
        let options = GenerateOptions { max_batch: self.batch_size, on_token, ..GenerateOptions::default() };
        let generated = generate(policy, &ids, &self.config, &self.streams, first_row, options)?;
        Ok(generated
            .into_iter()
            .map(|answer| Response {
                text: self.tokenizer.decode(&answer.ids),
                ended: answer.finish == Finish::Stop,
                ids: answer.ids,
                log_probs: answer.log_probs,
            })
            .collect())
    }
}
