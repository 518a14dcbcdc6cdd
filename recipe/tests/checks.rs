//! What `recipe run` finds wrong before its first step, not after hours of training.

#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the error in its message")]

mod lab;

use std::fs;

use lab::Lab;

const RECIPE: &str = "[evaluate]\nprompts = \"$DATA/prompts.test.jsonl\"\npairs = \"$DATA/prefs.test.jsonl\"\n";

/// The error of a run that must end before its first step.
#[track_caller]
fn refused(lab: &Lab, args: &[&str]) -> String {
    let error = lab.fail(args);
    assert!(!lab.out("tokenizer").exists() && !lab.out("data").exists(), "a step has run: {error}");
    error
}

#[test]
fn overrides_of_every_stage_are_named_as_they_were_typed() {
    let lab = Lab::new();
    for (flag, hint) in [
        ("sft.data.foo=1", "unknown field `foo`"),
        ("ppo.ppo.foo=1", "unknown field `foo`"),
        ("pretrain.steps=3", "hint: did you mean `pretrain.train.steps`?"),
        ("sft.steps=3", "hint: did you mean `sft.train.steps`?"),
        ("ppo.kl_coef=3", "hint: did you mean `ppo.ppo.kl_coef`?"),
        ("reward-model.train.epoch=3", "hint: did you mean `epochs`?"),
        ("recipe.evaluate.temperatur=1", "hint: did you mean `temperature`?"),
        ("ppo.train.steps=fast", "invalid value \"fast\", expected `train.steps` to be a whole number"),
    ] {
        let error = refused(&lab, &["--set", flag]);
        assert!(error.starts_with(&format!("error: invalid override `--set {flag}`")), "{error}");
        assert!(error.contains(hint), "{flag}: {error}");
    }
}

#[test]
fn numbers_that_do_not_fit_together_are_refused() {
    let lab = Lab::new();
    for (flag, reason) in [
        ("ppo.ppo.minibatches=3", "`ppo.minibatches` 3 does not divide"),
        ("ppo.ppo.response_length=300", "`ppo.ppo.response_length` is 300, but the model's context"),
        ("reward-model.normalisation.max_tokens=256", "`reward-model.normalisation.max_tokens` is 256"),
        ("recipe.collect.max_tokens=256", "`recipe.collect.max_tokens` is 256"),
        ("recipe.evaluate.max_tokens=999999", "`recipe.evaluate.max_tokens` is 999999"),
        ("recipe.evaluate.temperature=0", "`evaluate.temperature` is 0"),
        ("recipe.evaluate.temperature=nan", "`evaluate.temperature` to be a number from 0"),
        ("pretrain.model.n_heads=3", "n_heads"),
    ] {
        let error = refused(&lab, &["--set", flag]);
        assert!(error.contains(reason), "{flag}: {error}");
    }
    let error = refused(&lab, &["--backend", "cuda"]);
    assert!(error.contains("cuda"), "{error}");
}

/// What `recipe run` and `recipe plan` both say of a recipe that cannot run.
#[track_caller]
fn refused_by_both(lab: &Lab, sets: &[&str]) -> String {
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let error = refused(lab, &sets);
    let data: &[&str] = if lab.path("data").exists() { &["--data", "data"] } else { &[] };
    let planned = lab.program(&[&["plan", "micro", "--out", "out"][..], &sets, data].concat()).output().unwrap();
    let said = String::from_utf8(planned.stderr).unwrap();
    assert_eq!((planned.status.code(), planned.stdout.as_slice()), (Some(1), &b""[..]), "{said}");
    let reason = |text: &str| text.lines().find(|line| line.starts_with("error: ")).map(str::to_owned);
    assert_eq!(reason(&said), reason(&error));
    error
}

