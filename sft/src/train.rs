//! The training loop.

use std::collections::BTreeMap;

use anyhow::Context;
use burn::module::Module;
use burn::tensor::Tensor;
use common::checkpoint::{self, Stage};
use common::conversation::{self, Role};
use common::data::order::Order;
use common::generate::{GenerateOptions, SamplingConfig, generate};
use common::interrupt::Interrupt;
use common::metrics::names;
use common::model::Gpt;
use common::optim::Grads;
use common::rng::Streams;
use common::session::{Exported, Extras, Origin, Outcome, Session};
use common::{config, loss};
use serde_json::json;

use crate::cli::TrainArgs;
use crate::config::SftConfig;
use crate::data::{Batch, Conversations};
use crate::eval;

/// Fine-tunes a language model on conversations.
///
/// # Errors
/// Whatever stands in the way: configuration, data, the initial model, the output directory, a loss that is not finite.
pub fn train(args: &TrainArgs, interrupt: Interrupt) -> anyhow::Result<Outcome> {
    let config = load_config(args)?;
    let runtime = args.stage.runtime.open()?.autodiff();
    let device = runtime.device.clone();
    let streams = Streams::new(config.seed);
    let init = checkpoint::init_from(&args.init).context("failed to load the initial model")?;
    init.expect_stage(&[Stage::Pretrain, Stage::Sft]).context("failed to load the initial model")?;
    let tokenizer = init.require_tokenizer()?.clone();
    let pad = tokenizer.specials().pad;
    let seq_len = init.model_config().max_seq_len;
    let read = |files: &[std::path::PathBuf]| {
        Conversations::read(files, &tokenizer, seq_len, config.data.on_bad_record, config.data.on_too_long)
    };
    let training = read(&config.data.train).context("failed to read the training conversations")?;
    let held_out = read(&config.data.val).context("failed to read the held-out conversations")?;
    let n_steps = config.n_steps(training.encoded.len());
    let data: BTreeMap<String, String> = training.sha256.iter().chain(&held_out.sha256).map(own).collect();
    let origin = Origin {
        stage: Stage::Sft,
        parents: vec![init.as_parent()],
        data,
        tokenizer: tokenizer.clone(),
        config_toml: config::to_toml(&config)?,
        backend: runtime.label.clone(),
    };
    let (mut session, restored) = Session::start(&args.stage, origin, &config.run, n_steps, interrupt)?;
    let (mut gpt, mut optimizer) = match restored {
        Some(mut restored) => {
            let weights = restored.tensors("weights")?;
            let gpt = runtime.gpt_of(restored.checkpoint.model_config(), weights)?;
            (gpt, restored.optimizer("optimizer", &config.optimizer, &runtime)?)
        }
        None => (runtime.gpt(&init)?, runtime.optimizer(&config.optimizer)),
    };
    tracing::info!(
        "{} parameters, {} training conversations, {} held-out ones",
        gpt.num_params(),
        training.encoded.len(),
        held_out.encoded.len()
    );

    let mut order = Order::new(training.encoded.len(), streams, "order");
    let batch_size = config.train.batch_size;
    let micro = config.train.micro_batch_size.unwrap_or(batch_size);
    while session.goes_on() {
        let step = session.progress().step;
        let first = step * batch_size as u64;
        let chosen: Vec<_> =
            (first..first + batch_size as u64).map(|position| &training.encoded[order.item(position)]).collect();
        let batches: Vec<Batch> = chosen.chunks(micro).map(|part| Batch::new(part, seq_len, pad)).collect();
        let n_targets = batches.iter().map(Batch::n_targets).sum();
        let mut grads = Grads::default();
        let mut losses = Vec::new();
        for (i, batch) in batches.iter().enumerate() {
            let mut dropout = streams.get("dropout", first + (i * micro) as u64);
            let hidden = gpt.hidden_with_dropout(batch.inputs(&device), &batch.layout(), Some(&mut dropout));
            let [rows, seq, d_model] = hidden.dims();
            let (positions, targets) = batch.targets(&device);
            let hidden = hidden.reshape([rows * seq, d_model]).select(0, positions);
            // The whole batch's number of targets, so that micro-batches add up to its mean.
            let loss = loss::cross_entropy(&gpt, hidden, targets, n_targets);
            losses.push(loss.clone().inner());
            grads = grads.plus(Grads::take(&gpt, optimizer.scaled(loss).backward()));
        }
        let lr = config.optimizer.lr_at(step, n_steps);
        let grad_norm;
        (gpt, grad_norm) = optimizer.step(gpt, grads, lr);
        session.count_step(n_targets as u64, grad_norm.clone())?;

        if session.logs() {
            let loss = Tensor::cat(losses, 0).sum().into_scalar::<f32>();
            session.log(&[
                (names::TRAIN_LOSS, f64::from(loss)),
                (names::TRAIN_LR, lr),
                (names::TRAIN_GRAD_NORM, grad_norm.value()),
            ])?;
        }
        if session.evaluates() {
            evaluate(&mut session, &gpt, &held_out, &config, &streams)?;
        }
        if session.saves() {
            session.save(Exported::Lm(&gpt), &[("optimizer", &optimizer)], Extras::default())?;
        }
    }
    session.finish(Exported::Lm(&gpt), &[("optimizer", &optimizer)], Extras::default())
}

