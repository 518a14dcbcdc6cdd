//! Event files of every stage, read by TensorBoard.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::collections::BTreeMap;

use common::metrics::EVENTS_FILE;
use common::testing::python_with;
use pipeline_tests::{DPO, Lab, PPO, STAGES, Stage};

/// Prints every scalar with its steps and values. Nothing is left out that a restart would have made obsolete.
const READER: &str = r#"
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
print(json.dumps({tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
"#;

/// Steps and values by the names of the metrics.
type Scalars = BTreeMap<String, Vec<(u64, f32)>>;

/// What TensorBoard finds in the directory of a run.
fn events(lab: &Lab, out: &str) -> Option<Scalars> {
    let python = python_with("tensorboard")?;
    let read = lab.finish(lab.within(python, &["-c", READER, out]));
    assert!(read.status.success(), "{}", read.stderr);
    Some(serde_json::from_str(&read.stdout).unwrap())
}

/// What `metrics.jsonl` says, in the precision of the events.
fn metrics(lab: &Lab, out: &str) -> Scalars {
    let mut scalars = Scalars::new();
    for line in lab.lines(&format!("{out}/metrics.jsonl")) {
        let step = line["step"].as_u64().unwrap();
        for (name, value) in line.as_object().unwrap().iter().filter(|(name, _)| name.contains('/')) {
            scalars.entry(name.clone()).or_default().push((step, value.as_f64().unwrap() as f32));
        }
    }
    scalars
}

fn train(lab: &Lab, stage: Stage, steps: u64, more: &[&str]) {
    let steps = format!("train.steps={steps}");
    lab.ok(stage.program, &stage.train("out", &[&["-q", "--set", &steps][..], more].concat()));
}

#[test]
fn tensorboard_reads_the_metrics_of_every_stage() {
    let lab = Lab::before(PPO);
    for stage in STAGES {
        let _ = std::fs::remove_dir_all(lab.path("out"));
        train(&lab, stage, 4, &["--set", "run.tensorboard=true"]);
        let Some(events) = events(&lab, "out") else { return };
        assert_eq!(events, metrics(&lab, "out"), "{}", stage.program);
        assert!(events.len() > 4, "{events:?}");
    }
}

#[test]
fn a_resumed_run_has_each_step_once_and_no_record_is_cut() {
    let lab = Lab::before(DPO);
    train(&lab, DPO, 4, &["--set", "run.tensorboard=true"]);
    // A process that was killed after its last save had gone on writing, and was within a record at its end.
    let mut bytes = lab.bytes(&format!("out/{EVENTS_FILE}"));
    bytes.extend_from_within(bytes.len() / 2..bytes.len() - 10);
    lab.write(&format!("out/{EVENTS_FILE}"), &bytes);
    train(&lab, DPO, 7, &["--resume"]);
    let Some(resumed) = events(&lab, "out") else { return };
    assert_eq!(resumed, metrics(&lab, "out"));
    assert_eq!(resumed["train/loss"].iter().map(|(step, _)| *step).collect::<Vec<_>>(), (1..=7).collect::<Vec<_>>());
    // A run that began without an event file gets a whole one when it is resumed with it.
    std::fs::remove_file(lab.path(&format!("out/{EVENTS_FILE}"))).unwrap();
    train(&lab, DPO, 8, &["--resume"]);
    assert_eq!(events(&lab, "out").unwrap(), metrics(&lab, "out"));
}

#[test]
fn there_is_no_event_file_unless_asked_for() {
    let lab = Lab::before(DPO);
    train(&lab, DPO, 1, &[]);
    assert!(!lab.path(&format!("out/{EVENTS_FILE}")).exists());
}
