//! Backends agree: `recipe compare` finds them equal where they are, and says where they are not.
//!
//! The CPU backends always; with the feature `wgpu` also a graphics driver, which may be one that computes on the CPU.
//! In such a build a machine without any driver fails these tests, it does not skip them. The programs have to be built
//! with the same features: `cargo build --release --workspace --features wgpu`.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use pipeline_tests::{Lab, Output};
use serde_json::Value;

/// A lab whose configurations are a recipe.
fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("configs/recipe.toml", "title = \"Small\"\nseed = 3\n");
    lab
}

/// Compares and returns what was said and what was found.
fn compare(lab: &Lab, backends: &str, more: &[&str]) -> (Output, Value) {
    let fixed = ["compare", "configs", "--backends", backends, "--out", "compared", "--overwrite", "--threads", "1"];
    let output = lab.run("recipe", &[&fixed[..], more].concat());
    assert!(lab.path("compared/compare.json").is_file(), "{}", output.stderr);
    (output, lab.json("compared/compare.json"))
}

fn levels(found: &Value) -> &[Value] {
    found["levels"].as_array().unwrap()
}

#[test]
fn the_cpu_backends_agree_at_every_level() {
    let lab = lab();
    let (output, found) = compare(&lab, "flex,ndarray", &["--steps", "20"]);
    assert!(output.status.success(), "{}{}", output.stdout, output.stderr);
    assert_eq!(found["passed"], true);
    let names: Vec<String> = levels(&found).iter().map(|row| format!("{} {}", row["stage"], row["level"])).collect();
    for level in [
        "\"pretrain\" \"initial-weights\"",
        "\"pretrain\" \"operations\"",
        "\"pretrain\" \"operation-gradients\"",
        "\"pretrain\" \"logits\"",
        "\"pretrain\" \"loss\"",
        "\"pretrain\" \"gradients\"",
        "\"pretrain\" \"one-step\"",
        "\"pretrain\" \"ten-steps\"",
        "\"pretrain\" \"curve\"",
        "\"pretrain\" \"tokens\"",
        "\"sft\" \"curve\"",
        "\"sft\" \"tokens\"",
        "\"reward-model\" \"curve\"",
        "\"reward-model\" \"scores\"",
        "\"ppo\" \"ppo-iteration\"",
        "\"ppo\" \"ppo-updates\"",
        "\"ppo\" \"ppo-ratios\"",
    ] {
        assert!(names.iter().any(|name| name == level), "no {level} in {names:?}");
    }
    assert!(levels(&found).iter().all(|row| row["n_tensors"].as_u64() > Some(0)), "{found}");
    // Two implementations do not round alike: a comparison that finds nothing at all has not looked.
    let differs = |row: &&Value| row["max_absolute"].as_f64() > Some(0.0);
    assert!(levels(&found).iter().filter(differs).count() > 5, "{found}");
    let curves = found["curves"].as_array().unwrap();
    assert_eq!(curves.len(), 6, "three stages, two backends");
    assert!(curves.iter().all(|curve| curve["losses"].as_array().unwrap().len() == 20));
    let speeds = found["speed"].as_array().unwrap();
    for measure in ["tokens_per_s", "first_step_s", "decode_tokens_per_s", "iteration_s"] {
        let of = |backend: &str| {
            let speed = speeds.iter().find(|speed| speed["measure"] == measure && speed["backend"] == backend);
            speed.unwrap_or_else(|| panic!("no {measure} of {backend}"))
        };
        assert_eq!(of("flex")["ratio"], 1.0);
        assert!(of("ndarray")["value"].as_f64() > Some(0.0) && of("ndarray")["ratio"].as_f64() > Some(0.0));
    }
    let markdown = String::from_utf8(lab.bytes("compared/compare.md")).unwrap();
    assert!(markdown.contains("Every level is within its budget") && markdown.contains("(loss-sft.svg)"), "{markdown}");
    assert!(lab.path("compared/loss-pretrain.svg").is_file());
    assert!(output.stdout.contains("every level within its budget"), "{}", output.stdout);
}

