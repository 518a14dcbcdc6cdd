//! The training loop.

use anyhow::{Context, bail};
use burn::module::Module;
use burn::tensor::Tensor;
use common::checkpoint::{self, Checkpoint, Preview, Stage};
use common::corpus::{self, Corpus, Tokenising, Windows, evaluate_windows};
use common::generate::{GenerateOptions, SamplingConfig, generate};
use common::group::Group;
use common::interrupt::Interrupt;
use common::logging::grouped;
use common::metrics::{Recorder, names};
use common::model::Gpt;
use common::optim::{AdamW, Grads};
use common::reduce::GradSum;
use common::rng::{Rng, Streams};
use common::runtime::Runtime;
use common::session::{Contents, Exported, Outcome, Plan, Session, Step, Training};
use common::tokenizer::Tokenizer;
use serde_json::json;

use crate::cli::TrainArgs;
use crate::config::PretrainConfig;
use crate::data::SEQ_LEN;
use crate::needs;

/// Trains a language model on text.
///
/// # Errors
/// If configuration, data or the output directory cannot be used, or a loss is not finite.
pub fn train(args: &TrainArgs, group: &Group, interrupt: Interrupt) -> anyhow::Result<Outcome> {
    let config = PretrainConfig::load(&args.stage)?;
    config.train.amount().check_ranks(group.size(), "")?;
    args.stage.runtime.check_trunk(None)?;
    let runtime = args.stage.runtime.open()?.training(config.train.checkpoint_activations);
    let runtime = runtime.sharing(group, config.train.shard_optimizer);
    let streams = Streams::new(config.seed);
    let (tokenizer, mut init) = starting_point(args, &config, group, &runtime)?;
    let model_config = if let Some(init) = &init {
        init.model_config().clone()
    } else {
        let resolved = config.model.resolve(tokenizer.vocab_size());
        resolved.with_context(|| format!("invalid config `{}`", args.stage.config.display()))?
    };
    let seq_len = config.seq_len(&model_config)?;
    if init.is_none() {
        needs::check(&config, &model_config, group, &runtime)?;
    }
    let quiet = args.stage.runtime.process.hides_bars() || !group.is_first();
    let tokenising = Tokenising::new(group, interrupt, quiet);
    let corpus = Corpus::open(&config.data, &tokenizer, (seq_len, SEQ_LEN), &streams, &tokenising)?;
    let parents: Vec<_> = init.iter().map(|init| ("--init", init)).collect();
    let plan = Plan {
        stage: Stage::Pretrain,
        parents: &parents,
        data: config.data.sources(),
        tokenizer: &tokenizer,
        tokenizer_dir: args.tokenizer.as_deref(),
        config: &config,
        run: &config.run,
        runtime: &runtime,
        total_steps: config.train.steps,
        group,
    };
    let (session, restored) = Session::start(&args.stage, &plan, interrupt)?;
    let (gpt, optimizer) = match (restored, &mut init) {
        (Some(mut restored), _) => {
            (restored.gpt(&runtime)?, restored.optimizer("optimizer", &config.optimizer, &runtime)?)
        }
        (None, Some(init)) => (runtime.take_gpt(init)?, runtime.optimizer(&config.optimizer)),
        (None, None) => (runtime.new_gpt(&model_config, &streams), runtime.optimizer(&config.optimizer)),
    };
    tracing::info!(
        "{}, {} training tokens, {} held-out tokens",
        Exported::Lm(&gpt).parameters(),
        grouped(corpus.train.n_tokens()),
        grouped(corpus.val.n_tokens())
    );
    session.drive(Pretraining { group: group.clone(), gpt, optimizer, corpus, config: &config, streams, seq_len })
}

/// A language model that is being pretrained.
struct Pretraining<'a> {
    group: Group,
    gpt: Gpt,
    optimizer: AdamW,
    corpus: Corpus,
    config: &'a PretrainConfig,
    streams: Streams,
    /// Tokens in a window.
    seq_len: usize,
}