fn own((file, sha256): (&String, &String)) -> (String, String) {
    (file.clone(), sha256.clone())
}

/// The configuration with absolute paths.
fn load_config(args: &TrainArgs) -> anyhow::Result<SftConfig> {
    let path = &args.stage.config;
    let mut config: SftConfig = config::load(path, &args.stage.overrides)?;
    config.validate().with_context(|| format!("invalid config `{}`", path.display()))?;
    config.data.resolve(&config::PathResolver::new(path, args.stage.data.as_deref()))?;
    Ok(config)
}

/// Held-out loss, accuracy and samples.
fn evaluate(
    session: &mut Session,
    gpt: &Gpt,
    held_out: &Conversations,
    config: &SftConfig,
    streams: &Streams,
) -> anyhow::Result<()> {
    let plain = gpt.valid();
    let last = session.progress().step == session.total_steps();
    let all = held_out.encoded.len();
    let n = if last || config.train.eval_conversations == 0 { all } else { config.train.eval_conversations };
    let pad = session.tokenizer().specials().pad;
    let measured = eval::evaluate(&plain, held_out, n, config.train.batch_size, pad)?;
    session.log(&[(names::VAL_LOSS, measured.loss()), (names::VAL_ACCURACY, measured.token_accuracy())])?;
    sample(session, &plain, held_out, config, streams)?;
    session.note_evaluation(measured.loss(), Exported::Lm(gpt));
    Ok(())
}

/// Answers the first held-out prompts and writes the answers to `samples.jsonl`.
fn sample(
    session: &Session,
    gpt: &Gpt,
    held_out: &Conversations,
    config: &SftConfig,
    streams: &Streams,
) -> anyhow::Result<()> {
    let tokenizer = session.tokenizer();
    let step = session.progress().step;
    let sampling = SamplingConfig {
        temperature: 0.8,
        max_tokens: config.train.sample_tokens,
        stop: vec![tokenizer.specials().end],
        ..SamplingConfig::default()
    };
    for (i, messages) in held_out.messages.iter().take(config.train.n_samples).enumerate() {
        let n_given = messages.iter().position(|m| m.role == Role::Assistant).unwrap_or(messages.len());
        let given = &messages[..n_given];
        let Some(question) = given.last() else { continue };
        let prompt = conversation::encode_prompt(tokenizer, given)?;
        let room = gpt.config().max_seq_len.saturating_sub(prompt.len());
        if room == 0 {
            continue;
        }
        let sampling = SamplingConfig { max_tokens: sampling.max_tokens.min(room), ..sampling.clone() };
        let first_row = step << 16 | i as u64;
        let answer = generate(gpt, &[prompt], &sampling, streams, first_row, GenerateOptions::default())?;
        let text = tokenizer.decode(&answer[0].ids);
        tracing::info!("sample: {} → {}", question.content, text.replace('\n', "⏎"));
        session.recorder.sample(step, &json!({ "prompt": question.content, "text": text }))?;
    }
    Ok(())
}
