//! The training loop.

use std::collections::BTreeMap;

use anyhow::Context;
use burn::module::Module;
use burn::tensor::Tensor;
use common::checkpoint::{self, Stage};
use common::config;
use common::data::order::Order;
use common::interrupt::Interrupt;
use common::metrics::names;
use common::model::{Layout, ScalarGpt};
use common::optim::Grads;
use common::rng::Streams;
use common::scoring::by_length;
use common::session::{Exported, Extras, Origin, Outcome, Session};

use crate::cli::TrainArgs;
use crate::config::{BestBy, RewardModelConfig};
use crate::data::{Batch, EncodedPair, Pairs, win};
use crate::eval;
use crate::loss::{centring_penalty, pairwise_loss};
use crate::normalisation::{Normalisation, score_samples};

/// Trains a reward model on preference pairs.
///
/// The scores are normalised when training has come to its end: what an interrupted run leaves scores as trained, until
/// `--resume` has finished it.
///
/// # Errors
/// Whatever stands in the way: configuration, data, the initial model, the output directory, a loss that is not finite.
pub fn train(args: &TrainArgs, interrupt: Interrupt) -> anyhow::Result<Outcome> {
    let config = load_config(args)?;
    let plain = args.stage.runtime.open()?;
    let runtime = plain.autodiff();
    let device = runtime.device.clone();
    let streams = Streams::new(config.seed);
    let init = checkpoint::init_from(&args.init).context("failed to load the initial model")?;
    init.expect_stage(&[Stage::Sft, Stage::Pretrain]).context("failed to load the initial model")?;
    let tokenizer = init.require_tokenizer()?.clone();
    let seq_len = init.model_config().max_seq_len;
    let read = |files: &[std::path::PathBuf]| {
        Pairs::read(files, &tokenizer, seq_len, config.data.on_bad_record, config.data.on_too_long)
    };
    let training = read(&config.data.train).context("failed to read the training pairs")?;
    let held_out = read(&config.data.val).context("failed to read the held-out pairs")?;
    let n_steps = config.n_steps(training.encoded.len());
    let data: BTreeMap<String, String> = training.sha256.clone().into_iter().chain(held_out.sha256.clone()).collect();
    let origin = Origin {
        stage: Stage::RewardModel,
        parents: vec![init.as_parent()],
        data,
        tokenizer: tokenizer.clone(),
        config_toml: config::to_toml(&config)?,
        backend: runtime.label.clone(),
    };
    let (mut session, restored) = Session::start(&args.stage, origin, &config.run, n_steps, interrupt)?;
    if session.progress().finished {
        // Its exported scores are normalised already; to do it again would only move their last bits.
        tracing::info!("`{}` is finished: nothing is left to do", args.stage.out.display());
        return Ok(Outcome::Finished);
    }
    let (mut model, mut optimizer) = match restored {
        Some(mut restored) => {
            let weights = restored.tensors("weights")?;
            let model = runtime.scalar_of(restored.checkpoint.model_config(), weights)?;
            (model, restored.optimizer("optimizer", &config.optimizer, &runtime)?)
        }
        None => (ScalarGpt::new(runtime.gpt(&init)?, &streams), runtime.optimizer(&config.optimizer)),
    };
    tracing::info!(
        "{} parameters, {} training pairs, {} held-out ones",
        model.num_params(),
        training.encoded.len(),
        held_out.encoded.len()
    );

    let mut order = Order::new(training.encoded.len(), streams, "order");
    let batch_size = config.train.batch_size;
    let micro = config.train.micro_batch_size.unwrap_or(batch_size);
    while session.goes_on() {
        let step = session.progress().step;
        let first = step * batch_size as u64;
        let chosen: Vec<&EncodedPair> =
            (first..first + batch_size as u64).map(|position| &training.encoded[order.item(position)]).collect();
        let mut grads = Grads::default();
        let (mut losses, mut distances) = (Vec::new(), Vec::new());
        let mut n_tokens = 0;
        for (i, part) in by_length(chosen.iter().map(|pair| pair.len()), micro).iter().enumerate() {
            let batch = Batch::new(&part.iter().map(|&i| chosen[i]).collect::<Vec<_>>());
            let mut dropout = streams.get("dropout", first + (i * micro) as u64);
            let (inputs, last) = (batch.inputs(&device), batch.last(&device));
            let scores = model.forward_at(inputs, &Layout::right_padded(), last, Some(&mut dropout)); // [2·n_pairs]
            let n_pairs = part.len();
            let (chosen, rejected) = (scores.clone().narrow(0, 0, n_pairs), scores.narrow(0, n_pairs, n_pairs));
            let mut loss = pairwise_loss(chosen.clone(), rejected.clone(), batch.margins(&device));
            distances.push((chosen.clone() - rejected.clone()).inner());
            if config.train.centring_coef > 0.0 {
                loss = loss + centring_penalty(chosen, rejected) * config.train.centring_coef;
            }
            // Each part's mean by its share of the pairs, so that micro-batches add up to the batch's mean.
            let loss = loss * (n_pairs as f64 / batch_size as f64);
            losses.push(loss.clone().inner());
            grads = grads.plus(Grads::take(&model, optimizer.scaled(loss).backward()));
            n_tokens += batch.n_tokens();
        }
        let lr = config.optimizer.lr_at(step, n_steps);
        let grad_norm;
        (model, grad_norm) = optimizer.step(model, grads, lr);
        session.count_step(n_tokens as u64, grad_norm.clone())?;

        if session.logs() {
            let loss = Tensor::cat(losses, 0).sum().into_scalar::<f32>();
            let distances = Tensor::cat(distances, 0).try_into_vec_as::<f32>().context("failed to read the scores")?;
            let mean = |value: &dyn Fn(f64) -> f64| {
                distances.iter().map(|&distance| value(f64::from(distance))).sum::<f64>() / batch_size as f64
            };
            session.log(&[
                (names::TRAIN_LOSS, f64::from(loss)),
                (names::TRAIN_ACCURACY, mean(&|distance| win(distance, 0.0))),
                (names::TRAIN_MARGIN, mean(&|distance| distance)),
                (names::TRAIN_LR, lr),
                (names::TRAIN_GRAD_NORM, grad_norm.value()),
            ])?;
        }
        if session.evaluates() {
            evaluate(&mut session, &model, &held_out, &config)?;
        }
        if session.saves() {
            session.save(Exported::Scalar(&model), &[("optimizer", &optimizer)], Extras::default())?;
        }
    }

    let normalised = if session.was_interrupted() || config.normalisation.samples == 0 {
        None
    } else {
        let best = match session.best_weights() {
            Some(best) => plain.scalar_of(model.config(), best.clone())?,
            None => model.valid(),
        };
        let initial = plain.gpt(&init)?;
        let scores = score_samples(&config.normalisation, &initial, &best, &training, &tokenizer, streams)?;
        let fitted = Normalisation::fit(&scores)?;
        tracing::info!(
            "the initial model's answers score {:.3} ± {:.3}; scores are scaled so that they become 0 ± 1",
            fitted.mean,
            fitted.deviation
        );
        Some(fitted.apply(best))
    };
    let extras = Extras { exported: normalised.as_ref().map(Exported::Scalar), ..Extras::default() };
    session.finish(Exported::Scalar(&model), &[("optimizer", &optimizer)], extras)
}