#[test]
fn text_and_ensemble_of_a_later_step_are_checked_before_the_first() {
    let text = "ppo.ptx.data.train=$DATA/pretrain.train.txt";
    for (sets, reason) in [
        (&["ppo.ppo.ensemble=worst"][..], "`ppo.ensemble` is \"worst\", but a recipe trains one reward model\nhint: "),
        (&[text, "ppo.ptx.seq_len=257"], "cannot run: `ptx.seq_len` 257 exceeds the policy's context of 256"),
        (&[text, "ppo.ptx.data.val=nowhere.txt"], "nowhere.txt"),
        (&["ppo.ptx.data.train=$DATA/pretrian.txt"], "pretrian.txt"),
        (&["ppo.ptx.data.train=blank.txt"], "blank.txt` is empty\nhint: "),
        (&["ppo.ptx.data.train=bad.jsonl"], "or skip such records with `ptx.data.on_bad_record = "),
        (&["ppo.data.val=nowhere.jsonl"], "nowhere.jsonl"),
        (&["ppo.data.val=$DATA/prompts.vla.jsonl"], "prompts.vla.jsonl"),
        (&["sft.data.train=nowhere.jsonl"], "nowhere.jsonl"),
    ] {
        for lab in [Lab::new(), Lab::with_own_data(RECIPE)] {
            lab.write("micro/blank.txt", "\n");
            lab.write("micro/bad.jsonl", "{\"words\": 1}\n");
            let error = refused_by_both(&lab, sets);
            assert!(error.contains(reason), "{sets:?}: {error}");
        }
    }
    // What is to be generated need not be there yet, nor what is to be collected.
    let lab = Lab::new();
    let good = ["--set", text, "--set", "ppo.ptx.seq_len=256", "--set", "ppo.ppo.ptx_coef=1"];
    let planned = lab.program(&[&["plan", "micro"][..], &good].concat()).output().unwrap();
    assert!(planned.status.success(), "{}", String::from_utf8_lossy(&planned.stderr));
}

#[test]
fn adapters_of_every_stage_are_checked_before_the_first() {
    for (sets, reason) in [
        (&["sft.lora.targets=[\"q_prj\"]"][..], "`sft` cannot run: invalid `sft.lora`: `q_prj` is no linear layer"),
        (&["ppo.lora.targets=q_proj"], "`ppo` cannot run: invalid `ppo.lora`: `q_proj` is no linear layer"),
        (
            &["sft.lora.rank=8", "reward-model.lora.rank=16"],
            "`reward-model` cannot run: `reward-model.lora.rank` is 16, but the adapter of `sft`, which it goes on with, has 8\nhint: ",
        ),
        (&["sft.lora.rank=16", "ppo.lora.alpha=3"], "`ppo.lora.alpha` is 3, but the adapter of `sft`"),
        (&["sft.lora.rank=16", "ppo.lora.targets=c_fc"], "`ppo.lora.targets` is [\"c_fc\"], but the adapter of `sft`"),
        (&["sft.lora.rank=16", "reward-model.lora.rslora=true"], "`reward-model.lora.rslora` is true"),
    ] {
        let error = refused_by_both(&Lab::new(), sets);
        assert!(error.contains(reason), "{sets:?}: {error}");
    }
    // What fits: an adapter that goes on with another dropout, one on weights that were trained, and weights that take one in.
    let lab = Lab::new();
    for sets in [
        &["sft.lora.rank=8", "reward-model.lora.rank=8", "ppo.lora.rank=8", "ppo.lora.dropout=0.1"][..],
        &["reward-model.lora.rank=8", "ppo.lora.rank=4"],
        &["sft.lora.rank=8"],
    ] {
        let flags: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        let planned = lab.program(&[&["plan", "micro"][..], &flags].concat()).output().unwrap();
        assert!(planned.status.success(), "{sets:?}: {}", String::from_utf8_lossy(&planned.stderr));
    }
}

#[test]
fn a_model_that_no_recipe_can_start_from_is_refused_by_the_plan_too() {
    let first = Lab::with_own_data("seed = 3\nstages = [\"pretrain\", \"sft\", \"reward-model\"]\n");
    first.run(&[]);
    let mute = first.path("mute");
    fs::create_dir(&mute).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(first.out("pretrain").join(file), mute.join(file)).unwrap();
    }
    for (init, reason) in [
        (first.out("reward-model"), "was written by stage `reward-model`, expected `pretrain` or `sft`"),
        (mute, "has no tokenizer"),
    ] {
        let error = refused_by_both(&Lab::with_own_data(RECIPE), &[&format!("recipe.init={}", init.display())]);
        assert!(error.contains("failed to load `recipe.init`: ") && error.contains(reason), "{error}");
    }
}

#[test]
fn too_few_micro_batches_for_the_ranks_name_the_stage_and_its_key() {
    let lab = Lab::new();
    let planned = lab.program(&["plan", "micro", "--ranks", "2"]).output().unwrap();
    let said = String::from_utf8(planned.stderr).unwrap();
    assert_eq!(planned.status.code(), Some(1), "{said}");
    assert!(
        said.contains("the step `pretrain`: ") && said.contains("`pretrain.train.micro_batch_size` to 1"),
        "{said}"
    );
}

