//! Text, records and token ids.

use crate::{Case, models};

#[test]
fn text_that_cannot_be_read() {
    let lab = models();
    lab.write("data/empty.txt", "");
    lab.write("data/blank.txt", "\n  \n\n");
    lab.write("data/latin1.txt", b"a good line\nanother\ncaf\xe9\n");
    lab.write("data/short.txt", "the fox");
    lab.write("data/table.csv", "text\nhello\n");
    lab.write("data/cut.txt.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\x4b");
    lab.write("data/no.parquet", "not Parquet");
    for (name, file) in [
        ("missing", "nowhere.txt"),
        ("empty", "empty.txt"),
        ("blank", "blank.txt"),
        ("not-utf8", "latin1.txt"),
        ("short", "short.txt"),
        ("unknown-format", "table.csv"),
        ("cut-gzip", "cut.txt.gz"),
        ("not-parquet", "no.parquet"),
        ("no-extension", "../data"),
    ] {
        let setting = format!("data.train=[\"../data/{file}\"]");
        Case(&lab, &format!("text-{name}")).refused("pretrain", &crate::pretrain(&["-q", "--set", &setting]));
    }
    let eval = ["eval", "--checkpoint", "base", "--data", "data/empty.txt"];
    Case(&lab, "text-eval-empty").refused("pretrain", &eval);
    let tokenizer = ["tokenizer", "--config", "configs/pretrain.toml", "--out", "out", "-q"];
    let empty = [&tokenizer[..], &["--set", "data.train=[\"../data/empty.txt\"]"]].concat();
    Case(&lab, "text-tokenizer-empty").refused("pretrain", &empty);
}

#[test]
fn conversations_that_are_none() {
    let lab = models();
    let good = r#"{"prompt": "hello", "completion": "hi"}"#;
    for (name, line) in [
        ("not-json", r#"{"prompt": "hello", "completion"}"#),
        ("no-object", "[1, 2]"),
        ("without-keys", r#"{"question": "hello", "answer": "hi"}"#),
        ("of-alpaca", r#"{"instruction": "hello", "input": "", "output": "hi"}"#),
        ("of-sharegpt", r#"{"conversations": [{"from": "human", "value": "hello"}]}"#),
        ("wrong-type", r#"{"prompt": "hello", "completion": 7}"#),
        ("unknown-role", r#"{"messages": [{"role": "human", "content": "hi"}]}"#),
        ("without-answer", r#"{"messages": [{"role": "user", "content": "hi"}]}"#),
        ("empty-text", r#"{"prompt": "hello", "completion": " "}"#),
    ] {
        lab.write("data/bad.jsonl", format!("{good}\n\n{line}\n"));
        let args = crate::sft(&["--set", "data.train=[\"../data/bad.jsonl\"]"]);
        Case(&lab, &format!("conversation-{name}")).refused("sft", &args);
    }
    lab.write("data/bad.jsonl", [good.as_bytes(), b"\n{\"prompt\": \"caf\xe9\"}\n"].concat());
    let args = crate::sft(&["--set", "data.val=[\"../data/bad.jsonl\"]"]);
    Case(&lab, "conversation-not-utf8").refused("sft", &args);
    lab.write("data/bad.jsonl", "nonsense\nmore\n");
    let skip = ["--set", "data.train=[\"../data/bad.jsonl\"]", "--set", "data.on_bad_record=skip"];
    Case(&lab, "conversation-all-skipped").refused("sft", &crate::sft(&skip));
    lab.write("data/long.jsonl", format!(r#"{{"prompt": "hello", "completion": "{}"}}"#, "ab ".repeat(100)));
    let fail = ["--set", "data.train=[\"../data/long.jsonl\"]", "--set", "data.on_too_long=fail"];
    Case(&lab, "conversation-too-long").refused("sft", &crate::sft(&fail));
    Case(&lab, "conversation-eval-missing").refused("sft", &["eval", "--checkpoint", "sft", "--data", "no.jsonl"]);
}

#[test]
fn files_that_are_not_there_or_too_much() {
    let lab = models();
    lab.write("data/line.jsonl", format!("{{\"prompt\": \"hello\", \"response\": \"{}\"}}", "ab ".repeat(100)));
    let sft = |more: &[&str]| crate::sft(&[&["--set", "data.train=../data/line.jsonl"], more].concat());
    Case(&lab, "data-no-match").refused("sft", &sft(&["--set", "data.val=../data/*.nothing"]));
    std::fs::create_dir(lab.path("data.jsonl")).unwrap();
    Case(&lab, "data-folder").refused("sft", &crate::sft(&["--set", "data.train=../data.jsonl"]));
    Case(&lab, "data-no-folder").refused("sft", &sft(&["--set", "data.val=$DATA/line.jsonl"]));
    Case(&lab, "data-record-too-long").refused("sft", &sft(&["--set", "data.max_record_bytes=100"]));
    Case(&lab, "data-record-limit-of-zero").refused("sft", &sft(&["--set", "data.max_record_bytes=0"]));
}

#[test]
fn pairs_and_prompts_that_are_none() {
    let lab = models();
    for (name, line) in [
        ("without-keys", r#"{"prompt": "a", "chosen": "b"}"#),
        ("equal", r#"{"prompt": "a", "chosen": "b", "rejected": "b"}"#),
        ("no-transcript", r#"{"chosen": "b", "rejected": "c"}"#),
        ("margin", r#"{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"}"#),
        ("margin-beyond-f32", r#"{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e39}"#),
        (
            "of-another-prompt",
            r#"{"prompt": "a", "chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}], "rejected": "c"}"#,
        ),
    ] {
        lab.write("data/bad.jsonl", line);
        let args = crate::reward_model(&["--set", "data.train=[\"../data/bad.jsonl\"]"]);
        Case(&lab, &format!("pair-{name}")).refused("reward-model", &args);
    }
    for (name, line) in [
        ("without-keys", r#"{"text": "a"}"#),
        ("empty", r#"{"prompt": ""}"#),
        (
            "ends-with-answer",
            r#"{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
        ),
        ("too-long", &format!(r#"{{"prompt": "{}"}}"#, "ab ".repeat(30))),
    ] {
        lab.write("data/bad.jsonl", line);
        let args = crate::ppo(&["--set", "data.train=[\"../data/bad.jsonl\"]"]);
        Case(&lab, &format!("prompt-{name}")).refused("ppo", &args);
    }
    lab.write("data/bad.jsonl", r#"{"prompt": "a"}"#);
    let score = ["score", "--checkpoint", "reward", "--data", "data/bad.jsonl"];
    Case(&lab, "score-without-keys").refused("reward-model", &score);
}

#[test]
fn token_ids_that_are_none() {
    let lab = models();
    for (name, text) in [
        ("out-of-range", "[[1, 2], [3, 4000]]"),
        ("negative", "[[-1]]"),
        ("empty-row", "[[1], []]"),
        ("no-rows", "[]"),
        ("not-json", "1 2 3"),
        ("too-long", &format!("[[{}1]]", "1,".repeat(64))),
    ] {
        lab.write("ids.json", text);
        let eval = ["eval", "--checkpoint", "base", "--ids", "ids.json", "--logits"];
        Case(&lab, &format!("ids-{name}")).refused("pretrain", &eval);
    }
    lab.write("ids.json", "[[1, 4000]]");
    Case(&lab, "ids-score-out-of-range")
        .refused("reward-model", &["score", "--checkpoint", "reward", "--ids", "ids.json"]);
    Case(&lab, "ids-missing").refused("pretrain", &["eval", "--checkpoint", "base", "--ids", "no.json"]);
}
