//! `chat generate --best-of`: the answer that a reward model scores highest.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::path::Path;

use burn::tensor::Device;
use common::checkpoint::{Checkpoint, Stage};
use common::score::score_rows;
use common::testing::{byte_tokenizer, run, save_tiny};
use common::tokenizer::{Tokenizer, TokenizerConfig, TokenizerKind};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_chat");

fn models() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    save_tiny(&dir.path().join("lm"), Stage::Sft, &byte_tokenizer(), 3);
    save_tiny(&dir.path().join("rm"), Stage::RewardModel, &byte_tokenizer(), 5);
    let config = TokenizerConfig { kind: TokenizerKind::Char, ..TokenizerConfig::default() };
    let chars = Tokenizer::train(&config, ["abc"].iter(), true).unwrap();
    save_tiny(&dir.path().join("other"), Stage::RewardModel, &chars, 5);
    dir
}

fn generate(dir: &Path, more: &[&str]) -> (i32, String, String) {
    run(PROGRAM, &[&["generate", "--checkpoint", "lm", "--prompt", "hi", "--max-tokens", "12"], more].concat(), dir)
}

fn json(dir: &Path, more: &[&str]) -> Vec<Value> {
    let (code, stdout, stderr) = generate(dir, &[more, &["--json"]].concat());
    assert_eq!(code, 0, "{stderr}");
    stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn the_best_is_the_sample_with_the_highest_score() {
    let dir = models();
    let ids = |sample: &Value, name: &str| -> Vec<u32> { serde_json::from_value(sample[name].clone()).unwrap() };
    let reward_model = Checkpoint::open(&dir.path().join("rm")).unwrap().load_scalar(&Device::flex()).unwrap();
    let samples = json(dir.path(), &["--num-samples", "40"]);
    let rows: Vec<Vec<u32>> =
        samples.iter().map(|sample| [ids(sample, "prompt_token_ids"), ids(sample, "token_ids")].concat()).collect();
    let scores: Vec<f32> = rows.iter().map(|row| score_rows(&reward_model, &[row], 1).unwrap()[0]).collect();
    for n in [1, 5, 40] {
        let n_answers = n.to_string();
        let flags = ["--best-of", &n_answers, "--reward-model", "rm"];
        let [best] = &json(dir.path(), &flags)[..] else { panic!("one answer") };
        let chosen = best["sample"].as_u64().unwrap() as usize;
        let highest = scores[..n].iter().copied().fold(f32::NEG_INFINITY, f32::max);
        assert_eq!(scores[chosen], highest, "of {n}");
        assert!((best["score"].as_f64().unwrap() as f32 - highest).abs() < 1e-5, "{best}");
        assert_eq!(best["token_ids"], samples[chosen]["token_ids"]);
        let (_, text, _) = generate(dir.path(), &flags);
        assert_eq!(text, format!("{}\n", best["text"].as_str().unwrap()));
    }
}

/// How the scores of members become one.
type Combined = fn(f64, f64) -> f64;

#[test]
fn several_reward_models_choose_by_their_ensemble() {
    let dir = models();
    save_tiny(&dir.path().join("rm-2"), Stage::RewardModel, &byte_tokenizer(), 6);
    let of = |name: &str| Checkpoint::open(&dir.path().join(name)).unwrap().load_scalar(&Device::flex()).unwrap();
    let judges = ["rm", "rm-2"].map(of);
    let ids = |sample: &Value, name: &str| -> Vec<u32> { serde_json::from_value(sample[name].clone()).unwrap() };
    let rows: Vec<Vec<u32>> = json(dir.path(), &["--num-samples", "40"])
        .iter()
        .map(|sample| [ids(sample, "prompt_token_ids"), ids(sample, "token_ids")].concat())
        .collect();
    let score = |judge, row: &Vec<u32>| f64::from(score_rows(judge, &[row], 1).unwrap()[0]);
    let scores: Vec<[f64; 2]> = rows.iter().map(|row| [score(&judges[0], row), score(&judges[1], row)]).collect();
    let ways: [(&[&str], Combined); 4] = [
        (&[], f64::midpoint),
        (&["--ensemble", "mean"], f64::midpoint),
        (&["--ensemble", "worst"], f64::min),
        (&["--ensemble", "mean-less-variance"], |a, b| f64::midpoint(a, b) - 0.125 * (a - b) * (a - b)),
    ];
    for (flags, combined) in ways {
        let all = [&["--best-of", "40", "--reward-model", "rm", "--reward-model", "rm-2"][..], flags].concat();
        let [best] = &json(dir.path(), &all)[..] else { panic!("one answer") };
        let of: Vec<f64> = scores.iter().map(|&[a, b]| combined(a, b)).collect();
        let highest = of.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let chosen = best["sample"].as_u64().unwrap() as usize;
        assert!((of[chosen] - highest).abs() < 1e-5, "{flags:?}: {best}");
        assert!((best["score"].as_f64().unwrap() - highest).abs() < 1e-5, "{flags:?}: {best} {highest}");
    }
}

#[test]
fn what_cannot_choose_is_refused() {
    let dir = models();
    for (flags, code, says) in [
        (&["--best-of", "4"][..], 2, "--reward-model <DIR>"),
        (&["--reward-model", "rm"], 2, "--best-of <N>"),
        (&["--best-of", "0", "--reward-model", "rm"], 2, "0 is not in 1..=100000"),
        (&["--best-of", "4", "--reward-model", "rm", "--raw"], 2, "cannot be used with"),
        (&["--best-of", "4", "--reward-model", "rm", "--num-samples", "2"], 2, "cannot be used with"),
        (
            &["--best-of", "4", "--reward-model", "rm", "--temperature", "0"],
            2,
            "hint: leave out `--beams` and set `--temperature` above 0",
        ),
        (&["--best-of", "4", "--reward-model", "rm", "--ensemble", "worst"], 2, "needs several reward models"),
        (&["--best-of", "4", "--reward-model", "rm", "--ensemble", "best"], 2, "`mean-less-variance`"),
        (&["--best-of", "4", "--ensemble", "worst"], 2, "--reward-model <DIR>"),
        (&["--best-of", "4", "--reward-model", "lm"], 1, "was written by stage `sft`, expected `reward-model`"),
        (&["--best-of", "4", "--reward-model", "other"], 1, "`other` and `lm` have different tokenizers"),
    ] {
        let (found, stdout, stderr) = generate(dir.path(), flags);
        assert!(found == code && stdout.is_empty() && stderr.contains(says), "{flags:?}: {found}: {stderr}");
    }
}
