//! A run that was stopped and resumed ends as if it had not been stopped: the same weights, state and metrics, to the
//! byte, whether it was killed or asked to stop.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::io::BufRead as _;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::Duration;

use clap::Parser;
use common::group::Group;
use common::interrupt::Interrupt;
use common::session::Outcome;
use pipeline_tests::{DPO, Lab, Output, PPO, PRETRAIN, REWARD_MODEL, Running, SFT, Stage};
use rustix::process::Signal;

/// How often a run may be faster than the signal that should stop it.
const MAX_TRIES: u32 = 20;

/// Trains `stage` without interruption into `whole`; then into `parts`, killed once the checkpoint of step `k` is there
/// and resumed; and checks that nothing but times differs.
fn assert_killed_and_resumed_is_uninterrupted(lab: &Lab, stage: Stage, k: u64, settings: &[&str]) {
    let save_every = format!("run.save_every={k}");
    let mut more = vec!["--set", &save_every];
    more.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    lab.ok(stage.program, &stage.train("whole", &[&more[..], &["--overwrite"]].concat()));

    kill_after_checkpoint(lab, stage, k, &more);
    let killed_at = lab.lines("parts/metrics.jsonl").last().and_then(|line| line["step"].as_u64()).unwrap_or(0);
    lab.ok(stage.program, &stage.train("parts", &[&more[..], &["--resume"]].concat()));
    lab.assert_same("whole", "parts");
    let steps: Vec<_> = lab.lines("parts/metrics.jsonl").iter().filter_map(|line| line["step"].as_u64()).collect();
    assert!(steps.is_sorted() && killed_at >= k, "{steps:?}, killed at {killed_at}");
}

/// Leaves in `parts` what a run leaves that was killed between the checkpoint of step `k` and its end.
fn kill_after_checkpoint(lab: &Lab, stage: Stage, k: u64, more: &[&str]) {
    for _ in 0..MAX_TRIES {
        let mut run = lab.start(stage.program, &stage.train("parts", &[more, &["--overwrite"]].concat()));
        assert!(run.until(|| lab.saved_step("parts") == Some(k)), "no checkpoint of step {k}:\n{}", run.stderr());
        run.signal(Signal::KILL);
        if run.ends().signal() == Some(9) && lab.saved_step("parts") == Some(k) {
            return;
        }
    }
    panic!("`{}` ended {MAX_TRIES} times before it could be killed", stage.program);
}

#[test]
fn pretraining_killed_and_resumed_is_pretraining_uninterrupted() {
    let lab = Lab::before(PRETRAIN);
    assert_killed_and_resumed_is_uninterrupted(&lab, PRETRAIN, 6, &[]);
}

#[test]
fn an_order_in_blocks_goes_on_where_a_killed_run_was() {
    let lab = Lab::before(PRETRAIN);
    // Short windows are many: several blocks of 256.
    assert_killed_and_resumed_is_uninterrupted(&lab, PRETRAIN, 6, &["data.shuffle=\"blocks\"", "train.seq_len=4"]);
    lab.ok("pretrain", &PRETRAIN.train("windows", &["--set", "train.seq_len=4"]));
    assert_ne!(lab.bytes("whole/model.safetensors"), lab.bytes("windows/model.safetensors"), "another order");
}

#[test]
fn dropout_accumulation_and_the_best_weights_survive_a_kill() {
    let lab = Lab::before(PRETRAIN);
    let settings = [
        "model.dropout=0.2",
        "train.micro_batch_size=2",
        "run.keep_best=true",
        "run.eval_every=2",
        // So high a rate that the loss rises after the first evaluations: the best weights are not the last.
        "optimizer.lr=0.3",
    ];
    assert_killed_and_resumed_is_uninterrupted(&lab, PRETRAIN, 6, &settings);
    let best = lab.json("whole/manifest.json")["metrics"]["best/step"].as_f64().unwrap();
    assert!(best < 12.0, "the best weights were to be earlier ones, they are those of step {best}");
    assert_ne!(lab.json("whole/manifest.json")["weights_sha256"], weights_sha256_of_last(&lab, &settings));
}

/// The hash of the weights that the same run exports without keep-best.
fn weights_sha256_of_last(lab: &Lab, settings: &[&str]) -> serde_json::Value {
    let mut more: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
    more.extend(["--set", "run.keep_best=false"]);
    lab.ok("pretrain", &PRETRAIN.train("last", &more));
    lab.json("last/manifest.json")["weights_sha256"].clone()
}

