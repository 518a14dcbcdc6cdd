//! Recipes of every shape that a recipe.toml may have.

#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the error in its message")]

mod lab;

use std::fs;

use lab::Lab;
use serde_json::Value;

const EVALUATE: &str = "seed = 3\n[evaluate]\nprompts = \"$DATA/prompts.test.jsonl\"\nn_prompts = 5\nmax_tokens = 12\n";
const PAIRS: &str = "pairs = \"$DATA/prefs.test.jsonl\"\n";
const WORLD_GOLD: &str = "[gold]\nkind = \"world\"\n";

/// Fails if there is a `null` in `value`.
fn assert_no_null(name: &str, value: &Value) {
    match value {
        Value::Null => panic!("`{name}` is null"),
        Value::Array(values) => values.iter().for_each(|value| assert_no_null(name, value)),
        Value::Object(fields) => fields.iter().for_each(|(key, value)| assert_no_null(&format!("{name}.{key}"), value)),
        _ => {}
    }
}

/// Checks what every finished run leaves.
fn assert_reported(lab: &Lab, stages: &[&str]) -> Value {
    let report = lab.json("report.json");
    let found: Vec<&String> = report["stages"].as_object().unwrap().keys().collect();
    assert_eq!(found, stages);
    for file in ["report.json", "recipe.json"] {
        assert_no_null(file, &lab.json(file));
    }
    if lab.out("evaluation.json").is_file() {
        assert_no_null("evaluation.json", &lab.json("evaluation.json"));
        for line in fs::read_to_string(lab.out("answers.jsonl")).unwrap().lines() {
            assert_no_null("answers.jsonl", &serde_json::from_str(line).unwrap());
        }
    }
    assert!(fs::read_to_string(lab.out("report.html")).unwrap().contains("</html>"));
    report
}

const ALL: [&str; 4] = ["pretrain", "sft", "reward-model", "ppo"];

#[test]
fn own_data_without_a_gold_score_finish_with_scores_divergence_and_words() {
    let lab = Lab::with_own_data(&format!("{EVALUATE}{PAIRS}"));
    let output = lab.command(&[]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("reward model's score on held-out prompts: base ") && said.contains("ppo "), "{said}");
    let report = assert_reported(&lab, &ALL);
    assert!(report.get("gold").is_none(), "{report}");
    assert_eq!(report["score"]["ppo"]["n"], 5);
    assert!(report["words"]["base"]["mean"].is_number(), "{report}");
    let (ppo, reward_model) = (&report["stages"]["ppo"]["metrics"], &report["stages"]["reward-model"]["metrics"]);
    assert!(ppo["kl_mean"].is_number() && ppo.get("gold/score").is_none(), "{ppo}");
    // The same prompts in both tables.
    assert_eq!(ppo["prompts"], 5, "{ppo}");
    assert!(reward_model["accuracy"].is_number() && reward_model.get("gold_accuracy").is_none(), "{reward_model}");
}

#[test]
fn own_data_without_test_pairs_finish() {
    let lab = Lab::with_own_data(EVALUATE);
    lab.run(&[]);
    let report = assert_reported(&lab, &ALL);
    assert!(report["stages"]["reward-model"]["metrics"].get("accuracy").is_none(), "{report}");
}

