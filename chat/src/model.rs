//! From a prompt to its completion in text: the model, its tokenizer and how to choose.

use std::ops::{ControlFlow, Range};
use std::path::Path;

use anyhow::Context;
use common::checkpoint::{Checkpoint, Opening, Stage};
use common::cli::RuntimeArgs;
use common::exit::UsageError;
use common::generate::{Finish, GenerateOptions, Generated, beam_search, generate};
use common::logging::grouped;
use common::model::{Gpt, param_paths};
use common::rng::Streams;
use common::runtime::Runtime;
use common::tokenizer::{StreamDecoder, Tokenizer};
use serde::Serialize;

use crate::cli::{SamplingArgs, Strategy, Switch};
use crate::stop_text::StopText;

/// Called with each piece of a text as it becomes certain; `Break` ends the text.
pub type OnText<'a> = &'a mut dyn FnMut(&str) -> ControlFlow<()>;

/// A language model of a checkpoint with what turns its tokens into text.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// Directory, stage, step and size.
    pub description: String,
    /// The model.
    pub gpt: Gpt,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// The tokens that end an answer.
    pub stop: Vec<u32>,
    /// Whether it was only pretrained, on text in which nobody answers, and has no chat template from elsewhere.
    pub is_base: bool,
}

impl Loaded {
    /// Loads the language model in `dir`.
    ///
    /// # Errors
    /// If the directory holds no language model or no tokenizer.
    pub(crate) fn open(dir: &Path, runtime: &Runtime, opening: Opening<'_>) -> anyhow::Result<Self> {
        let mut checkpoint = Checkpoint::open_with(dir, opening)?.of_stage(&Stage::LANGUAGE_MODELS)?;
        let tokenizer = checkpoint.require_tokenizer()?.clone();
        let gpt = runtime.take_gpt(&mut checkpoint)?;
        // A model that was never taught `<|end|>` ends a document by beginning the next.
        let stop = tokenizer.end_ids().into_iter().chain(tokenizer.bos()).collect();
        let is_base = checkpoint.stage() == Some(Stage::Pretrain) && !tokenizer.writes_by_template();
        Ok(Self { description: describe(&checkpoint, &gpt), gpt, tokenizer, stop, is_base })
    }
}

/// A loaded model and how its tokens are chosen.
#[derive(Debug)]
pub struct ChatModel {
    description: String,
    gpt: Gpt,
    tokenizer: Tokenizer,
    strategy: Strategy,
    stop_texts: Vec<String>,
    streams: Streams,
}

/// The continuation of one prompt.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Completion {
    /// The text, up to the stop text where there is one.
    pub text: String,
    /// The tokens, with the stop token or those of the stop text.
    pub token_ids: Vec<u32>,
    /// The log-probability of each token in nats, see [`common::generate::Choice::log_prob`].
    pub log_probs: Vec<f32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// Why a completion ended.
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

impl ChatModel {
    /// Loads the checkpoint in `dir`.
    ///
    /// # Errors
    /// [`UsageError`] for flags that contradict each other; else if there is no such
    /// device, or the directory holds no language model or no tokenizer.
    pub fn load(dir: &Path, sampling: &SamplingArgs, runtime: &RuntimeArgs) -> anyhow::Result<Self> {
        sampling.strategy(vec![])?; // before anything is read
        let (backend, opening) = (&runtime.backend, runtime.opening());
        let Loaded { description, gpt, tokenizer, stop, .. } = Loaded::open(dir, &runtime.open()?, opening)?;
        tracing::debug!("loaded `{}` on {}", dir.display(), backend);
        Ok(Self {
            description,
            gpt,
            tokenizer,
            strategy: sampling.strategy(stop)?,
            stop_texts: sampling.stop.clone(),
            streams: Streams::new(sampling.seed),
        })
    }

    /// The model with the switch `enable_thinking` of its chat template set, where `thinking` says how.
    ///
    /// # Errors
    /// [`UsageError`] if the template has no such switch.
    pub fn with_thinking(self, thinking: Option<Switch>) -> Result<Self, UsageError> {
        let Some(thinking) = thinking else { return Ok(self) };
        let tokenizer = self.tokenizer.with_thinking(thinking == Switch::On).ok_or_else(|| {
            UsageError("`--thinking`: the model's chat template has no switch `enable_thinking`".to_owned())
        })?;
        Ok(Self { tokenizer, ..self })
    }

