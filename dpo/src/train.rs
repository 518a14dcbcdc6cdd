//! The start of a run, and one step of it.

use std::path::PathBuf;

use anyhow::Context;
use burn::module::Module;
use burn::tensor::Tensor;
use common::checkpoint::{self, Stage};
use common::data::order::Order;
use common::group::Group;
use common::interrupt::Interrupt;
use common::logging::grouped;
use common::metrics::{Recorder, names};
use common::model::Gpt;
use common::optim::{AdamW, GradNorm, Grads};
use common::pace::Pace;
use common::reduce::{GradSum, in_order};
use common::rng::Streams;
use common::score::{Pairs, by_length};
use common::session::{Contents, Exported, Outcome, Plan, Session, Step, Training, gpt_and_optimizer};
use common::stats::win;

use crate::cli::TrainArgs;
use crate::config::DpoConfig;
use crate::data::{self, Batch, PairLogProbs};
use crate::eval::{Evaluation, losses};
use crate::needs;
use crate::reference::{Reference, pair_log_probs};

/// Trains a policy on preference pairs.
///
/// # Errors
/// If configuration, data, the initial model or the output directory cannot be used, or a loss is not finite.
pub fn train(args: &TrainArgs, group: &Group, interrupt: Interrupt) -> anyhow::Result<Outcome> {
    let config = DpoConfig::load(&args.stage)?;
    config.train.amount().check_ranks(group.size(), "")?;
    args.stage.runtime.check_trunk(config.lora.as_ref())?;
    let plain = args.stage.runtime.open()?;
    let runtime = plain.training(config.train.checkpoint_activations);
    let runtime = runtime.sharing(group, config.train.shard_optimizer);
    needs::check(&config, &args.init, args.stage.runtime.base(), group, &runtime)?;
    let streams = Streams::new(config.seed);
    let mut init = checkpoint::init_from(&args.init, args.stage.runtime.opening())
        .and_then(|init| init.of_stage(&[Stage::Sft, Stage::Dpo]))
        .context("failed to load the initial policy")?;
    init.check_lora(config.lora.as_ref())?;
    let tokenizer = init.require_tokenizer()?;
    let max_seq_len = init.model_config().max_seq_len;
    let read = |files: &[PathBuf]| {
        data::read(files, tokenizer, max_seq_len, config.data.read_options(), config.data.on_too_long)
    };
    let training = read(&config.data.train).context("failed to read the training pairs")?;
    let held_out = read(&config.data.val).context("failed to read the held-out pairs")?;
    let total_steps = config.train.amount().n_steps(training.records.len());
    let plan = Plan {
        stage: Stage::Dpo,
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
    let batch_size = 2 * config.train.amount().micro();
    let pairs = [&training, &held_out];
    let reference = Reference::read_or_compute(group, &args.stage.out, &init, pairs, batch_size, interrupt, || {
        Ok(plain.gpt(&init)?)
    })?;
    // Without it the run is saved before its first step, which asks for it.
    let reference = reference.unwrap_or_default();
    let (policy, optimizer) =
        gpt_and_optimizer(restored, &mut init, config.lora.as_ref(), &config.optimizer, &runtime, &streams)?;
    drop(init);
    tracing::info!(
        "{}, {} training pairs, {} held out",
        Exported::Lm(&policy).parameters(),
        grouped(training.encoded.len()),
        grouped(held_out.encoded.len())
    );
    session.drive(Dpo {
        group: group.clone(),
        order: Order::new(training.records.len(), streams, "order"),
        total_steps,
        policy,
        optimizer,
        training: &training,
        held_out: &held_out,
        reference: &reference,
        config: &config,
    })
}

/// A policy that is being trained.
struct Dpo<'a> {
    group: Group,
    policy: Gpt,
    optimizer: AdamW,
    training: &'a Pairs,
    held_out: &'a Pairs,
    reference: &'a Reference,
    config: &'a DpoConfig,
    order: Order,
    total_steps: u64,
}

