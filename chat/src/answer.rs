//! From a prompt to an answer in text: the model, its tokenizer and how to choose.

use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Context;
use common::checkpoint::{Checkpoint, Stage};
use common::cli::RuntimeArgs;
use common::generate::{Finish, GenerateOptions, beam_search, generate};
use common::model::Gpt;
use common::rng::Streams;
use common::tokenizer::{StreamDecoder, Tokenizer};
use serde::Serialize;

use crate::cli::{SamplingArgs, Strategy};
use crate::stop_text::StopText;

/// Called with each piece of an answer as it becomes certain; `Break` ends the answer.
pub type OnText<'a> = &'a mut dyn FnMut(&str) -> ControlFlow<()>;

/// A loaded model and how to choose what it says.
#[derive(Debug)]
pub struct Answerer {
    gpt: Gpt,
    tokenizer: Tokenizer,
    strategy: Strategy,
    stop_texts: Vec<String>,
    streams: Streams,
}

/// What a model answered.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Answer {
    /// The text, up to the stop text where there is one.
    pub text: String,
    /// The tokens, with the stop token or those of the stop text.
    pub token_ids: Vec<u32>,
    /// The log-probability of each token in nats, see [`common::generate::Choice::log_prob`].
    pub log_probs: Vec<f32>,
    /// Why the answer ended.
    pub finish_reason: FinishReason,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// At a stop token or a stop text.
    Stop,
    /// At the largest number of tokens, or where the context window ends.
    Length,
    /// The user or the reader of the output broke off.
    Interrupted,
}

impl Answerer {
    /// Loads the checkpoint in `dir`.
    ///
    /// # Errors
    /// [`UsageError`](common::exit::UsageError) for flags that contradict each other; else if there is no such
    /// device, or the directory holds no language model or no tokenizer.
    pub fn load(dir: &Path, sampling: &SamplingArgs, runtime: &RuntimeArgs) -> anyhow::Result<Self> {
        sampling.strategy(vec![])?; // before anything is read
        let backend = &runtime.backend;
        let runtime = runtime.open()?;
        let checkpoint = Checkpoint::open(dir)?;
        checkpoint.expect_stage(&[Stage::Pretrain, Stage::Sft, Stage::Ppo])?;
        let tokenizer = checkpoint.require_tokenizer()?.clone();
        let gpt = runtime.gpt(&checkpoint)?;
        // A model that was never taught `<|end|>` ends a document by beginning the next.
        let stop = [tokenizer.eos(), tokenizer.bos()].into_iter().flatten().collect();
        tracing::debug!("loaded `{}` on {}", dir.display(), backend);
        Ok(Self {
            gpt,
            tokenizer,
            strategy: sampling.strategy(stop)?,
            stop_texts: sampling.stop.clone(),
            streams: Streams::new(sampling.seed),
        })
    }

    /// The tokenizer of the checkpoint.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The longest prompt that leaves room for an answer: for `--max-tokens`, or for half of the context window if
    /// that is less.
    pub fn prompt_budget(&self) -> usize {
        let max_tokens = match &self.strategy {
            Strategy::Sample(config) => config.max_tokens,
            Strategy::Search(config) => config.max_tokens,
        };
        let max_seq_len = self.max_seq_len();
        max_seq_len - max_tokens.min(max_seq_len / 2).max(1)
    }

    /// The model's context window in tokens.
    pub fn max_seq_len(&self) -> usize {
        self.gpt.config().max_seq_len
    }

    /// Answers `prompt` with the random numbers of stream `row`, telling `on_text` what comes.
    ///
    /// With beams the answer comes all at once.
    ///
    /// # Errors
    /// As [`common::generate::generate()`].
    pub fn answer(&self, prompt: Vec<u32>, row: u64, on_text: OnText<'_>) -> anyhow::Result<Answer> {
        let mut speaker = Speaker {
            decoder: StreamDecoder::new(&self.tokenizer),
            stop_text: StopText::new(self.stop_texts.clone()),
            text: String::new(),
            n_tokens: 0,
            stopped: false,
            on_text,
        };
        let (mut token_ids, mut log_probs, finish) = match &self.strategy {
            Strategy::Sample(config) => {
                let mut on_token = |_, id| speaker.hear(id);
                let options = GenerateOptions { max_batch: 0, on_token: Some(&mut on_token) };
                let answer = generate(&self.gpt, &[prompt], config, &self.streams, row, options)
                    .context("failed to generate an answer")?
                    .swap_remove(0);
                (answer.ids, answer.log_probs, answer.finish)
            }
            Strategy::Search(config) => {
                let best = beam_search(&self.gpt, &prompt, config).context("failed to generate an answer")?;
                let broken_off = best.ids.iter().any(|&id| speaker.hear(id).is_break());
                (best.ids, best.log_probs, if broken_off { Finish::Interrupted } else { best.finish })
            }
        };
        token_ids.truncate(speaker.n_tokens);
        log_probs.truncate(speaker.n_tokens);
        let (text, stopped) = speaker.finish();
        let finish_reason = match finish {
            _ if stopped => FinishReason::Stop,
            Finish::Stop => FinishReason::Stop,
            Finish::Length => FinishReason::Length,
            Finish::Interrupted => FinishReason::Interrupted,
        };
        Ok(Answer { text, token_ids, log_probs, finish_reason })
    }
}

/// Turns tokens into text and says it, up to a stop text.
struct Speaker<'t, 'f> {
    decoder: StreamDecoder<'t>,
    stop_text: StopText,
    text: String,
    n_tokens: usize,
    stopped: bool,
    on_text: OnText<'f>,
}

impl Speaker<'_, '_> {
    fn hear(&mut self, id: u32) -> ControlFlow<()> {
        self.n_tokens += 1;
        let (certain, stopped) = self.stop_text.push(&self.decoder.push(id));
        self.stopped = stopped;
        self.say(&certain)?;
        if stopped { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn say(&mut self, text: &str) -> ControlFlow<()> {
        self.text.push_str(text);
        // Also without text: a user who breaks off must be heard between two letters.
        (self.on_text)(text)
    }

    /// Says what was held back; returns the whole text, and whether a stop text ended it.
    fn finish(self) -> (String, bool) {
        let Self { decoder, mut stop_text, mut text, mut stopped, on_text, .. } = self;
        if !stopped {
            let mut rest;
            (rest, stopped) = stop_text.push(&decoder.finish());
            if !stopped {
                rest += &stop_text.finish();
            }
            text += &rest;
            let _ = on_text(&rest); // the answer is over: there is nothing left to break off
        }
        (text, stopped)
    }
}
