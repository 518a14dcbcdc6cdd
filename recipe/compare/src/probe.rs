//! One backend's part of a comparison, in a process of its own.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use burn::module::Module;
use burn::tensor::{Tensor, TensorData};
use common::checkpoint::{Checkpoint, Stage};
use common::cli::{RuntimeArgs, StageArgs};
use common::group::Group;
use common::interrupt::Interrupt;
use common::kernels::{self, Precision};
use common::loss;
use common::metrics::{MetricsLog, names};
use common::model::{Gpt, HostTensor, Layout, NamedTensors};
use common::optim::Grads;
use common::rng::Streams;
use common::runtime::Runtime;
use common::score::score_rows;
use common::tokenizer::Tokenizer;
use pretrain::PretrainConfig;
use serde::{Deserialize, Serialize};

use super::args::ProbeArgs;
use super::operations::{Ids, operations};
use super::record::{Level, RecordWriter, Records};
use super::replay::replay;
use super::tokens::continuations;
use super::{Prepared, StageConfig};

/// Windows of the batch that the levels below a training run are computed on.
const N_WINDOWS: usize = 4;
/// Tokens of a window that a prompt takes.
const PROMPT: usize = 8;
/// Tokens that are sampled after it.
const CONTINUED: usize = 16;
/// Answers of the PPO iteration, as far as the recipe's batch has as many.
const N_ANSWERS: usize = 16;
/// Greedy decoding for its speed: rows and tokens.
const DECODED: (usize, usize) = (8, 32);

/// The work of every backend's process.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// The recipe.
    pub prepared: Prepared,
    /// Stages to compare.
    pub stages: Vec<Stage>,
    /// Steps of the loss curves.
    pub steps: u64,
}

/// Computes everything and records it.
///
/// # Errors
/// Whatever fails; what was recorded before stays.
pub fn probe(args: &ProbeArgs) -> Result<()> {
    let text =
        std::fs::read_to_string(&args.plan).with_context(|| format!("failed to read `{}`", args.plan.display()))?;
    let plan: Plan = serde_json::from_str(&text)?;
    if let Some(fault) = args.plant {
        kernels::fault::plant(fault);
    }
    let runtime = args.runtime.open()?;
    let recorder = RecordWriter::create(&args.out, runtime.label.clone())?;
    let reference = args.reference.as_deref().map(Records::read).transpose()?;
    let parents = args.reference.clone().unwrap_or_else(|| args.out.clone());
    let mut flags = args.runtime.clone();
    flags.process.quiet = true;
    let mut probe = Probe { plan, out: args.out.clone(), parents, reference, flags, runtime, recorder };
    probe.run()?;
    probe.recorder.done()
}

struct Probe {
    plan: Plan,
    out: PathBuf,
    /// Where the checkpoints lie that stages start from: with the reference.
    parents: PathBuf,
    /// Absent in the reference itself.
    reference: Option<Records>,
    flags: RuntimeArgs,
    runtime: Runtime,
    recorder: RecordWriter,
}

impl Probe {
    fn run(&mut self) -> Result<()> {
        let is_reference = self.reference.is_none();
        for step in self.plan.prepared.stages.keys().copied().collect::<Vec<_>>() {
            let wanted = self.plan.stages.contains(&step);
            // The reference also makes the checkpoints that the stages wanted start from.
            let is_parent = is_reference && self.plan.stages.iter().any(|&later| later > step) && step != Stage::Ppo;
            if !wanted && !is_parent {
                continue;
            }
            tracing::info!("{step}");
            if step == Stage::Ppo {
                self.ppo()?;
            } else {
                self.curve(step)?;
            }
            match step {
                Stage::Pretrain if wanted => self.language_model()?,
                Stage::Sft if wanted => self.tokens(step)?,
                Stage::RewardModel if wanted => self.scores()?,
                _ => {}
            }
            self.memory(step)?;
        }
        Ok(())
    }

    fn streams(&self) -> Streams {
        Streams::new(self.plan.prepared.seed)
    }

    fn stage_args(&self, step: Stage, more: &[String]) -> StageArgs {
        let StageConfig { file, overrides } = self.plan.prepared.stages[&step].clone();
        let overrides = [&overrides, more].concat();
        StageArgs {
            config: file,
            out: self.out.join(step.to_string()),
            resume: false,
            overwrite: true,
            overrides,
            data: self.plan.prepared.data.clone(),
            tui: false,
            runtime: self.flags.clone(),
        }
    }

