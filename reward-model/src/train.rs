//! The training loop.

use std::path::PathBuf;

use anyhow::Context;
use burn::module::Module;
use burn::tensor::Tensor;
use common::checkpoint::{self, Checkpoint, Stage};
use common::data::order::Order;
use common::group::Group;
use common::hf::HostAdapter;
use common::interrupt::Interrupt;
use common::logging::grouped;
use common::metrics::{Recorder, names};
use common::model::params::Output;
use common::model::{Gpt, Layout, ScalarGpt};
use common::optim::{AdamW, GradNorm, Grads};
use common::reduce::{GradSum, in_order};
use common::rng::Streams;
use common::runtime::Runtime;
use common::score::{EncodedPair, Pairs, by_length};
use common::session::{Contents, Exported, Outcome, Plan, Restored, Session, Step, Training};
use common::stats::win;
use common::tokenizer::Tokenizer;

use crate::cli::TrainArgs;
use crate::config::{BestBy, RewardModelConfig};
use crate::data::{self, Batch};
use crate::eval;
use crate::loss::{centring_penalty, pairwise_loss};
use crate::needs;
use crate::normalisation::{Normalisation, score_samples};

/// Trains a reward model on preference pairs.
///
/// The scores are normalised when training has come to its end: an interrupted run leaves scores as trained, until
/// `--resume` has finished it.
///
/// # Errors
/// If configuration, data, the initial model or the output directory cannot be used, a loss is not finite, or the scores
/// cannot be normalised.
pub fn train(args: &TrainArgs, group: &Group, interrupt: Interrupt) -> anyhow::Result<Outcome> {
    let config = RewardModelConfig::load(&args.stage)?;
    config.train.amount().check_ranks(group.size(), "")?;
    args.stage.runtime.check_trunk(config.lora.as_ref())?;
    let plain = args.stage.runtime.open()?;
    let runtime = plain.training(config.train.checkpoint_activations);
    let runtime = runtime.sharing(group, config.train.shard_optimizer);
    needs::check(&config, &args.init, args.stage.runtime.base(), group, &runtime)?;
    let streams = Streams::new(config.seed);
    let mut init = checkpoint::init_from(&args.init, args.stage.runtime.opening())
        .and_then(|init| init.of_stage(&[Stage::Sft, Stage::Pretrain, Stage::Dpo]))
        .context("failed to load the initial model")?
        .with_dropout(config.model.dropout);
    init.check_lora(config.lora.as_ref())?;
    let tokenizer = init.require_tokenizer()?;
    let max_seq_len = init.model_config().max_seq_len;
    let read = |files: &[PathBuf]| data::read(files, tokenizer, max_seq_len, &config.data);
    let training = read(&config.data.train).context("failed to read the training pairs")?;
    let held_out = read(&config.data.val).context("failed to read the held-out pairs")?;
    let total_steps = config.train.amount().n_steps(training.records.len());
    let plan = Plan {
        stage: Stage::RewardModel,
        parents: &[("--init", &init)],
        data: config.data.sources(),
        tokenizer,
        tokenizer_dir: None,
        config: &config,
        run: &config.run,
        runtime: &runtime,
        total_steps,
        group,
    };
    let (session, restored) = Session::start(&args.stage, &plan, interrupt)?;
    let (model, optimizer, initial) = begin(&config, &mut init, restored, &plain, &runtime)?;
    tracing::info!(
        "{}, {} training pairs, {} held out",
        Exported::Scalar(&model).parameters(),
        grouped(training.encoded.len()),
        grouped(held_out.encoded.len())
    );
    if config.lora.is_some() {
        say_pad_of_base(&init);
    }
    session.drive(RewardTraining {
        group: group.clone(),
        order: Order::new(training.records.len(), streams, "order"),
        total_steps,
        model,
        optimizer,
        normalised: None,
        training: &training,
        held_out: &held_out,
        config: &config,
        init: &init,
        initial,
        plain: &plain,
        streams,
    })
}

/// Says how PEFT has to be told the padding id, where the base that it goes by has another.
fn say_pad_of_base(init: &Checkpoint) {
    let own = init.tokenizer().and_then(Tokenizer::pad);
    if let Some(pad) = own.filter(|&pad| init.pad_of_base().is_some_and(|of_base| of_base != pad)) {
        tracing::info!(
            "the base pads with another id: in PEFT set `model.config.pad_token_id = {pad}`, or scores are read before the \
             answer's end (docs/lora.md)"
        );
    }
}