impl Training for Pretraining<'_> {
    fn step(mut self, step: u64, _recorder: &Recorder) -> anyhow::Result<(Self, Step)> {
        let (batch_size, micro) = (self.config.train.batch_size, self.config.train.amount().micro());
        let n_targets = batch_size * self.seq_len;
        let mut grads = GradSum::new(&self.group, self.config.train.reduce);
        let mut losses = Vec::new();
        for i in self.group.share().of(batch_size / micro) {
            let position = step * batch_size as u64 + (i * micro) as u64;
            let windows = self.corpus.train.batch(position..position + micro as u64)?;
            let mut dropout = self.streams.get("dropout", position);
            // The whole batch's number of targets, so that micro-batches add up to its mean.
            let (of_windows, loss) = gradients(&self.gpt, &self.optimizer, &windows, n_targets, Some(&mut dropout));
            grads.add(of_windows);
            losses.push(loss);
        }
        let lr = self.config.optimizer.lr_at(step, self.config.train.steps);
        let grad_norm;
        (self.gpt, grad_norm) = grads.descend(&mut self.optimizer, self.gpt, lr)?;
        let step = Step::of_lm(&self.group, n_targets as u64, losses, lr, grad_norm);
        Ok((self, step))
    }

    fn evaluate(&self, session: &mut Session) -> anyhow::Result<()> {
        let plain = self.gpt.valid();
        let n_windows = if session.is_last() { 0 } else { self.config.train.eval_windows };
        let text = &self.corpus.val;
        let held_out = evaluate_windows(&self.group, &plain, text, n_windows, self.config.train.amount().micro())?;
        session.log(&[
            (names::VAL_LOSS, held_out.loss()),
            (names::VAL_BITS_PER_BYTE, held_out.nats / std::f64::consts::LN_2 / text.bytes_of(held_out.tokens)),
        ])?;
        if self.group.is_first() {
            self.sample(session, &plain)?;
        }
        session.note_evaluation(held_out.loss(), Exported::Lm(&self.gpt));
        Ok(())
    }

    fn contents(&self) -> Contents<'_> {
        Contents::new(Exported::Lm(&self.gpt), &self.optimizer)
    }
}

impl Pretraining<'_> {
    /// Continues the configured beginnings and writes the texts to `samples.jsonl`.
    fn sample(&self, session: &Session, plain: &Gpt) -> anyhow::Result<()> {
        let tokenizer = session.tokenizer();
        let bos = tokenizer.bos();
        let step = session.progress().step;
        let train = &self.config.train;
        let sampling = SamplingConfig {
            temperature: 0.8,
            max_tokens: train.sample_tokens,
            stop: bos.into_iter().chain(tokenizer.end_ids()).collect(),
            ..SamplingConfig::default()
        };
        for (i, prompt) in train.sample_prompts.iter().enumerate() {
            let mut ids = Vec::from_iter(bos.filter(|_| self.config.data.document_bos));
            ids.extend(tokenizer.encode(prompt)?);
            if ids.is_empty() {
                continue;
            }
            let first_row = step << 16 | i as u64;
            let continued = generate(plain, &[ids], &sampling, &self.streams, first_row, GenerateOptions::default())?;
            let text = tokenizer.decode(&continued[0].ids);
            tracing::info!("sample: {prompt}{}", text.replace('\n', "⏎"));
            session.recorder.sample(step, &json!({ "prompt": prompt, "response": text }))?;
        }
        Ok(())
    }
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
    let loss = corpus::loss(gpt, windows, n_targets, dropout);
    let value = loss.clone().inner();
    (Grads::take(gpt, optimizer.scaled(loss).backward()), value)
}

/// The tokenizer, and the checkpoint to start from if there is one.
fn starting_point(
    args: &TrainArgs,
    config: &PretrainConfig,
    group: &Group,
    runtime: &Runtime,
) -> anyhow::Result<(Tokenizer, Option<Checkpoint>)> {
    match (&args.tokenizer, &args.init) {
        (_, Some(dir)) => {
            // What is wrong with the initial model is said where it is loaded.
            if let Ok(initial) = Preview::open(dir, args.stage.runtime.base()) {
                needs::check(config, &initial.config, group, runtime)?;
            }
            let init = checkpoint::init_from(dir, args.stage.runtime.opening())
                .and_then(|init| init.of_stage(&Stage::LANGUAGE_MODELS))
                .context("failed to load the initial model")?
                .with_dropout(config.model.dropout);
            Ok((init.require_tokenizer()?.clone(), Some(init)))
        }
        (Some(dir), None) => Ok((Tokenizer::load(dir)?, None)),
        (None, None) => bail!("either `--tokenizer` or `--init` is needed"),
    }
}
