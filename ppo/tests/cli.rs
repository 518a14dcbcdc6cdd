//! The command `ppo` from outside: training, resuming, evaluating, and what it says when it cannot.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

mod support;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use common::checkpoint::Stage;
use common::testing::{assert_close, assert_snapshot, run, save_tiny};
use common::tokenizer::{Tokenizer, TokenizerConfig, TokenizerKind};
use serde_json::{Value, json};

use support::{PROGRAM, TRAIN, ends_with_the_same_bytes_after_a_kill, lines, metrics, train, workplace};

#[test]
fn training_writes_the_policy_the_value_model_every_metric_and_every_rollout() {
    let dir = workplace();
    let (code, stdout, stderr) = train(dir.path(), "out", &[]);
    assert_eq!((code, stdout.as_str()), (0, ""), "{stderr}");
    let out = dir.path().join("out");
    for file in ["model.safetensors", "config.json", "tokenizer.json", "value/model.safetensors", "value/config.json"] {
        assert!(out.join(file).is_file(), "{file}");
    }

    let steps: Vec<Value> = lines(&out.join("metrics.jsonl"));
    let trained: Vec<&Value> = steps.iter().filter(|line| line["objective/kl"].is_f64()).collect();
    assert_eq!(trained.len(), 6);
    for name in [
        "objective/kl",
        "objective/kl_coef",
        "objective/entropy",
        "objective/score",
        "objective/rlhf_reward",
        "objective/non_score_reward",
        "policy/loss",
        "policy/approx_kl",
        "policy/clip_frac",
        "policy/ratio_mean",
        "policy/ratio_max",
        "policy/entropy",
        "value/loss",
        "value/clip_frac",
        "value/explained_variance",
        "rollout/response_length",
        "rollout/eos_rate",
        "timing/rollout",
        "timing/score",
        "timing/update",
        "train/lr",
    ] {
        assert!(trained.iter().all(|line| line[name].is_f64()), "{name} in {:?}", trained[0]);
    }
    // The initial policy is the reference, so the first rollouts have diverged by nothing but rounding.
    assert!(trained[0]["objective/kl"].as_f64().unwrap().abs() < 1e-3, "{:?}", trained[0]);
    assert_eq!(trained[0]["objective/kl_coef"].as_f64().map(|beta| beta as f32), Some(0.05));
    let held_out: Vec<u64> =
        steps.iter().filter(|line| line["val/score"].is_f64()).map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(held_out, [0, 3, 6]);
    assert_eq!(lines(&out.join("samples.jsonl")).len(), 6);

    let rollouts = lines(&out.join("rollouts.jsonl"));
    assert_eq!(rollouts.len(), 6 * 8);
    let first: Vec<&Value> = rollouts.iter().filter(|line| line["step"] == 1).collect();
    let mean = |name: &str| first.iter().map(|line| line[name].as_f64().unwrap()).sum::<f64>() / 8.0;
    assert!((mean("score") - trained[0]["objective/score"].as_f64().unwrap()).abs() < 1e-9);
    assert!((mean("length") - trained[0]["rollout/response_length"].as_f64().unwrap()).abs() < 1e-9);
    assert!((mean("kl") - trained[0]["objective/kl"].as_f64().unwrap()).abs() < 1e-9);
    for line in &rollouts {
        // A response that was cut off counts with the configured score.
        assert!(line["finish"] == "stop" || line["score"] == -1.0, "{line}");
    }
}

#[test]
fn a_killed_and_resumed_run_ends_with_the_same_bytes() {
    ends_with_the_same_bytes_after_a_kill(&[], true);
}

#[test]
fn a_killed_and_resumed_run_without_a_value_model_ends_with_the_same_bytes() {
    let grouped = ["--set", "ppo.samples_per_prompt=4"];
    for estimator in ["ppo.estimator=rloo", "ppo.estimator=grpo"] {
        ends_with_the_same_bytes_after_a_kill(&[&grouped[..], &["--set", estimator]].concat(), false);
    }
}

#[test]
fn a_killed_and_resumed_run_of_another_dialect_ends_with_the_same_bytes() {
    for dialect in ["ppo.dialect=lm-human-preferences", "ppo.dialect=trl"] {
        let batch = ["--set", "train.batch_size=16", "--set", "ppo.missing_eos_score=-2"];
        ends_with_the_same_bytes_after_a_kill(&[&batch[..], &["--set", dialect]].concat(), true);
    }
}

/// A learning rate that no policy survives.
const TOO_HIGH: [&str; 4] = ["--set", "optimizer.lr=1.0", "--set", "train.steps=4"];

