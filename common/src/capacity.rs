//! Memory that a training run needs, and whether this machine has it: asked before any weights are read.

mod room;

use std::fmt;
use std::ops::AddAssign;

use serde::Serialize;

use crate::group::Share;
use crate::hf::{self, Class};
use crate::kernels::{Kernels, TrunkPrecision};
use crate::model::footprint::{self, Batch, Computation};
use crate::model::params::Output;
use crate::model::{GptConfig, LoraConfig};
use crate::reduce::Reduce;

pub use room::{Ranks, TooLarge, available, check, check_model, check_run};

/// The program itself with two threads, and the pieces of memory that each of them keeps whatever the model, in bytes.
const PROGRAM: f64 = 58.0 * MIB;

/// The same of one of several processes, which have a thread each.
const PROCESS: f64 = 48.0 * MIB;

/// The MPI library in each of several processes, in bytes.
const LIBRARY: f64 = 10.0 * MIB;

/// Memory that stays resident for each byte in use: freed pieces are kept, by each thread its own, and not all fit what
/// comes later. Measured over all stages and families: from 1.08 to 1.29.
const ALLOCATOR: f64 = 1.2;

const MIB: f64 = (1_u64 << 20) as f64;
const GIB: f64 = (1_u64 << 30) as f64;

/// What a run needs at most, in bytes, in one process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Needs {
    /// The checkpoint it starts from, where the run goes on to hold it.
    pub initial: f64,
    /// Weights of all models, trained or not.
    pub weights: f64,
    /// Of the optimisers; of one rank's part of them where they are shared.
    pub moments: f64,
    /// Gradients of the trained weights; twice where they are accumulated, and as often as a rank has micro-batches where it
    /// keeps those of each.
    pub gradients: f64,
    /// Those of them that are there from earlier micro-batches.
    pub accumulated: f64,
    /// The gradients, what is left of the activations, and what is sent to other ranks and received.
    pub exchange: f64,
    /// Of a micro-batch, when its backward pass begins.
    pub activations: f64,
    /// Of a single block, when it ends.
    pub last_activations: f64,
    /// Keys and values of the answers decoded at a time, and the activations of a step of decoding.
    pub cache: f64,
    /// Copies that are made to read the weights.
    pub loading: f64,
    /// Copies that are made to save a checkpoint.
    pub saving: f64,
    /// Tokenizer and data.
    pub data: f64,
    /// The library that connects several processes.
    pub library: f64,
}

impl Needs {
    /// The most that is in use at a time, in the phase that needs most: loading, a training step, the exchange of its
    /// gradients, decoding or saving.
    ///
    /// `program + data + library + 1.2 · (initial + weights + moments + max(loading, step, exchange, cache, saving))`, with
    /// `step = max(accumulated + activations, gradients + last_activations)`: gradients come as activations go.
    pub fn peak(&self) -> f64 {
        let (_, phase) = self.phase();
        let program = if self.library > 0.0 { PROCESS } else { PROGRAM };
        program + self.data + self.library + ALLOCATOR * (self.initial + self.weights + self.moments + phase)
    }

    /// The phase that needs most, and what it takes beside weights and moments.
    pub fn phase(&self) -> (Phase, f64) {
        let phases = [
            (Phase::Training, self.step()),
            (Phase::Exchange, self.exchange),
            (Phase::Decoding, self.cache),
            (Phase::Loading, self.loading),
            (Phase::Saving, self.saving),
        ];
        phases.into_iter().reduce(|most, phase| if phase.1 > most.1 { phase } else { most }).unwrap_or(phases[0])
    }

    fn step(&self) -> f64 {
        (self.accumulated + self.activations).max(self.gradients + self.last_activations)
    }
}

/// What a run does one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Reading the weights.
    Loading,
    /// A step: the backward pass of a micro-batch.
    Training,
    /// Sending gradients to other ranks and receiving theirs.
    Exchange,
    /// Sampling answers.
    Decoding,
    /// Writing a checkpoint.
    Saving,
}

impl Phase {
    /// Name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Training => "training",
            Self::Exchange => "exchange",
            Self::Decoding => "decoding",
            Self::Saving => "saving",
        }
    }
}

