//! The training loop.

use std::path::PathBuf;

use anyhow::Context;
use burn::module::Module;
use common::checkpoint::{self, Stage};
use common::conversation::{self, Role};
use common::data::order::Order;
use common::generate::{GenerateOptions, SamplingConfig, generate};
use common::group::Group;
use common::interrupt::Interrupt;
use common::logging::grouped;
use common::loss;
use common::metrics::{Recorder, names};
use common::model::Gpt;
use common::optim::{AdamW, Grads};
use common::reduce::GradSum;
use common::rng::Streams;
use common::session::{Contents, Exported, Outcome, Plan, Session, Step, Training, gpt_and_optimizer};
use serde_json::json;

use crate::cli::TrainArgs;
use crate::config::SftConfig;
use crate::data::{Batch, Conversations};
use crate::eval;
use crate::needs;

/// Fine-tunes a language model on conversations.
///
/// # Errors
/// If configuration, data, the initial model or the output directory cannot be used, or a loss is not finite.
pub fn train(args: &TrainArgs, group: &Group, interrupt: Interrupt) -> anyhow::Result<Outcome> {
    let config = SftConfig::load(&args.stage)?;
    config.train.amount().check_ranks(group.size(), "")?;
    args.stage.runtime.check_trunk(config.lora.as_ref())?;
    let runtime = args.stage.runtime.open()?.training(config.train.checkpoint_activations);
    let runtime = runtime.sharing(group, config.train.shard_optimizer);
    let streams = Streams::new(config.seed);
    needs::check(&config, &args.init, args.stage.runtime.base(), group, &runtime)?;
    let mut init = checkpoint::init_from(&args.init, args.stage.runtime.opening())
        .and_then(|init| init.of_stage(&[Stage::Pretrain, Stage::Sft, Stage::Dpo]))
        .context("failed to load the initial model")?
        .with_dropout(config.model.dropout);
    init.check_lora(config.lora.as_ref())?;
    let tokenizer = init.require_tokenizer()?;
    let max_seq_len = init.model_config().max_seq_len;
    let read = |files: &[PathBuf]| Conversations::read(files, tokenizer, max_seq_len, &config.data);
    let training = read(&config.data.train).context("failed to read the training conversations")?;
    let held_out = read(&config.data.val).context("failed to read the held-out conversations")?;
    if !training.teach_an_end(tokenizer) {
        tracing::warn!(
            "no answer ends with a token at which generation stops: the model will not learn to stop; see the chat template"
        );
    }
    let total_steps = config.train.amount().n_steps(training.encoded.len());
    let plan = Plan {
        stage: Stage::Sft,
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
    let (gpt, optimizer) =
        gpt_and_optimizer(restored, &mut init, config.lora.as_ref(), &config.optimizer, &runtime, &streams)?;
    drop(init);
    tracing::info!(
        "{}, {} training conversations, {} held out",
        Exported::Lm(&gpt).parameters(),
        grouped(training.encoded.len()),
        grouped(held_out.encoded.len())
    );
    session.drive(FineTuning {
        group: group.clone(),
        order: Order::new(training.encoded.len(), streams, "order"),
        total_steps,
        gpt,
        optimizer,
        training: &training,
        held_out: &held_out,
        config: &config,
        streams,
    })
}

/// A language model that is being fine-tuned.
struct FineTuning<'a> {
    group: Group,
    gpt: Gpt,
    optimizer: AdamW,
    training: &'a Conversations,
    held_out: &'a Conversations,
    config: &'a SftConfig,
    order: Order,
    streams: Streams,
    total_steps: u64,
}