#[test]
fn a_planted_fault_is_caught_and_located() {
    let lab = lab();
    for (fault, operation) in
        [("layer-norm", "layer norm"), ("activation", "activation"), ("attention", "attention over")]
    {
        let plant = format!("ndarray={fault}");
        let (output, found) =
            compare(&lab, "flex,ndarray", &["--steps", "2", "--stages", "pretrain", "--plant", &plant]);
        assert_eq!(output.status.code(), Some(1), "{}", output.stderr);
        assert!(output.stderr.contains("differ by more than the budgets allow"), "{}", output.stderr);
        let row = |level: &str| levels(&found).iter().find(|row| row["level"] == level).unwrap();
        // Not before it arises, then in the operation itself, then in all that follows from it.
        assert_eq!(row("initial-weights")["passed"], true);
        let place = row("operations")["first_excess"].as_str().unwrap();
        assert!(place.starts_with(operation) || place.starts_with(&format!("addition and {operation}")), "{place}");
        for level in ["operation-gradients", "logits", "loss", "gradients"] {
            assert_eq!(row(level)["passed"], false, "{fault}: {level}");
        }
    }
}

#[test]
fn a_backend_whose_process_fails_is_a_row_that_says_so() {
    let lab = lab();
    let (output, found) =
        compare(&lab, "flex,ndarray", &["--steps", "2", "--stages", "pretrain", "--plant", "ndarray=nothing"]);
    assert_eq!(output.status.code(), Some(1), "{}", output.stderr);
    let failure = found["backends"][1]["failure"].as_str().unwrap();
    assert!(failure.contains("exit status: 2") && failure.contains("log.txt"), "{failure}");
    assert!(levels(&found).iter().all(|row| row["passed"] == false), "{found}");
    assert!(levels(&found)[0]["first_excess"].as_str().unwrap().contains("the process ended before"), "{found}");
}

#[test]
fn a_comparison_needs_two_backends_that_are_there() {
    let lab = lab();
    let run = |backends: &str| {
        let output = lab.run("recipe", &["compare", "configs", "--out", "o", "--backends", backends]);
        (output.status.code(), output.stderr)
    };
    assert_eq!(run("flex").0, Some(2));
    assert_eq!(run("flex,flex").0, Some(2));
    let (code, said) = run("flex,fleks");
    assert!(code == Some(1) && said.contains("did you mean `flex`?"), "{said}");
    assert!(!lab.path("o").exists(), "nothing is written for a backend that is not there");
}

#[test]
fn every_program_lists_the_backends() {
    let lab = Lab::new();
    for program in ["pretrain", "sft", "reward-model", "ppo", "dpo", "chat", "recipe"] {
        let text = lab.ok(program, &["--backend", "list"]);
        for name in ["flex", "ndarray", "wgpu", "vulkan", "metal", "cuda", "cpu"] {
            assert!(text.lines().any(|line| line.starts_with(name)), "{program}: no {name} in\n{text}");
        }
    }
    let refused = lab.run("chat", &["generate", "--checkpoint", "x", "--prompt", "y", "--precision", "f16"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(!refused.stderr.is_empty());
}

/// A program that answers as `recipe` does, and whose PPO fails.
const STAND_IN: &str = r#"#!/bin/sh
case "$1 $2" in
  "--backend list") printf 'backend  device        memory  precision\nflex     the CPU       1 GiB   f32\nwgpu     A card, 8 x   1 GiB   f32, bf16\n' ;;
  "--version ") echo "recipe 9.9.9" ;;
  "bench train") echo '{"ms_per_step":2.5,"tokens_per_s":100.5,"first_step_s":1.25,"loss_first":8.5,"loss_last":7.5,"resident_mib":[1.0,2.0],"device_mib":[3.0,3.5]}' ;;
  "bench generate") echo '{"results":[{"batch":1,"ms_per_decode_step":0.75,"tokens_per_s":40.0}]}' ;;
  "bench ppo") echo "out of memory" >&2; exit 3 ;;
  "compare tiny")
    while [ "$1" != --out ]; do shift; done
    mkdir -p "$2"
    printf '# Title\n\n- `wgpu` (A card)\n\nEvery level is within its budget.\n' >"$2/compare.md" ;;