#[test]
fn fine_tuning_killed_and_resumed_is_fine_tuning_uninterrupted() {
    let lab = Lab::before(SFT);
    assert_killed_and_resumed_is_uninterrupted(&lab, SFT, 6, &["train.micro_batch_size=2", "run.keep_best=true"]);
}

#[test]
fn a_reward_model_killed_and_resumed_is_one_trained_uninterrupted() {
    let lab = Lab::before(REWARD_MODEL);
    assert_killed_and_resumed_is_uninterrupted(&lab, REWARD_MODEL, 6, &["train.micro_batch_size=2"]);
    assert_killed_and_resumed_is_uninterrupted(&lab, REWARD_MODEL, 6, &["run.keep_best=true"]);
}

#[test]
fn ppo_killed_and_resumed_is_ppo_uninterrupted() {
    let lab = Lab::before(PPO);
    assert_killed_and_resumed_is_uninterrupted(&lab, PPO, 4, &[]);
    assert_killed_and_resumed_is_uninterrupted(&lab, PPO, 3, &["run.keep_best=true", "train.micro_batch_size=1"]);
}

#[test]
fn dpo_killed_and_resumed_is_dpo_uninterrupted() {
    let lab = Lab::before(DPO);
    assert_killed_and_resumed_is_uninterrupted(&lab, DPO, 6, &["train.micro_batch_size=2"]);
    assert_killed_and_resumed_is_uninterrupted(&lab, DPO, 6, &["run.keep_best=true", "dpo.loss=ipo"]);
}

#[test]
fn normalisation_stops_when_asked_to_and_is_made_on_resuming() {
    let lab = Lab::before(REWARD_MODEL);
    // So many answers that the signal comes before the last.
    let more = ["--set", "normalisation.samples=30000", "--set", "normalisation.max_tokens=24"];
    lab.ok("reward-model", &REWARD_MODEL.train("whole", &more));
    let mut run = lab.start("reward-model", &REWARD_MODEL.train("parts", &more));
    run.hears("normalisation: ");
    run.signal(Signal::INT);
    assert_eq!(run.ends().code(), Some(130), "{}", run.stderr());
    let stderr = run.stderr();
    assert!(!stderr.contains("scores are scaled") && stderr.contains("stopped at step 12 of"), "{stderr}");
    assert!(stderr.contains("continue with `--resume`") && lab.saved_step("parts") == Some(12), "{stderr}");
    assert_eq!(lab.json("parts/manifest.json")["finished"], false);
    lab.ok("reward-model", &REWARD_MODEL.train("parts", &[&more[..], &["--resume"]].concat()));
    lab.assert_same("whole", "parts");
}

#[test]
fn a_run_that_is_to_stop_before_its_first_step_does_not_compute_what_comes_before_it() {
    let lab = Lab::before(PPO);
    for stage in [PPO, DPO] {
        lab.ok(stage.program, &stage.train("whole", &["--overwrite"]));
        let mut args = vec![stage.program.to_owned()];
        for word in stage.train("parts", &["--overwrite", "--threads", "2"]) {
            args.push(if word.starts_with("configs/") || lab.path(&word).exists() || word == "parts" {
                lab.path(&word).display().to_string()
            } else {
                word
            });
        }
        let (group, interrupt) = (Group::alone(), Interrupt::of_test());
        interrupt.request();
        let outcome = if stage.program == "ppo" {
            let ppo::Command::Train(args) = ppo::Cli::parse_from(args).command else { panic!("it trains") };
            ppo::train(&args, &group, interrupt, None)
        } else {
            let dpo::Command::Train(args) = dpo::Cli::parse_from(args).command else { panic!("it trains") };
            dpo::train(&args, &group, interrupt)
        };
        assert_eq!(outcome.unwrap(), Outcome::Interrupted);
        assert_eq!(lab.saved_step("parts"), Some(0), "{}", stage.program);
        let metrics = std::fs::read_to_string(lab.path("parts/metrics.jsonl")).unwrap_or_default();
        assert!(metrics.is_empty(), "{}: {metrics}", stage.program);
        lab.ok(stage.program, &stage.train("parts", &["--resume"]));
        lab.assert_same("whole", "parts");
    }
}