#[test]
fn a_gold_score_without_collected_pairs_is_reported() {
    let lab = Lab::with_own_data(&format!("{EVALUATE}{PAIRS}{WORLD_GOLD}"));
    lab.run(&[]);
    let report = assert_reported(&lab, &ALL);
    assert_eq!(report["gold"]["ppo"]["n"], 5, "{report}");
    assert!(report["stages"]["reward-model"]["metrics"]["gold_accuracy"].is_number(), "{report}");
    assert!(report["stages"]["ppo"]["metrics"]["gold/score"].is_number(), "{report}");

    // Another gold score is reported, not trained on: PPO stays, without the curve of the one before.
    lab.write("data/words.json", r#"{"happy": 3, "sad": -3}"#);
    let lexicon = "[gold]\nkind = \"lexicon\"\nwords = \"$DATA/words.json\"\n";
    lab.write("micro/recipe.toml", &format!("{EVALUATE}{PAIRS}{lexicon}"));
    let error = lab.fail(&[]);
    assert!(error.contains("`recipe.gold.kind` changed") && !error.contains("ppo, "), "{error}");
    let said = lab.run(&["--overwrite"]);
    assert_eq!(lab::n_skipped(&said), 5, "all but the evaluation: {said}");
    let report = assert_reported(&lab, &ALL);
    assert!(report["gold"]["ppo"].is_object(), "{report}");
    assert!(report["stages"]["ppo"]["metrics"].get("gold/score").is_none(), "{report}");
}

#[test]
fn a_recipe_without_evaluation_ends_with_its_stages() {
    let lab = Lab::with_own_data("seed = 3\n");
    lab.run(&[]);
    let report = assert_reported(&lab, &ALL);
    assert!(report.get("score").is_none() && report.get("words").is_none(), "{report}");
}

#[test]
fn some_stages_are_a_recipe_and_later_ones_go_on_from_them() {
    let lab = Lab::with_own_data(&format!("stages = [\"pretrain\", \"sft\"]\n{EVALUATE}temperature = 0\n"));
    lab.run(&[]);
    let report = assert_reported(&lab, &["pretrain", "sft"]);
    assert!(report["words"]["sft"].is_object() && report.get("score").is_none(), "{report}");

    lab.write("micro/recipe.toml", &format!("stages = [\"reward-model\", \"ppo\"]\n{EVALUATE}"));
    lab.run(&["--stages", "reward-model,ppo"]);
    let report = lab.json("report.json");
    assert!(report["stages"]["ppo"].is_object(), "{report}");
}

#[test]
fn a_recipe_starts_from_a_model_that_is_there() {
    let first = Lab::with_own_data("seed = 3\nstages = [\"pretrain\"]\n");
    first.run(&[]);
    let model = first.out("pretrain");
    let lab = Lab::with_own_data(&format!("init = \"{}\"\n{EVALUATE}", model.display()));
    let said = lab.run(&[]);
    assert!(!said.contains("tokenizer") && !said.contains("] pretrain"), "{said}");
    let report = assert_reported(&lab, &["sft", "reward-model", "ppo"]);
    assert!(report["score"]["base"].is_object(), "{report}");
    let error = lab.fail(&["--base", "nowhere"]);
    assert!(error.contains("`--base nowhere` says where the base of an adapter lies, but `"), "{error}");
    let manifest = lab.json("sft/manifest.json");
    let weights = first.json("pretrain/manifest.json")["weights_sha256"].clone();
    assert_eq!(manifest["parents"][0]["weights_sha256"], weights);

    // A recipe that generates its data can be planned for it before there is any: the lengths are those of the context.
    let generated = Lab::new();
    let plan = || {
        let init = ["plan", "micro", "--out", "out", "--json", "--init", model.to_str().unwrap()];
        let planned = generated.program(&init).output().unwrap();
        assert!(planned.status.success(), "{}", String::from_utf8_lossy(&planned.stderr));
        let plan: serde_json::Value = serde_json::from_slice(&planned.stdout).unwrap();
        plan["stages"]["ppo"]["bytes"]["activations"].as_u64().unwrap()
    };
    let of_contexts = plan();
    let data = ["world", "--out", "out/data", "--stories", "480"];
    assert!(generated.program(&data).output().unwrap().status.success());
    let of_data = plan();
    assert!(of_data < of_contexts, "{of_data} and {of_contexts}");

    // Pretraining can go on from it as well; a flag names it, by a path from where the command is run.
    let lab = Lab::with_own_data("seed = 3\nstages = [\"pretrain\"]\n");
    std::os::unix::fs::symlink(&model, lab.path("a \"model\"")).unwrap();
    lab.run(&["--init", "a \"model\""]);
    assert_eq!(lab.json("pretrain/manifest.json")["parents"][0]["weights_sha256"], weights);
}

#[test]
fn a_recipe_starts_from_an_adapter_whose_base_lies_elsewhere() {
    let first = Lab::with_own_data("seed = 3\nstages = [\"pretrain\", \"sft\"]\n");
    first.run(&["--set", "sft.lora.rank=2"]);
    std::fs::rename(first.out("pretrain"), first.path("moved")).unwrap();
    let adapter = first.out("sft");
    let lab = Lab::with_own_data(&format!("init = \"{}\"\n{EVALUATE}", adapter.display()));
    assert!(lab.fail(&[]).contains("pretrain"));
    let error = lab.fail(&["--base", first.path("moved").to_str().unwrap(), "--set", "sft.lora.rank=3"]);
    assert!(error.contains("`sft.lora.rank` is 3, but the adapter in `") && error.contains("has 2"), "{error}");
    lab.run(&["--base", first.path("moved").to_str().unwrap()]);
    let report = assert_reported(&lab, &["sft", "reward-model", "ppo"]);
    assert!(report["score"]["base"].is_object(), "{report}");

    // The reward model's adapter stands on the SFT model's weights, of which the base of another adapter is none.
    let again = Lab::with_own_data(&format!("init = \"{}\"\n{EVALUATE}", adapter.display()));
    let adapters = ["--set", "reward-model.lora.rank=2", "--set", "ppo.lora.rank=2"];
    again.run(&[&["--base", first.path("moved").to_str().unwrap()][..], &adapters].concat());

    // The base of the recipe's own adapters moves.
    let own = Lab::with_own_data(EVALUATE);
    let (moved, again) = (first.path("moved"), first.path("again"));
    let adapter = ["--set", "sft.lora.rank=2"];
    own.run(&[&["--init", moved.to_str().unwrap()][..], &adapter].concat());
    std::fs::rename(&moved, &again).unwrap();
    let other = ["--overwrite", "--set", "recipe.evaluate.n_prompts=2", "--init", again.to_str().unwrap()];
    let other = [&other[..], &adapter].concat();
    let error = own.fail(&other);
    assert!(error.contains("the base of the adapter") && error.contains("hint: `--base DIR`"), "{error}");
    own.run(&[&other[..], &["--base", again.to_str().unwrap()]].concat());
}
