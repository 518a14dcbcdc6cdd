//! Responses of a policy to prompts.

use base::rng::Streams;
use group::Group;
use model::Gpt;
use model::generate::{Finish, GenerateOptions, OnToken, SamplingConfig, generate};
use serde::{Deserialize, Serialize};
use text::tokenizer::Tokenizer;

use crate::{ScoreError, Watch};

/// A response to a prompt.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// The sampled tokens, with the stop token where there is one; at least one.
    pub ids: Vec<u32>,
    /// Of each token under the policy that sampled it, at the sampling temperature, in nats.
    pub log_probs: Vec<f32>,
    /// The text, special tokens left out.
    pub text: String,
    /// Whether a stop token was sampled, rather than the length limit reached.
    pub ended: bool,
    /// Number of tokens sampled after the stop token, 0 unless [`Sampling::past_end`].
    pub n_after_end: usize,
}

impl Response {
    /// The tokens up to the stop token, which the text and the score are those of.
    pub fn answer(&self) -> &[u32] {
        &self.ids[..self.ids.len() - self.n_after_end]
    }
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
    /// Whether sampling goes on after a stop token, up to the length limit.
    pub past_end: bool,
    /// Whether a response's log-probabilities keep their last bits whatever it is decoded together with, see
    /// [`GenerateOptions::batch_invariant`].
    pub batch_invariant: bool,
    /// The processes that share the prompts. What each samples does not depend on their number; the last bits of
    /// log-probabilities only where they are `batch_invariant`.
    pub group: Group,
}

impl<'a> Sampling<'a> {
    /// The policy's own distribution at a temperature, up to an id that ends answers or `max_tokens`; `batch_size`
    /// responses at a time.
    pub fn new(
        temperature: f64,
        max_tokens: usize,
        streams: Streams,
        tokenizer: &'a Tokenizer,
        batch_size: usize,
    ) -> Self {
        let config = SamplingConfig { temperature, max_tokens, stop: tokenizer.end_ids(), ..SamplingConfig::default() };
        let group = Group::alone();
        Self { config, streams, tokenizer, batch_size, past_end: false, batch_invariant: false, group }
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
        let own = self.group.share().of(prompts.len());
        let first_row = first_row + own.start as u64;
        let ids: Vec<Vec<u32>> = prompts[own].iter().map(|prompt| prompt.as_ref().to_vec()).collect();
        let options = GenerateOptions { max_batch: self.batch_size, batch_invariant: self.batch_invariant, on_token };
        let config = SamplingConfig {
            stop: if self.past_end { Vec::new() } else { self.config.stop.clone() },
            ..self.config.clone()
        };
        let generated = generate(policy, &ids, &config, &self.streams, first_row, options)?;
        let own = generated.into_iter().map(|answer| self.response(answer.ids, answer.log_probs, answer.finish));
        Ok(self.group.gather(own.collect::<Vec<_>>())?.concat())
    }

    /// [`answer`](Self::answer), with `watch` looking on: it is told of each answer that is done, and of 0 where a token
    /// of another is. Every process is watched for itself.
    ///
    /// # Errors
    /// As [`answer`](Self::answer), and if `watch` breaks it off.
    pub fn answer_counted<P: AsRef<[u32]>>(
        &self,
        policy: &Gpt,
        prompts: &[P],
        first_row: u64,
        watch: Watch<'_>,
    ) -> Result<Vec<Response>, ScoreError> {
        let first = self.group.share().of(prompts.len()).start;
        let mut n_tokens = vec![0; prompts.len() - first];
        let mut is_broken_off = false;
        let mut on_token = |i: usize, id: u32| {
            n_tokens[i] += 1;
            let room = policy.config().max_seq_len - prompts[first + i].as_ref().len();
            let is_last = n_tokens[i] == self.config.max_tokens.min(room);
            let ends = !self.past_end && self.config.stop.contains(&id);
            let flow = watch(usize::from(ends || is_last));
            is_broken_off |= flow.is_break();
            flow
        };
        let answers = self.answer_watched(policy, prompts, first_row, Some(&mut on_token))?;
        if is_broken_off { Err(ScoreError::Stopped) } else { Ok(answers) }
    }

