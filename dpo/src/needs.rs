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

use crate::config::DpoConfig;
use crate::data;

/// Refuses a run that needs more memory than there is, before the weights in `init` are read.
///
/// # Errors
/// If it does not fit.
pub(crate) fn check(
    config: &DpoConfig,
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
pub fn lengths(config: &DpoConfig, initial: &Preview) -> anyhow::Result<Lengths> {
    let context = initial.config.max_seq_len;
    let Some(tokenizer) = &initial.tokenizer else { return Ok(Lengths::unknown(context)) };
    let training =
        data::read(&config.data.train, tokenizer, context, config.data.read_options(), config.data.on_too_long)?;
    Ok(Lengths::of(context, training.encoded.iter().map(EncodedPair::len).collect()))
}

/// What training a policy of architecture `model` needs. The reference is gone before the policy is loaded; while it
/// computes, there are its weights and the checkpoint's.
pub fn needs(config: &DpoConfig, model: &GptConfig, lengths: &Lengths, kernels: Kernels, settings: Settings) -> Needs {
    // Dropout is off.
    let model = GptConfig { dropout: 0.0, ..model.clone() };
    let batch = Batch { rows: 2.0 * settings.micro_batch_size as f64, seq: lengths.longest() as f64 };
    let trained = Trained {
        config: &model,
        output: Output::Logits,
        lora: config.lora.as_ref(),
        kernels,
        settings,
        batch,
        n_micro_batches: config.train.batch_size / settings.micro_batch_size,
    };
    let computing = footprint::inference(&model, trained.computation(), batch);
    let Needs { weights, .. } = trained.needs();
    Needs {
        loading: weights + trained.loading() + computing,
        data: capacity::vocabulary(model.vocab_size)
            + capacity::records(config.data.train.iter().chain(&config.data.val)),
        ..trained.needs()
    }
}
