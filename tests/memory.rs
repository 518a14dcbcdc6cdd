//! Memory: what `recipe plan` says a run needs is what it takes, what a machine does not have is refused before weights are
//! read, and activations that are not kept take none.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::process::{Child, Stdio};
use std::time::Duration;

use pipeline_tests::{DPO, Lab, PPO, REWARD_MODEL, SFT, Stage};
use serde_json::Value;

/// How far a plan may be from what a run took: it counts tensors, not the pieces that an allocator makes of memory.
const TOLERANCE: f64 = 0.15;

const MIB: f64 = (1_u64 << 20) as f64;

/// Of all runs: short, but of models of 20 to 40 MB, which dominate what the program itself takes.
const SHORT: [&str; 4] = ["run.eval_every=0", "run.save_every=0", "run.log_every=1", "train.steps=2"];
const MODEL: [&str; 4] = ["model.d_model=384", "model.n_layers=4", "model.n_heads=6", "model.max_seq_len=128"];
const PRETRAINING: [&str; 5] =
    ["train.batch_size=4", "train.seq_len=128", "train.eval_windows=4", "train.sample_tokens=4", "model.dropout=0.0"];

fn flags(settings: &[&str]) -> Vec<String> {
    settings.iter().flat_map(|setting| ["--set".to_owned(), (*setting).to_owned()]).collect()
}

