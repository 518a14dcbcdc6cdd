//! Memory that a training run needs, and whether this machine has it: asked before any weights are read.

use std::fmt;
use std::ops::AddAssign;

use serde::Serialize;

use crate::hf::{self, Class};
use crate::kernels::{Kernels, TrunkPrecision};
use crate::model::footprint::{self, Batch, Computation};
use crate::model::params::Output;
use crate::model::{GptConfig, LoraConfig};

/// The program itself with its threads, in bytes.
const PROGRAM: f64 = 38.0 * MIB;

/// Memory that stays resident for each byte in use: freed pieces are kept, by each thread its own, and not all fit what
/// comes later. Measured over all stages and families: from 1.08 to 1.29.
const ALLOCATOR: f64 = 1.2;

const MIB: f64 = (1_u64 << 20) as f64;
const GIB: f64 = (1_u64 << 30) as f64;

/// What a run needs at most, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Needs {
    /// The checkpoint it starts from, where the run goes on to hold it.
    pub initial: f64,
    /// Weights of all models, trained or not.
    pub weights: f64,
    /// Of the optimisers.
    pub moments: f64,
    /// Gradients of the trained weights; twice where they are accumulated.
    pub gradients: f64,
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
}

impl Needs {
    /// The most that is in use at a time, in the phase that needs most: loading, a training step, decoding or
    /// saving.
    ///
    /// `program + data + 1.2 · (initial + weights + moments + max(loading, step, cache, saving))`, with
    /// `step = max(activations, gradients + last_activations)`: gradients come as activations go. Where gradients are
    /// accumulated, half of them are there from the beginning.
    pub fn peak(&self) -> f64 {
        let phase = self.step().max(self.cache).max(self.loading).max(self.saving);
        PROGRAM + self.data + ALLOCATOR * (self.initial + self.weights + self.moments + phase)
    }

    fn step(&self) -> f64 {
        let accumulated = if self.gradients > self.trained() { self.gradients - self.trained() } else { 0.0 };
        (accumulated + self.activations).max(self.gradients + self.last_activations)
    }

    /// Bytes of the weights that are trained: half of their moments.
    fn trained(&self) -> f64 {
        self.moments / 2.0
    }
}

impl AddAssign for Needs {
    /// Of two models that are trained side by side.
    fn add_assign(&mut self, other: Self) {
        self.initial += other.initial;
        self.weights += other.weights;
        self.moments += other.moments;
        self.gradients += other.gradients;
        self.activations += other.activations;
        self.last_activations += other.last_activations;
        self.cache += other.cache;
        self.loading += other.loading;
        self.saving += other.saving;
        self.data += other.data;
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
    /// Whether it keeps the inputs of its blocks alone.
    pub checkpoint_activations: bool,
    /// The type of the weights that adapters stand beside.
    pub trunk: TrunkPrecision,
    /// A micro-batch.
    pub batch: Batch,
    /// Whether a step has several.
    pub accumulates: bool,
}

impl Trained<'_> {
    /// Weights, moments, gradients and activations, and what saving copies: the optimiser's moments, the weights, the
    /// weights to hand on, and those again where transformers has them in another order.
    pub fn needs(&self) -> Needs {
        let all = footprint::weights(self.config, self.output, self.trunk);
        // What is wrong with `[lora]` is said where the adapters are made.
        let adapters = self.lora.and_then(|lora| hf::adapters_of(self.config, lora).ok());
        let beside = adapters.as_ref().map(|adapters| footprint::adapters(self.config, self.output, adapters));
        let trained = beside.unwrap_or(all);
        let is_rearranged = !matches!(Class::of(self.config), Class::Gpt2 | Class::OpenAiGpt | Class::Kindling);
        let activations = footprint::activations(self.config, self.computation(), self.batch, self.output);
        Needs {
            weights: all + beside.unwrap_or(0.0),
            moments: 2.0 * trained,
            gradients: if self.accumulates { 2.0 * trained } else { trained },
            activations: activations.at_most,
            last_activations: activations.at_the_end,
            saving: (if is_rearranged { 5.0 } else { 4.0 }) * trained,
            ..Needs::default()
        }
    }

