//! Groups of threads in this process.

use clap::Parser;
use common::group::{Group, threads};
use common::interrupt::Interrupt;
use common::session::Outcome;
use pipeline_tests::{DPO, Lab, PPO, PRETRAIN, REWARD_MODEL, SFT, Stage};

/// Enough micro-batches that 2, 3 and 4 ranks have some each.
pub(crate) const SHARED: [&str; 2] = ["train.batch_size=8", "train.micro_batch_size=1"];

/// Pretraining text for PPO.
const TEXT: &str = "ptx.data.train=['../data/train.txt']";

/// Trains a stage on one rank of a group.
fn train(lab: &Lab, stage: Stage, out: &str, group: &Group, more: &[&str]) -> anyhow::Result<Outcome> {
    let path = |name: &str| lab.path(name).display().to_string();
    let mut args = [stage.program, "train", "--threads", "2"].map(str::to_owned).to_vec();
    let config = format!("configs/{}.toml", stage.program);
    for pair in
        [["--config", &config], ["--out", out]].iter().copied().chain(stage.inputs.chunks(2).map(|i| [i[0], i[1]]))
    {
        args.extend([pair[0].to_owned(), path(pair[1])]);
    }
    args.extend(more.iter().map(ToString::to_string));
    let never = Interrupt::never();
    match stage.program {
        "pretrain" => {
            let pretrain::Command::Train(args) = pretrain::Cli::parse_from(args).command else { panic!("it trains") };
            pretrain::train(&args, group, never)
        }
        "sft" => {
            let sft::Command::Train(args) = sft::Cli::parse_from(args).command else { panic!("it trains") };
            sft::train(&args, group, never)
        }
        "reward-model" => {
            let reward_model::Command::Train(args) = reward_model::Cli::parse_from(args).command else {
                panic!("it trains")
            };
            reward_model::train(&args, group, never)
        }
        "dpo" => {
            let dpo::Command::Train(args) = dpo::Cli::parse_from(args).command else { panic!("it trains") };
            dpo::train(&args, group, never)
        }
        _ => {
            let ppo::Command::Train(args) = ppo::Cli::parse_from(args).command else { panic!("it trains") };
            ppo::train(&args, group, never, None)
        }
    }
}

/// Trains a stage as a group of `n` threads.
fn train_as(lab: &Lab, stage: Stage, out: &str, n: usize, more: &[&str]) {
    for (rank, outcome) in threads(n, |group| train(lab, stage, out, &group, more)).into_iter().enumerate() {
        assert_eq!(outcome.unwrap_or_else(|error| panic!("rank {rank} of {n}: {error:#}")), Outcome::Finished);
    }
}

/// Checks that 2, 3 and 4 ranks leave what one leaves, and that a run goes on with another number of them.
fn assert_any_number_of_ranks_is_one(stage: Stage, settings: &[&str]) {
    let lab = Lab::before(stage);
    let more: Vec<&str> = SHARED.iter().chain(settings).flat_map(|setting| ["--set", setting]).collect();
    train_as(&lab, stage, "one", 1, &more);
    for n in [2, 4] {
        let out = format!("by-{n}");
        train_as(&lab, stage, &out, n, &more);
        lab.assert_same("one", &out);
    }
    let steps = lab.saved_step("one").unwrap();
    for (out, ranks) in [("alone", [1, 1, 1]), ("parts", [2, 3, 1])] {
        for (i, n) in ranks.into_iter().enumerate() {
            let up_to = format!("train.steps={}", steps * (i as u64 + 1) / 3);
            let resume = ["--set", &up_to, "--resume"];
            train_as(&lab, stage, out, n, &[&more, &resume[..if i == 0 { 2 } else { 3 }]].concat());
        }
    }
    lab.assert_same("alone", "parts");
}

#[test]
fn an_order_in_blocks_is_the_same_for_any_number_of_ranks() {
    assert_any_number_of_ranks_is_one(PRETRAIN, &["data.shuffle=\"blocks\"", "train.seq_len=4"]);
}

#[test]
fn pretraining_by_any_number_of_ranks_is_that_of_one() {
    assert_any_number_of_ranks_is_one(PRETRAIN, &["model.dropout=0.1", "run.keep_best=true"]);
}

#[test]
fn fine_tuning_by_any_number_of_ranks_is_that_of_one() {
    assert_any_number_of_ranks_is_one(SFT, &["model.dropout=0.1"]);
}

#[test]
fn a_reward_model_by_any_number_of_ranks_is_that_of_one() {
    assert_any_number_of_ranks_is_one(REWARD_MODEL, &["train.centring_coef=0.1"]);
}

#[test]
fn dpo_by_any_number_of_ranks_is_that_of_one() {
    assert_any_number_of_ranks_is_one(DPO, &["run.keep_best=true"]);
}

#[test]
fn ppo_by_any_number_of_ranks_is_that_of_one() {
    // With its controller, whitening and value model; a minibatch has four micro-batches.
    assert_any_number_of_ranks_is_one(PPO, &["train.batch_invariant=true", "ppo.policy_ema=0.5"]);
}

#[test]
fn ppo_with_pretraining_text_by_any_number_of_ranks_is_that_of_one() {
    // Six windows for four micro-batches.
    assert_any_number_of_ranks_is_one(
        PPO,
        &["train.batch_invariant=true", TEXT, "ppo.ptx_coef=0.5", "ptx.batch_size=6"],
    );
}

