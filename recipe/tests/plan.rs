//! `recipe plan`: a table and an object whose parts add up, and nothing that is said twice.

#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the error in its message")]

mod lab;

use std::fs;

use lab::Lab;
use serde_json::Value;

/// What `recipe plan` prints and says.
#[track_caller]
fn plan(lab: &Lab, args: &[&str]) -> (String, String) {
    let planned = lab.program(&[&["plan", "micro"][..], args].concat()).output().unwrap();
    let [stdout, stderr] = [planned.stdout, planned.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(planned.status.success(), "{args:?}: {stderr}");
    (stdout, stderr)
}

#[test]
fn the_parts_of_a_peak_add_up_to_it() {
    let lab = Lab::new();
    let large = ["--set", "pretrain.model.d_model=512", "--set", "pretrain.model.n_layers=4"];
    let long = ["--set", "pretrain.train.batch_size=64", "--set", "pretrain.train.seq_len=256"];
    for (args, phase) in [(&large[..], "saving"), (&[large, long].concat(), "training")] {
        let (table, _) = plan(&lab, args);
        let mut lines = table.lines();
        let columns: Vec<&str> = lines.next().unwrap().split_whitespace().skip(1).take(9).collect();
        assert_eq!(columns[6..], ["phase", "other", "peak"], "{table}");
        let rows: Vec<Vec<&str>> = lines.by_ref().take(4).map(|line| line.split_whitespace().collect()).collect();
        for row in &rows {
            let mib: Vec<i64> = row[1..10].iter().map(|value| value.parse().unwrap()).collect();
            assert_eq!(mib[0] + mib[1] + mib[6] + mib[7], mib[8], "{table}");
        }
        assert_eq!((rows[0][0], rows[0][10]), ("pretrain", phase), "{table}");
        assert!(lines.next().unwrap().starts_with("peak = weights + moments + phase + other"), "{table}");

        let (json, _) = plan(&lab, &[args, &["--json"]].concat());
        let plan: Value = serde_json::from_str(&json).unwrap();
        for (name, stage) in plan["stages"].as_object().unwrap() {
            let of = |key: &str| stage[key].as_u64().unwrap_or_else(|| panic!("`{key}` of {name}: {stage}"));
            assert_eq!(of("held") + of("phase_bytes") + of("other"), of("peak"), "{name}");
            let bytes = stage["bytes"].as_object().unwrap();
            assert!(bytes.len() > 10 && bytes.values().all(Value::is_u64), "{name}: whole bytes, not {stage}");
        }
        assert_eq!(plan["stages"]["pretrain"]["phase"], phase);
        assert!(plan["available"].is_u64(), "{plan}");
    }
}

#[test]
fn skipped_records_of_a_file_are_said_once() {
    let lab = Lab::with_own_data("seed = 3\nstages = [\"pretrain\", \"sft\"]\n");
    let path = lab.path("data/sft.train.jsonl");
    fs::write(&path, fs::read_to_string(&path).unwrap() + "{\"prompt\": \"a\"}\n").unwrap();
    let skip = ["--set", "sft.data.on_bad_record=skip"];
    let said = lab.run(&skip);
    assert_eq!(said.matches("skipped 1 bad record of").count(), 1, "checked, measured and read: {said}");
    let init = ["--data", "data", "--init", "out/pretrain", "--set", "recipe.stages=[\"sft\"]"];
    let (_, said) = plan(&lab, &[&init[..], &skip].concat());
    assert_eq!(said.matches("skipped 1 bad record of").count(), 1, "{said}");
}