    /// How it is computed.
    pub fn computation(&self) -> Computation {
        Computation {
            kernels: self.kernels,
            checkpoints: self.checkpoint_activations,
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

/// Refuses a run that needs more memory than there is: first as if every item of its data were as long as the context,
/// which costs nothing to ask, and then, where that does not fit, with the `lengths` that they have.
///
/// # Errors
/// If it does not fit, or the data cannot be read.
pub fn check_run(
    batch_size: usize,
    settings: Settings,
    context: usize,
    lengths: impl FnOnce() -> anyhow::Result<Lengths>,
    needs: impl Fn(&Lengths, Settings) -> Needs,
) -> anyhow::Result<()> {
    let unknown = Lengths::unknown(context);
    if check(batch_size, settings, |settings| needs(&unknown, settings)).is_ok() {
        return Ok(());
    }
    let lengths = lengths()?;
    Ok(check(batch_size, settings, |settings| needs(&lengths, settings))?)
}

/// Refuses a run that needs more memory than there is.
///
/// `needs` says how much it needs with other settings than its own, so that the error can name some that would do.
///
/// # Errors
/// If it does not fit.
pub fn check(batch_size: usize, settings: Settings, needs: impl Fn(Settings) -> Needs) -> Result<(), TooLarge> {
    match available() {
        Some(available) => check_within(available, batch_size, settings, needs),
        None => Ok(()),
    }
}

fn check_within(
    available: f64,
    batch_size: usize,
    settings: Settings,
    needs: impl Fn(Settings) -> Needs,
) -> Result<(), TooLarge> {
    let needed = needs(settings);
    if needed.peak() <= available {
        return Ok(());
    }
    let fits = |settings: &Settings| needs(*settings).peak() <= available;
    let smaller = |checkpoint_activations: bool| {
        (1..=settings.micro_batch_size)
            .rev()
            .filter(|&micro| batch_size.is_multiple_of(micro))
            .map(|micro_batch_size| Settings { micro_batch_size, checkpoint_activations, ..settings })
            .find(fits)
    };
    let mut would_fit: Vec<Settings> = smaller(settings.checkpoint_activations).into_iter().collect();
    if !settings.checkpoint_activations {
        would_fit.extend(smaller(true));
    }
    Err(TooLarge { needed: Box::new(needed), available, settings, would_fit })
}

/// A run that needs more memory than there is.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "this run needs about {:.1} GiB of memory ({needed}), and {:.1} GiB are available\nhint: {}",
    needed.peak() / GIB, available / GIB, self.hint()
)]
pub struct TooLarge {
    needed: Box<Needs>,
    available: f64,
    settings: Settings,
    /// Settings with which it would fit.
    would_fit: Vec<Settings>,
}

impl TooLarge {
    fn hint(&self) -> String {
        let own = self.settings;
        let named = |settings: &Settings| {
            let micro = (settings.micro_batch_size != own.micro_batch_size)
                .then(|| format!("`train.micro_batch_size={}`", settings.micro_batch_size));
            let checkpoints = (settings.checkpoint_activations != own.checkpoint_activations)
                .then(|| "`train.checkpoint_activations=true`".to_owned());
            micro.into_iter().chain(checkpoints).collect::<Vec<_>>().join(" and ")
        };
        let fitting: Vec<String> = self.would_fit.iter().map(named).collect();
        let instead = if fitting.is_empty() {
            "no smaller micro-batch would fit: train adapters (`[lora]`), or use a smaller model".to_owned()
        } else {
            format!("it would fit with {}", fitting.join(", or with "))
        };
        format!("{instead}; `run.check_memory=false` tries it all the same")
    }
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

/// Refuses a model whose weights, gradients and moments alone do not fit into memory.
///
/// # Errors
/// If they do not fit.
pub fn check_model(model: &GptConfig) -> Result<(), TooLarge> {
    let settings = Settings { micro_batch_size: 1, checkpoint_activations: true, trunk: TrunkPrecision::F32 };
    check(1, settings, |Settings { checkpoint_activations, trunk, .. }| {
        let batch = Batch { rows: 1.0, seq: 1.0 };
        let trained = Trained {
            config: model,
            output: Output::Logits,
            lora: None,
            kernels: Kernels::Fused,
            checkpoint_activations,
            trunk,
            batch,
            accumulates: false,
        };
        Needs { saving: 0.0, ..trained.needs() }
    })
}

/// Bytes that this process may use: what the system says is available, or the limit set for it or for its group;
/// `None` where neither is known.
pub fn available() -> Option<f64> {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Resource, getrlimit};
        let limit = getrlimit(Resource::As).current.map_or(f64::INFINITY, |bytes| bytes as f64);
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib * 1024.0)
        };
        let free = field("MemAvailable:")? + field("SwapFree:").unwrap_or(0.0);
        Some(free.min(limit).min(group_limit().unwrap_or(f64::INFINITY)))
    }
    #[cfg(not(target_os = "linux"))]
    None
}