#[test]
fn an_alarm_warns_with_number_and_limit_or_saves_and_stops_and_changes_no_byte() {
    let dir = workplace();
    let (code, _, stderr) = train(dir.path(), "warned", &TOO_HIGH);
    assert_eq!(code, 0, "{stderr}");
    let line =
        stderr.lines().find(|line| line.contains("alarm `approx-kl` at step 1")).unwrap_or_else(|| panic!("{stderr}"));
    assert!(line.contains("`policy/approx_kl` is ") && line.contains("limit 0.250 (stage ppo)"), "{line}");
    assert!(line.contains("Lower `optimizer.lr`"), "{line}");
    let stop = [&TOO_HIGH[..], &["--set", "ppo.on_alarm=stop"]].concat();
    let (code, _, stderr) = train(dir.path(), "stopped", &stop);
    assert_eq!(code, 1, "{stderr}");
    let error = &stderr[stderr.find("error: ").unwrap_or_else(|| panic!("{stderr}"))..];
    assert!(error.starts_with("error: alarm `") && error.contains("`ppo.on_alarm` is \"stop\""), "{error}");
    assert!(error.contains("\nhint: "), "{error}");
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("stopped/manifest.json")).unwrap()).unwrap();
    assert_eq!((&manifest["step"], &manifest["finished"]), (&json!(1), &json!(false)));

    // Resuming goes on past the alarms that were heard, and ends as the run that was only warned.
    let (code, _, stderr) =
        train(dir.path(), "stopped", &[&stop[..], &["--resume", "--set", "ppo.on_alarm=warn"]].concat());
    assert_eq!(code, 0, "{stderr}");
    assert!(!stderr.contains("alarm `approx-kl` at step 1"), "{stderr}");
    for file in ["model.safetensors", "value/model.safetensors", "rollouts.jsonl"] {
        let [a, b] = ["warned", "stopped"].map(|out| std::fs::read(dir.path().join(out).join(file)).unwrap());
        assert!(a == b, "{file} differs");
    }
    assert_eq!(metrics(&dir.path().join("warned")), metrics(&dir.path().join("stopped")));
}

#[test]
fn micro_batches_add_up_to_the_minibatch() {
    let dir = workplace();
    let last = |micro: usize| {
        let out = format!("micro-{micro}");
        let micro = format!("train.micro_batch_size={micro}");
        let (code, _, stderr) = train(dir.path(), &out, &["--set", &micro, "--set", "train.steps=1"]);
        assert_eq!(code, 0, "{stderr}");
        metrics(&dir.path().join(&out)).into_iter().find(|line| line["policy/loss"].is_f64()).unwrap()
    };
    let (small, large) = (last(1), last(4));
    for name in
        ["policy/loss", "policy/approx_kl", "policy/clip_frac", "policy/entropy", "value/loss", "value/clip_frac"]
    {
        let [a, b] = [&small, &large].map(|line| line[name].as_f64().unwrap());
        // Four updates of float rounding in another order.
        assert!((a - b).abs() < 1e-4 * b.abs().max(1.0), "{name}: {a} {b}");
    }
}

#[test]
fn evaluation_of_the_reference_itself_is_a_draw() {
    let dir = workplace();
    let args = ["eval", "--checkpoint", "sft", "--reference", "sft", "--reward-model", "rm", "--data", "val.jsonl"];
    let (code, stdout, stderr) = run(PROGRAM, &[&args[..], &["--max-tokens", "12"]].concat(), dir.path());
    assert_eq!(code, 0, "{stderr}");
    let result: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((&result["prompts"], &result["win_rate"]), (&json!(10), &json!(0.5)), "{result}");
    assert_eq!(result["score_mean"], result["score_reference_mean"], "{result}");
    assert!(result["kl_mean"].as_f64().unwrap().abs() < 1e-3, "{result}");
    for name in ["score_mean", "score_reference_mean", "win_rate", "kl_mean", "length_mean", "eos_rate"] {
        let (x, interval) = (result[name].as_f64().unwrap(), &result[format!("{name}_interval")]);
        assert!(interval[0].as_f64().unwrap() <= x && x <= interval[1].as_f64().unwrap(), "{name} in {result}");
    }
}

#[test]
fn help_and_version_are_as_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let mut all = String::new();
    for command in ["", "train", "eval", "doctor", "dialects", "oracle"] {
        let args: Vec<&str> = command.split(' ').filter(|command| !command.is_empty()).chain(["--help"]).collect();
        let args = args.as_slice();
        let (code, stdout, _) = run(PROGRAM, args, dir.path());
        assert_eq!(code, 0, "{args:?}");
        write!(all, "$ ppo {}\n{stdout}\n", args.join(" ")).unwrap();
    }
    assert_snapshot(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/help.txt"), &all);
    let version = run(PROGRAM, &["--version"], dir.path()).1;
    assert_eq!(version, concat!("ppo ", env!("CARGO_PKG_VERSION"), "\n"));
    assert_eq!(run(PROGRAM, &["train", "--out", "x"], dir.path()).0, 2, "wrong usage");
}