    fn pretrain_args(&self, more: &[String]) -> pretrain::TrainArgs {
        let tokenizer = Some(self.plan.prepared.tokenizer.clone());
        pretrain::TrainArgs { tokenizer, init: None, stage: self.stage_args(Stage::Pretrain, more) }
    }

    /// Trains a stage by its own loop and records its losses and its speed.
    fn curve(&mut self, step: Stage) -> Result<()> {
        let mut more = vec![format!("train.steps={}", self.plan.steps)];
        more.extend(["run.log_every=1", "run.eval_every=0", "run.save_every=0"].map(str::to_owned));
        match step {
            Stage::Pretrain => more.push("train.sample_prompts=[]".to_owned()),
            Stage::Sft => more.push("train.n_samples=0".to_owned()),
            _ => more.extend(["normalisation.samples=8", "normalisation.max_tokens=16"].map(str::to_owned)),
        }
        let (alone, never) = (Group::alone(), Interrupt::never());
        let init = |stage: Stage| self.parents.join(stage.to_string());
        match step {
            Stage::Pretrain => pretrain::train(&self.pretrain_args(&more), &alone, never),
            Stage::Sft => {
                let args = sft::TrainArgs { init: init(Stage::Pretrain), stage: self.stage_args(step, &more) };
                sft::train(&args, &alone, never)
            }
            _ => reward_model::train(
                &reward_model::TrainArgs { init: init(Stage::Sft), stage: self.stage_args(step, &more) },
                &alone,
                never,
            ),
        }
        .with_context(|| format!("failed to train the stage `{step}`"))?;
        let log = MetricsLog::read(&self.out.join(step.to_string()))?;
        let series = |name: &str| log.series(name).into_iter().map(|(_, value)| value).collect::<Vec<f64>>();
        let losses = series(names::TRAIN_LOSS);
        ensure!(losses.len() as u64 == self.plan.steps, "{} losses of {} steps", losses.len(), self.plan.steps);
        let (seconds, tokens) = (series("seconds"), series("tokens"));
        self.recorder.measure(step, "first_step_s", seconds[0])?;
        let last = losses.len() - 1;
        // A few steps of a very small model can pass within the clock's resolution in the metrics.
        let elapsed = seconds[last] - seconds[0];
        if elapsed > 0.0 {
            self.recorder.measure(step, "tokens_per_s", (tokens[last] - tokens[0]) / elapsed)?;
        }
        let losses = losses.into_iter().map(|loss| loss as f32).collect();
        self.recorder.numbers(step, Level::Curve, "train/loss", losses)
    }

    /// A language model of the reference, and the same on this backend.
    fn load_gpt(&self, step: Stage) -> Result<(Checkpoint, Gpt)> {
        let checkpoint = Checkpoint::open(&self.parents.join(step.to_string()))?;
        let gpt = self.runtime.autodiff().gpt(&checkpoint)?;
        Ok((checkpoint, gpt))
    }

    /// The first windows of the training text, as inputs and targets.
    fn windows(&self, n: usize) -> Result<Vec<(Ids, Vec<i64>)>> {
        let rows = pretrain::first_windows(&self.pretrain_args(&[]), n)?;
        Ok(rows
            .chunks(N_WINDOWS)
            .map(|rows| {
                let seq = rows[0].len() - 1;
                let cut = |skip: usize| -> Vec<i64> {
                    rows.iter().flat_map(|row| row[skip..skip + seq].iter().map(|&id| i64::from(id))).collect()
                };
                (Ids { flat: cut(0), batch: rows.len(), seq }, cut(1))
            })
            .collect())
    }