/// Runs a training command and returns the most memory it had, in MiB.
fn peak_of(lab: &Lab, program: &str, args: &[String]) -> f64 {
    let output = lab.run(program, &[args, &["-v".to_owned()]].concat());
    assert!(output.status.success(), "{program} {args:?}: {}", output.stderr);
    let (before, _) = output.stderr.split_once(" MiB of memory at most").expect("the run says what it took");
    before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

fn pretrain(lab: &Lab, out: &str, settings: &[&str]) -> f64 {
    let fixed = ["train", "--config", "configs/pretrain.toml", "--tokenizer", "tokenizer", "--out", out];
    let args = [fixed.map(str::to_owned).to_vec(), flags(settings)].concat();
    peak_of(lab, "pretrain", &args)
}

/// The peak that `recipe plan` expects of a stage, in MiB.
fn planned(lab: &Lab, recipe: &str, stage: &str, settings: &[&str]) -> f64 {
    let settings: Vec<String> = settings.iter().map(|setting| format!("{stage}.{setting}")).collect();
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let args = [["plan", recipe, "--out", ".", "--json"].map(str::to_owned).to_vec(), flags(&settings)].concat();
    let plan: Value = serde_json::from_str(&lab.ok("recipe", &args)).unwrap();
    plan["stages"][stage]["peak"].as_f64().unwrap() / MIB
}

fn assert_near(what: &str, planned: f64, taken: f64) {
    let off = planned / taken - 1.0;
    assert!(off.abs() <= TOLERANCE, "{what}: {planned:.0} MiB were planned, {taken:.0} taken ({:+.0} %)", 100.0 * off);
}

fn lab() -> Lab {
    let lab = Lab::before(pipeline_tests::PRETRAIN);
    // A recipe's files are those of the stages.
    for stage in ["pretrain", "sft", "reward-model", "ppo", "dpo"] {
        let text = String::from_utf8(lab.bytes(&format!("configs/{stage}.toml"))).unwrap();
        lab.write(&format!("recipe/{stage}.toml"), text);
    }
    lab.write("recipe/recipe.toml", "title = \"Memory\"\nstages = [\"pretrain\"]\n");
    lab.write(
        "later/recipe.toml",
        "title = \"Memory\"\ninit = \"../base\"\nstages = [\"sft\", \"reward-model\", \"ppo\", \"dpo\"]\n",
    );
    for stage in ["sft", "reward-model", "ppo", "dpo"] {
        lab.write(&format!("later/{stage}.toml"), lab.bytes(&format!("configs/{stage}.toml")));
    }
    lab
}

#[test]
fn a_plan_is_what_a_run_takes() {
    let lab = lab();
    let families: [(&str, &[&str]); 4] = [
        ("gpt2", &[]),
        ("gpt-neox", &["train.checkpoint_activations=true"]),
        ("qwen3", &["train.micro_batch_size=2"]),
        ("llama", &[]),
    ];
    for (preset, more) in families {
        let preset_key = format!("model.preset=\"{preset}\"");
        let settings = [&SHORT[..], &MODEL, &PRETRAINING, more, &[&preset_key]].concat();
        let planned = planned(&lab, "recipe", "pretrain", &settings);
        let out = if preset == "llama" { "base" } else { preset };
        assert_near(preset, planned, pretrain(&lab, out, &settings));
    }
    let text = ["ppo.epochs=1", "ppo.ptx_coef=1.0", "ptx.batch_size=32", "ptx.data.train=['../data/train.txt']"];
    let stages: [(Stage, &[&str]); 6] = [
        (SFT, &["model.dropout=0.0", "lora.rank=8"]),
        (SFT, &["model.dropout=0.0"]),
        (REWARD_MODEL, &["model.dropout=0.0", "normalisation.samples=4"]),
        (PPO, &["ppo.epochs=1"]),
        (PPO, &text),
        (DPO, &[]),
    ];
    for (stage, more) in stages {
        let settings = [&SHORT[..], more].concat();
        let planned = planned(&lab, "later", stage.program, &settings);
        let args = [stage.train(stage.out, &["--overwrite"]), flags(&settings)].concat();
        assert_near(stage.program, planned, peak_of(&lab, stage.program, &args));
    }
}

#[test]
fn a_model_is_in_memory_once_while_it_answers_and_is_merged() {
    let lab = lab();
    // 100 MB of weights, of which a second copy would show, in the layout of a class that has them in another order.
    let settings = ["model.preset=\"llama\"", "model.d_model=768", "model.n_layers=4", "model.n_heads=12"];
    let short = ["train.steps=1", "train.batch_size=1", "train.seq_len=32", "train.eval_windows=1", "run.eval_every=0"];
    pretrain(&lab, "base", &[&SHORT[..3], &settings, &short].concat());
    let weights = std::fs::metadata(lab.path("base/model.safetensors")).unwrap().len() as f64 / MIB;
    assert!(weights > 90.0, "{weights}");
    let adapted =
        [SFT.train("sft", &[]), flags(&[&SHORT[..], &["lora.rank=4", "model.dropout=0.0"]].concat())].concat();
    assert!(lab.run("sft", &adapted).status.success());
    let answers = ["generate", "--checkpoint", "sft", "--prompt", "the fox", "--max-tokens", "1"];
    let merged = ["merge", "--checkpoint", "sft", "--out", "merged"];
    for args in [&answers[..], &merged] {
        let mut child = lab.command("chat", args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let peak = peak_of_child(&mut child);
        assert!(peak < 1.6 * weights + 60.0, "`chat {}`: {peak:.0} MiB for {weights:.0} of weights", args[0]);
    }
}

/// The most memory that a process had when it ended, in MiB: the program must not be gone before it is asked.
fn peak_of_child(child: &mut Child) -> f64 {
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0.0;
    while child.try_wait().unwrap().is_none() {
        let status = std::fs::read_to_string(&status).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        if let Some(kib) = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()) {
            peak = kib / 1024.0;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(child.wait().unwrap().success() && peak > 0.0);
    peak
}

#[test]
fn activations_computed_twice_take_no_memory_in_between() {
    let lab = lab();
    let settings = ["model.d_model=128", "model.n_layers=12", "model.max_seq_len=128", "train.seq_len=128"];
    let of = |out: &str, checkpoints: &str| {
        pretrain(&lab, out, &[&SHORT[..], &settings, &["train.batch_size=32", checkpoints]].concat())
    };
    let kept = of("kept", "train.checkpoint_activations=false");
    let computed = of("computed", "train.checkpoint_activations=true");
    assert!(computed < 0.75 * kept, "{computed} MiB of {kept}");
    assert_eq!(lab.bytes("kept/model.safetensors"), lab.bytes("computed/model.safetensors"));
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_read_or_written() {
    let lab = lab();
    let fixed = ["train", "--config", "configs/pretrain.toml", "--tokenizer", "tokenizer", "--out", "large"];
    let settings = ["train.batch_size=1000000", "model.n_layers=12", "model.d_model=256"];
    let args = [fixed.map(str::to_owned).to_vec(), flags(&settings)].concat();
    let refused = lab.run("pretrain", &args);
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    for text in ["error: this run needs about ", " GiB are available", "it would fit with `train.micro_batch_size="] {
        assert!(refused.stderr.contains(text), "{text}: {}", refused.stderr);
    }
    assert!(!lab.path("large").exists());

    // Were the weights looked at first, their shapes would be found wrong.
    lab.prepare(pipeline_tests::PRETRAIN);
    let mut config = lab.json("base/config.json");
    for (key, value) in [("n_embd", 32_768), ("n_inner", 131_072), ("n_layer", 4)] {
        config[key] = value.into();
    }
    lab.write("base/config.json", config.to_string());
    let refused = lab.run("sft", &SFT.train("large", &[]));
    assert!(refused.stderr.contains("no smaller micro-batch would fit: train adapters"), "{}", refused.stderr);
    let tried = lab.run("sft", &SFT.train("large", &["--set", "run.check_memory=false"]));
    assert!(tried.stderr.contains("has shape"), "{}", tried.stderr);
}