    /// Which model it is: directory, stage, step and size.
    pub fn description(&self) -> &str {
        &self.description
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

    /// Completes `prompt` with the random numbers of stream `row`, telling `on_text` what comes.
    ///
    /// With beams the text comes all at once.
    ///
    /// # Errors
    /// As [`common::generate::generate()`].
    pub fn complete(&self, prompt: Vec<u32>, row: u64, on_text: OnText<'_>) -> anyhow::Result<Completion> {
        let mut transcript = Transcript::new(&self.tokenizer, self.stop_texts.clone());
        let mut hear = |id| on_text(&transcript.push(id)).is_break() || transcript.stopped;
        let generated = match &self.strategy {
            Strategy::Sample(config) => {
                let mut on_token = |_, id| if hear(id) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
                let options = GenerateOptions { on_token: Some(&mut on_token), ..GenerateOptions::default() };
                generate(&self.gpt, &[prompt], config, &self.streams, row, options)
                    .context("failed to generate an answer")?
                    .swap_remove(0)
            }
            Strategy::Search(config) => {
                let best = beam_search(&self.gpt, &prompt, config).context("failed to generate an answer")?;
                let broken_off = best.ids.iter().any(|&id| hear(id));
                let finish = if broken_off { Finish::Interrupted } else { best.finish };
                Generated { ids: best.ids, log_probs: best.log_probs, finish }
            }
        };
        let (rest, completion) = transcript.finish(generated);
        let _ = on_text(&rest); // the answer is over: there is nothing left to break off
        Ok(completion)
    }

    /// Completes `prompt` once with the random numbers of each stream of `rows`, all together.
    ///
    /// A completion does not depend on the others: it has the same tokens and log-probabilities, bit by bit, in whichever
    /// range of streams.
    ///
    /// # Errors
    /// As [`common::generate::generate()`].
    ///
    /// # Panics
    /// With beams, which do not sample.
    pub fn samples(&self, prompt: &[u32], rows: Range<u64>) -> anyhow::Result<Vec<Completion>> {
        let Strategy::Sample(config) = &self.strategy else { panic!("beam search has one answer") };
        let prompts: Vec<Vec<u32>> = rows.clone().map(|_| prompt.to_vec()).collect();
        let mut transcripts: Vec<Transcript<'_>> =
            rows.clone().map(|_| Transcript::new(&self.tokenizer, self.stop_texts.clone())).collect();
        let mut on_token = |i: usize, id| {
            let transcript: &mut Transcript<'_> = &mut transcripts[i];
            transcript.push(id);
            if transcript.stopped { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let options = GenerateOptions { on_token: Some(&mut on_token), batch_invariant: true, max_batch: 0 };
        let generated = generate(&self.gpt, &prompts, config, &self.streams, rows.start, options)
            .context("failed to generate answers")?;
        Ok(transcripts
            .into_iter()
            .zip(generated)
            .map(|(transcript, generated)| transcript.finish(generated).1)
            .collect())
    }
}

/// Directory, stage, step and number of parameters, as far as they are known.
fn describe(checkpoint: &Checkpoint, gpt: &Gpt) -> String {
    let stage = checkpoint.manifest().map(|manifest| format!("stage `{}`, step {}, ", manifest.stage, manifest.step));
    let n_params: usize = param_paths(gpt).into_iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    format!("`{}`: {}{} parameters", checkpoint.dir().display(), stage.unwrap_or_default(), grouped(n_params))
}

/// The text of tokens as they come, up to a stop text.
#[derive(Debug)]
pub(crate) struct Transcript<'t> {
    decoder: StreamDecoder<'t>,
    stop_text: StopText,
    text: String,
    n_tokens: usize,
    /// Whether a stop text was found: what comes after it is not heard.
    pub stopped: bool,
}

impl<'t> Transcript<'t> {
    pub(crate) fn new(tokenizer: &'t Tokenizer, stop_texts: Vec<String>) -> Self {
        Self {
            decoder: StreamDecoder::new(tokenizer),
            stop_text: StopText::new(stop_texts),
            text: String::new(),
            n_tokens: 0,
            stopped: false,
        }
    }

    /// Takes a token and returns the text that is now certain, often none.
    pub(crate) fn push(&mut self, id: u32) -> String {
        self.n_tokens += 1;
        let (certain, stopped) = self.stop_text.push(&self.decoder.push(id));
        self.stopped = stopped;
        self.text.push_str(&certain);
        certain
    }

    /// The text that was held back to the end, and the whole of it with its tokens.
    pub(crate) fn finish(self, generated: Generated) -> (String, Completion) {
        let Self { decoder, mut stop_text, mut text, n_tokens, mut stopped } = self;
        let mut rest = String::new();
        if !stopped {
            (rest, stopped) = stop_text.push(&decoder.finish());
            if !stopped {
                rest += &stop_text.finish();
            }
            text += &rest;
        }
        let finish_reason = match generated.finish {
            _ if stopped => FinishReason::Stop,
            Finish::Stop => FinishReason::Stop,
            Finish::Length => FinishReason::Length,
            Finish::Interrupted => FinishReason::Interrupted,
        };
        let Generated { ids: mut token_ids, mut log_probs, .. } = generated;
        token_ids.truncate(n_tokens);
        log_probs.truncate(n_tokens);
        (rest, Completion { text, token_ids, log_probs, finish_reason })
    }
}