    /// Everything below a training run, on the model that the reference's run left.
    fn language_model(&mut self) -> Result<()> {
        let stage = Stage::Pretrain;
        let tokenizer = Tokenizer::load(&self.plan.prepared.tokenizer)?;
        let args = self.pretrain_args(&[]);
        let config: PretrainConfig = common::config::load(&args.stage.config, &args.stage.overrides)?;
        let initial = Gpt::new(&config.model.resolve(tokenizer.vocab_size())?, &self.streams(), &self.runtime.device);
        self.named(stage, Level::InitialWeights, &initial.to_named())?;

        let (_, gpt) = self.load_gpt(stage)?;
        let batches = self.windows(10 * N_WINDOWS)?;
        let (ids, targets) = &batches[0];
        let input = || ids.tensor(&self.runtime.device.clone().autodiff());
        let hidden = gpt.hidden(input(), &Layout::right_padded());
        if self.runtime.precision == Precision::F32 {
            self.operations(&gpt, ids, targets)?;
        }
        let logits = HostTensor::of(&gpt.logits(hidden).inner());
        self.recorder.tensor(stage, Level::Logits, "logits", &logits)?;

        let mut optimizer = self.runtime.optimizer(&config.optimizer);
        let before = gpt.to_named();
        let mut gpt = gpt;
        for (i, (ids, targets)) in batches.iter().enumerate() {
            let value = self.loss(&gpt, ids, targets);
            let of_loss = HostTensor::of(&value.clone().inner());
            let grads = Grads::take(&gpt, optimizer.scaled(value).backward());
            if i == 0 {
                self.recorder.tensor(stage, Level::Loss, "loss", &of_loss)?;
                let factor = optimizer.loss_factor() as f32;
                let mut named = grads.to_named();
                for x in named.values_mut().flat_map(|grad| &mut grad.data) {
                    *x /= factor;
                }
                self.named(stage, Level::Gradients, &named)?;
            }
            (gpt, _) = optimizer.step(gpt, grads, config.optimizer.lr_at(i as u64, config.train.steps));
            if i == 0 {
                self.named(stage, Level::OneStep, &change(&gpt.to_named(), &before))?;
            }
        }
        self.named(stage, Level::TenSteps, &change(&gpt.to_named(), &before))?;
        self.tokens(stage)
    }

    fn loss(&self, gpt: &Gpt, ids: &Ids, targets: &[i64]) -> Tensor<1> {
        let device = self.runtime.device.clone().autodiff();
        let hidden = gpt.hidden(ids.tensor(&device), &Layout::right_padded());
        let [batch, seq, d_model] = hidden.dims();
        let targets = Tensor::from_data(TensorData::new(targets.to_vec(), [batch * seq]), &device);
        loss::cross_entropy(gpt, hidden.reshape([batch * seq, d_model]), targets, batch * seq)
    }

    /// Each operation on the reference's activations.
    fn operations(&mut self, gpt: &Gpt, ids: &Ids, targets: &[i64]) -> Result<()> {
        let stage = Stage::Pretrain;
        for mut operation in operations(&gpt.valid(), ids, targets) {
            for (i, input) in operation.inputs.iter_mut().enumerate() {
                let name = format!("{} input {i}", operation.name);
                match &self.reference {
                    None => self.recorder.tensor(stage, Level::Activations, &name, input)?,
                    Some(reference) => {
                        let known = reference.find(stage, Level::Activations, &name);
                        *input = known.with_context(|| format!("the reference did not record `{name}`"))?.clone();
                    }
                }
            }
            let computed = operation.run(self.runtime.kernels, &self.runtime.device);
            for (i, output) in computed.outputs.iter().enumerate() {
                let name = if i == 0 { operation.name.clone() } else { format!("{}, output {i}", operation.name) };
                self.recorder.tensor(stage, Level::Operations, &name, output)?;
            }
            for (i, gradient) in computed.gradients.iter().enumerate() {
                let name = format!("{} by input {i}", operation.name);
                self.recorder.tensor(stage, Level::OperationGradients, &name, gradient)?;
            }
        }
        Ok(())
    }

    fn named(&mut self, stage: Stage, level: Level, tensors: &NamedTensors) -> Result<()> {
        tensors.iter().try_for_each(|(path, tensor)| self.recorder.tensor(stage, level, path, tensor))
    }

    /// Continuations of the first windows' beginnings, and how fast tokens come.
    fn tokens(&mut self, stage: Stage) -> Result<()> {
        let (_, gpt) = self.load_gpt(stage)?;
        let gpt = gpt.valid();
        let args = self.pretrain_args(&[]);
        let rows = pretrain::first_windows(&args, DECODED.0)?;
        let prompts: Vec<Vec<u32>> = rows.iter().map(|row| row[..PROMPT.min(row.len() - 1)].to_vec()).collect();
        let streams = self.streams();
        for (name, temperature) in [("greedy", 0.0), ("seeded", 1.0)] {
            let continued = continuations(&gpt, &prompts, CONTINUED, temperature, &streams)?;
            self.recorder.tensor(stage, Level::Tokens, name, &continued.ids)?;
            self.recorder.tensor(stage, Level::Margins, name, &continued.margins)?;
        }
        let config = common::generate::SamplingConfig::greedy(DECODED.1, Vec::new());
        // Once to compile and tune, once for the time.
        for timed in [false, true] {
            let clock = Instant::now();
            let answers = common::generate::generate(
                &gpt,
                &prompts,
                &config,
                &streams,
                0,
                common::generate::GenerateOptions::default(),
            )?;
            if timed {
                let n: usize = answers.iter().map(|answer| answer.ids.len()).sum();
                self.recorder.measure(stage, "decode_tokens_per_s", n as f64 / clock.elapsed().as_secs_f64())?;
            }
        }
        Ok(())
    }

