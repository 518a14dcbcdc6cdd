//! `recipe run` with models so small that every step takes moments: what is done, skipped, done anew and gone on with.

#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the error in its message")]

mod lab;

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::{Lab, n_skipped, snapshot};

/// Steps of the recipe, the report aside.
const N_STEPS: usize = 8;

#[test]
fn a_recipe_runs_once_skips_what_is_unchanged_and_redoes_what_is_not() {
    let lab = Lab::new();
    let said = lab.run(&[]);
    assert_eq!(n_skipped(&said), 0);
    assert!(said.contains("[1/9] world") && said.contains("[9/9] report"), "{said}");

    let report = lab.json("report.json");
    for stage in ["pretrain", "sft", "reward-model", "ppo"] {
        assert!(report["stages"][stage]["seconds"].as_f64() > Some(0.0), "{stage}: {report}");
        assert!(report["stages"][stage]["tokens"].as_u64() > Some(0), "{stage}: {report}");
    }
    for metric in ["objective/kl", "gold/score", "kl_mean", "win_rate"] {
        assert!(report["stages"]["ppo"]["metrics"][metric].is_number(), "{metric}: {report}");
    }
    for metric in ["accuracy", "longer_wins_accuracy", "val/accuracy"] {
        assert!(report["stages"]["reward-model"]["metrics"][metric].is_number(), "{metric}: {report}");
    }
    for policy in ["base", "sft", "ppo"] {
        assert_eq!(report["gold"][policy]["n"], 5, "{report}");
    }
    // Models that have learned nothing are examined too, and PPO runs all the same.
    assert_eq!((&report["doctor"]["verdict"], &lab.json("doctor.json")["verdict"]), (&"fail".into(), &"fail".into()));
    assert!(said.contains("warning: the doctor: `answers-end` failed, look at sft: "), "{said}");
    let html = fs::read_to_string(lab.out("report.html")).unwrap();
    assert!(html.contains("id=\"doctor\"") && html.contains("<td>answers-end</td>"), "{html}");
    assert!(html.contains("Micro") && html.contains("id=\"answers\""));
    let pairs = fs::read_to_string(lab.out("data/pairs.train.jsonl")).unwrap();
    let config = fs::read_to_string(lab.out("reward-model/config.toml")).unwrap();
    assert!(pairs.lines().count() > 4 && config.contains("pairs.train.jsonl"), "{config}");

    assert_eq!(n_skipped(&lab.run(&[])), N_STEPS);

    let policy = fs::read(lab.out("ppo/model.safetensors")).unwrap();
    let said = lab.run(&["--set", "ppo.ppo.kl_coef=0.5", "--overwrite"]);
    assert_eq!(n_skipped(&said), N_STEPS - 2, "PPO and the evaluation: {said}");
    assert!(said.contains("`ppo.ppo.kl_coef` changed from 0.05 to 0.5"), "{said}");
    assert_ne!(fs::read(lab.out("ppo/model.safetensors")).unwrap(), policy);

    // Data changed by hand are noticed, and everything that learned from them is done anew.
    let path = lab.out("data/sft.train.jsonl");
    let sft = fs::read_to_string(&path).unwrap();
    fs::write(&path, sft.lines().skip(1).collect::<Vec<_>>().join("\n")).unwrap();
    let changed = lab.fail(&["--set", "ppo.ppo.kl_coef=0.5"]);
    assert!(changed.contains("the content of `sft.data.train[0]` changed"), "{changed}");
    assert_eq!(n_skipped(&lab.run(&["--set", "ppo.ppo.kl_coef=0.5", "--overwrite"])), 3);
}

