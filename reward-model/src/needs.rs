//! Memory that a run needs.

use std::path::Path;

use common::capacity::{self, Lengths, Needs, Ranks, Settings, Trained};
use common::checkpoint::Preview;
use common::group::Group;
use common::kernels::Kernels;
use common::model::GptConfig;
use common::model::footprint::{self, Batch};
use common::model::params::Output;
use common::runtime::Runtime;
use common::score::EncodedPair;

use crate::config::RewardModelConfig;
use crate::data;

/// Refuses a run that needs more memory than there is, before the weights in `init` are read.
///
/// # Errors
/// If it does not fit.
pub(crate) fn check(
    config: &RewardModelConfig,
    init: &Path,
    base: Option<&Path>,
    group: &Group,
    runtime: &Runtime,
) -> anyhow::Result<()> {
    // What is wrong with the initial model is said where it is loaded.
    let Ok(initial) = Preview::open(init, base) else { return Ok(()) };
    let ranks = Ranks::gathered(group, config.run.check_memory && runtime.is_on_host())?;
    let amount = config.train.amount();
    let settings = config.train.memory(runtime.trunk);
    let kernels = runtime.effective_kernels();
    capacity::check_run(
        &ranks,
        amount.batch_size,
        settings,
        initial.config.max_seq_len,
        || lengths(config, &initial),
        |lengths, settings| needs(config, &initial.config, lengths, kernels, settings),
    )
}

/// The lengths of the training pairs, each that of its longer row.
///
/// # Errors
/// If they cannot be read.
pub fn lengths(config: &RewardModelConfig, initial: &Preview) -> anyhow::Result<Lengths> {
    let context = initial.config.max_seq_len;
    let Some(tokenizer) = &initial.tokenizer else { return Ok(Lengths::unknown(context)) };
    let training = data::read(&config.data.train, tokenizer, context, &config.data)?;
    Ok(Lengths::of(context, training.encoded.iter().map(EncodedPair::len).collect()))
}

/// What training a reward model of architecture `model` needs: while it trains, and, to normalise the scores, the initial
/// model again with the cache of its answers.
pub fn needs(
    config: &RewardModelConfig,
    model: &GptConfig,
    lengths: &Lengths,
    kernels: Kernels,
    settings: Settings,
) -> Needs {
    let model = GptConfig { dropout: config.model.dropout.unwrap_or(model.dropout), ..model.clone() };
    let trained = Trained {
        config: &model,
        output: Output::Score,
        lora: config.lora.as_ref(),
        kernels,
        settings,
        batch: Batch { rows: 2.0 * settings.micro_batch_size as f64, seq: lengths.longest() as f64 },
        n_micro_batches: config.train.batch_size / settings.micro_batch_size,
    };
    // With adapters the initial model is their trunk.
    let initial = if config.lora.is_some() { 0.0 } else { footprint::weights(&model, Output::Logits, settings.trunk) };
    let normalisation = &config.normalisation;
    let rows = normalisation.batch_size.min(normalisation.samples);
    let cache = footprint::cache(&model, rows, (lengths.longest() + normalisation.max_tokens).min(model.max_seq_len));
    Needs {
        loading: trained.loading(),
        initial,
        // The initial model was loaded once more to normalise the scores.
        saving: trained.needs().saving + if rows > 0 { initial } else { 0.0 },
        cache: if rows > 0 { initial + cache } else { 0.0 },
        data: capacity::vocabulary(model.vocab_size)
            + capacity::records(config.data.train.iter().chain(&config.data.val)),
        ..trained.needs()
    }
}