impl Training for FineTuning<'_> {
    fn step(mut self, step: u64, _recorder: &Recorder) -> anyhow::Result<(Self, Step)> {
        let (batch_size, micro) = (self.config.train.batch_size, self.config.train.amount().micro());
        let (device, seq_len) = (self.gpt.device(), self.gpt.config().max_seq_len);
        let first = step * batch_size as u64;
        let chosen: Vec<_> = (first..first + batch_size as u64)
            .map(|position| &self.training.encoded[self.order.item(position)])
            .collect();
        let batches: Vec<Batch> = chosen.chunks(micro).map(|part| Batch::new(part, seq_len)).collect();
        let n_targets = batches.iter().map(Batch::n_targets).sum();
        let mut grads = GradSum::new(&self.group, self.config.train.reduce);
        let mut losses = Vec::new();
        for i in self.group.share().of(batches.len()) {
            let batch = &batches[i];
            let mut dropout = self.streams.get("dropout", first + (i * micro) as u64);
            let hidden = self.gpt.hidden_with_dropout(batch.inputs(&device), &batch.layout(), Some(&mut dropout));
            let [rows, seq, d_model] = hidden.dims();
            let (positions, targets) = batch.targets(&device);
            let hidden = hidden.reshape([rows * seq, d_model]).select(0, positions);
            // The whole batch's number of targets, so that micro-batches add up to its mean.
            let loss = loss::cross_entropy(&self.gpt, hidden, targets, n_targets);
            losses.push(loss.clone().inner());
            grads.add(Grads::take(&self.gpt, self.optimizer.scaled(loss).backward()));
        }
        let lr = self.config.optimizer.lr_at(step, self.total_steps);
        let grad_norm;
        (self.gpt, grad_norm) = grads.descend(&mut self.optimizer, self.gpt, lr)?;
        let step = Step::of_lm(&self.group, n_targets as u64, losses, lr, grad_norm);
        Ok((self, step))
    }

    fn evaluate(&self, session: &mut Session) -> anyhow::Result<()> {
        let plain = self.gpt.valid();
        let train = &self.config.train;
        let all = self.held_out.encoded.len();
        let n = if session.is_last() || train.eval_conversations == 0 { all } else { train.eval_conversations };
        let measured = eval::evaluate(&self.group, &plain, self.held_out, n, train.amount().micro())?;
        session.log(&[(names::VAL_LOSS, measured.loss()), (names::VAL_ACCURACY, measured.token_accuracy())])?;
        if self.group.is_first() {
            self.sample(session, &plain)?;
        }
        session.note_evaluation(measured.loss(), Exported::Lm(&self.gpt));
        Ok(())
    }

    fn contents(&self) -> Contents<'_> {
        Contents::new(Exported::Lm(&self.gpt), &self.optimizer)
    }
}

impl FineTuning<'_> {
    /// Answers the first held-out prompts and writes the answers to `samples.jsonl`.
    fn sample(&self, session: &Session, plain: &Gpt) -> anyhow::Result<()> {
        let tokenizer = session.tokenizer();
        let step = session.progress().step;
        let sampling = SamplingConfig {
            temperature: 0.8,
            max_tokens: self.config.train.sample_tokens,
            stop: tokenizer.end_ids(),
            ..SamplingConfig::default()
        };
        for (i, messages) in self.held_out.messages.iter().take(self.config.train.n_samples).enumerate() {
            let n_given = messages.iter().position(|m| m.role == Role::Assistant).unwrap_or(messages.len());
            let given = &messages[..n_given];
            let Some(question) = given.last() else { continue };
            let prompt = conversation::encode_prompt(tokenizer, given)?;
            let room = plain.config().max_seq_len.saturating_sub(prompt.len());
            if room == 0 {
                continue;
            }
            let sampling = SamplingConfig { max_tokens: sampling.max_tokens.min(room), ..sampling.clone() };
            let first_row = step << 16 | i as u64;
            let answer = generate(plain, &[prompt], &sampling, &self.streams, first_row, GenerateOptions::default())?;
            let text = tokenizer.decode(&answer[0].ids);
            tracing::info!("sample: {} → {}", question.content, text.replace('\n', "⏎"));
            session.recorder.sample(step, &json!({ "prompt": question.content, "response": text }))?;
        }
        Ok(())
    }
}
