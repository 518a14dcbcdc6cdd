//! Memory of several processes: what `recipe plan` says of each rank is what it takes, and what a machine does not have for
//! all of its ranks is refused.

#![cfg(target_os = "linux")]

use common::testing::has_mpirun;
use pipeline_tests::{DPO, Lab, PPO, PRETRAIN, REWARD_MODEL, SFT, Stage};
use serde_json::Value;

use crate::mpirun::{mpirun, process, set};

/// How far a plan may be from what a rank took: it counts tensors, not the pieces that an allocator makes of memory.
const TOLERANCE: f64 = 0.15;

const MIB: f64 = (1_u64 << 20) as f64;

/// Of all runs: short, in six micro-batches.
const SHORT: [&str; 6] = [
    "run.eval_every=0",
    "run.save_every=0",
    "run.log_every=1",
    "train.steps=2",
    "train.batch_size=6",
    "train.micro_batch_size=1",
];

/// A model of 30 MB, which dominates what the program itself takes.
const MODEL: [&str; 8] = [
    "model.d_model=384",
    "model.n_layers=4",
    "model.n_heads=6",
    "model.max_seq_len=128",
    "model.dropout=0.0",
    "train.seq_len=128",
    "train.eval_windows=4",
    "train.sample_tokens=4",
];

/// The memory that each of `n` ranks took at most, in MiB.
fn taken(lab: &Lab, stage: Stage, out: &str, n: usize, settings: &[&str]) -> Vec<f64> {
    let more = [set(settings), vec!["-v", "--overwrite"]].concat();
    let output = lab.finish(mpirun(lab, &vec![process(stage, out, &more); n]));
    assert!(output.status.success(), "{}", output.stderr);
    let line = output.stderr.lines().find_map(|line| line.strip_suffix(" MiB of memory at most"));
    let (_, of_ranks) = line.and_then(|line| line.rsplit_once(": ")).expect("the run says what it took");
    of_ranks.split(", ").map(|mib| mib.parse().unwrap()).collect()
}

/// The peak that `recipe plan` expects of each of `n` ranks in a stage of a recipe with the `others`, in MiB.
fn planned(lab: &Lab, recipe: &str, stage: Stage, others: &[Stage], n: usize, settings: &[&str]) -> Vec<f64> {
    let name = stage.program;
    let of_stage = settings.iter().map(|setting| format!("{name}.{setting}"));
    // A plan is for ranks that have something to do in every stage.
    let of_others = others.iter().flat_map(|other| SHORT.map(|setting| format!("{}.{setting}", other.program)));
    let settings: Vec<String> = of_others.chain(of_stage).collect();
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let n = n.to_string();
    let args = [&["plan", recipe, "--out", ".", "--json", "--ranks", &n][..], &set(&settings)].concat();
    let plan: Value = serde_json::from_str(&lab.ok("recipe", &args)).unwrap();
    let stage = &plan["stages"][name];
    let ranks: Vec<f64> = stage["ranks"].as_array().unwrap().iter().map(|r| r["peak"].as_f64().unwrap()).collect();
    assert!((stage["peak"].as_f64().unwrap() - ranks.iter().sum::<f64>()).abs() < 1.0, "all ranks together");
    ranks.into_iter().map(|bytes| bytes / MIB).collect()
}

fn assert_near(what: &str, planned: &[f64], taken: &[f64]) {
    println!("{what}: {planned:.0?} MiB were planned, {taken:.0?} taken");
    assert_eq!(planned.len(), taken.len());
    let near = planned.iter().zip(taken).all(|(planned, taken)| (planned / taken - 1.0).abs() <= TOLERANCE);
    assert!(near, "{what}: {planned:.0?} MiB were planned, {taken:.0?} taken");
}

#[test]
fn a_plan_for_several_ranks_is_what_each_takes() {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::before(PRETRAIN);
    let recipe = |name: &str, head: &str, stages: &[&str]| {
        let listed: Vec<String> = stages.iter().map(|stage| format!("\"{stage}\"")).collect();
        lab.write(
            &format!("{name}/recipe.toml"),
            format!("title = \"Memory\"\n{head}stages = [{}]\n", listed.join(", ")),
        );
        for stage in stages {
            lab.write(&format!("{name}/{stage}.toml"), lab.bytes(&format!("configs/{stage}.toml")));
        }
    };
    recipe("recipe", "", &["pretrain"]);
    recipe("later", "init = \"../base\"\n", &["sft", "reward-model", "ppo", "dpo"]);
    let parts = "train.shard_optimizer=true";
    let ways: [(&str, usize, &[&str]); 4] = [
        ("fast", 2, &["train.reduce='fast'"]),
        ("three", 3, &["train.micro_batch_size=2"]),
        ("parts", 3, &[parts]),
        ("base", 2, &[]),
    ];
    for (out, n, how) in ways {
        let settings = [&SHORT[..], &MODEL, how].concat();
        let planned = planned(&lab, "recipe", PRETRAIN, &[], n, &settings);
        assert_near(out, &planned, &taken(&lab, PRETRAIN, out, n, &settings));
    }
    let stages: [(Stage, &[&str]); 4] = [
        (SFT, &["model.dropout=0.0"]),
        (REWARD_MODEL, &["model.dropout=0.0", "normalisation.samples=4", parts]),
        (PPO, &["ppo.epochs=1", "ppo.minibatches=1", parts]),
        (DPO, &[]),
    ];
    for (stage, how) in stages {
        let settings = [&SHORT[..], how].concat();
        let planned = planned(&lab, "later", stage, &[SFT, REWARD_MODEL, PPO, DPO], 2, &settings);
        assert_near(stage.program, &planned, &taken(&lab, stage, stage.out, 2, &settings));
    }
}

#[test]
fn what_a_machine_does_not_have_for_all_of_its_ranks_is_refused() {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::before(PRETRAIN);
    let large = set(&[&SHORT[..], &["model.d_model=8192", "model.n_layers=24"]].concat());
    let refused = lab.finish(mpirun(&lab, &vec![process(PRETRAIN, "out", &large); 3]));
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    for says in
        ["error: ranks 0 to 2 need about ", " GiB of memory together (", "start fewer processes on that machine"]
    {
        assert!(refused.stderr.contains(says), "`{says}`: {}", refused.stderr);
    }
    assert_eq!(refused.stderr.matches("error: ").count(), 1, "one of them speaks: {}", refused.stderr);
    assert!(!lab.path("out").exists());
}
