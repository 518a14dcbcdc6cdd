//! Numbers on the command line and in configurations, through the programs: every numeric flag and every numeric key at its
//! extremes. A program ends with 0, 1 or 2, neither panics nor aborts nor runs out of memory, and no JSON that it writes has
//! a `null`.
//!
//! The flags are read from clap's definitions and the keys from the schemas, so that a new one is covered from its first day.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::any::TypeId;
use std::num::NonZeroUsize;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::CommandFactory;
use common::checkpoint::Stage;
use common::config::{Kind, Section, sections};
use common::testing::{byte_tokenizer, save_tiny};
use pipeline_tests::{DPO, Lab, PPO, PRETRAIN, REWARD_MODEL, SFT};
use serde_json::Value;

/// What a flag that takes a number is tried with.
const VALUES: [&str; 10] = [
    "0",
    "-1",
    "0.5",
    "1e-300",
    "1e308",
    "NaN",
    "inf",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
];

/// A run longer than this hangs, unless the number asks for it.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a run may go on that was asked for a great deal of work: long enough to see it start.
const GLIMPSE: Duration = Duration::from_secs(1);

/// Address space of a program in KiB: more would be an allocation that no small input justifies.
const ADDRESS_SPACE: &str = "8388608";

/// Flags and keys whose number is an amount of work: a large one is carried out, however long it takes.
const AMOUNTS: [&str; 17] = [
    "n_layers",
    "rank",
    "max_seq_len",
    "steps",
    "warmup",
    "epochs",
    "ppo-epochs",
    "batch",
    "batches",
    "batch_size",
    "samples",
    "stories",
    "gen",
    "prefill",
    "minibatches",
    "minibatch",
    "mini-batches",
];

/// Each command that takes numbers, by the words that lead to it, with the least it needs otherwise.
const COMMANDS: [(&str, &[&str], &str); 21] = [
    ("pretrain", &["tokenizer"], "--config configs/pretrain.toml --out out --overwrite"),
    ("pretrain", &["eval"], "--checkpoint base --data data/val.txt"),
    ("sft", &["eval"], "--checkpoint sft --data data/sft.val.jsonl"),
    ("reward-model", &["eval"], "--checkpoint reward --data data/pairs.val.jsonl"),
    ("reward-model", &["score"], "--checkpoint reward --data data/pairs.val.jsonl"),
    (
        "reward-model",
        &["label"],
        "--policy sft --prompts data/prompts.val.jsonl --by gold --max-tokens 8 --out labels.jsonl",
    ),
    (
        "ppo",
        &["eval"],
        "--checkpoint sft --reference sft --reward-model reward --data data/prompts.val.jsonl --max-tokens 8",
    ),
    ("dpo", &["eval"], "--checkpoint sft --reference sft --data data/pairs.val.jsonl"),
    ("chat", &[], "--checkpoint sft"),
    ("chat", &["generate"], "--checkpoint sft --prompt hi --json"),
    // It would serve until it is stopped.
    ("chat", &["serve"], "--checkpoint no-such-model"),
    ("recipe", &["run"], "no-such-recipe --out out"),
    ("recipe", &["plan"], "tiny"),
    ("recipe", &["compare"], "no-such-recipe --backends flex"),
    ("recipe", &["duel"], "sft sft --prompts data/prompts.val.jsonl --reward-model reward --max-tokens 8"),
    ("recipe", &["overoptimise"], "no-such-recipe --out out"),
    ("recipe", &["world"], "--out out --overwrite"),
    ("recipe", &["bench", "train"], "--steps 1 --warmup 1 --n-layers 1 --d-model 16 --n-heads 2 --ctx 16 --vocab 64"),
    (
        "recipe",
        &["bench", "generate"],
        "--steps 1 --n-layers 1 --d-model 16 --n-heads 2 --ctx 16 --vocab 64 --prefill 4 --gen 4",
    ),
    ("recipe", &["bench", "ppo"], "--n-layers 1 --d-model 16 --n-heads 2 --vocab 64"),
    ("recipe", &["bench", "gemm"], ""),
];