#[test]
fn adapters_by_any_number_of_ranks_are_those_of_one() {
    assert_any_number_of_ranks_is_one(SFT, &["lora.rank=3", "lora.dropout=0.1"]);
}

/// Checks that a run whose ranks each keep a part of the optimiser leaves what one rank leaves, and goes on with any number of
/// ranks, with parts or without.
fn assert_parts_are_the_whole(stage: Stage, settings: &[&str]) {
    let lab = Lab::before(stage);
    let more: Vec<&str> = SHARED.iter().chain(settings).flat_map(|setting| ["--set", setting]).collect();
    let parts = ["--set", "train.shard_optimizer=true"];
    train_as(&lab, stage, "one", 1, &more);
    for n in [2, 3] {
        let out = format!("by-{n}");
        train_as(&lab, stage, &out, n, &[&more[..], &parts].concat());
        assert_same_but_for_settings(&lab, "one", &out);
    }
    let steps = lab.saved_step("one").unwrap();
    let wholes = ["--set", "train.shard_optimizer=false"];
    for (out, ranks) in [("alone", [1, 1, 1, 1]), ("parts", [2, 3, 2, 1])] {
        for (i, n) in ranks.into_iter().enumerate() {
            let up_to = format!("train.steps={}", steps * (i as u64 + 1) / 4);
            let resume = ["--set", &up_to, "--resume"];
            let how = if i == 1 { &wholes } else { &parts };
            train_as(&lab, stage, out, n, &[&more, &how[..], &resume[..if i == 0 { 2 } else { 3 }]].concat());
        }
    }
    lab.assert_same("alone", "parts");
}

/// Checks that two checkpoints have the same weights, moments, metrics and samples.
#[track_caller]
fn assert_same_but_for_settings(lab: &Lab, a: &str, b: &str) {
    let contents = |out: &str| {
        let mut contents = lab.contents(out);
        for name in ["config.toml", "state/state.json"] {
            assert!(contents.remove(name).is_some(), "{name}");
        }
        contents
    };
    let (of_a, of_b) = (contents(a), contents(b));
    assert!(of_a.keys().eq(of_b.keys()), "`{a}` and `{b}` hold different files");
    let different: Vec<_> = of_a.iter().filter(|(name, content)| of_b[*name] != **content).collect();
    assert!(different.is_empty(), "`{a}` and `{b}`: {:?}", different.iter().map(|(name, _)| name).collect::<Vec<_>>());
}

#[test]
fn pretraining_with_parts_of_the_optimiser_is_that_with_the_whole() {
    assert_parts_are_the_whole(PRETRAIN, &["model.dropout=0.1", "run.keep_best=true", "optimizer.grad_clip=0.1"]);
}

#[test]
fn fine_tuning_with_parts_of_the_optimiser_is_that_with_the_whole() {
    assert_parts_are_the_whole(SFT, &[]);
}

#[test]
fn a_reward_model_with_parts_of_the_optimiser_is_that_with_the_whole() {
    assert_parts_are_the_whole(REWARD_MODEL, &["optimizer.grad_clip=0"]);
}

#[test]
fn dpo_with_parts_of_the_optimiser_is_that_with_the_whole() {
    assert_parts_are_the_whole(DPO, &[]);
}

#[test]
fn ppo_with_parts_of_both_optimisers_is_that_with_the_whole() {
    let text = [TEXT, "ppo.ptx_coef=0.5"];
    assert_parts_are_the_whole(PPO, &[&["train.batch_invariant=true", "ppo.policy_ema=0.5"], &text[..]].concat());
}

#[test]
fn adapters_with_parts_of_the_optimiser_are_those_with_the_whole() {
    assert_parts_are_the_whole(SFT, &["lora.rank=3", "lora.dropout=0.1"]);
}

/// The largest difference of two weights after the runs of [`fast_sums_differ_by_rounding_alone`]; with AdamW's first steps of
/// about the learning rate for any gradient, one that rounds to the other sign moves a weight by twice that.
const ROUNDED: f32 = 1e-3;

#[test]
fn fast_sums_differ_by_rounding_alone() {
    let lab = Lab::before(PRETRAIN);
    let more: Vec<&str> = SHARED.iter().flat_map(|setting| ["--set", setting]).collect();
    let fast = [&more[..], &["--set", "train.reduce='fast'"]].concat();
    train_as(&lab, PRETRAIN, "one", 1, &more);
    train_as(&lab, PRETRAIN, "fast-alone", 1, &fast);
    assert_same_but_for_settings(&lab, "one", "fast-alone");
    for n in [2, 3] {
        let (whole, parts) = (format!("fast-{n}"), format!("fast-parts-{n}"));
        train_as(&lab, PRETRAIN, &whole, n, &fast);
        train_as(&lab, PRETRAIN, &parts, n, &[&fast[..], &["--set", "train.shard_optimizer=true"]].concat());
        for out in [whole, parts] {
            let difference = lab.largest_difference("one", &out);
            println!("{out}: weights differ by {difference:e} at most");
            assert!(difference > 0.0, "`{out}`: another order rounds otherwise");
            assert!(difference < ROUNDED, "`{out}`: {difference}");
        }
    }
}