#[test]
fn errors_name_what_is_wrong_and_what_to_do() {
    let dir = workplace();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("long.jsonl"), json!({ "prompt": "q".repeat(60) }).to_string()).unwrap();
    let config = TokenizerConfig { kind: TokenizerKind::Char, ..TokenizerConfig::default() };
    let other = Tokenizer::train(&config, ["abc"].into_iter(), true).unwrap();
    save_tiny(&path("other"), Stage::RewardModel, &other, 5);
    std::fs::write(path("empty.jsonl"), "").unwrap();
    std::fs::write(path("bad.jsonl"), "{\"prompt\": \"q\"}\n{\"question\": \"q\"}\n").unwrap();
    let train = |more: &[&'static str]| [&TRAIN[..], &["--out", "out"], more].concat();
    let with = |policy: &'static str, reward_model: &'static str| {
        vec!["train", "--config", "config.toml", "--policy", policy, "--reward-model", reward_model, "--out", "out"]
    };
    let eval = ["eval", "--checkpoint", "sft", "--reference", "sft", "--reward-model", "rm", "--data", "val.jsonl"];
    let cases = [
        with("rm", "rm"),
        with("sft", "sft"),
        with("nowhere", "rm"),
        with("sft", "other"),
        train(&["--set", "ppo.kl_coeff=1"]),
        train(&["--set", "ppo.minibatches=3"]),
        train(&["--set", "train.micro_batch_size=3"]),
        train(&["--set", "ppo.lambda=1.5"]),
        train(&["--set", "ppo.kl_target=0"]),
        train(&["--set", "ppo.dialect=trlx"]),
        train(&["--set", "ppo.estimator=rloo"]),
        train(&["--set", "ppo.kl_place=loss"]),
        train(&["--set", "ppo.ptx_coef=27.8"]),
        train(&["--set", "optimizer.lr=-1"]),
        train(&["--set", "data.train=[]"]),
        train(&["--set", "data.train=['nowhere.jsonl']"]),
        train(&["--set", "data.train=['empty.jsonl']"]),
        train(&["--set", "data.train=['bad.jsonl']"]),
        train(&["--set", "data.train=['long.jsonl']"]),
        train(&["--set", "data.train=['long.jsonl']", "--set", "data.on_too_long=skip"]),
        train(&["--resume"]),
        [&eval[..], &["--temperature", "0"]].concat(),
        vec!["oracle", "--vectors", "nowhere.json"],
        vec!["oracle", "--vectors", "val.jsonl"],
    ];
    let mut all = String::new();
    for args in cases {
        let (code, stdout, stderr) = run(PROGRAM, &args, dir.path());
        // A flag's value that makes no sense is wrong usage, everything else a failure.
        let expected = if args.contains(&"--temperature") { 2 } else { 1 };
        assert_eq!((code, stdout.as_str()), (expected, ""), "{args:?}: {stderr}");
        let error = &stderr[stderr.find("error: ").unwrap_or(0)..];
        write!(all, "$ ppo {}\n{error}\n", args.join(" ")).unwrap();
        std::fs::remove_dir_all(path("out")).ok();
    }
    assert_snapshot(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/errors.txt"), &all);
}

#[test]
fn a_moving_average_of_the_policy_is_handed_on_and_resumed() {
    let dir = workplace();
    let (code, _, stderr) = train(dir.path(), "out", &["--set", "ppo.policy_ema=0.75", "--set", "train.steps=1"]);
    assert_eq!(code, 0, "{stderr}");
    let tensors = |file: &str| safetensors(&dir.path().join(file));
    let (initial, last) = (tensors("sft/model.safetensors"), tensors("out/model.safetensors"));
    let (code, _, stderr) = train(dir.path(), "plain", &["--set", "train.steps=1"]);
    assert_eq!(code, 0, "{stderr}");
    for (name, trained) in tensors("plain/model.safetensors") {
        let expected: Vec<f32> = initial[&name].iter().zip(&trained).map(|(a, b)| 0.75 * a + 0.25 * b).collect();
        assert_close(&last[&name], &expected, 1e-6);
    }
    ends_with_the_same_bytes_after_a_kill(&["--set", "ppo.policy_ema=0.75", "--set", "run.keep_best=true"], true);
}

/// The tensors of a file, flat.
fn safetensors(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let (model, ..) = common::hf::read(path.parent().unwrap()).unwrap();
    model.tensors.into_iter().map(|(name, tensor)| (name, tensor.data)).collect()
}

#[test]
fn the_resolved_configuration_shows_every_switch_of_the_dialect() {
    let dir = workplace();
    let set = ["--set", "ppo.dialect=verl", "--set", "ppo.dual_clip=4", "--print-config"];
    let (code, printed, stderr) = train(dir.path(), "out", &set);
    assert_eq!(code, 0, "{stderr}");
    let (code, listed, _) = run(PROGRAM, &["dialects", "--json"], dir.path());
    assert_eq!(code, 0);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    for row in listed["switches"].as_array().unwrap() {
        let name = row["switch"].as_str().unwrap();
        let cell = &row["dialects"]["verl"];
        assert!(!cell["source"].as_str().unwrap().is_empty());
        let value = if name == "dual_clip" { json!(4.0) } else { cell["value"].clone() };
        assert!(printed.contains(&format!("\n{name} = {value}\n")), "{name} = {value} is not in\n{printed}");
    }
    let (code, text, _) = run(PROGRAM, &["dialects"], dir.path());
    assert_eq!(code, 0);
    assert!(text.contains("  deepspeed-chat        5.0             rlhf/ppo_trainer.py:67\n"), "{text}");
}

#[test]
fn the_oracle_passes_and_fails_by_the_recorded_numbers() {
    let dir = workplace();
    let (code, stdout, stderr) = run(PROGRAM, &["oracle"], dir.path());
    assert_eq!(code, 0, "{stdout}{stderr}");
    let lines: Vec<&str> = stdout.lines().collect();
    let (last, equations) = lines.split_last().unwrap();
    assert!(equations.len() > 200 && equations.iter().all(|line| line.starts_with("pass  ")), "{stdout}");
    assert_eq!(*last, format!("{0} of {0} pass", equations.len()));

    let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/dialects.json");
    let mut vectors: Value = serde_json::from_slice(&std::fs::read(recorded).unwrap()).unwrap();
    let value_loss = &mut vectors["dialects"]["trl"]["cases"]["short"]["value_loss"];
    *value_loss = json!(value_loss.as_f64().unwrap() * 1.001);
    std::fs::write(dir.path().join("vectors.json"), vectors.to_string()).unwrap();
    let (code, stdout, stderr) = run(PROGRAM, &["oracle", "--vectors", "vectors.json", "--json"], dir.path());
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("1 of ") && stderr.contains("`value loss` of dialect `trl`"), "{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["passed"], false);
    let failed: Vec<&Value> =
        report["equations"].as_array().unwrap().iter().filter(|equation| equation["passed"] == false).collect();
    assert_eq!((failed.len(), &failed[0]["equation"], &failed[0]["case"]), (1, &json!("value loss"), &json!("short")));
    let only = ["oracle", "--vectors", "vectors.json", "--dialect", "openrlhf"];
    assert_eq!(run(PROGRAM, &only, dir.path()).0, 0);
}

#[cfg(unix)]
#[test]
fn a_reader_that_has_had_enough_is_no_error() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = std::process::Command::new(PROGRAM).arg("oracle").stdout(writer).output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8(output.stderr).unwrap()), (Some(0), String::new()));
}