#[test]
fn rloo_dpo_and_the_best_of_several_answers_stand_beside_the_others() {
    let lab = Lab::new();
    let stages = r#"recipe.stages=["pretrain", "sft", "reward-model", "ppo", "rloo", "dpo"]"#;
    let settings = ["--set", stages, "--set", "recipe.evaluate.best_of=[1, 3]"];
    let said = lab.run(&settings);
    assert!(said.contains("[8/11] rloo") && said.contains("[9/11] dpo") && said.contains("[10/11] evaluate"), "{said}");

    let report = lab.json("report.json");
    assert_eq!(report["gold"]["dpo"]["n"], 5, "{report}");
    for metric in ["rewards/margins", "logps/chosen", "val/accuracy", "accuracy", "margin_mean", "kl_mean", "win_rate"]
    {
        assert!(report["stages"]["dpo"]["metrics"][metric].is_number(), "{metric}: {report}");
    }
    assert_eq!(report["gold"]["rloo"]["n"], 5, "{report}");
    for metric in ["objective/score", "gold/score", "kl_mean", "win_rate"] {
        assert!(report["stages"]["rloo"]["metrics"][metric].is_number(), "{metric}: {report}");
    }
    let weights = |stage: &str| fs::read(lab.out(&format!("{stage}/model.safetensors"))).unwrap();
    assert!(weights("rloo") != weights("ppo") && weights("rloo") != weights("sft"));
    let answers = fs::read_to_string(lab.out("answers.jsonl")).unwrap();
    let rows = answers.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    assert!(rows.clone().any(|row| row["rloo"]["text"] != row["sft"]["text"]), "{answers}");
    assert!(rows.clone().any(|row| row["rloo"]["text"] != row["ppo"]["text"]), "{answers}");
    let best_of = report["best_of"].as_array().unwrap();
    assert_eq!(best_of.iter().map(|best| &best["n"]).collect::<Vec<_>>(), [1, 3], "{report}");
    assert_eq!(best_of[0]["kl"], 0.0);
    // The best of three scores higher than any one of them does on average.
    assert!(best_of[1]["score"]["mean"].as_f64() > best_of[0]["score"]["mean"].as_f64(), "{report}");
    assert!(best_of.iter().all(|best| best["gold"]["n"] == 5), "{report}");
    let html = fs::read_to_string(lab.out("report.html")).unwrap();
    for part in ["id=\"dpo\"", "<th>DPO</th>", "id=\"rloo\"", "<th>RLOO</th>", "<th>SFT, best of 3</th>", "KL from SFT"]
    {
        assert!(html.contains(part), "{part}: {html}");
    }
    // It learns from the collected pairs, as the reward model does.
    let config = fs::read_to_string(lab.out("dpo/config.toml")).unwrap();
    assert!(config.contains("pairs.train.jsonl"), "{config}");

    assert_eq!(n_skipped(&lab.run(&settings)), N_STEPS + 2);
    let said = lab.run(&[&settings[..], &["--set", "dpo.dpo.beta=0.5", "--overwrite"]].concat());
    assert_eq!(n_skipped(&said), N_STEPS, "DPO and the evaluation are done anew: {said}");
    let error = lab.fail(&[&settings[..], &["--set", "rloo.ppo.estimator=\"gae\""]].concat());
    assert!(error.contains("`ppo.estimator` is \"gae\", which is the stage `ppo`"), "{error}");
}

#[test]
fn a_failed_check_of_the_doctor_ends_a_recipe_that_says_so() {
    let lab = Lab::new();
    lab.write("micro/recipe.toml", &format!("{}\n[doctor]\non_fail = \"stop\"\n", lab::RECIPE));
    let error = lab.fail(&[]);
    assert!(
        error.contains("error: the step `ppo` failed: ") && error.contains("checks of the doctor failed"),
        "{error}"
    );
    assert!(error.contains("\nhint: mend what they name, or set `doctor.on_fail` to \"warn\""), "{error}");
    assert!(lab.out("doctor.json").is_file() && !lab.out("ppo/manifest.json").exists());
}