impl AddAssign for Needs {
    /// Of two models that are trained side by side, or of two ranks.
    fn add_assign(&mut self, other: Self) {
        self.initial += other.initial;
        self.weights += other.weights;
        self.moments += other.moments;
        self.gradients += other.gradients;
        self.accumulated += other.accumulated;
        self.exchange += other.exchange;
        self.activations += other.activations;
        self.last_activations += other.last_activations;
        self.cache += other.cache;
        self.loading += other.loading;
        self.saving += other.saving;
        self.data += other.data;
        self.library += other.library;
    }
}

/// The settings of a run that decide how much it needs and change no result but for rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// `train.micro_batch_size`, or its default.
    pub micro_batch_size: usize,
    /// `train.checkpoint_activations`.
    pub checkpoint_activations: bool,
    /// `--trunk`.
    pub trunk: TrunkPrecision,
    /// `train.shard_optimizer`.
    pub shard_optimizer: bool,
    /// `train.reduce`.
    pub reduce: Reduce,
    /// The rank that is asked about.
    pub share: Share,
}

impl Settings {
    /// The same of another rank.
    #[must_use]
    pub const fn of(self, share: Share) -> Self {
        Self { share, ..self }
    }
}

/// A model that is trained.
#[derive(Debug, Clone, Copy)]
pub struct Trained<'a> {
    /// Its architecture.
    pub config: &'a GptConfig,
    /// Its output.
    pub output: Output,
    /// Adapters that are trained in place of all weights.
    pub lora: Option<&'a LoraConfig>,
    /// How it is computed.
    pub kernels: Kernels,
    /// What else the run's settings say.
    pub settings: Settings,
    /// A micro-batch.
    pub batch: Batch,
    /// How many of them a step has, those of all ranks together.
    pub n_micro_batches: usize,
}

impl Trained<'_> {
    /// Weights, moments, gradients and activations, and what saving copies: the optimiser's moments, the weights and the
    /// weights to hand on. Ranks behind the first save nothing, but copy the weights to compare them.
    pub fn needs(&self) -> Needs {
        let Settings { trunk, shard_optimizer, share, .. } = self.settings;
        let all = footprint::weights(self.config, self.output, trunk);
        let adapters = self.adapters();
        let trained = adapters.unwrap_or(all);
        let activations = footprint::activations(self.config, self.computation(), self.batch, self.output);
        let kept = if shard_optimizer { share.fraction() } else { 1.0 };
        let gradients = self.n_gradients() * trained;
        Needs {
            weights: all + adapters.unwrap_or(0.0),
            moments: 2.0 * trained * kept,
            gradients,
            accumulated: gradients - trained,
            exchange: if share.is_whole() { 0.0 } else { gradients + trained + activations.at_the_end },
            activations: activations.at_most,
            last_activations: activations.at_the_end,
            saving: if share.is_first() { 4.0 * trained } else { trained },
            library: if share.is_whole() { 0.0 } else { LIBRARY },
            ..Needs::default()
        }
    }

    /// Bytes that reading the model that training begins with takes beside its weights.
    pub fn loading(&self) -> f64 {
        footprint::loading(Class::of(self.config), self.config, self.output, self.settings.trunk)
    }

    /// Bytes of the weights that are trained.
    pub fn trained(&self) -> f64 {
        self.adapters().unwrap_or_else(|| footprint::weights(self.config, self.output, self.settings.trunk))
    }

    /// Bytes of the adapters, where they are trained in place of all weights.
    fn adapters(&self) -> Option<f64> {
        // What is wrong with `[lora]` is said where the adapters are made.
        let adapters = hf::adapters_of(self.config, self.lora?).ok()?;
        Some(footprint::adapters(self.config, self.output, &adapters))
    }

    /// The micro-batches whose gradients are there at a time: the last and the sum of those before it, or, behind the first
    /// rank of a sum in order, all that are the rank's own.
    fn n_gradients(&self) -> f64 {
        let Settings { reduce, share, .. } = self.settings;
        let own = share.of(self.n_micro_batches).len().max(1);
        let n = if share.is_first() || reduce == Reduce::Fast { own.min(2) } else { own };
        n as f64
    }

    /// How it is computed.
    pub fn computation(&self) -> Computation {
        Computation {
            kernels: self.kernels,
            checkpoints: self.settings.checkpoint_activations,
            has_adapters: self.lora.is_some(),
            adapters_drop: self.lora.is_some_and(|lora| lora.dropout > 0.0),
        }
    }
}

/// Lengths of the data's items in tokens, longest first; each as long as the context where they are not known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lengths {
    context: usize,
    longest_first: Option<Vec<usize>>,
}