#[test]
fn a_ratio_that_is_not_one_stops_the_run_with_a_diagnosis() {
    let dir = workplace();
    let (code, _, stderr) = train(dir.path(), "out", &["--set", "ppo.ratio_tolerance=1e-12"]);
    assert_eq!(code, 1, "{stderr}");
    // The numbers are rounding, which differs between processors.
    for text in [
        "error: before any update the policy gives a sampled token",
        "times the probability it was sampled with",
        "\nhint: ",
    ] {
        assert!(stderr.contains(text), "{text} in {stderr}");
    }
    assert!(!dir.path().join("out/manifest.json").exists());
}

#[test]
fn a_damaged_configuration_is_an_error_and_not_another_temperature() {
    let dir = workplace();
    let (code, _, stderr) = train(dir.path(), "out", &["--set", "train.steps=1"]);
    assert_eq!(code, 0, "{stderr}");
    let config = dir.path().join("out/config.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("[ppo]", "[ppo]\ntemprature = 0.5")).unwrap();
    let args = ["eval", "--checkpoint", "out", "--reference", "sft", "--reward-model", "rm", "--data", "val.jsonl"];
    let (code, stdout, stderr) = run(PROGRAM, &args, dir.path());
    assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
    assert!(stderr.contains("`temprature`") && stderr.contains("config.toml"), "{stderr}");
}