#[test]
fn adapters_killed_and_resumed_are_adapters_trained_uninterrupted() {
    const LORA: [&str; 2] = ["lora.rank=3", "lora.dropout=0.1"];
    let lab = Lab::before(PPO);
    assert_killed_and_resumed_is_uninterrupted(&lab, SFT, 6, &[&LORA[..], &["run.keep_best=true"]].concat());
    std::fs::rename(lab.path("whole"), lab.path("sft-lora")).unwrap();
    let dpo_from_adapter = Stage { inputs: &["--init", "sft-lora"], ..DPO };
    for stage in [DPO, dpo_from_adapter] {
        assert_killed_and_resumed_is_uninterrupted(&lab, stage, 6, &LORA);
    }
    let from_adapter = Stage { inputs: &["--init", "sft-lora"], ..REWARD_MODEL };
    assert_killed_and_resumed_is_uninterrupted(&lab, REWARD_MODEL, 6, &[&LORA[..], &["run.keep_best=true"]].concat());
    assert_killed_and_resumed_is_uninterrupted(&lab, from_adapter, 6, &LORA);
    std::fs::rename(lab.path("whole"), lab.path("reward-lora")).unwrap();
    assert_killed_and_resumed_is_uninterrupted(&lab, PPO, 4, &LORA);
    let on_one_trunk = Stage { inputs: &["--policy", "sft-lora", "--reward-model", "reward-lora"], ..PPO };
    assert_killed_and_resumed_is_uninterrupted(&lab, on_one_trunk, 4, &LORA);
}

#[test]
fn ctrl_c_and_sigterm_finish_the_step_save_and_exit_as_shells_expect() {
    for stage in [PRETRAIN, SFT, REWARD_MODEL, PPO, DPO] {
        let lab = Lab::before(stage);
        lab.ok(stage.program, &stage.train("whole", &["-q"]));
        for signal in [Signal::INT, Signal::TERM] {
            let stopped_at = stop(&lab, stage, signal);
            let logged = lab.lines("parts/metrics.jsonl").last().and_then(|line| line["step"].as_u64());
            assert_eq!(logged, Some(stopped_at), "the metrics of the step that was finished are there");
            lab.ok(stage.program, &stage.train("parts", &["--resume", "-q"]));
            lab.assert_same("whole", "parts");
        }
    }
}

/// Stops a run by `signal` after its third step; returns the step it saved.
fn stop(lab: &Lab, stage: Stage, signal: Signal) -> u64 {
    for _ in 0..MAX_TRIES {
        let mut run = lab.start(stage.program, &stage.train("parts", &["--overwrite"]));
        run.hears("step 3/");
        run.signal(signal);
        let status = run.ends();
        let step = lab.saved_step("parts").unwrap();
        let finished = run.stderr().contains("done at step");
        let expected = if finished { 0 } else { 128 + signal.as_raw() };
        assert_eq!(status.code(), Some(expected), "{}:\n{}", stage.program, run.stderr());
        assert_eq!(finished, !run.stderr().contains("continue with `--resume`"), "{}", run.stderr());
        if !finished {
            assert!(run.stderr().contains("finishing the step"), "{}", run.stderr());
            assert!(run.stderr().contains(&format!("stopped at step {step} of")), "{}", run.stderr());
            return step;
        }
    }
    panic!("`{}` ended {MAX_TRIES} times before the signal arrived", stage.program);
}

/// Starts a run and waits until it makes a step, which takes so long that all signals arrive within it.
fn start_long_step(lab: &Lab) -> Running {
    let more = ["--set", "train.batch_size=262144", "--set", "train.micro_batch_size=32"];
    let mut run = lab.start("pretrain", &PRETRAIN.train("parts", &more));
    run.hears("parameters");
    // From the last line it prints to the first step is a moment.
    std::thread::sleep(Duration::from_millis(500));
    run
}

#[test]
fn a_run_whose_messages_nobody_reads_saves_and_stops_as_asked() {
    let lab = Lab::before(PRETRAIN);
    let (reader, writer) = std::io::pipe().unwrap();
    let args = PRETRAIN.train("parts", &["--set", "train.steps=1000000"]);
    let mut run = lab.command("pretrain", &args).stderr(writer).spawn().unwrap();
    // As `head -1` does.
    let mut first = String::new();
    std::io::BufReader::new(reader).read_line(&mut first).unwrap();
    assert!(!first.is_empty());
    std::thread::sleep(Duration::from_millis(500));
    let pid = rustix::process::Pid::from_raw(run.id().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::INT).unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(130));
    assert!(lab.saved_step("parts").is_some_and(|step| step > 0));
}

