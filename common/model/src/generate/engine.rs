//! A list of prompts at once, as training and evaluation need it.

use std::cmp::Reverse;
use std::ops::ControlFlow;

use super::{Finish, GenerateError, Limits, Request, SamplingConfig, Scheduler, check_prompt};
use crate::Gpt;
use base::rng::Streams;
use kernels;

/// Most prompts decoded together where [`GenerateOptions::max_batch`] does not say.
pub const DEFAULT_MAX_BATCH: usize = 256;

/// Called with a prompt's index and each of its new tokens, as they come; `Break` ends that answer.
pub type OnToken<'a> = &'a mut dyn FnMut(usize, u32) -> ControlFlow<()>;

/// How a set of prompts is worked through. Nothing here changes what is sampled, unless `on_token` breaks off.
#[derive(Default)]
pub struct GenerateOptions<'a> {
    /// Most prompts decoded together, and so the most rows of the cache; 0 stands for [`DEFAULT_MAX_BATCH`]. Where there
    /// are more prompts, each that ends makes room for the next.
    pub max_batch: usize,
    /// Whether log-probabilities keep their last bits whatever the batch, see [`Limits::batch_invariant`].
    pub batch_invariant: bool,
    /// Watches the tokens: to print them, to count them, to stop at a text or on Ctrl-C.
    pub on_token: Option<OnToken<'a>>,
}

/// The continuation of one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The new tokens, with the stop token where there is one.
    pub ids: Vec<u32>,
    /// The log-probability of each in nats, see [`Choice::log_prob`](super::Choice::log_prob).
    pub log_probs: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Continues every prompt and returns the continuations in the order of the prompts.
///
/// Prompt `i` draws from stream `("sampling", first_row + i)`, so its answer does not depend on the others. An answer ends
/// at a stop token, at `max_tokens`, or where prompt and answer fill the model's context window.
///
/// The model should be on a plain device: on an autodiff device every step would be recorded.
///
/// # Errors
/// For an invalid `config`, a prompt that is empty, fills the window or holds an unknown token, and for logits that
/// are not finite. `on_token` may have been called by then.
pub fn generate(
    model: &Gpt,
    prompts: &[Vec<u32>],
    config: &SamplingConfig,
    streams: &Streams,
    first_row: u64,
    options: GenerateOptions<'_>,
) -> Result<Vec<Generated>, GenerateError> {
    config.validate()?;
    for (prompt_idx, prompt) in prompts.iter().enumerate() {
        check_prompt(model, prompt_idx, prompt)?;
    }
    let GenerateOptions { max_batch, batch_invariant, mut on_token } = options;
    // The last token is never read back.
    let n_positions =
        |prompt: &Vec<u32>| prompt.len() + config.max_tokens.min(model.config().max_seq_len - prompt.len()) - 1;
    let limits = Limits {
        max_rows: if max_batch == 0 { DEFAULT_MAX_BATCH } else { max_batch },
        capacity: prompts.iter().map(n_positions).max().unwrap_or(0),
        batch_invariant,
        prompt_piece: None,
    };
    let mut scheduler = Scheduler::new(model, limits)?;
    // Longest first: neighbours need little padding, and what needs most memory runs (or fails) first.
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by_key(|&prompt_idx| Reverse(prompts[prompt_idx].len()));
    for prompt_idx in order {
        let rng = streams.get("sampling", first_row + prompt_idx as u64);
        let prompt = prompts[prompt_idx].clone();
        scheduler.submit(Request { id: prompt_idx, prompt, sampling: config.clone(), rng, n_likeliest: 0 })?;
    }

    let nothing = Generated { ids: Vec::new(), log_probs: Vec::new(), finish: Finish::Interrupted };
    let mut answers = vec![nothing; prompts.len()];
    let mut step = || -> Result<bool, GenerateError> {
        for token in scheduler.step()? {
            let answer = &mut answers[token.request];
            answer.ids.push(token.id);
            answer.log_probs.push(token.log_prob);
            let broken_off = on_token.as_mut().is_some_and(|on_token| on_token(token.request, token.id).is_break());
            match token.finish {
                Some(finish) => answer.finish = finish,
                None if broken_off => scheduler.cancel(token.request),
                None => {}
            }
        }
        Ok(scheduler.is_idle())
    };
    // The prompts are long operations, which all threads of the pool should share.
    if !step()? {
        kernels::with_workers(|| -> Result<(), GenerateError> {
            while !step()? {}
            Ok(())
        })?;
    }
    Ok(answers)
}