    fn response(&self, ids: Vec<u32>, log_probs: Vec<f32>, finish: Finish) -> Response {
        let end = ids.iter().position(|id| self.past_end && self.config.stop.contains(id));
        let n_after_end = end.map_or(0, |end| ids.len() - end - 1);
        let response = Response {
            ended: finish == Finish::Stop || end.is_some(),
            n_after_end,
            ids,
            log_probs,
            ..Response::default()
        };
        Response { text: self.tokenizer.decode(response.answer()), ..response }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use burn::tensor::Device;
    use model::GptConfig;
    use text::tokenizer::{TokenizerConfig, TokenizerKind};

    fn byte_tokenizer() -> Tokenizer {
        let bytes = TokenizerConfig { kind: TokenizerKind::Byte, ..TokenizerConfig::default() };
        Tokenizer::train(&bytes, std::iter::empty::<&str>(), true).unwrap()
    }

    fn policy(vocab_size: usize) -> Gpt {
        let sizes = GptConfig {
            d_model: 16,
            n_layers: 1,
            n_heads: 2,
            d_ff: 32,
            max_seq_len: 32,
            ..GptConfig::gpt2(vocab_size)
        };
        Gpt::new(&sizes, &Streams::new(3), &Device::flex())
    }

    #[test]
    fn a_response_ends_at_any_id_that_the_models_configuration_names() {
        let tokenizer = byte_tokenizer();
        let policy = policy(tokenizer.vocab_size());
        let ends: Vec<u32> = (0..tokenizer.vocab_size() as u32).filter(|id| id % 3 == 0).collect();
        let tokenizer = tokenizer.with_end_ids(ends.clone());
        let sampling = Sampling::new(1.0, 30, Streams::new(1), &tokenizer, 2);
        let prompts: Vec<Vec<u32>> = (0..16).map(|i| vec![1, i]).collect();
        let responses = sampling.answer(&policy, &prompts, 0).unwrap();
        let end = tokenizer.specials().end;
        let is_end = |id: &u32| *id == end || ends.contains(id);
        for response in &responses {
            let (last, others) = response.ids.split_last().unwrap();
            assert!(response.ended && is_end(last) && !others.iter().any(is_end), "{:?}", response.ids);
        }
        assert!(responses.iter().any(|response| response.ids.last() != Some(&end)));
    }

    #[test]
    fn past_its_end_a_response_goes_on_to_the_limit_with_the_same_answer() {
        let tokenizer = byte_tokenizer();
        let policy = policy(tokenizer.vocab_size());
        let ends = (0..tokenizer.vocab_size() as u32).filter(|id| id % 9 == 0).collect();
        let tokenizer = tokenizer.with_end_ids(ends);
        let prompts: Vec<Vec<u32>> = (0..8).map(|i| vec![1, i]).collect();
        let mut sampling = Sampling::new(1.0, 24, Streams::new(1), &tokenizer, 3);
        let stopped = sampling.answer(&policy, &prompts, 0).unwrap();
        sampling.past_end = true;
        let whole = sampling.answer(&policy, &prompts, 0).unwrap();
        for (stopped, whole) in stopped.iter().zip(&whole) {
            assert_eq!((whole.ids.len(), whole.log_probs.len()), (24, 24));
            assert_eq!((whole.answer(), &whole.text, whole.ended), (&*stopped.ids, &stopped.text, stopped.ended));
        }
        assert!(whole.iter().any(|response| response.n_after_end > 0));
    }

    #[test]
    fn every_answer_is_counted_once_and_a_break_ends_all() {
        let tokenizer = byte_tokenizer();
        let policy = policy(tokenizer.vocab_size());
        // The context has 32 tokens: the long prompt's answer ends there, some others at a stop token, the rest at 24.
        let mut prompts: Vec<Vec<u32>> = (0..8).map(|i| vec![1, i]).collect();
        prompts.push((0..20).collect());
        let ends = (0..tokenizer.vocab_size() as u32).filter(|id| id % 9 == 0).collect();
        let tokenizer = tokenizer.with_end_ids(ends);
        let mut sampling = Sampling::new(1.0, 24, Streams::new(1), &tokenizer, 3);
        for past_end in [false, true] {
            sampling.past_end = past_end;
            let n_done = AtomicUsize::new(0);
            let watch = |n| {
                n_done.fetch_add(n, Ordering::Relaxed);
                ControlFlow::Continue(())
            };
            let counted = sampling.answer_counted(&policy, &prompts, 0, &watch).unwrap();
            assert_eq!(counted, sampling.answer(&policy, &prompts, 0).unwrap());
            assert_eq!(n_done.into_inner(), 9, "past the end: {past_end}");
        }
        let n_told = AtomicUsize::new(0);
        let watch = |_| {
            n_told.fetch_add(1, Ordering::Relaxed);
            ControlFlow::Break(())
        };
        let stopped = sampling.answer_counted(&policy, &prompts, 0, &watch);
        assert!(matches!(stopped, Err(ScoreError::Stopped)));
        assert_eq!(n_told.into_inner(), 9, "each answer is broken off at its first token");
    }

    #[test]
    fn no_more_responses_are_decoded_at_a_time_than_asked_for() {
        let tokenizer = byte_tokenizer();
        let policy = policy(tokenizer.vocab_size());
        let prompts = [vec![1, 2], vec![1, 3], vec![1, 4]];
        // Where one is decoded after the other, so are their tokens seen.
        let n_changes = |batch_size: usize| {
            let mut seen = Vec::new();
            let mut watch = |prompt_idx: usize, _| {
                seen.push(prompt_idx);
                ControlFlow::Continue(())
            };
            let mut sampling = Sampling::new(1.0, 8, Streams::new(1), &tokenizer, batch_size);
            sampling.config.stop.clear();
            let responses = sampling.answer_watched(&policy, &prompts, 0, Some(&mut watch)).unwrap();
            assert!(responses.iter().all(|response| response.ids.len() == 8 && !response.ended));
            seen.windows(2).filter(|pair| pair[0] != pair[1]).count()
        };
        assert_eq!(n_changes(1), 2);
        assert!(n_changes(3) > 2);
    }
}
