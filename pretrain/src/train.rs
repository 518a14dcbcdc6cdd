//! The training loop.

use anyhow::Context;
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use common::checkpoint::{self, Checkpoint, Stage};
use common::generate::{GenerateOptions, SamplingConfig, generate};
use common::interrupt::Interrupt;
use common::metrics::names;
use common::model::Gpt;
use common::optim::{AdamW, Grads};
use common::rng::{Rng, Streams};
use common::session::{Exported, Extras, Origin, Outcome, Session};
use common::tokenizer::Tokenizer;
use common::{config, loss};
use serde_json::json;

use crate::cli::TrainArgs;
use crate::config::PretrainConfig;
use crate::data::{Corpus, Windows};
use crate::eval;

/// Trains a language model on text.
///
/// # Errors
/// Whatever stands in the way: configuration, data, the output directory, a loss that is not finite.
pub fn train(args: &TrainArgs, interrupt: Interrupt) -> anyhow::Result<Outcome> {
    let config = load_config(args)?;
    let runtime = args.stage.runtime.open()?.autodiff();
    let streams = Streams::new(config.seed);
    let (tokenizer, init) = starting_point(args)?;
    let model_config = if let Some(init) = &init {
        init.model_config().clone()
    } else {
        let resolved = config.model.resolve(tokenizer.vocab_size());
        resolved.with_context(|| format!("invalid config `{}`", args.stage.config.display()))?
    };
    let seq_len = config.train.seq_len.unwrap_or(model_config.max_seq_len).min(model_config.max_seq_len);
    let mut corpus = Corpus::open(&config.data, &tokenizer, seq_len, &streams, args.stage.runtime.quiet)?;
    let origin = Origin {
        stage: Stage::Pretrain,
        parents: init.iter().map(Checkpoint::as_parent).collect(),
        data: corpus.sha256.clone(),
        tokenizer,
        config_toml: config::to_toml(&config)?,
        backend: runtime.label.clone(),
    };
    let (mut session, restored) = Session::start(&args.stage, origin, &config.run, config.train.steps, interrupt)?;
    let (mut gpt, mut optimizer) = match (restored, init) {
        (Some(mut restored), _) => {
            let weights = restored.tensors("weights")?;
            let gpt = runtime.gpt_of(restored.checkpoint.model_config(), weights)?;
            (gpt, restored.optimizer("optimizer", &config.optimizer, &runtime)?)
        }
        (None, Some(init)) => (runtime.gpt(&init)?, runtime.optimizer(&config.optimizer)),
        (None, None) => (runtime.new_gpt(&model_config, &streams), runtime.optimizer(&config.optimizer)),
    };
    tracing::info!(
        "{} parameters, {} training tokens, {} held-out tokens",
        gpt.num_params(),
        corpus.train.n_tokens(),
        corpus.val.n_tokens()
    );

    let batch_size = config.train.batch_size as u64;
    let n_targets = config.train.batch_size * seq_len;
    let micro = config.train.micro_batch_size.unwrap_or(config.train.batch_size) as u64;
    while session.goes_on() {
        let step = session.progress().step;
        let mut grads = Grads::default();
        let mut losses = Vec::new();
        for first in (0..batch_size).step_by(micro as usize) {
            let position = step * batch_size + first;
            let windows = corpus.train.batch(position..position + micro)?;
            let mut dropout = streams.get("dropout", position);
            // The whole batch's number of targets, so that micro-batches add up to its mean.
            let (of_windows, loss) = gradients(&gpt, &optimizer, &windows, n_targets, Some(&mut dropout));
            grads = grads.plus(of_windows);
            losses.push(loss);
        }
        let lr = config.optimizer.lr_at(step, config.train.steps);
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
            evaluate(&mut session, &gpt, &corpus, &config, &streams)?;
        }
        if session.saves() {
            session.save(Exported::Lm(&gpt), &[("optimizer", &optimizer)], Extras::default())?;
        }
    }
    session.finish(Exported::Lm(&gpt), &[("optimizer", &optimizer)], Extras::default())
}

/// The gradients of the windows' cross-entropy as `optimizer` takes them, and its value, off the graph.
///
/// The sum over all targets is divided by `n_targets`; dropout is drawn from `dropout`.
///
/// # Shapes
/// - returns the loss as `[1]`, in nats
pub fn gradients(
    gpt: &Gpt,
    optimizer: &AdamW,
    windows: &Windows,
    n_targets: usize,
    dropout: Option<&mut Rng>,
) -> (Grads, Tensor<1>) {
    let (inputs, targets) = windows.tensors(&gpt.device());
    let hidden = gpt.hidden_with_dropout(inputs, &windows.layout(), dropout);
    let [batch, seq, d_model] = hidden.dims();
    let loss = loss::cross_entropy(gpt, hidden.reshape([batch * seq, d_model]), targets, n_targets);
    let value = loss.clone().inner();
    (Grads::take(gpt, optimizer.scaled(loss).backward()), value)
}