#[test]
fn a_second_process_does_not_write_to_the_directory_of_a_run() {
    let lab = Lab::before(PRETRAIN);
    let mut run = start_long_step(&lab);
    for more in ["--overwrite", "--resume"] {
        let second = lab.run("pretrain", &PRETRAIN.train("parts", &[more]));
        assert_eq!(second.status.code(), Some(1), "{}", second.stderr);
        assert!(second.stderr.contains(&format!("another process ({}) is writing to", run.id())), "{}", second.stderr);
    }
    run.signal(Signal::KILL);
    run.ends();
    lab.ok("pretrain", &PRETRAIN.train("parts", &["--overwrite"]));
}

#[test]
fn a_second_signal_after_a_second_ends_the_run_at_once_and_says_so() {
    let lab = Lab::before(PRETRAIN);
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let mut run = start_long_step(&lab);
        run.signal(signal);
        run.hears(if code == 130 { "press Ctrl-C again" } else { "signal once more" });
        std::thread::sleep(Duration::from_millis(1100));
        run.signal(signal);
        assert_eq!(run.ends().code(), Some(code), "{}", run.stderr());
        assert!(run.stderr().contains("stopped without saving"), "{}", run.stderr());
        assert_eq!(lab.saved_step("parts"), None);
        std::fs::remove_dir_all(lab.path("parts")).unwrap();
    }
}

#[test]
fn two_signals_within_a_second_are_one_request() {
    let lab = Lab::before(PRETRAIN);
    for _ in 0..MAX_TRIES {
        let more = ["--set", "train.steps=500", "--overwrite"];
        let mut run = lab.start("pretrain", &PRETRAIN.train("parts", &more));
        run.hears("step 3/");
        run.signal(Signal::TERM);
        std::thread::sleep(Duration::from_millis(5));
        run.signal(Signal::TERM);
        let code = run.ends().code();
        assert!(code == Some(0) || code == Some(143), "{code:?}\n{}", run.stderr());
        if code == Some(143) {
            assert!(run.stderr().contains("stopped at step") && lab.saved_step("parts").is_some(), "{}", run.stderr());
            return;
        }
    }
    panic!("the run ended {MAX_TRIES} times before the signals arrived");
}

#[test]
fn a_hang_up_is_saved_and_under_nohup_does_nothing() {
    let lab = Lab::before(PRETRAIN);
    let shell = |exec: &str| {
        let script = format!("{exec} \"$@\"");
        let program = pipeline_tests::binary("pretrain").display().to_string();
        let mut args = vec!["-c".to_owned(), script, "sh".to_owned(), program];
        args.extend(PRETRAIN.train("parts", &["--overwrite", "--set", "train.steps=300"]));
        lab.within(Command::new("sh"), &args)
    };
    let mut run = Lab::running(shell("trap '' HUP; exec"));
    run.hears("step 3/");
    run.signal(Signal::HUP);
    assert_eq!(run.ends().code(), Some(0), "{}", run.stderr());
    assert_eq!(lab.saved_step("parts"), Some(300));
    if cfg!(target_os = "linux") {
        // The tests themselves may run under nohup.
        let mut run = Lab::running(shell("exec env --default-signal=HUP"));
        run.hears("step 3/");
        run.signal(Signal::HUP);
        assert_eq!(run.ends().code(), Some(129), "{}", run.stderr());
        assert!(lab.saved_step("parts").is_some_and(|step| step < 300));
    }
}

/// Trains `stage` for a few of its steps into `parts`, then resumes it with `more`; the resumed run's output.
fn resumed_with(lab: &Lab, stage: Stage, more: &[&str]) -> Output {
    lab.ok(stage.program, &stage.train("parts", &["-q", "--overwrite", "--set", "train.steps=2"]));
    lab.run(stage.program, &stage.train("parts", &[&["--resume", "--set", "train.steps=3"], more].concat()))
}

