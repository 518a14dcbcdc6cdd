//! Held-out loss and accuracy on trained tokens.

use anyhow::{Context, ensure};
use burn::tensor::{Int, Tensor};
use common::checkpoint::{Checkpoint, Stage};
use common::cli::print_json;
use common::conversation::EncodedConversation;
use common::group::Group;
use common::logging::Progress;
use common::loss;
use common::model::Gpt;
use common::session::DataConfig;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cli::EvalArgs;
use crate::data::{Batch, Conversations};

/// Logits computed at a time: 64 MiB of them.
const MAX_LOGITS: usize = 1 << 24;

/// Held-out loss and accuracy on the assistant's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Evaluation {
    /// Sum of `−log p(token)` in nats.
    pub nats: f64,
    /// How many tokens the model itself would have chosen.
    pub correct: usize,
    /// How many tokens were predicted.
    pub tokens: usize,
}

impl Evaluation {
    /// Mean over trained tokens, in nats.
    pub fn loss(&self) -> f64 {
        self.nats / self.tokens as f64
    }

    /// Fraction of trained tokens that are the most probable one.
    pub fn token_accuracy(&self) -> f64 {
        self.correct as f64 / self.tokens as f64
    }
}

/// Carries out `sft eval`: one JSON object on stdout.
pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<()> {
    args.runtime.check_base([&*args.checkpoint])?;
    let mut checkpoint =
        Checkpoint::open_with(&args.checkpoint, args.runtime.opening())?.of_stage(&Stage::LANGUAGE_MODELS)?;
    let gpt = args.runtime.open()?.take_gpt(&mut checkpoint)?;
    let tokenizer = checkpoint.require_tokenizer()?;
    let max_seq_len = gpt.config().max_seq_len;
    let files = std::slice::from_ref(&args.data);
    let conversations = Conversations::read(files, tokenizer, max_seq_len, &DataConfig::default())?;
    let all = evaluate(&Group::alone(), &gpt, &conversations, conversations.encoded.len(), args.batch_size.get())?;
    let result = json!({ "loss": all.loss(), "token_accuracy": all.token_accuracy(), "tokens": all.tokens });
    print_json(&result)
}

/// How many targets are the most probable token, from the logits of `n_at_a_time` positions at a time.
///
/// # Shapes
/// - `hidden`: `[n_targets, d_model]`
/// - `targets`: `[n_targets]`
fn n_correct(gpt: &Gpt, hidden: &Tensor<2>, targets: &Tensor<1, Int>, n_at_a_time: usize) -> usize {
    let n = hidden.dims()[0];
    let mut correct = 0;
    for first in (0..n).step_by(n_at_a_time) {
        let len = n_at_a_time.min(n - first);
        // [1, len, vocab_size]
        let logits = gpt.logits(hidden.clone().narrow(0, first, len).unsqueeze_dim(0));
        let chosen = logits.argmax(2).reshape([len]);
        correct += chosen.equal(targets.clone().narrow(0, first, len)).int().sum().into_scalar::<i64>() as usize;
    }
    correct
}

/// Loss and accuracy on the first `n` conversations.
pub(crate) fn evaluate(
    group: &Group,
    gpt: &Gpt,
    conversations: &Conversations,
    n: usize,
    batch_size: usize,
) -> anyhow::Result<Evaluation> {
    let chosen = &conversations.encoded[..n.min(conversations.encoded.len())];
    let batches: Vec<Vec<&EncodedConversation>> = chosen.chunks(batch_size).map(|some| some.iter().collect()).collect();
    let mut all = Evaluation::default();
    let mut progress = Progress::new("evaluation", group.share().of(chosen.len()).len(), "conversations");
    let of_batches = group.map_shared(batches.len(), |i| {
        let of_batch = evaluate_batch(gpt, &batches[i]);
        progress.add(batches[i].len());
        of_batch
    })?;
    for of_batch in of_batches {
        all.nats += of_batch.nats;
        all.correct += of_batch.correct;
        all.tokens += of_batch.tokens;
    }
    ensure!(all.nats.is_finite(), "the held-out loss is {}", all.nats);
    Ok(all)
}

fn evaluate_batch(gpt: &Gpt, conversations: &[&EncodedConversation]) -> anyhow::Result<Evaluation> {
    let device = gpt.device();
    let batch = Batch::new(conversations, gpt.config().max_seq_len);
    let hidden = gpt.hidden(batch.inputs(&device), &batch.layout());
    let (positions, targets) = batch.targets(&device);
    let [rows, seq, d_model] = hidden.dims();
    // [n_targets, d_model]
    let hidden = hidden.reshape([rows * seq, d_model]).select(0, positions);
    let correct = n_correct(gpt, &hidden, &targets, (MAX_LOGITS / gpt.config().vocab_size).max(1));
    let log_probs = loss::token_log_probs(gpt, hidden, targets, 1.0);
    let log_probs = log_probs.try_into_vec_as::<f32>().context("failed to read the loss from the device")?;
    let nats = -log_probs.iter().map(|&p| f64::from(p)).sum::<f64>();
    Ok(Evaluation { nats, correct, tokens: batch.n_targets() })
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};
    use common::model::Layout;
    use common::rng::Streams;
    use common::testing::tiny_config;

    use super::*;

    #[test]
    fn the_number_of_logits_at_a_time_changes_no_count() {
        let device = Device::flex();
        let gpt = Gpt::new(&tiny_config(20), &Streams::new(3), &device);
        let ids = Tensor::<2, Int>::from_data(TensorData::new((0..40).map(|i| i % 20).collect(), [1, 40]), &device);
        let hidden = gpt.hidden(ids.clone(), &Layout::right_padded()).reshape([40, 16]);
        let chosen = gpt.logits(hidden.clone().unsqueeze_dim(0)).argmax(2).reshape([40]);
        // Half of the targets are what the model would choose.
        let targets = Tensor::cat(vec![chosen.narrow(0, 0, 20), Tensor::<1, Int>::full([20], 19, &device)], 0);
        let of = |n_at_a_time| n_correct(&gpt, &hidden, &targets, n_at_a_time);
        assert!(of(40) >= 20);
        assert_eq!([1, 7, 39, 1000].map(of), [of(40); 4]);
    }
}