/// The program's command line as clap knows it.
fn definition(program: &str) -> clap::Command {
    match program {
        "pretrain" => pretrain::Cli::command(),
        "sft" => sft::Cli::command(),
        "reward-model" => reward_model::Cli::command(),
        "ppo" => ppo::Cli::command(),
        "dpo" => dpo::Cli::command(),
        "chat" => chat::Cli::command(),
        _ => recipe::Cli::command(),
    }
}

/// Whether `arg` takes numbers.
fn is_number(arg: &clap::Arg) -> bool {
    let types = [
        TypeId::of::<u64>(),
        TypeId::of::<usize>(),
        TypeId::of::<f64>(),
        TypeId::of::<u32>(),
        TypeId::of::<NonZeroUsize>(),
    ];
    arg.get_action().takes_values() && types.iter().any(|id| arg.get_value_parser().type_id() == *id)
}

/// The numeric flags of a command, by the words that lead to it.
fn numeric_flags(command: &clap::Command, words: &[&str], into: &mut Vec<(Vec<String>, String)>) {
    let words: Vec<&str> = words.to_vec();
    for arg in command.get_arguments().filter(|arg| is_number(arg)) {
        into.push((words.iter().map(ToString::to_string).collect(), format!("--{}", arg.get_long().unwrap())));
    }
    for inner in command.get_subcommands().filter(|inner| !inner.is_hide_set()) {
        numeric_flags(inner, &[&words[..], &[inner.get_name()]].concat(), into);
    }
}

/// A lab with an untrained checkpoint of every stage.
fn models() -> Lab {
    let lab = Lab::new();
    let tokenizer = byte_tokenizer();
    tokenizer.save(&lab.path("tokenizer")).unwrap();
    save_tiny(&lab.path("base"), Stage::Pretrain, &tokenizer, 1);
    save_tiny(&lab.path("sft"), Stage::Sft, &tokenizer, 2);
    save_tiny(&lab.path("reward"), Stage::RewardModel, &tokenizer, 3);
    lab
}

/// Runs a program on one thread in a limited address space. A fault is the text that says what went wrong.
fn fault(lab: &Lab, program: &str, args: &[String], amount: bool) -> Option<String> {
    let limited = Command::new("sh");
    let binary = pipeline_tests::binary(program).display().to_string();
    let script = format!("ulimit -v {ADDRESS_SPACE}; exec \"$0\" \"$@\"");
    let threads =
        if args.iter().any(|arg| arg == "--threads") || args[0] == "world" { vec![] } else { vec!["--threads", "1"] };
    let words: Vec<&str> =
        ["-c", &script, &binary].into_iter().chain(args.iter().map(String::as_str)).chain(threads).collect();
    let mut command = lab.within(limited, &words);
    let (out, err) = (lab.path("stdout"), lab.path("stderr"));
    let file = |path: &Path| Stdio::from(std::fs::File::create(path).unwrap());
    let mut child = command.stdin(Stdio::null()).stdout(file(&out)).stderr(file(&err)).spawn().unwrap();
    let patience = if amount { GLIMPSE } else { PATIENCE };
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if start.elapsed() > patience {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let stderr = String::from_utf8_lossy(&std::fs::read(&err).unwrap()).into_owned();
    let tail = stderr.lines().rev().take(6).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
    let says = |what: &str| Some(format!("`{program} {}`: {what}\n{tail}", args.join(" ")));
    match status {
        None if amount => None,
        None => says("runs on and on"),
        Some(_) if stderr.contains("panicked") => says("panicked"),
        Some(status) if !matches!(status.code(), Some(0..=2)) => says(&format!("{status}")),
        Some(status) if status.code() != Some(0) && !stderr.contains("error: ") => says("fails without a word"),
        Some(_) => bad_json(lab).and_then(|bad| says(&bad)),
    }
}

/// A `null` in the result or the files of a run.
fn bad_json(lab: &Lab) -> Option<String> {
    let mut files = vec![lab.path("stdout")];
    for name in ["metrics.jsonl", "samples.jsonl", "manifest.json"] {
        files.push(lab.path("out").join(name));
    }
    for path in files {
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        let documents = serde_json::Deserializer::from_str(&text).into_iter::<Value>().map_while(Result::ok);
        if documents.into_iter().any(|document| has_null(&document)) {
            return Some(format!("`{}` has a null", lab.relative(&path.display().to_string())));
        }
    }
    None
}

fn has_null(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.iter().any(has_null),
        Value::Object(fields) => fields.values().any(has_null),
        _ => false,
    }
}

