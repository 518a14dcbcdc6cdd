//! Small worlds with models that have learned them: what a healthy run of PPO starts from.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use clap::Parser;
use common::checkpoint::{Stage, Weights};
use common::group::Group;
use common::interrupt::Interrupt;
use common::model::{Gpt, GptConfig};
use common::rng::{Rng, Streams};
use common::testing::save_weights;
use common::tokenizer::{Tokenizer, TokenizerConfig, TokenizerKind};
use serde_json::{Value, json};
use tempfile::TempDir;

/// What differs between set-ups.
#[derive(Clone)]
pub struct World {
    /// In failures.
    pub name: &'static str,
    /// What prompts ask for, one letter each.
    pub subjects: &'static str,
    /// What answers are filled with.
    pub letters: &'static str,
    /// Letters that follow the subject of a good answer.
    pub n_letters: std::ops::Range<usize>,
    /// Share of SFT's answers that are flawed.
    pub flawed: f64,
    pub tokenizer: TokenizerKind,
    pub model: fn(usize) -> GptConfig,
    pub seed: u64,
    pub lr: f64,
    pub sft_steps: usize,
    pub reward_steps: usize,
    pub temperature: f64,
    pub n_pairs: usize,
    pub n_held_out: usize,
}

/// `model` in a size that learns in seconds.
pub fn small(config: &GptConfig) -> GptConfig {
    GptConfig { d_model: 32, n_layers: 2, n_heads: 4, d_ff: 64, max_seq_len: 64, ..config.clone() }
}

pub const BASE: World = World {
    name: "base",
    subjects: "ab",
    letters: "stuvwxyz",
    n_letters: 3..6,
    flawed: 0.3,
    tokenizer: TokenizerKind::Char,
    model: |vocab_size| small(&GptConfig::llama(vocab_size)),
    seed: 1,
    lr: 3e-3,
    sft_steps: 110,
    reward_steps: 130,
    temperature: 1.0,
    n_pairs: 1500,
    n_held_out: 300,
};

/// A directory with data and models.
pub struct Setup {
    pub dir: TempDir,
    pub world: World,
}

impl World {
    fn one(text: &str, rng: &mut Rng) -> char {
        text.as_bytes()[rng.below(text.len())].into()
    }

    fn some(&self, n: usize, rng: &mut Rng) -> String {
        (0..n).map(|_| Self::one(self.letters, rng)).collect()
    }

    /// The subject, and letters of no meaning that make prompts differ.
    fn prompt(&self, subject: char, rng: &mut Rng) -> String {
        format!("{subject}{subject}{subject}{}?", self.some(3, rng))
    }

    fn subject(&self, rng: &mut Rng) -> char {
        Self::one(self.subjects, rng)
    }

    /// The subject, and a word of some letters.
    fn answer(&self, subject: char, rng: &mut Rng) -> String {
        let n = self.n_letters.start + rng.below(self.n_letters.len());
        format!("{subject}{subject}{}.", self.some(n, rng))
    }

    /// Of another subject, cut off, said twice, or empty.
    fn flawed(&self, subject: char, rng: &mut Rng) -> String {
        let answer = self.answer(subject, rng);
        match rng.below(12) {
            0..6 => {
                let other = loop {
                    let other = self.subject(rng);
                    if other != subject {
                        break other;
                    }
                };
                self.answer(other, rng)
            }
            6 | 7 => answer[..=rng.below(answer.len() - 2)].to_owned(),
            8..11 => format!("{answer} {answer}"),
            _ => String::new(),
        }
    }

    pub fn pair(&self, rng: &mut Rng) -> Value {
        let subject = self.subject(rng);
        let (prompt, chosen) = (self.prompt(subject, rng), self.answer(subject, rng));
        json!({ "prompt": prompt, "chosen": chosen, "rejected": self.flawed(subject, rng) })
    }

    fn conversation(&self, rng: &mut Rng) -> Value {
        let subject = self.subject(rng);
        let is_flawed = (rng.below(1000) as f64) < 1000.0 * self.flawed;
        let prompt = self.prompt(subject, rng);
        let flawed = Some(self.flawed(subject, rng)).filter(|answer| is_flawed && !answer.is_empty());
        let answer = flawed.unwrap_or_else(|| self.answer(subject, rng));
        json!({ "prompt": prompt, "completion": answer })
    }

    fn ask(&self, rng: &mut Rng) -> Value {
        let subject = self.subject(rng);
        json!({ "prompt": self.prompt(subject, rng) })
    }
}

impl Setup {
    /// Data, an SFT model and a reward model.
    pub fn new(world: World) -> Self {
        let setup = Self { dir: tempfile::tempdir().unwrap(), world };
        let world = &setup.world;
        let streams = Streams::new(world.seed);
        let write = |name: &str, n: usize, record: fn(&World, &mut Rng) -> Value| {
            let mut rng = streams.get(name, 0);
            setup.write(name, (0..n).map(|_| record(world, &mut rng)));
        };
        write("sft.train.jsonl", 2000, World::conversation);
        write("sft.val.jsonl", 20, World::conversation);
        write("pairs.train.jsonl", world.n_pairs, World::pair);
        write("pairs.val.jsonl", world.n_held_out, World::pair);
        write("prompts.jsonl", 200, World::ask);
        let config = TokenizerConfig { kind: world.tokenizer, vocab_size: 300, ..TokenizerConfig::default() };
        let text =
            std::fs::read_to_string(setup.path("sft.train.jsonl")).unwrap() + world.subjects + world.letters + " ?.";
        let tokenizer = Tokenizer::train(&config, text.lines(), true).unwrap();
        setup.save_untrained("base", &tokenizer, world.seed);
        setup.train_sft("sft", "sft.train.jsonl");
        setup.train_reward_model("rm", "pairs.train.jsonl");
        std::fs::write(setup.path("ppo.toml"), setup.ppo_config()).unwrap();
        setup
    }