esac
"#;

#[cfg(unix)]
#[test]
fn the_check_of_a_card_reports_what_the_program_found() {
    use std::os::unix::fs::PermissionsExt as _;
    let lab = Lab::new();
    lab.write("recipe", STAND_IN);
    std::fs::set_permissions(lab.path("recipe"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/gpu/check.sh");
    let check = |args: &[&str]| {
        let mut command = std::process::Command::new("bash");
        command.arg(script).args(args).current_dir(lab.dir());
        lab.finish(command)
    };
    let output = check(&["./recipe", "wgpu", "report.md"]);
    assert_eq!(output.status.code(), Some(1), "a part failed: {}", output.stderr);
    let report = String::from_utf8(lab.bytes("report.md")).unwrap();
    for line in [
        "## A card, 8 x, `wgpu`",
        "| training, size a | 2.5 | 100.5 | 1.25 | 8.5 7.5 |",
        "| training, size a, bf16 | 2.5 | 100.5 | 1.25 | 8.5 7.5 |",
        "| decoding, size c, 1 row | 0.75 | 40.0 |  |   |",
        "| PPO, size a | failed with 3: out of memory | | | |",
        "Held after each hundred of the 500 steps, MiB: on the device [3.0,3.5], by the process [1.0,2.0].",
        "### `recipe compare`, a small model, bf16",
        "Every level is within its budget.",
    ] {
        assert!(report.lines().any(|found| found == line), "no `{line}` in:\n{report}");
    }
    assert!(report.contains("Failed: bench ppo --size a --steps 2."), "{report}");
    let output = check(&["./recipe", "cuda"]);
    assert!(output.status.code() == Some(1) && output.stderr.contains("cannot open `cuda`"), "{}", output.stderr);
    assert_eq!(check(&[]).status.code(), Some(2));
}

#[cfg(feature = "wgpu")]
mod wgpu {
    use super::{compare, lab};
    use burn::tensor::{Device, Int, Tensor, TensorData};
    use common::backend;
    use common::kernels::Kernels;
    use common::loss::cross_entropy;
    use common::model::{Gpt, GptConfig, Layout};
    use common::optim::{AdamW, Grads, OptimizerConfig};
    use common::rng::Streams;
    use pipeline_tests::{Lab, PPO, PRETRAIN, REWARD_MODEL, SFT};
    use serde_json::Value;

    /// The same loss by two backends, whose sums run in different orders.
    const BACKENDS: f64 = 1e-4;

    /// One layer and short rows: a software driver compiles and runs it in moments.
    const SMALL: [&str; 8] = [
        "--set",
        "pretrain.model.n_layers=1",
        "--set",
        "pretrain.model.d_model=16",
        "--set",
        "pretrain.train.seq_len=16",
        "--set",
        "pretrain.tokenizer.vocab_size=280",
    ];

    /// Opens the device and prints which it is.
    #[allow(clippy::print_stderr)] // the adapter belongs in the log of a test run
    fn device() -> Device {
        let device = backend::open("wgpu").expect("a graphics driver; one that computes on the CPU will do");
        eprintln!("wgpu runs on {}", backend::adapter(&device).expect("it has a name"));
        device
    }

    #[test]
    fn wgpu_agrees_at_every_level() {
        device();
        let lab = lab();
        let (output, found) = compare(&lab, "flex,ndarray,wgpu", &[&["--steps", "20"], &SMALL[..]].concat());
        assert!(output.status.success(), "{}{}", output.stdout, output.stderr);
        assert!(found["backends"][2]["device"].as_str().unwrap().starts_with("wgpu: "), "{found}");
    }

    #[test]
    fn all_stages_run_on_wgpu_and_their_checkpoints_go_on_elsewhere_and_back() {
        device();
        let lab = Lab::before(PRETRAIN);
        let wgpu = ["--backend", "wgpu", "-q", "--set", "run.eval_every=0"];
        let args = |more: &[&'static str]| [&wgpu[..], more].concat();
        lab.ok("pretrain", &PRETRAIN.train("base", &args(&["--set", "train.steps=6"])));
        let manifest = lab.json("base/manifest.json");
        assert!(manifest["backend"].as_str().unwrap().starts_with("wgpu: "), "{manifest}");
        let loss = |backend: &str| {
            let said = lab.ok(
                "pretrain",
                &["eval", "--checkpoint", "base", "--data", "data/val.txt", "--backend", backend, "-q"],
            );
            serde_json::from_str::<Value>(&said).unwrap()["loss"].as_f64().unwrap()
        };
        let mut losses = vec![loss("flex")];
        for (steps, backend) in [("train.steps=9", "flex"), ("train.steps=12", "wgpu")] {
            lab.ok("pretrain", &PRETRAIN.train("base", &["--resume", "-q", "--set", steps, "--backend", backend]));
            let (flex, wgpu) = (loss("flex"), loss("wgpu"));
            assert!((flex - wgpu).abs() < BACKENDS, "after {steps} on {backend}: flex {flex}, wgpu {wgpu}");
            losses.push(flex);
        }
        assert!(losses.is_sorted_by(|a, b| a > b), "the loss falls on: {losses:?}");
        lab.ok("sft", &SFT.train(SFT.out, &args(&["--set", "train.steps=4"])));
        lab.ok("reward-model", &REWARD_MODEL.train(REWARD_MODEL.out, &args(&["--set", "train.steps=4"])));
        lab.ok("ppo", &PPO.train(PPO.out, &args(&["--set", "train.steps=1"])));
        lab.ok("ppo", &PPO.train(PPO.out, &["--resume", "-q", "--set", "train.steps=2"]));
        let greedy = ["generate", "--checkpoint", "ppo", "--prompt", "what does the owl see?", "--temperature", "0"];
        let answer = |backend: &str| lab.ok("chat", &[&greedy[..], &["--backend", backend, "-q"]].concat());
        assert_eq!(answer("flex"), answer("wgpu"));
    }

    #[test]
    fn five_hundred_steps_hold_no_more_memory_than_one_hundred() {
        /// What the allocator of the driver or of this process may keep.
        const SLACK_MIB: f64 = 48.0;
        let device = device();
        let config =
            GptConfig { d_model: 16, n_layers: 1, n_heads: 2, d_ff: 32, max_seq_len: 16, ..GptConfig::gpt2(37) };
        let tracked = device.clone().autodiff();
        let mut gpt = Gpt::new(&config, &Streams::new(1), &tracked);
        let mut optimizer = AdamW::new(&OptimizerConfig::default(), Kernels::Fused);
        let mut rng = Streams::new(2).get("test", 0);
        let mut held = Vec::new();
        for step in 1..=500 {
            let rows: Vec<i64> = (0..2 * 16).map(|_| rng.below(37) as i64).collect();
            let ids = Tensor::<2, Int>::from_data(TensorData::new(rows.clone(), [2, 16]), &tracked);
            let targets = Tensor::<1, Int>::from_data(TensorData::new(rows, [32]), &tracked);
            let hidden = gpt.hidden(ids, &Layout::right_padded()).reshape([32, 16]);
            let loss = cross_entropy(&gpt, hidden, targets, 32);
            let grads = Grads::take(&gpt, loss.backward());
            let norm;
            (gpt, norm) = optimizer.step(gpt, grads, 1e-3);
            assert!(norm.known().is_none(), "a step waits for the device");
            if step % 100 == 0 {
                assert!(norm.value().is_finite());
                device.sync().expect("the device works");
                let pools = device.memory_pool_usage().expect("the backend knows").bytes_reserved as f64;
                held.push([pools / f64::from(1 << 20), resident_mib()]);
            }
        }
        let ([pools_100, resident_100], [pools_500, resident_500]) = (held[0], held[4]);
        assert!(pools_500 <= pools_100 * 1.1 + 1.0, "device memory grows, MiB: {held:?}");
        assert!(resident_500 <= resident_100 + SLACK_MIB, "host memory grows, MiB: {held:?}");
    }

    fn resident_mib() -> f64 {
        let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("Linux");
        line.trim().trim_end_matches("kB").trim().parse::<f64>().expect("a number") / 1024.0
    }
}