impl Lengths {
    /// Of items that no tokenizer has cut yet.
    pub const fn unknown(context: usize) -> Self {
        Self { context, longest_first: None }
    }

    /// Of items with these lengths, for a model that reads `context` tokens.
    pub fn of(context: usize, mut lengths: Vec<usize>) -> Self {
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        Self { context, longest_first: Some(lengths) }
    }

    /// The longest item.
    pub fn longest(&self) -> usize {
        self.longest_first.as_ref().and_then(|lengths| lengths.first()).map_or(self.context, |&n| n.min(self.context))
    }

    /// The `n` longest items, one behind the other in rows of at most the context.
    pub fn packed(&self, n: usize) -> Batch {
        let tokens = match &self.longest_first {
            Some(lengths) => lengths.iter().take(n).sum(),
            None => n * self.context,
        };
        let rows = tokens.div_ceil(self.context).max(1);
        Batch { rows: rows as f64, seq: if rows == 1 { tokens } else { self.context } as f64 }
    }
}

/// Bytes of tokens and tokenizer: each token's text, its merges and both directions of the table, in every copy.
pub fn vocabulary(vocab_size: usize) -> f64 {
    const BYTES_PER_TOKEN: f64 = 2600.0;
    vocab_size as f64 * BYTES_PER_TOKEN
}

/// Bytes of the records of `files` and their tokens; those that are not there yet count nothing.
pub fn records<'a>(files: impl IntoIterator<Item = &'a std::path::PathBuf>) -> f64 {
    const BYTES_PER_BYTE: f64 = 4.0;
    let sizes = files.into_iter().filter_map(|file| std::fs::metadata(file).ok()).map(|file| file.len() as f64);
    BYTES_PER_BYTE * sizes.sum::<f64>()
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            ("weights", self.weights + self.initial),
            ("moments", self.moments),
            ("gradients", self.gradients),
            ("activations", self.activations),
            ("cache", self.cache),
            ("saving", self.saving),
        ];
        let parts: Vec<String> = parts
            .iter()
            .filter(|(_, bytes)| *bytes > 0.0)
            .map(|(name, bytes)| format!("{name} {:.1}", bytes / GIB))
            .collect();
        f.write_str(&parts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_needs_activations_first_and_gradients_last() {
        let needs = Needs { moments: 4.0, gradients: 2.0, activations: 9.0, last_activations: 3.0, ..Needs::default() };
        assert_eq!(needs.step(), 9.0);
        assert_eq!(Needs { activations: 4.0, ..needs }.step(), 5.0);
        assert_eq!(Needs { gradients: 4.0, accumulated: 2.0, ..needs }.step(), 11.0);
    }

    /// Of each of `size` ranks, gradients, moments and copies to save in units of the trained weights; six micro-batches a step.
    fn units(size: usize, shard_optimizer: bool, reduce: Reduce) -> Vec<[f64; 3]> {
        let config = GptConfig { d_model: 64, n_layers: 1, n_heads: 2, d_ff: 64, ..GptConfig::gpt2(100) };
        let of = |share| {
            let settings = Settings {
                micro_batch_size: 1,
                checkpoint_activations: false,
                trunk: TrunkPrecision::F32,
                shard_optimizer,
                reduce,
                share,
            };
            let trained = Trained {
                config: &config,
                output: Output::Logits,
                lora: None,
                kernels: Kernels::Fused,
                settings,
                batch: Batch { rows: 1.0, seq: 8.0 },
                n_micro_batches: 6,
            };
            let needs = trained.needs();
            assert_eq!(needs.exchange > 0.0, size > 1);
            [needs.gradients, needs.moments, needs.saving].map(|bytes| bytes / trained.trained())
        };
        Share::all(size).map(of).collect()
    }

    #[test]
    fn a_rank_keeps_the_gradients_of_its_micro_batches_and_its_part_of_the_moments() {
        assert_eq!(units(1, true, Reduce::Ordered), [[2.0, 2.0, 4.0]]);
        assert_eq!(units(2, false, Reduce::Ordered), [[2.0, 2.0, 4.0], [3.0, 2.0, 1.0]]);
        assert_eq!(units(2, true, Reduce::Fast), [[2.0, 1.0, 4.0], [2.0, 1.0, 1.0]]);
        assert_eq!(units(6, false, Reduce::Ordered)[5], [1.0, 2.0, 1.0]);
    }
}