impl Training for Dpo<'_> {
    fn step(mut self, step: u64, _recorder: &Recorder) -> anyhow::Result<(Self, Step)> {
        let micro = self.config.train.amount().micro();
        let device = self.policy.device();
        let chosen = self.training.of_step(&mut self.order, step, self.config.train.batch_size);
        let mut grads = GradSum::new(&self.group, self.config.train.reduce);
        let mut micro_batches = Vec::new();
        let mut n_tokens = 0;
        let pair = |i: usize| (&self.training.encoded[i], self.reference.train[i]);
        let parts = by_length(chosen.iter().map(|&i| self.training.encoded[i].len()), micro);
        for part in &parts[self.group.share().of(parts.len())] {
            let batch = Batch::new(&part.iter().map(|&i| pair(chosen[i])).collect::<Vec<_>>());
            let log_probs = batch.log_probs(&self.policy); // [2·n_pairs]
            let log_ratios = log_probs.clone() - batch.reference(&device);
            // The whole batch's number of pairs, so that micro-batches add up to its mean.
            let loss = losses(log_ratios.clone(), &batch.n_tokens, &self.config.dpo).sum() / chosen.len() as f64;
            micro_batches.push(MicroBatch {
                loss: loss.clone().inner(),
                log_probs: log_probs.inner(),
                log_ratios: log_ratios.inner(),
            });
            grads.add(Grads::take(&self.policy, self.optimizer.scaled(loss).backward()));
            n_tokens += batch.n_tokens.iter().sum::<usize>();
        }
        let lr = self.config.optimizer.lr_at(step, self.total_steps);
        let grad_norm;
        (self.policy, grad_norm) = grads.descend(&mut self.optimizer, self.policy, lr)?;
        let (group, norm, beta) = (self.group.clone(), grad_norm.clone(), self.config.dpo.beta);
        let metrics = Box::new(move || metrics(&group, micro_batches, beta, lr, &norm));
        let n_tokens: usize = self.group.gather(n_tokens)?.iter().sum();
        Ok((self, Step { tokens: n_tokens as u64, grad_norm, metrics }))
    }

    fn evaluate(&self, session: &mut Session) -> anyhow::Result<()> {
        let train = &self.config.train;
        let all = self.held_out.encoded.len();
        let n = if session.is_last() || train.eval_pairs == 0 { all } else { train.eval_pairs.min(all) };
        let pairs = &self.held_out.encoded[..n];
        let plain = self.policy.valid();
        let n_answers = self.group.share().of(2 * n).len();
        let pace = Pace::new("evaluation", n_answers, "answers", Interrupt::never());
        let of_policy = pair_log_probs(&self.group, &plain, pairs, 2 * train.amount().micro(), &|n| pace.done(n))?;
        let of_reference = &self.reference.val[..n];
        let measured = Evaluation::of(&of_policy, of_reference, pairs, &self.config.dpo, &plain.device())?;
        session.log(&[
            (names::VAL_LOSS, measured.loss),
            (names::VAL_ACCURACY, measured.accuracy),
            (names::VAL_MARGIN, measured.margin_mean),
        ])?;
        session.note_evaluation(measured.loss, Exported::Lm(&self.policy));
        Ok(())
    }

    fn contents(&self) -> Contents<'_> {
        Contents::new(Exported::Lm(&self.policy), &self.optimizer)
    }
}

/// The metrics of a micro-batch, off the graph.
struct MicroBatch {
    /// Its share of the batch's mean loss, `[1]`.
    loss: Tensor<1>,
    /// Log-probabilities of the answers, chosen then rejected, `[2 · n_pairs]`.
    log_probs: Tensor<1>,
    /// The same less those of the reference.
    log_ratios: Tensor<1>,
}

/// The line of metrics of a step.
fn metrics(
    group: &Group,
    micro_batches: Vec<MicroBatch>,
    beta: f64,
    lr: f64,
    grad_norm: &GradNorm,
) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let host = |tensor: Tensor<1>| tensor.try_into_vec_as::<f32>().context("failed to read the log-probabilities");
    let (mut losses, mut of_answers, mut log_ratios) = (Vec::new(), Vec::new(), Vec::new());
    for micro in micro_batches {
        losses.push(micro.loss);
        of_answers.push(micro.log_probs);
        log_ratios.push(micro.log_ratios);
    }
    let (mut log_probs, mut rewards) = (Vec::<PairLogProbs>::new(), Vec::<[f64; 2]>::new());
    for (of_answers, log_ratios) in in_order(group, of_answers)?.into_iter().zip(in_order(group, log_ratios)?) {
        log_probs.extend(of_pairs(&host(of_answers)?));
        rewards.extend(of_pairs(&host(log_ratios)?).map(|ratios| ratios.map(|ratio| beta * f64::from(ratio))));
    }
    let loss = Tensor::cat(in_order(group, losses)?, 0).sum().into_scalar::<f32>();
    let n = rewards.len() as f64;
    let mean_reward = |of: &dyn Fn(&[f64; 2]) -> f64| rewards.iter().map(of).sum::<f64>() / n;
    let mean_log_prob = |side: usize| log_probs.iter().map(|pair| f64::from(pair[side])).sum::<f64>() / n;
    Ok(vec![
        (names::TRAIN_LOSS, f64::from(loss)),
        (names::REWARDS_CHOSEN, mean_reward(&|[chosen, _]| *chosen)),
        (names::REWARDS_REJECTED, mean_reward(&|[_, rejected]| *rejected)),
        (names::REWARDS_ACCURACIES, mean_reward(&|[chosen, rejected]| win(*chosen, *rejected))),
        (names::REWARDS_MARGINS, mean_reward(&|[chosen, rejected]| chosen - rejected)),
        (names::LOGPS_CHOSEN, mean_log_prob(0)),
        (names::LOGPS_REJECTED, mean_log_prob(1)),
        (names::TRAIN_LR, lr),
        (names::TRAIN_GRAD_NORM, grad_norm.value()),
    ])
}

/// Numbers of chosen answers, then rejected ones, pair by pair.
fn of_pairs(of_answers: &[f32]) -> impl Iterator<Item = PairLogProbs> {
    let (chosen, rejected) = of_answers.split_at(of_answers.len() / 2);
    chosen.iter().zip(rejected).map(|(&chosen, &rejected)| [chosen, rejected])
}
