//! Memory that a run needs.

use common::capacity::{self, Needs, Ranks, Settings, Trained};
use common::group::Group;
use common::kernels::Kernels;
use common::model::GptConfig;
use common::model::footprint::Batch;
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
    group: &Group,
    runtime: &Runtime,
) -> anyhow::Result<()> {
    let seq_len = config.seq_len(model)?;
    let ranks = Ranks::gathered(group, config.run.check_memory && runtime.is_on_host())?;
    let amount = config.train.amount();
    let settings = config.train.memory(runtime.trunk);
    let kernels = runtime.effective_kernels();
    let needs = |settings| needs(config, model, seq_len, kernels, settings);
    Ok(capacity::check(&ranks, amount.batch_size, settings, needs)?)
}

/// What training a model of architecture `model` on windows of `seq_len` tokens needs.
pub fn needs(
    config: &PretrainConfig,
    model: &GptConfig,
    seq_len: usize,
    kernels: Kernels,
    settings: Settings,
) -> Needs {
    let model = GptConfig { dropout: config.model.dropout.unwrap_or(model.dropout), ..model.clone() };
    let trained = Trained {
        config: &model,
        output: Output::Logits,
        lora: None,
        kernels,
        settings,
        batch: Batch { rows: settings.micro_batch_size as f64, seq: seq_len as f64 },
        n_micro_batches: config.train.batch_size / settings.micro_batch_size,
    };
    Needs { data: capacity::vocabulary(model.vocab_size), ..trained.needs() }
}