    /// A language model that has learned nothing.
    pub fn save_untrained(&self, name: &str, tokenizer: &Tokenizer, seed: u64) {
        let config = (self.world.model)(tokenizer.vocab_size());
        let gpt = Gpt::new(&config, &Streams::new(seed), &Device::flex());
        save_weights(&self.path(name), Stage::Pretrain, tokenizer, Weights::Lm { named: gpt.to_named(), config });
    }

    pub fn train_sft(&self, out: &str, data: &str) {
        let config = format!(
            "seed = {}\n[data]\ntrain = [\"{data}\"]\nval = [\"sft.val.jsonl\"]\n[optimizer]\nlr = {}\n[train]\nsteps = {}\n\
             batch_size = 32\nn_samples = 0\n[run]\neval_every = 0\nsave_every = 0\n",
            self.world.seed, self.world.lr, self.world.sft_steps
        );
        let args = self.args("sft", &config, out, &["--init", "base"]);
        let sft::Command::Train(args) = sft::Cli::parse_from(args).command else { panic!("it trains") };
        sft::train(&args, &Group::alone(), Interrupt::never()).unwrap();
    }

    pub fn train_reward_model(&self, out: &str, data: &str) {
        let config = format!(
            "seed = {}\n[data]\ntrain = [\"{data}\"]\nval = [\"pairs.val.jsonl\"]\n[optimizer]\nlr = {}\n[train]\nsteps = {}\n\
             batch_size = 32\n[normalisation]\nsamples = 128\nmax_tokens = 24\ntemperature = {}\n[run]\neval_every = 0\nsave_every = 0\n",
            self.world.seed, self.world.lr, self.world.reward_steps, self.world.temperature
        );
        let args = self.args("reward-model", &config, out, &["--init", "sft"]);
        let reward_model::Command::Train(args) = reward_model::Cli::parse_from(args).command else {
            panic!("it trains")
        };
        reward_model::train(&args, &Group::alone(), Interrupt::never()).unwrap();
    }

    fn ppo_config(&self) -> String {
        format!(
            "seed = {}\n[data]\ntrain = [\"prompts.jsonl\"]\nval = [\"prompts.jsonl\"]\n[optimizer]\nlr = 3e-4\n[value_optimizer]\n\
             lr = 1e-3\n[train]\nsteps = 8\nbatch_size = 64\neval_prompts = 32\nn_samples = 0\n[ppo]\nresponse_length = 24\n\
             temperature = {}\n[run]\neval_every = 4\nsave_every = 0\n",
            self.world.seed, self.world.temperature
        )
    }

    /// The command line of `program train`, with paths of this directory.
    fn args(&self, program: &str, config: &str, out: &str, more: &[&str]) -> Vec<String> {
        let path = self.path(&format!("{program}-{out}.toml"));
        std::fs::write(&path, config).unwrap();
        let path = |name: &str| self.path(name).display().to_string();
        let mut args = vec![program.to_owned(), "train".to_owned(), "--config".to_owned()];
        args.extend([path(&format!("{program}-{out}.toml")), "--out".to_owned(), path(out)]);
        args.extend(more.iter().map(|arg| if arg.starts_with("--") { (*arg).to_owned() } else { path(arg) }));
        args
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, records: impl IntoIterator<Item = Value>) {
        let lines: Vec<String> = records.into_iter().map(|record| record.to_string()).collect();
        std::fs::write(self.path(name), lines.join("\n")).unwrap();
    }

    pub fn records(&self, name: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The report of `ppo doctor` with further flags; files among them are this directory's.
    pub fn examine(&self, more: &[&str]) -> ppo::doctor::Report {
        let path = |name: &str| self.path(name).display().to_string();
        let mut args: Vec<String> = vec!["ppo".to_owned(), "doctor".to_owned()];
        for (flag, name) in
            [("--policy", "sft"), ("--reward-model", "rm"), ("--data", "prompts.jsonl"), ("--config", "ppo.toml")]
        {
            let given = more.iter().position(|arg| *arg == flag).map(|i| more[i + 1]);
            args.extend([flag.to_owned(), path(given.unwrap_or(name))]);
        }
        let mut rest = more.iter();
        while let Some(flag) = rest.next() {
            let value = rest.next().unwrap();
            match *flag {
                "--policy" | "--reward-model" | "--data" | "--config" => {}
                "--set" => args.extend([(*flag).to_owned(), (*value).to_owned()]),
                _ => args.extend([(*flag).to_owned(), path(value)]),
            }
        }
        let ppo::Command::Doctor(args) = ppo::Cli::parse_from(args).command else { panic!("it examines") };
        ppo::doctor::examine(&args, Interrupt::never()).unwrap()
    }

    /// Trains by PPO, and stops at an alarm.
    pub fn train_ppo(&self, out: &str, more: &[&str]) -> anyhow::Result<()> {
        let path = |name: &str| self.path(name).display().to_string();
        let mut args = vec!["ppo".to_owned(), "train".to_owned()];
        for (flag, name) in [("--policy", "sft"), ("--reward-model", "rm"), ("--config", "ppo.toml"), ("--out", out)] {
            args.extend([flag.to_owned(), path(name)]);
        }
        args.extend(["--set", "ppo.on_alarm=stop"].iter().chain(more).map(ToString::to_string));
        let ppo::Command::Train(args) = ppo::Cli::parse_from(args).command else { panic!("it trains") };
        ppo::train(&args, &Group::alone(), Interrupt::never(), None).map(drop)
    }
}

/// Copies a directory of files, as a checkpoint without state is.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}