/// The model and optimiser to begin or to go on with, and with adapters also the initial model, on the same trunk.
fn begin(
    config: &RewardModelConfig,
    init: &mut Checkpoint,
    mut restored: Option<Restored>,
    plain: &Runtime,
    runtime: &Runtime,
) -> anyhow::Result<(ScalarGpt, AdamW, Option<Gpt>)> {
    let streams = Streams::new(config.seed);
    let (model, initial) = if let Some(lora) = &config.lora {
        let HostAdapter { adapters, tensors, head } = init.adapter_to_train(lora, Output::Score, &streams)?;
        let trunk = runtime.trunk(init)?;
        let initial = plain.on_trunk(&trunk, init)?;
        let model = match &mut restored {
            Some(restored) => restored.adapted_scalar(trunk, runtime)?,
            None => ScalarGpt::with_adapters(trunk, &adapters, tensors, head.bias(), &runtime.device)?,
        };
        (model, Some(initial))
    } else {
        let model = match &mut restored {
            Some(restored) => restored.scalar(runtime)?,
            None => ScalarGpt::new(runtime.gpt(init)?, &streams),
        };
        (model, None)
    };
    let optimizer = match &mut restored {
        Some(restored) => restored.optimizer("optimizer", &config.optimizer, runtime)?,
        None => runtime.optimizer(&config.optimizer),
    };
    Ok((model, optimizer, initial))
}

/// A reward model that is being trained.
struct RewardTraining<'a> {
    group: Group,
    model: ScalarGpt,
    optimizer: AdamW,
    /// The model to hand on, once its scores are normalised.
    normalised: Option<ScalarGpt>,
    training: &'a Pairs,
    held_out: &'a Pairs,
    config: &'a RewardModelConfig,
    init: &'a Checkpoint,
    /// The model of `init`, where it stands on the trunk of the reward model.
    initial: Option<Gpt>,
    /// The device without autodiff.
    plain: &'a Runtime,
    order: Order,
    streams: Streams,
    total_steps: u64,
}

