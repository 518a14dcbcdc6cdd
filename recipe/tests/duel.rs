//! `recipe duel`: two checkpoints, one judge.

#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the error in its message")]

use std::path::Path;

use common::checkpoint::Stage;
use common::testing::{byte_tokenizer, run, save_tiny};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_recipe");

/// Sums of a few dozen numbers of order one, in another order.
const ROUNDING: f64 = 1e-6;

/// Two policies, a judge, and prompts of which one is none of the world's.
fn arena() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = byte_tokenizer();
    save_tiny(&dir.path().join("a"), Stage::Sft, &tokenizer, 3);
    save_tiny(&dir.path().join("b"), Stage::Ppo, &tokenizer, 4);
    save_tiny(&dir.path().join("rm"), Stage::RewardModel, &tokenizer, 5);
    let names = ["Mia", "Sam", "Leo", "Ben", "Tom", "Mia and Sam"];
    let asked = names.map(|name| format!("Tell me a story about {name}.")).into_iter().chain(["hello?".to_owned()]);
    let lines: String = asked.map(|text| format!("{}\n", json!({ "prompt": text }))).collect();
    std::fs::write(dir.path().join("prompts.jsonl"), lines).unwrap();
    dir
}

fn duel(dir: &Path, [a, b]: [&str; 2], judge: &[&str]) -> Value {
    let args = [&["duel", a, b, "--prompts", "prompts.jsonl", "--max-tokens", "12", "--threads", "1"], judge].concat();
    let (code, stdout, stderr) = run(PROGRAM, &args, dir);
    assert_eq!(code, 0, "{stderr}");
    serde_json::from_str(&stdout).unwrap()
}

fn number(result: &Value, name: &str) -> f64 {
    result[name].as_f64().unwrap_or_else(|| panic!("no `{name}` in {result}"))
}

#[test]
fn the_sides_of_a_duel_can_be_changed() {
    let dir = arena();
    for (judge, n_prompts) in [(&["--reward-model", "rm"][..], 7), (&["--gold"], 6)] {
        let (there, back) = (duel(dir.path(), ["a", "b"], judge), duel(dir.path(), ["b", "a"], judge));
        assert_eq!(there["prompts"], n_prompts, "{there}");
        assert!((number(&there, "win_rate") + number(&back, "win_rate") - 1.0).abs() < ROUNDING, "{there} {back}");
        assert!((number(&there, "score_a") - number(&back, "score_b")).abs() < ROUNDING, "{there} {back}");
        let difference = number(&there, "score_a") - number(&there, "score_b");
        assert!((number(&there, "difference") - difference).abs() < ROUNDING, "{there}");
        let n = number(&there, "prompts");
        let wins = (number(&there, "wins") + 0.5 * number(&there, "ties")) / n;
        assert!((number(&there, "win_rate") - wins).abs() < ROUNDING, "{there}");
        let [low, high] = [0, 1].map(|i| there["win_rate_interval"][i].as_f64().unwrap());
        assert!(low < number(&there, "win_rate") && number(&there, "win_rate") < high || wins == 1.0 || wins == 0.0);
    }
    let judged = duel(dir.path(), ["a", "b"], &["--reward-model", "rm"]);
    assert_eq!(judged["ties"], 0, "two models that say different things: {judged}");
}

#[test]
fn a_model_is_as_good_as_itself() {
    let dir = arena();
    let result = duel(dir.path(), ["a", "a"], &["--reward-model", "rm", "--n-prompts", "5"]);
    assert_eq!((&result["ties"], &result["prompts"]), (&json!(5), &json!(5)), "{result}");
    assert_eq!((number(&result, "win_rate"), number(&result, "difference")), (0.5, 0.0), "{result}");
    let one = duel(dir.path(), ["a", "b"], &["--reward-model", "rm", "--n-prompts", "1"]);
    assert_eq!(one["difference_interval"], Value::Null, "one answer says nothing of others: {one}");
}

#[test]
fn a_duel_without_a_judge_or_with_two_is_wrong_usage() {
    let dir = arena();
    let base = ["duel", "a", "b", "--prompts", "prompts.jsonl"];
    for judge in [&[][..], &["--gold", "--reward-model", "rm"]] {
        let (code, stdout, stderr) = run(PROGRAM, &[&base, judge].concat(), dir.path());
        assert!(code == 2 && stdout.is_empty(), "{stderr}");
    }
    for bad in ["nan", "-1", "inf"] {
        let args = [&base[..], &["--gold", "--temperature", bad]].concat();
        let (code, _, stderr) = run(PROGRAM, &args, dir.path());
        assert!(code == 2 && stderr.contains("expected a number from 0 up"), "{bad}: {stderr}");
    }
    let (code, _, stderr) = run(PROGRAM, &["duel", "a", "rm", "--prompts", "prompts.jsonl", "--gold"], dir.path());
    assert!(code == 1 && stderr.contains("error: failed to load B: checkpoint `rm` was written by stage"), "{stderr}");
    std::fs::write(dir.path().join("prompts.jsonl"), "{\"prompt\": \"hello?\"}\n").unwrap();
    let args = [&base[..], &["--gold", "--max-tokens", "4"]].concat();
    let (code, _, stderr) = run(PROGRAM, &args, dir.path());
    assert!(code == 1 && stderr.contains("the gold score is defined for none of the prompts\nhint: "), "{stderr}");
}
