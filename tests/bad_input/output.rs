//! Output directories, full disks, runs to resume.

use std::process::Command;

use common::checkpoint::Checkpoint;
use pipeline_tests::{Lab, PRETRAIN, binary};

use crate::{Case, models};

#[test]
fn directories_that_are_in_use() {
    let lab = models();
    lab.write("used/manifest.json", "{}");
    lab.write("thesis/chapter.tex", "");
    lab.write("file", "");
    let into = |out: &'static str| crate::pretrain_into(out, &[]);
    Case(&lab, "out-not-empty").refused("pretrain", &into("used"));
    Case(&lab, "out-is-a-file").refused("pretrain", &into("file"));
    Case(&lab, "out-below-a-file").refused("pretrain", &into("file/run"));
    Case(&lab, "out-below-a-device").refused("pretrain", &into("/dev/null/run"));
    Case(&lab, "overwrite-not-ours").refused("pretrain", &crate::pretrain_into("thesis", &["--overwrite"]));
    assert!(lab.path("thesis/chapter.tex").exists());
    let args = ["train", "--config", "configs/sft.toml", "--init", "base", "--out", "base", "--overwrite"];
    Case(&lab, "overwrite-the-input").refused("sft", &args);
    Checkpoint::open(&lab.path("base")).unwrap();
    let tokenizer = ["tokenizer", "--config", "configs/pretrain.toml", "--out", "thesis", "--overwrite"];
    Case(&lab, "overwrite-not-ours-tokenizer").refused("pretrain", &tokenizer);
}

#[test]
fn runs_that_cannot_be_resumed() {
    let lab = models();
    Case(&lab, "resume-nothing").refused("pretrain", &crate::pretrain_into("nowhere", &["--resume"]));
    Case(&lab, "resume-without-state").refused("pretrain", &crate::pretrain_into("base", &["--resume"]));
    Case(&lab, "resume-another-stage").refused("pretrain", &crate::pretrain_into("sft", &["--resume"]));
    Case(&lab, "resume-and-overwrite").refused("pretrain", &crate::pretrain_into("base", &["--resume", "--overwrite"]));

    lab.ok("pretrain", &crate::pretrain_into("run", &["-q", "--set", "train.steps=2"]));
    let resume = crate::pretrain_into("run", &["--resume", "-q"]);
    let path = "run/state/optimizer.safetensors";
    let mut bytes = lab.bytes(path);
    *bytes.last_mut().unwrap() ^= 1;
    lab.write(path, bytes);
    Case(&lab, "resume-changed-state").refused("pretrain", &resume);
    std::fs::remove_file(lab.path(path)).unwrap();
    Case(&lab, "resume-missing-state").refused("pretrain", &resume);
}

/// A limit on the size of files, with the signal that comes with it ignored, is what a program sees of a full disk.
fn limited(lab: &Lab, blocks: u32, program: &str, args: &[String]) -> pipeline_tests::Output {
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    let mut command = Command::new("bash");
    command.args(["-c", &script]).arg(binary(program));
    lab.finish(lab.within(command, args))
}

#[test]
fn a_full_disk_leaves_the_last_checkpoint() {
    let lab = models();
    lab.ok("pretrain", &PRETRAIN.train("out", &["-q", "--set", "train.steps=2"]));
    let before = lab.contents("out");
    let more = ["--resume", "-q", "--set", "train.steps=4"];
    let output = limited(&lab, 16, "pretrain", &PRETRAIN.train("out", &more));
    Case(&lab, "disk-full-save").compare("pretrain (on a full disk)", &output);
    let after = lab.contents("out");
    for (file, content) in &before {
        // The resolved configuration and the metrics of the steps that were made are written before the save.
        assert!(
            ["config.toml", "metrics.jsonl", "samples.jsonl"].contains(&&**file) || after[file] == *content,
            "`{file}` changed"
        );
    }
    Checkpoint::open(&lab.path("out")).unwrap();
    let names = std::fs::read_dir(lab.dir()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(names.into_iter().all(|name| !name.to_string_lossy().contains(".tmp-")), "an unfinished save was left");
    lab.ok("pretrain", &PRETRAIN.train("out", &more));
    assert_eq!(lab.saved_step("out"), Some(4));
}

#[test]
fn a_run_that_diverges_says_so_and_leaves_the_last_checkpoint() {
    let lab = models();
    // The first step moves finite weights very far; the second has nothing finite to go by.
    let settings = [
        "optimizer.lr=1000",
        "optimizer.weight_decay=1e6",
        "optimizer.warmup_steps=0",
        "optimizer.grad_clip=0",
        "run.save_every=1",
    ];
    let more: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
    let output = lab.run("pretrain", &PRETRAIN.train("out", &[&more[..], &["-q"]].concat()));
    assert_eq!(output.status.code(), Some(1), "{}", output.stderr);
    // Whether it is an infinity or NaN, and which number is seen first, is the processor's business.
    assert!(output.stderr.contains("any checkpoint saved before is kept"), "{}", output.stderr);
    assert!(["became", "holds"].iter().any(|verb| output.stderr.contains(verb)), "{}", output.stderr);
    let checkpoint = Checkpoint::open(&lab.path("out")).unwrap();
    checkpoint.state().unwrap();
    assert!(lab.saved_step("out").is_some_and(|step| (1..12).contains(&step)));
}

#[test]
fn results_that_cannot_be_printed() {
    let lab = models();
    lab.write("ids.json", "[[1, 2]]");
    for (name, program, args) in [
        ("disk-full-stdout-eval", "pretrain", &["eval", "--checkpoint", "base", "--ids", "ids.json"][..]),
        ("disk-full-stdout-score", "reward-model", &["score", "--checkpoint", "reward", "--ids", "ids.json"]),
        ("disk-full-stdout-chat", "chat", &["generate", "--checkpoint", "sft", "--prompt", "hi", "--max-tokens", "4"]),
    ] {
        let mut command = lab.command(program, args);
        command.stdout(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
        let output = command.output().unwrap();
        let stderr = lab.relative(&String::from_utf8(output.stderr).unwrap());
        let output = pipeline_tests::Output { status: output.status, stdout: String::new(), stderr };
        Case(&lab, name).compare(&format!("{program} {} > /dev/full", args.join(" ")), &output);
    }
}

#[test]
fn a_save_is_refused_where_nothing_may_be_written() {
    let lab = models();
    let tokenizer = ["tokenizer", "--config", "configs/pretrain.toml", "--out", "/dev/null/tokenizer"];
    Case(&lab, "out-below-a-device-tokenizer").refused("pretrain", &tokenizer);
}