impl Training for RewardTraining<'_> {
    fn step(mut self, step: u64, _recorder: &Recorder) -> anyhow::Result<(Self, Step)> {
        let (batch_size, micro) = (self.config.train.batch_size, self.config.train.amount().micro());
        let device = self.model.device();
        let first = step * batch_size as u64;
        let chosen = self.training.of_step(&mut self.order, step, batch_size);
        let chosen: Vec<&EncodedPair> = chosen.into_iter().map(|i| &self.training.encoded[i]).collect();
        let n_in_batch = chosen.len();
        let mut grads = GradSum::new(&self.group, self.config.train.reduce);
        let mut micro_batches = Vec::new();
        let parts = by_length(chosen.iter().map(|pair| pair.len()), micro);
        let mut n_tokens = 0;
        for i in self.group.share().of(parts.len()) {
            let part = &parts[i];
            let batch = Batch::new(&part.iter().map(|&i| chosen[i]).collect::<Vec<_>>());
            let mut dropout = self.streams.get("dropout", first + (i * micro) as u64);
            let (inputs, last) = (batch.inputs(&device), batch.last(&device));
            let scores = self.model.forward_at(inputs, &Layout::right_padded(), last, Some(&mut dropout)); // [2·n_pairs]
            let n_pairs = part.len();
            let (chosen, rejected) = (scores.clone().narrow(0, 0, n_pairs), scores.narrow(0, n_pairs, n_pairs));
            let pairwise = pairwise_loss(chosen.clone(), rejected.clone(), batch.margins(&device));
            // Each part's mean by its share of the pairs, so that micro-batches add up to the batch's mean.
            let share = n_pairs as f64 / n_in_batch as f64;
            micro_batches.push(MicroBatch {
                loss: pairwise.clone().inner() * share,
                distances: (chosen.clone() - rejected.clone()).inner(),
            });
            let mut loss = pairwise;
            if self.config.train.centring_coef > 0.0 {
                loss = loss + centring_penalty(chosen, rejected) * self.config.train.centring_coef;
            }
            grads.add(Grads::take(&self.model, self.optimizer.scaled(loss * share).backward()));
            n_tokens += batch.n_tokens();
        }
        let lr = self.config.optimizer.lr_at(step, self.total_steps);
        let grad_norm;
        (self.model, grad_norm) = grads.descend(&mut self.optimizer, self.model, lr)?;
        let (norm, group) = (grad_norm.clone(), self.group.clone());
        let metrics = Box::new(move || metrics(&group, micro_batches, n_in_batch, lr, &norm));
        let n_tokens: usize = self.group.gather(n_tokens)?.iter().sum();
        Ok((self, Step { tokens: n_tokens as u64, grad_norm, metrics }))
    }

    fn evaluate(&self, session: &mut Session) -> anyhow::Result<()> {
        let train = &self.config.train;
        let all = self.held_out.encoded.len();
        let n = if session.is_last() || train.eval_pairs == 0 { all } else { train.eval_pairs };
        let measured =
            eval::evaluate_pairs(&self.group, &self.model.valid(), self.held_out, n, 2 * train.amount().micro())?;
        session.log(&[
            (names::VAL_LOSS, measured.loss),
            (names::VAL_ACCURACY, measured.accuracy),
            (names::VAL_MARGIN, measured.margin_mean),
            (names::VAL_LONGER_WINS_ACCURACY, measured.longer_wins_accuracy),
        ])?;
        let value = match train.best_by {
            BestBy::Loss => measured.loss,
            BestBy::Accuracy => -measured.accuracy,
        };
        session.note_evaluation(value, Exported::Scalar(&self.model));
        Ok(())
    }

    fn contents(&self) -> Contents<'_> {
        Contents {
            exported: self.normalised.as_ref().map(Exported::Scalar),
            ..Contents::new(Exported::Scalar(&self.model), &self.optimizer)
        }
    }

    fn is_incomplete(&self) -> bool {
        self.config.normalisation.samples > 0
    }

    /// Normalises the scores of the model to hand on.
    fn complete(&mut self, session: &Session) -> anyhow::Result<Outcome> {
        let best = match session.best_weights() {
            Some(best) => self.model.valid().with_trained(best.clone())?,
            None => self.model.valid(),
        };
        let initial = match &self.initial {
            Some(initial) => initial.clone(),
            None => self.plain.gpt(self.init)?,
        };
        let tokenizer = session.tokenizer();
        let n = self.config.normalisation.samples;
        tracing::info!("normalisation: the initial model answers {n} prompts, whose scores are to become 0 ± 1");
        let scores = score_samples(
            &self.config.normalisation,
            &initial,
            &best,
            self.training,
            tokenizer,
            self.streams,
            session.interrupt(),
        );
        if session.is_asked_to_stop()? {
            tracing::info!("stopped before the scores were normalised, which `--resume` does");
            return Ok(Outcome::Interrupted);
        }
        let scores = scores?;
        let fitted = Normalisation::fit(&scores)?;
        tracing::info!(
            "the initial model's answers score {:.3} ± {:.3}; scores are scaled so that they become 0 ± 1",
            fitted.mean,
            fitted.deviation
        );
        self.normalised = Some(fitted.apply(best));
        Ok(Outcome::Finished)
    }
}

/// The metrics of a micro-batch, off the graph.
struct MicroBatch {
    /// Its share of the batch's mean pairwise loss, `[1]`; without the centring penalty, as in `val/loss`.
    loss: Tensor<1>,
    /// Scores of the chosen less those of the rejected answers, `[n_pairs]`.
    distances: Tensor<1>,
}

/// The line of metrics of a step.
fn metrics(
    group: &Group,
    micro_batches: Vec<MicroBatch>,
    n_pairs: usize,
    lr: f64,
    grad_norm: &GradNorm,
) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let (losses, distances): (Vec<_>, Vec<_>) =
        micro_batches.into_iter().map(|micro| (micro.loss, micro.distances)).unzip();
    let (losses, distances) = (in_order(group, losses)?, in_order(group, distances)?);
    let loss = Tensor::cat(losses, 0).sum().into_scalar::<f32>();
    let distances = Tensor::cat(distances, 0).try_into_vec_as::<f32>().context("failed to read the scores")?;
    let mean = |value: &dyn Fn(f64) -> f64| {
        distances.iter().map(|&distance| value(f64::from(distance))).sum::<f64>() / n_pairs as f64
    };
    Ok(vec![
        (names::TRAIN_LOSS, f64::from(loss)),
        (names::TRAIN_ACCURACY, mean(&|distance| win(distance, 0.0))),
        (names::TRAIN_MARGIN, mean(&|distance| distance)),
        (names::TRAIN_LR, lr),
        (names::TRAIN_GRAD_NORM, grad_norm.value()),
    ])
}