#[track_caller]
fn assert_no_faults(faults: &[String]) {
    assert!(faults.is_empty(), "{} faults:\n\n{}", faults.len(), faults.join("\n\n"));
}

#[test]
fn every_numeric_flag_at_its_extremes() {
    let lab = models();
    let mut faults = Vec::new();
    let mut seen_threads = false;
    for program in ["pretrain", "sft", "reward-model", "ppo", "dpo", "chat", "recipe"] {
        let mut flags = Vec::new();
        numeric_flags(&definition(program), &[], &mut flags);
        for (words, flag) in flags {
            // Training commands are tried with their configurations' numbers below; their only number is `--threads`.
            if flag == "--threads" && std::mem::replace(&mut seen_threads, true) {
                continue;
            }
            let command = COMMANDS.iter().find(|(name, path, _)| *name == program && **path == *words);
            let (_, path, rest) =
                command.unwrap_or_else(|| panic!("`{program} {}` is not in COMMANDS", words.join(" ")));
            for value in VALUES {
                let mut args: Vec<String> =
                    path.iter().copied().chain(rest.split_whitespace()).map(str::to_owned).collect();
                if let Some(at) = args.iter().position(|arg| *arg == flag) {
                    args.drain(at..at + 2);
                }
                args.push(format!("{flag}={value}"));
                let amount = AMOUNTS.contains(&flag.trim_start_matches('-'));
                faults.extend(fault(&lab, program, &args, amount));
            }
        }
    }
    assert_no_faults(&faults);
}

/// A stage's configuration with every numeric key of `sections` at the ends of its range and one beyond each.
fn try_keys(stage: pipeline_tests::Stage, sections: &[Section], small: &[&str]) {
    let lab = models();
    let mut faults = Vec::new();
    for section in sections {
        for key in &section.keys {
            let values: Vec<String> = match &key.kind {
                Kind::Integer { min, max } => vec![min.to_string(), max.to_string()],
                Kind::Number(interval) => interval
                    .ends()
                    .into_iter()
                    .flatten()
                    .flat_map(|end| [end, end.next_up(), end.next_down()].map(|x| format!("{x:e}")))
                    .collect(),
                _ => continue,
            };
            for value in values {
                let path = section.dotted(key);
                let set: Vec<String> =
                    small.iter().map(ToString::to_string).chain([format!("{path}={value}")]).collect();
                let mut args = stage.train("out", &["-q", "--overwrite"]);
                args.extend(set.into_iter().flat_map(|set| ["--set".to_owned(), set]));
                faults.extend(fault(&lab, stage.program, &args, AMOUNTS.contains(&key.name.as_str())));
            }
        }
    }
    assert_no_faults(&faults);
}

#[test]
fn keys_of_pretraining_at_the_ends_of_their_range() {
    try_keys(PRETRAIN, &sections::<pretrain::PretrainConfig>(), &["train.steps=1", "train.batch_size=1"]);
}

#[test]
fn keys_of_fine_tuning_at_the_ends_of_their_range() {
    try_keys(SFT, &sections::<sft::SftConfig>(), &["train.steps=1", "train.batch_size=1"]);
}

#[test]
fn keys_of_reward_models_at_the_ends_of_their_range() {
    let small = ["train.steps=1", "train.batch_size=1", "normalisation.samples=2"];
    try_keys(REWARD_MODEL, &sections::<reward_model::RewardModelConfig>(), &small);
}

#[test]
fn keys_of_ppo_at_the_ends_of_their_range() {
    let small = ["train.steps=1", "train.batch_size=2", "ppo.minibatches=1", "ppo.epochs=1", "ppo.response_length=4"];
    try_keys(PPO, &sections::<ppo::PpoConfig>(), &small);
}

#[test]
fn keys_of_dpo_at_the_ends_of_their_range() {
    try_keys(DPO, &sections::<dpo::DpoConfig>(), &["train.steps=1", "train.batch_size=1"]);
}