#[test]
fn records_of_every_stage_are_read_before_the_first() {
    for (file, record, step, reason) in [
        ("sft.train.jsonl", "{\"prompt\": \"a\", \"completion\": \" \"}", "sft", "is empty"),
        ("prefs.train.jsonl", "{\"prompt\": \"a\", \"chosen\": \"b\"}", "reward-model", "rejected"),
        ("prompts.train.jsonl", "{\"prompts\": \"a\"}", "ppo", "expected `prompt`; found `prompts`"),
        ("prompts.test.jsonl", "not JSON", "evaluate", "line"),
        ("prefs.test.jsonl", "{}", "reward-model", "line"),
    ] {
        let lab = Lab::with_own_data(RECIPE);
        let path = lab.path("data").join(file);
        let text = fs::read_to_string(&path).unwrap();
        let good: Vec<&str> = text.lines().take(8).collect();
        fs::write(&path, [&good[..], &[record, ""]].concat().join("\n")).unwrap();
        let error = refused(&lab, &[]);
        let n = good.len() + 1;
        for part in [&format!("the step `{step}` cannot run"), file, reason, &format!("line {n}")] {
            assert!(error.contains(part), "no {part}: {error}");
        }
    }
}

#[test]
fn files_that_are_missing_or_empty_are_named() {
    for file in
        ["pretrain.train.txt", "sft.val.jsonl", "prefs.test.jsonl", "prompts.pairs-test.jsonl", "prompts.test.jsonl"]
    {
        let lab = Lab::with_own_data(RECIPE);
        fs::write(lab.path("data").join(file), "").unwrap();
        assert!(refused(&lab, &[]).contains(file), "{file} is empty");
        fs::remove_file(lab.path("data").join(file)).unwrap();
        assert!(refused(&lab, &[]).contains(file), "{file} is missing");
    }
    let lab = Lab::with_own_data(RECIPE);
    fs::remove_file(lab.path("micro/ppo.toml")).unwrap();
    assert!(refused(&lab, &[]).contains("micro/ppo.toml"));
}

#[test]
fn a_gold_score_that_understands_no_prompt_is_refused() {
    let lab = Lab::with_own_data(&format!("{RECIPE}[gold]\nkind = \"world\"\n"));
    lab.write("data/prompts.test.jsonl", "{\"prompt\": \"What is two and two?\"}\n");
    let error = refused(&lab, &[]);
    assert!(error.contains("no prompt of `") && error.contains("is a request of the world"), "{error}");
    assert!(error.contains("hint: leave `[gold]` out"), "{error}");
}

#[test]
fn prompts_that_are_too_long_are_found_as_soon_as_there_is_a_tokenizer() {
    let lab = Lab::with_own_data(RECIPE);
    let long = "Tell me a story about a fox and a red boat. ".repeat(60);
    lab.write("data/prompts.train.jsonl", &format!("{{\"prompt\": \"{long}\"}}\n{{\"prompt\": \"Hello?\"}}\n"));
    let error = lab.fail(&[]);
    assert!(error.contains("the step `ppo` cannot run: 1 of 2 prompts"), "{error}");
    assert!(lab.out("tokenizer").exists() && !lab.out("pretrain").exists(), "{error}");
    // Now that the tokenizer is there, at once.
    let output = lab.command(&[]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("1 of 2 prompts") && !said.contains("[1/"), "{said}");
}

#[test]
fn records_that_are_too_long_are_found_as_soon_as_there_is_a_tokenizer() {
    let lab = Lab::with_own_data(RECIPE);
    let long = "a fox and a red boat ".repeat(200);
    lab.write("data/sft.train.jsonl", &format!("{{\"prompt\": \"Hello?\", \"completion\": \"{long}\"}}\n"));
    lab.write(
        "data/prefs.test.jsonl",
        &format!("{{\"prompt\": \"Hello?\", \"chosen\": \"{long}\", \"rejected\": \"No.\"}}\n"),
    );
    let error = lab.fail(&["--set", "sft.data.on_too_long=fail"]);
    assert!(error.contains("the step `sft` cannot run: a conversation of `") && error.contains("sft.train"), "{error}");
    assert!(lab.out("tokenizer").exists() && !lab.out("pretrain").exists(), "{error}");
    let error = lab.fail(&[]);
    assert!(error.contains("the step `reward-model` cannot run: no pair is left to use"), "{error}");
    assert!(!lab.out("pretrain").exists(), "{error}");
}

#[test]
fn a_step_whose_parent_is_nowhere_is_refused() {
    let lab = Lab::with_own_data(RECIPE);
    let error = refused(&lab, &["--stages", "ppo"]);
    assert!(error.contains("the step `ppo` cannot run: it needs what `sft` leaves"), "{error}");
}