    /// Scores of rows of all lengths.
    fn scores(&mut self) -> Result<()> {
        let stage = Stage::RewardModel;
        let checkpoint = Checkpoint::open(&self.parents.join(stage.to_string()))?;
        let model = self.runtime.scalar(&checkpoint)?;
        let rows = pretrain::first_windows(&self.pretrain_args(&[]), DECODED.0)?;
        let n = rows.len();
        let rows: Vec<&[u32]> = rows.iter().enumerate().map(|(i, row)| &row[..row.len() * (i + 1) / n]).collect();
        let scores = score_rows(&model, &rows, 4).context("failed to read the scores")?;
        self.recorder.numbers(stage, Level::Scores, "scores", scores)
    }

    /// One PPO iteration on the reference's answers.
    fn ppo(&mut self) -> Result<()> {
        let stage = Stage::Ppo;
        let args = ppo::TrainArgs {
            policy: self.parents.join(Stage::Sft.to_string()),
            reward_model: vec![self.parents.join(Stage::RewardModel.to_string())],
            stage: self.stage_args(stage, &[]),
        };
        let given = match &self.reference {
            None => None,
            Some(reference) => {
                let answers =
                    reference.entries.iter().filter(|entry| entry.stage == stage && entry.level == Level::Activations);
                Some(
                    answers
                        .map(|entry| entry.tensor.data.iter().map(|&id| id as u32).collect())
                        .collect::<Vec<Vec<u32>>>(),
                )
            }
        };
        let clock = Instant::now();
        // The divergence is from the pretrained model: from itself the policy is not divergent yet.
        let base = self.parents.join(Stage::Pretrain.to_string());
        let iteration = replay(&args, &base, N_ANSWERS, given.as_deref()).context("failed to iterate PPO")?;
        self.recorder.measure(stage, "iteration_s", clock.elapsed().as_secs_f64())?;
        if given.is_none() {
            for (i, answer) in iteration.responses.iter().enumerate() {
                let ids = answer.iter().map(|&id| id as f32).collect();
                self.recorder.numbers(stage, Level::Activations, &format!("answer {i}"), ids)?;
            }
        }
        for (name, numbers) in iteration.before {
            self.recorder.numbers(stage, Level::PpoIteration, name, numbers)?;
        }
        for (name, numbers) in iteration.losses {
            self.recorder.numbers(stage, Level::PpoUpdates, name, numbers)?;
        }
        self.recorder.numbers(stage, Level::PpoRatios, "ratio", iteration.ratio)
    }

    /// The most host memory so far, and what the device's pools hold now.
    fn memory(&mut self, step: Stage) -> Result<()> {
        const MIB: f64 = 1024.0 * 1024.0;
        self.recorder.measure(step, "peak_host_mib", kernels::memory::usage().peak_bytes as f64 / MIB)?;
        if let Some(usage) = self.runtime.device.memory_pool_usage() {
            self.recorder.measure(step, "device_mib", usage.bytes_reserved as f64 / MIB)?;
        }
        Ok(())
    }
}

/// The changes by training, tensor by tensor, the keys' biases left out.
///
/// Their gradient is zero: a constant added to all keys of a query cancels in the softmax. What is there instead is
/// rounding, which differs between backends and which AdamW makes as large as any other step.
fn change(after: &NamedTensors, before: &NamedTensors) -> NamedTensors {
    after
        .iter()
        .map(|(path, tensor)| {
            let mut data: Vec<f32> = tensor.data.iter().zip(&before[path].data).map(|(a, b)| a - b).collect();
            if path.ends_with("attention.qkv.bias") {
                let d_model = data.len() / 3;
                data[d_model..2 * d_model].fill(0.0);
            }
            (path.clone(), HostTensor { shape: tensor.shape.clone(), data })
        })
        .collect()
}