#[test]
fn an_interrupted_recipe_saves_and_goes_on_to_the_same_weights() {
    let steps = ["--set", "pretrain.train.steps=400", "--set", "pretrain.run.log_every=1", "--stages"];
    let stages = "world,tokenizer,pretrain";
    let uninterrupted = Lab::new();
    uninterrupted.run(&[&steps[..], &[stages]].concat());

    let lab = Lab::new();
    let child = lab.command(&[&steps[..], &[stages]].concat()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for_lines(&lab.out("pretrain/metrics.jsonl"), 8);
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(143), "{said}");
    assert!(said.contains("run the same command again to continue") && !said.contains("--resume"), "{said}");
    assert!(lab.out("report.html").is_file());

    // Without its settings the interrupted run would begin again.
    let error = lab.fail(&["--stages", stages]);
    assert!(error.contains("`pretrain.train.steps` changed from 400 to 6"), "{error}");

    let said = lab.run(&[&steps[..], &[stages]].concat());
    assert_eq!(n_skipped(&said), 2, "{said}");
    assert!(said.contains("pretrain: resuming"), "{said}");
    let weights = |lab: &Lab| fs::read(lab.out("pretrain/model.safetensors")).unwrap();
    assert!(weights(&lab) == weights(&uninterrupted), "resumed and uninterrupted weights differ");
}