/// The configuration with absolute paths.
pub(crate) fn load_config(args: &TrainArgs) -> anyhow::Result<PretrainConfig> {
    let path = &args.stage.config;
    let mut config: PretrainConfig = config::load(path, &args.stage.overrides)?;
    config.validate().with_context(|| format!("invalid config `{}`", path.display()))?;
    config.data.resolve(&config::PathResolver::new(path, args.stage.data.as_deref()))?;
    Ok(config)
}

/// The tokenizer, and the checkpoint to start from if there is one.
fn starting_point(args: &TrainArgs) -> anyhow::Result<(Tokenizer, Option<Checkpoint>)> {
    match (&args.tokenizer, &args.init) {
        (_, Some(dir)) => {
            let init = checkpoint::init_from(dir).context("failed to load the initial model")?;
            init.expect_stage(&[Stage::Pretrain, Stage::Sft, Stage::Ppo])
                .context("failed to load the initial model")?;
            Ok((init.require_tokenizer()?.clone(), Some(init)))
        }
        (Some(dir), None) => Ok((Tokenizer::load(dir)?, None)),
        (None, None) => anyhow::bail!("either `--tokenizer` or `--init` is needed"),
    }
}

/// Held-out loss and samples.
fn evaluate(
    session: &mut Session,
    gpt: &Gpt,
    corpus: &Corpus,
    config: &PretrainConfig,
    streams: &Streams,
) -> anyhow::Result<()> {
    let plain = gpt.valid();
    let last = session.progress().step == session.total_steps();
    let n_windows = if last { 0 } else { config.train.eval_windows };
    let held_out = eval::evaluate_windows(&plain, &corpus.val, n_windows, config.train.batch_size)?;
    session.log(&[
        (names::VAL_LOSS, held_out.loss()),
        (names::VAL_BITS_PER_BYTE, held_out.nats / std::f64::consts::LN_2 / corpus.val.bytes_of(held_out.tokens)),
    ])?;
    sample(session, &plain, config, streams)?;
    session.note_evaluation(held_out.loss(), Exported::Lm(gpt));
    Ok(())
}

/// Continues the configured beginnings and writes what comes of them to `samples.jsonl`.
fn sample(session: &Session, gpt: &Gpt, config: &PretrainConfig, streams: &Streams) -> anyhow::Result<()> {
    let tokenizer = session.tokenizer();
    let specials = tokenizer.specials();
    let step = session.progress().step;
    let prompts = config
        .train
        .sample_prompts
        .iter()
        .map(|prompt| {
            let mut ids = if config.data.document_bos { vec![specials.bos] } else { Vec::new() };
            ids.extend(tokenizer.encode(prompt)?);
            Ok(ids)
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let sampling = SamplingConfig {
        temperature: 0.8,
        max_tokens: config.train.sample_tokens,
        stop: vec![specials.bos, specials.end],
        ..SamplingConfig::default()
    };
    for (i, (prompt, ids)) in config.train.sample_prompts.iter().zip(prompts).enumerate() {
        if ids.is_empty() {
            continue;
        }
        let first_row = step << 16 | i as u64;
        let continued = generate(gpt, &[ids], &sampling, streams, first_row, GenerateOptions::default())?;
        let text = tokenizer.decode(&continued[0].ids);
        tracing::info!("sample: {prompt}{}", text.replace('\n', "⏎"));
        session.recorder.sample(step, &json!({ "prompt": prompt, "text": text }))?;
    }
    Ok(())
}

impl Windows {
    /// Inputs `[batch, seq]` and the tokens that follow them, `[batch · seq]`.
    pub(crate) fn tensors(&self, device: &Device) -> (Tensor<2, Int>, Tensor<1, Int>) {
        let (batch, seq) = (self.rows.len(), self.seq_len);
        let ids = |skip: usize| -> Vec<i64> {
            self.rows.iter().flat_map(|row| row[skip..skip + seq].iter().map(|&id| i64::from(id))).collect()
        };
        (
            Tensor::from_data(TensorData::new(ids(0), [batch, seq]), device),
            Tensor::from_data(TensorData::new(ids(1), [batch * seq]), device),
        )
    }
}
