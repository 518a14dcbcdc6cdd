//! Memory that a run needs.

use common::capacity::{self, Needs, Settings, Trained};
use common::kernels::Kernels;
use common::model::GptConfig;
use common::model::footprint::{self, Batch};
use common::model::params::Output;
use common::runtime::Runtime;

use crate::config::PretrainConfig;

/// Refuses a run that needs more memory than there is, before a weight is read or drawn.
///
/// # Errors
/// If it does not fit, or a window is longer than the context.
pub(crate) fn check(
    config: &PretrainConfig,
    model: &GptConfig,
    has_init: bool,
    runtime: &Runtime,
) -> anyhow::Result<()> {
    let seq_len = config.seq_len(model)?;
    if !config.run.check_memory || !runtime.is_on_host() {
        return Ok(());
    }
    let amount = config.train.amount();
    let settings = amount.memory(config.train.checkpoint_activations, runtime.trunk);
    let kernels = runtime.effective_kernels();
    let needs = |settings| needs(config, model, seq_len, has_init, kernels, settings);
    Ok(capacity::check(amount.batch_size, settings, needs)?)
}

/// What training a model of architecture `model` on windows of `seq_len` tokens needs; `has_init` if its first weights come
/// from a checkpoint.
pub fn needs(
    config: &PretrainConfig,
    model: &GptConfig,
    seq_len: usize,
    has_init: bool,
    kernels: Kernels,
    settings: Settings,
) -> Needs {
    let model = GptConfig { dropout: config.model.dropout.unwrap_or(model.dropout), ..model.clone() };
    let trained = Trained {
        config: &model,
        output: Output::Logits,
        lora: None,
        kernels,
        checkpoint_activations: settings.checkpoint_activations,
        trunk: settings.trunk,
        batch: Batch { rows: settings.micro_batch_size as f64, seq: seq_len as f64 },
        accumulates: settings.micro_batch_size < config.train.batch_size,
    };
    Needs {
        initial: if has_init { footprint::weights(&model, Output::Logits, settings.trunk) } else { 0.0 },
        data: capacity::vocabulary(model.vocab_size),
        ..trained.needs()
    }
}