/// Runs the recipe until it says `text`, interrupts it, and returns what it said.
fn interrupted_at(lab: &Lab, args: &[&str], text: &str) -> String {
    let mut child = lab.command(args).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    while !said.contains(text) {
        assert!(stderr.read_line(&mut said).unwrap() > 0, "{said}");
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    stderr.read_to_string(&mut said).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{said}");
    assert!(said.contains("run the same command again to continue"), "{said}");
    said
}

#[test]
fn a_recipe_that_is_interrupted_while_the_doctor_examines_goes_on_with_it() {
    let lab = Lab::new();
    // A model and answers that take the doctor a second, so that the signal comes before its end.
    let long = [
        "--set",
        "pretrain.model.d_model=256",
        "--set",
        "pretrain.model.n_layers=6",
        "--set",
        "ppo.ppo.response_length=200",
        "--set",
        "ppo.train.steps=1",
        "--stages",
        "world,tokenizer,pretrain,sft,collect,reward-model,ppo",
    ];
    let said = interrupted_at(&lab, &long, "answering ");
    assert!(said.contains("ppo: interrupted"), "{said}");
    assert!(!lab.out("doctor.json").exists() && !lab.out("ppo").exists(), "{said}");

    let said = lab.run(&long);
    assert_eq!(n_skipped(&said), 6, "{said}");
    assert!(lab.out("doctor.json").exists() && lab.out("ppo/manifest.json").exists(), "{said}");
}

fn wait_for_lines(path: &Path, n: usize) {
    let started = Instant::now();
    while fs::read_to_string(path).map_or(0, |text| text.lines().count()) < n {
        assert!(started.elapsed() < Duration::from_mins(2), "`{}` has no {n} lines", path.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn finished_work_is_not_discarded_unasked() {
    let lab = Lab::new();
    lab.run(&[]);
    let before = snapshot(&lab.out(""));

    let error = lab.fail(&["--set", "sft.optimizer.lr=0.0001"]);
    for part in [
        "error: this command would discard",
        "  sft, ",
        "`sft.optimizer.lr` changed from 0.001 to 0.0001",
        "  collect, ",
        "it depends on `sft`",
        "  evaluate, ",
        "hint: pass `--overwrite`",
    ] {
        assert!(error.contains(part), "no {part}: {error}");
    }
    assert!(!error.contains("pretrain, "), "{error}");

    let error = lab.fail(&["--stages", "world", "--seed", "5"]);
    assert!(error.contains("`recipe.world.seed` changed from 3 to 5") && error.contains("  ppo, "), "{error}");
    assert!(snapshot(&lab.out("")) == before, "a refused command changed something");

    // When a run logs and saves is no part of what it computes.
    assert_eq!(n_skipped(&lab.run(&["--set", "pretrain.run.log_every=1", "--backend", "flex"])), N_STEPS);

    let said = lab.run(&["--set", "sft.optimizer.lr=0.0001", "--overwrite"]);
    assert_eq!(n_skipped(&said), 3, "{said}");
    assert_eq!(n_skipped(&lab.run(&["--set", "sft.optimizer.lr=0.0001"])), N_STEPS);
}

#[test]
fn another_recipe_takes_over_nothing_of_the_one_it_replaces() {
    let lab = Lab::new();
    lab.run(&[]);
    fs::rename(lab.path("micro"), lab.path("other")).unwrap();
    let recipe = fs::read_to_string(lab.path("other/recipe.toml")).unwrap();
    let shorter = recipe.replace("seed = 3", "seed = 3\nstages = [\"pretrain\", \"sft\"]");
    let (head, _) = shorter.split_once("[collect]").unwrap();
    lab.write("micro-2/recipe.toml", head);
    for file in ["pretrain.toml", "sft.toml"] {
        fs::copy(lab.path("other").join(file), lab.path("micro-2").join(file)).unwrap();
    }
    let args = ["run", "micro-2", "--out", "out", "--threads", "1"];
    let refused = lab.program(&args).output().unwrap();
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(1) && stderr.contains("holds a run of the recipe `micro`"), "{stderr}");
    let output = lab.program(&[&args[..], &["--overwrite"]].concat()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for gone in ["answers.jsonl", "evaluation.json", "ppo/manifest.json", "reward-model/manifest.json"] {
        assert!(!lab.out(gone).exists(), "{gone}");
    }
    let stages = lab.json("report.json")["stages"].as_object().unwrap().len();
    assert_eq!(stages, 2);
}

#[test]
fn a_stage_trained_by_hand_is_not_discarded_unasked() {
    let lab = Lab::new();
    lab.run(&["--stages", "world,tokenizer,pretrain"]);
    fs::create_dir(lab.out("sft")).unwrap();
    for entry in fs::read_dir(lab.out("pretrain")).unwrap().map(Result::unwrap).filter(|e| e.path().is_file()) {
        fs::copy(entry.path(), lab.out("sft").join(entry.file_name())).unwrap();
    }
    let error = lab.fail(&[]);
    assert!(error.contains("  sft, ") && error.contains("it was not trained by this recipe"), "{error}");
    assert!(lab.out("sft/model.safetensors").is_file());
}

#[test]
fn a_recipe_does_not_delete_what_it_reads() {
    let lab = Lab::new();
    lab.run(&["--stages", "world,tokenizer,pretrain"]);
    let recipe = "stages = [\"sft\"]\ninit = \"../out/pretrain\"\n";
    lab.write("tuned/recipe.toml", recipe);
    let sft = fs::read_to_string(lab.path("micro/sft.toml")).unwrap();
    lab.write("tuned/sft.toml", &sft.replace("$DATA", "../out/data"));
    let run = ["run", "tuned", "--out", "out", "--threads", "1", "--overwrite"];
    let output = lab.program(&run).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && stderr.contains("which this command would delete"), "{stderr}");
    assert!(lab.out("pretrain/model.safetensors").is_file() && lab.out("data/sft.train.jsonl").is_file());
}

#[test]
fn a_world_does_not_replace_files_of_somebody_else() {
    let lab = Lab::new();
    lab.write("mine/sft.train.jsonl", "{}\n");
    let world =
        |more: &[&str]| lab.program(&[&["world", "--out", "mine", "--stories", "80"], more].concat()).output().unwrap();
    let output = world(&["--overwrite"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("does not hold a generated world"));
    assert_eq!(fs::read_to_string(lab.path("mine/sft.train.jsonl")).unwrap(), "{}\n");
    fs::remove_file(lab.path("mine/sft.train.jsonl")).unwrap();
    assert!(world(&[]).status.success() && world(&["--overwrite"]).status.success());
}

#[test]
fn data_that_were_deleted_are_made_again_and_everything_else_stays() {
    let lab = Lab::new();
    lab.run(&[]);
    fs::remove_dir_all(lab.out("data")).unwrap();
    let said = lab.run(&[]);
    assert_eq!(n_skipped(&said), N_STEPS - 2, "the world and the pairs: {said}");
}

#[test]
fn a_step_that_failed_at_first_does_not_pass_off_the_model_before_it() {
    let lab = Lab::new();
    lab.run(&[]);
    let before = lab.bytes("sft/model.safetensors");
    let changed = ["--set", "sft.optimizer.lr=0.05"];
    // The parent cannot be read, so the step fails before it has written anything.
    let (weights, aside) = (lab.out("pretrain/model.safetensors"), lab.out("pretrain/aside"));
    fs::rename(&weights, &aside).unwrap();
    let error = lab.fail(&[&changed[..], &["--overwrite"]].concat());
    assert!(error.contains("the step `sft` failed"), "{error}");
    fs::rename(&aside, &weights).unwrap();

    let said = lab.run(&changed);
    assert!(!said.contains("sft: resuming"), "{said}");
    let after = lab.bytes("sft/model.safetensors");
    assert!(after != before, "the old model was passed off as the new one");
    let fresh = Lab::new();
    fresh.run(&[&changed[..], &["--stages", "world,tokenizer,pretrain,sft"]].concat());
    assert!(fresh.bytes("sft/model.safetensors") == after, "not what a fresh run gives");
}

#[test]
fn a_run_of_an_earlier_version_is_recognised_by_its_checkpoints() {
    let lab = Lab::new();
    lab.run(&[]);
    // Earlier versions kept a hash in place of the inputs.
    let mut record = lab.json("recipe.json");
    for step in record["steps"].as_object_mut().unwrap().values_mut() {
        let step = step.as_object_mut().unwrap();
        step.remove("inputs");
        step.insert("key".to_owned(), "0123".into());
    }
    let text = record.to_string();
    fs::write(lab.out("recipe.json"), &text).unwrap();
    let error = lab.fail(&["--set", "reward-model.optimizer.lr=0.5"]);
    assert!(error.contains("`reward-model.optimizer.lr` changed") && error.contains("  ppo, "), "{error}");
    fs::write(lab.out("recipe.json"), &text).unwrap();
    assert_eq!(n_skipped(&lab.run(&[])), N_STEPS);
    let steps = &lab.json("recipe.json")["steps"];
    assert!(steps["sft"]["inputs"]["sft.optimizer.lr"].is_string(), "{steps}");
    // A version without these settings computed what their defaults compute.
    let newer = [
        ("pretrain", "pretrain.data.max_record_bytes"),
        ("sft", "sft.data.max_record_bytes"),
        ("ppo", "ppo.train.rollout_batch_size"),
        ("ppo", "ppo.ppo.estimator"),
        ("collect", "recipe.collect.batch_size"),
    ];
    let mut record = lab.json("recipe.json");
    for (step, name) in newer {
        let inputs = record["steps"][step]["inputs"].as_object_mut().unwrap();
        assert!(inputs.remove(name).is_some(), "{name}: {inputs:?}");
    }
    fs::write(lab.out("recipe.json"), record.to_string()).unwrap();
    let error = lab.fail(&["--set", "ppo.train.rollout_batch_size=2"]);
    assert!(error.contains("`ppo.train.rollout_batch_size` was not set and is now 2"), "{error}");
    assert_eq!(n_skipped(&lab.run(&[])), N_STEPS);
    // The precision decides what is computed; PPO only reports the gold score.
    assert_eq!(steps["ppo"]["inputs"]["precision"], "f32");
    let ppo = steps["ppo"]["inputs"].as_object().unwrap();
    assert!(!ppo.keys().any(|name| name.contains("gold")), "{ppo:?}");
}