/// The configuration with absolute paths.
fn load_config(args: &TrainArgs) -> anyhow::Result<RewardModelConfig> {
    let path = &args.stage.config;
    let mut config: RewardModelConfig = config::load(path, &args.stage.overrides)?;
    config.validate().with_context(|| format!("invalid config `{}`", path.display()))?;
    config.data.resolve(&config::PathResolver::new(path, args.stage.data.as_deref()))?;
    Ok(config)
}

/// Held-out loss and accuracy.
fn evaluate(
    session: &mut Session,
    model: &ScalarGpt,
    held_out: &Pairs,
    config: &RewardModelConfig,
) -> anyhow::Result<()> {
    let last = session.progress().step == session.total_steps();
    let all = held_out.encoded.len();
    let n = if last || config.train.eval_pairs == 0 { all } else { config.train.eval_pairs };
    let micro = config.train.micro_batch_size.unwrap_or(config.train.batch_size);
    let measured = eval::evaluate_pairs(&model.valid(), held_out, n, 2 * micro)?;
    session.log(&[
        (names::VAL_LOSS, measured.loss),
        (names::VAL_ACCURACY, measured.accuracy),
        (names::VAL_MARGIN, measured.margin_mean),
        (names::VAL_LONGER_WINS_ACCURACY, measured.longer_wins_accuracy),
    ])?;
    let value = match config.train.best_by {
        BestBy::Loss => measured.loss,
        BestBy::Accuracy => -measured.accuracy,
    };
    session.note_evaluation(value, Exported::Scalar(model));
    Ok(())
}