#[test]
fn a_run_goes_on_only_as_it_began() {
    for stage in [PRETRAIN, SFT, REWARD_MODEL, PPO] {
        let lab = Lab::before(stage);
        for (setting, says) in [
            ("train.batch_size=8", "`train.batch_size` was 4, is now 8"),
            ("optimizer.lr=0.5", "`optimizer.lr` was 0."),
            ("seed=4", "`seed` was "),
        ] {
            let refused = resumed_with(&lab, stage, &["--set", setting]);
            assert_eq!(refused.status.code(), Some(1), "{setting}: {}", refused.stderr);
            assert!(refused.stderr.contains(says) && refused.stderr.contains("docs/resuming.md"), "{}", refused.stderr);
            assert_eq!(lab.saved_step("parts"), Some(2));
        }
        let goes_on = resumed_with(&lab, stage, &["--set", "run.log_every=2"]);
        assert!(goes_on.status.success(), "{}", goes_on.stderr);
        assert!(goes_on.stderr.contains("`train.steps` was 2, is now 3"), "{}", goes_on.stderr);
        assert!(goes_on.stderr.contains("`run.log_every` was 1, is now 2"), "{}", goes_on.stderr);
        assert_eq!(lab.saved_step("parts"), Some(3));
    }
}

#[test]
fn a_run_goes_on_only_from_what_it_began_from() {
    for stage in [SFT, REWARD_MODEL, PPO] {
        let lab = Lab::before(stage);
        for parent in stage.parents {
            let other = [&["-q", "--overwrite", "--set", "seed=77"][..]].concat();
            lab.ok(stage.program, &stage.train("parts", &["-q", "--overwrite", "--set", "train.steps=2"]));
            std::fs::rename(lab.path(parent.out), lab.path("aside")).unwrap();
            lab.ok(parent.program, &parent.train(parent.out, &other));
            let refused = lab.run(stage.program, &stage.train("parts", &["--resume"]));
            assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
            let flag = stage.inputs.iter().zip(&stage.inputs[1..]).find(|(_, dir)| **dir == parent.out).unwrap().0;
            assert!(
                refused.stderr.contains(&format!("`{flag}` was `LAB/{}` (weights ", parent.out)),
                "{}",
                refused.stderr
            );
            std::fs::remove_dir_all(lab.path(parent.out)).unwrap();
            std::fs::rename(lab.path("aside"), lab.path(parent.out)).unwrap();
        }
    }
}

#[test]
fn a_run_goes_on_only_with_the_data_it_began_with_wherever_they_lie() {
    let lab = Lab::before(SFT);
    lab.ok("sft", &SFT.train("parts", &["-q", "--set", "train.steps=2"]));
    let data = lab.bytes("data/sft.train.jsonl");
    lab.write("data/moved.jsonl", &data);
    let moved = ["--set", "data.train=[\"../data/moved.jsonl\"]", "--set", "train.steps=3"];
    lab.ok("sft", &SFT.train("parts", &[&["--resume"], &moved[..]].concat()));
    lab.write("data/moved.jsonl", [&data[..], &data[..]].concat());
    let refused = lab.run("sft", &SFT.train("parts", &["--resume", "--set", "train.steps=4"]));
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains("`data.train` was `LAB/data/moved.jsonl` (SHA-256 "), "{}", refused.stderr);
}

#[test]
fn a_resumed_run_remembers_the_settings_of_its_first_call() {
    let lab = Lab::before(SFT);
    lab.ok("sft", &SFT.train("parts", &["-q", "--set", "train.steps=4", "--set", "optimizer.lr=0.01"]));
    let again = lab.run("sft", &SFT.train("parts", &["--resume"]));
    assert!(again.status.success() && again.stderr.contains("is finished"), "{}", again.stderr);
    assert_eq!(lab.saved_step("parts"), Some(4));
    lab.ok("sft", &SFT.train("parts", &["--resume", "--set", "train.steps=5"]));
    lab.ok("sft", &SFT.train("parts", &["--resume"]));
    assert_eq!(lab.saved_step("parts"), Some(5));
    let back = lab.run("sft", &SFT.train("parts", &["--resume", "--set", "train.steps=3"]));
    assert!(back.stderr.contains("stands at step 5, past the 3 steps asked for"), "{}", back.stderr);
}

#[test]
fn a_resume_that_is_refused_leaves_the_checkpoint_as_it_was() {
    let lab = Lab::before(SFT);
    lab.ok("sft", &SFT.train("parts", &["-q", "--set", "train.steps=2"]));
    let before = lab.contents("parts");
    lab.run("sft", &SFT.train("parts", &["--resume", "--set", "train.batch_size=8"]));
    assert!(before == lab.contents("parts"));
}

