//! Memory that a run needs.

use std::path::Path;

use common::capacity::{self, Lengths, Needs, Ranks, Settings, Trained};
use common::checkpoint::Preview;
use common::group::Group;
use common::kernels::Kernels;
use common::model::GptConfig;
use common::model::params::Output;
use common::runtime::Runtime;

use crate::config::SftConfig;
use crate::data::Conversations;

/// Refuses a run that needs more memory than there is, before the weights in `init` are read.
///
/// # Errors
/// If it does not fit.
pub(crate) fn check(
    config: &SftConfig,
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

/// The lengths of the training conversations.
///
/// # Errors
/// If they cannot be read.
pub fn lengths(config: &SftConfig, initial: &Preview) -> anyhow::Result<Lengths> {
    let context = initial.config.max_seq_len;
    let Some(tokenizer) = &initial.tokenizer else { return Ok(Lengths::unknown(context)) };
    let training = Conversations::read(&config.data.train, tokenizer, context, &config.data)?;
    Ok(Lengths::of(context, training.encoded.iter().map(|conversation| conversation.ids.len()).collect()))
}

/// What fine-tuning a model of architecture `model` needs.
pub fn needs(config: &SftConfig, model: &GptConfig, lengths: &Lengths, kernels: Kernels, settings: Settings) -> Needs {
    let model = GptConfig { dropout: config.model.dropout.unwrap_or(model.dropout), ..model.clone() };
    let trained = Trained {
        config: &model,
        output: Output::Logits,
        lora: config.lora.as_ref(),
        kernels,
        settings,
        batch: lengths.packed(settings.micro_batch_size),
        n_micro_batches: config.train.batch_size / settings.micro_batch_size,
    };
    Needs {
        loading: trained.loading(),
        data: capacity::vocabulary(model.vocab_size)
            + capacity::records(config.data.train.iter().chain(&config.data.val)),
        ..trained.needs()
    }
}
