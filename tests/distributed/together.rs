//! Groups of threads in this process.

use clap::Parser;
use common::group::{Group, threads};
use common::interrupt::Interrupt;
use common::session::Outcome;
use pipeline_tests::{DPO, Lab, PPO, PRETRAIN, REWARD_MODEL, SFT, Stage};

/// Enough micro-batches that 2, 3 and 4 ranks have some each.
pub(crate) const SHARED: [&str; 2] = ["train.batch_size=8", "train.micro_batch_size=1"];

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
fn adapters_by_any_number_of_ranks_are_those_of_one() {
    assert_any_number_of_ranks_is_one(SFT, &["lora.rank=3", "lora.dropout=0.1"]);
}