#[test]
fn an_unfinished_run_is_named_where_another_starts_from_it() {
    let lab = Lab::before(SFT);
    // A run stopped between two saves looks like one that was interrupted there.
    kill_after_checkpoint(&lab, SFT, 4, &["--set", "run.save_every=4", "--set", "train.steps=300"]);
    let warned = lab.run("sft", &["train", "--config", "configs/sft.toml", "--init", "parts", "--out", "more"]);
    assert!(warned.status.success(), "{}", warned.stderr);
    assert!(
        warned.stderr.contains("`--init parts` is unfinished: it was stopped at step 4 of 300"),
        "{}",
        warned.stderr
    );
    let silent = lab.run("sft", &["train", "--config", "configs/sft.toml", "--init", "more", "--out", "most"]);
    assert!(!silent.stderr.contains("unfinished"), "{}", silent.stderr);
}

#[test]
fn training_that_stopped_early_is_finished_and_more_patience_makes_it_go_on() {
    let lab = Lab::before(REWARD_MODEL);
    // So high a rate that the loss only rises after the first evaluation.
    let early = ["--set", "optimizer.lr=0.5", "--set", "run.eval_every=1", "--set", "run.patience=1"];
    lab.ok("reward-model", &REWARD_MODEL.train("parts", &[&early[..], &["-q", "--set", "train.steps=40"]].concat()));
    let stopped_at = lab.saved_step("parts").unwrap();
    assert!(stopped_at < 40, "it did not stop early");
    let before = lab.contents("parts");
    let again = lab.run("reward-model", &REWARD_MODEL.train("parts", &["--resume"]));
    assert!(again.stderr.contains("is finished: nothing is left to do"), "{}", again.stderr);
    assert!(before == lab.contents("parts"), "the bytes of a finished model changed");
    lab.ok("reward-model", &REWARD_MODEL.train("parts", &["--resume", "-q", "--set", "run.patience=30"]));
    assert!(lab.saved_step("parts").unwrap() > stopped_at);
}

#[test]
fn what_was_trained_is_saved_before_scores_are_normalised() {
    let lab = Lab::before(REWARD_MODEL);
    // All pairs have one prompt, and so cold a sampler gives one answer: the scores have no deviation.
    let pair = String::from_utf8(lab.bytes("data/pairs.train.jsonl")).unwrap().lines().next().unwrap().to_owned();
    lab.write("data/one.jsonl", format!("{pair}\n"));
    let more = ["--set", "data.train=[\"../data/one.jsonl\"]", "--set", "normalisation.temperature=1e-9"];
    let failed = lab.run("reward-model", &REWARD_MODEL.train("parts", &more));
    assert_eq!(failed.status.code(), Some(1), "{}", failed.stderr);
    assert!(failed.stderr.contains("cannot be normalised"), "{}", failed.stderr);
    assert_eq!(lab.saved_step("parts"), Some(12));
    lab.ok("reward-model", &REWARD_MODEL.train("parts", &["--resume", "-q", "--set", "normalisation.samples=0"]));
    assert_eq!(lab.json("parts/manifest.json")["finished"], true);
}

#[test]
fn a_run_saves_after_some_minutes_and_its_bytes_do_not_depend_on_that() {
    let lab = Lab::before(PRETRAIN);
    lab.ok("pretrain", &PRETRAIN.train("whole", &["-q"]));
    // A hundredth of a second: every step saves.
    let more = ["--set", "run.save_every_minutes=0.0001"];
    let mut run = lab.start("pretrain", &PRETRAIN.train("parts", &more));
    assert!(run.until(|| lab.saved_step("parts").is_some_and(|step| step < 12)), "{}", run.stderr());
    assert!(run.ends().success(), "{}", run.stderr());
    assert_eq!(lab.bytes("whole/model.safetensors"), lab.bytes("parts/model.safetensors"));
}

#[test]
fn resuming_a_finished_run_changes_nothing() {
    let lab = Lab::before(PPO);
    lab.prepare(PPO);
    for stage in [PRETRAIN, SFT, REWARD_MODEL, PPO] {
        let before = lab.contents(stage.out);
        lab.ok(stage.program, &stage.train(stage.out, &["--resume", "-q"]));
        let after = lab.contents(stage.out);
        for (name, content) in &before {
            assert!(after.get(name) == Some(content), "{}: `{name}` changed", stage.program);
        }
    }
}

#[test]
fn a_longer_schedule_makes_a_finished_run_go_on() {
    let lab = Lab::before(PRETRAIN);
    lab.prepare(PRETRAIN);
    lab.ok("pretrain", &PRETRAIN.train("base", &["--resume", "--set", "train.steps=15", "-q"]));
    assert_eq!(lab.saved_step("base"), Some(15));
}
