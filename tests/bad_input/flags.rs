//! Devices, usage and sampling.

use crate::{Case, models};

#[test]
fn devices_that_are_not_there() {
    let lab = models();
    Case(&lab, "backend-unknown").refused("pretrain", &crate::pretrain(&["--backend", "ndarry"]));
    Case(&lab, "backend-not-compiled-in").refused("sft", &crate::sft(&["--backend", "metal"]));
    Case(&lab, "backend-no-such-index").refused("pretrain", &crate::pretrain(&["--backend", "flex:7"]));
    Case(&lab, "backend-bad-index")
        .refused("chat", &["generate", "--checkpoint", "sft", "--prompt", "hi", "--backend", "flex:x"]);
}

#[test]
fn usage_that_clap_refuses() {
    let lab = models();
    Case(&lab, "threads-zero").refused("pretrain", &crate::pretrain(&["--threads", "0"]));
    Case(&lab, "threads-word").refused("pretrain", &crate::pretrain(&["--threads", "all"]));
    Case(&lab, "flag-unknown").refused("pretrain", &crate::pretrain(&["--step", "3"]));
    Case(&lab, "flag-missing").refused("sft", &["train", "--config", "configs/sft.toml"]);
    Case(&lab, "flag-quiet-and-verbose").refused("sft", &crate::sft(&["-q", "-v"]));
    Case(&lab, "command-unknown").refused("pretrain", &["trian"]);
    Case(&lab, "eval-without-input").refused("pretrain", &["eval", "--checkpoint", "base"]);
    Case(&lab, "eval-two-inputs")
        .refused("pretrain", &["eval", "--checkpoint", "base", "--data", "a.txt", "--ids", "b.json"]);
    Case(&lab, "eval-logits-of-text")
        .refused("pretrain", &["eval", "--checkpoint", "base", "--data", "a.txt", "--logits"]);
    Case(&lab, "kernels-unknown").refused("pretrain", &crate::pretrain(&["--kernels", "fast"]));
    Case(&lab, "ppo-eval-temperature").refused(
        "ppo",
        &[
            "eval",
            "--checkpoint",
            "sft",
            "--reference",
            "sft",
            "--reward-model",
            "reward",
            "--data",
            "data/prompts.val.jsonl",
            "--temperature",
            "0",
        ],
    );
}

#[test]
fn answers_that_cannot_be_given() {
    let lab = models();
    let generate = |more: &[&'static str]| [&["generate", "--checkpoint", "sft"], more].concat();
    for (name, more) in [
        ("temperature", &["--prompt", "hi", "--temperature", "-1"][..]),
        ("top-p", &["--prompt", "hi", "--top-p", "1.5"]),
        ("top-k", &["--prompt", "hi", "--top-k", "-1"]),
        ("repetition-penalty", &["--prompt", "hi", "--repetition-penalty", "0"]),
        ("max-tokens", &["--prompt", "hi", "--max-tokens", "0"]),
        ("beams-and-top-k", &["--prompt", "hi", "--beams", "2", "--top-k", "3"]),
        ("length-penalty", &["--prompt", "hi", "--length-penalty", "2"]),
        ("empty-stop", &["--prompt", "hi", "--stop", ""]),
        ("empty-prompt", &["--prompt", " "]),
        ("system-and-raw", &["--prompt", "hi", "--raw", "--system", "be kind"]),
        ("thinking", &["--prompt", "hi", "--thinking", "off"]),
    ] {
        Case(&lab, &format!("chat-{name}")).refused("chat", &generate(more));
    }
    let long = "a long prompt ".repeat(10);
    for (name, more) in [("over-long-prompt", &[][..]), ("over-long-raw-prompt", &["--raw"])] {
        let args = [&["generate", "--checkpoint", "sft", "--prompt", &long], more].concat();
        Case(&lab, &format!("chat-{name}")).refused("chat", &args);
    }
}
