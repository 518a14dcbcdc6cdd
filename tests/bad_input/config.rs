//! Configurations and `--set`.

use crate::{Case, models};

#[test]
fn files_that_are_no_config() {
    let lab = models();
    lab.write("configs/broken.toml", "seed = 1\ntrain = [\n");
    lab.write("configs/latin1.toml", b"seed = 1 # caf\xe9\n");
    let train = |config| ["train", "--config", config, "--tokenizer", "tokenizer", "--out", "out"];
    Case(&lab, "config-missing").refused("pretrain", &train("configs/nowhere.toml"));
    Case(&lab, "config-directory").refused("pretrain", &train("configs"));
    Case(&lab, "config-broken").refused("pretrain", &train("configs/broken.toml"));
    Case(&lab, "config-not-utf8").refused("pretrain", &train("configs/latin1.toml"));
}

#[test]
fn keys_and_values_that_have_no_place() {
    let lab = models();
    lab.write("configs/key.toml", "seed = 1\n\n[train]\nbatch_sise = 4\n");
    lab.write("configs/section.toml", "[modle]\nd_model = 4\n");
    lab.write("configs/type.toml", "[train]\nsteps = \"many\"\n");
    lab.write("configs/negative.toml", "[train]\nsteps = -1\n");
    lab.write("configs/variant.toml", "[model]\npreset = \"gpt3\"\n");
    let train = |config| ["train", "--config", config, "--tokenizer", "tokenizer", "--out", "out"];
    Case(&lab, "config-unknown-key").refused("pretrain", &train("configs/key.toml"));
    Case(&lab, "config-unknown-section").refused("pretrain", &train("configs/section.toml"));
    Case(&lab, "config-wrong-type").refused("pretrain", &train("configs/type.toml"));
    Case(&lab, "config-negative-count").refused("pretrain", &train("configs/negative.toml"));
    Case(&lab, "config-unknown-variant").refused("pretrain", &train("configs/variant.toml"));
    Case(&lab, "config-unknown-key-sft")
        .refused("sft", &["train", "--config", "configs/key.toml", "--init", "base", "--out", "out"]);
}

#[test]
fn overrides_that_do_not_fit() {
    let lab = models();
    Case(&lab, "set-unknown-key").refused("pretrain", &crate::pretrain(&["--set", "train.stepz=3"]));
    Case(&lab, "set-wrong-type").refused("pretrain", &crate::pretrain(&["--set", "train.steps=many"]));
    Case(&lab, "set-without-value").refused("pretrain", &crate::pretrain(&["--set", "train.steps"]));
    Case(&lab, "set-into-a-number").refused("sft", &crate::sft(&["--set", "seed.x=1"]));
}

#[test]
fn numbers_that_do_not_go_together() {
    let lab = models();
    for (name, setting) in [
        ("heads", "model.n_heads=5"),
        ("odd-width", "model={preset=\"transformer\",d_model=33,n_heads=3}"),
        ("no-layers", "model.n_layers=0"),
        ("dropout", "model.dropout=1.0"),
        ("micro-batch", "train.micro_batch_size=3"),
        ("no-steps", "train.steps=0"),
        ("negative-lr", "optimizer.lr=-0.001"),
        ("infinite-lr", "optimizer.lr=inf"),
        ("betas", "optimizer.betas=[0.9, 1.0]"),
        ("min-lr", "optimizer.min_lr=1.0"),
        ("val-fraction", "data.val_fraction=1.5"),
        ("no-data", "data.train=[]"),
    ] {
        Case(&lab, &format!("value-{name}")).refused("pretrain", &crate::pretrain(&["--set", setting]));
    }
    let tokenizer = ["tokenizer", "--config", "configs/pretrain.toml", "--out", "out"];
    let small = [&tokenizer[..], &["--set", "tokenizer.vocab_size=100"]].concat();
    Case(&lab, "value-vocab-size").refused("pretrain", &small);
    Case(&lab, "value-sft-micro-batch").refused("sft", &crate::sft(&["--set", "train.micro_batch_size=3"]));
    for (name, setting) in [
        ("minibatches", "ppo.minibatches=3"),
        ("micro-batch", "train.micro_batch_size=3"),
        ("gamma", "ppo.gamma=1.5"),
        ("temperature", "ppo.temperature=0.0"),
    ] {
        Case(&lab, &format!("value-ppo-{name}")).refused("ppo", &crate::ppo(&["--set", setting]));
    }
    for (name, setting) in [("samples", "normalisation.samples=1"), ("centring", "train.centring_coef=-1.0")] {
        let args = crate::reward_model(&["--set", setting]);
        Case(&lab, &format!("value-reward-model-{name}")).refused("reward-model", &args);
    }
}

#[test]
fn a_data_directory_that_is_not_named() {
    let lab = models();
    Case(&lab, "data-directory").refused("pretrain", &crate::pretrain(&["--set", "data.train=[\"$DATA/a.txt\"]"]));
}