/// The least limit of the control groups that this process is in, of either version.
#[cfg(target_os = "linux")]
fn group_limit() -> Option<f64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let mut least: Option<f64> = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            "memory" => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => continue,
        };
        // A group has no more than any of those around it. In a container the path may be that of the outside.
        for path in std::path::Path::new(path).ancestors() {
            let file = std::path::Path::new(root).join(path.strip_prefix("/").unwrap_or(path)).join(file);
            let limit = std::fs::read_to_string(file).ok().and_then(|text| text.trim().parse::<f64>().ok());
            least = [least, limit].into_iter().flatten().reduce(f64::min);
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory that grows with the micro-batch: 1 GiB a sequence, a quarter of it with checkpoints, and 2 GiB of weights.
    fn needs(settings: Settings) -> Needs {
        let each = if settings.checkpoint_activations { 0.25 } else { 1.0 };
        Needs { weights: 2.0 * GIB, activations: each * settings.micro_batch_size as f64 * GIB, ..Needs::default() }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_settings_that_would() {
        let check = |available: f64, micro_batch_size: usize| {
            let trunk = TrunkPrecision::F32;
            let settings = Settings { micro_batch_size, checkpoint_activations: false, trunk };
            check_within(available * GIB, 12, settings, needs).map_err(|error| error.to_string())
        };
        assert_eq!(check(8.0, 4), Ok(()));
        let refused = check(8.0, 12).expect_err("needs 16");
        assert_eq!(
            refused,
            "this run needs about 16.8 GiB of memory (weights 2.0, activations 12.0), and 8.0 GiB are available\nhint: \
             it would fit with `train.micro_batch_size=4`, or with `train.checkpoint_activations=true`; \
             `run.check_memory=false` tries it all the same"
        );
        let refused = check(3.2, 12).expect_err("needs 16");
        assert!(
            refused.contains("with `train.micro_batch_size=2` and `train.checkpoint_activations=true`;"),
            "{refused}"
        );
        let refused = check(1.0, 12).expect_err("needs 16");
        assert!(refused.contains("no smaller micro-batch would fit"), "{refused}");
    }

    #[test]
    fn models_beyond_any_machine_are_refused() {
        let small = GptConfig::gpt2(1000);
        assert_eq!(check_model(&small), Ok(()));
        let wide = GptConfig { d_model: 1_000_000, ..small };
        assert!(check_model(&wide).is_err());
    }

    #[test]
    fn a_step_needs_activations_first_and_gradients_last() {
        let needs = Needs { moments: 4.0, gradients: 2.0, activations: 9.0, last_activations: 3.0, ..Needs::default() };
        assert_eq!(needs.step(), 9.0);
        assert_eq!(Needs { activations: 4.0, ..needs }.step(), 5.0);
        assert_eq!(Needs { gradients: 4.0, ..needs }.step(), 11.0);
    }
}
