//! A process that dies or fails ends the others within moments, and the last checkpoint goes on.

use std::time::{Duration, Instant};

use common::hf;
use common::rng::Streams;
use common::testing::has_mpirun;
use pipeline_tests::{Lab, PRETRAIN, SFT, Stage};
use rustix::process::{Signal, kill_process, test_kill_process};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use crate::mpirun::{mpirun, process, rank_pids, set};
use crate::together::SHARED;

/// The longest that the others may outlive a process.
pub(crate) const LONGEST: Duration = Duration::from_secs(30);

/// How often a process is killed, unless the variable `N_KILLS` says otherwise.
const N_KILLS: usize = 10;

#[test]
fn a_process_killed_at_any_moment_ends_the_others_and_the_rest_goes_on() {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::before(PRETRAIN);
    let more = set(&[&SHARED[..], &["train.steps=60", "run.save_every=1"]].concat());
    lab.ok("pretrain", &PRETRAIN.train("whole", &more));
    let mut moments = Streams::new(13).get("tests/faults", 0);
    let n_kills = std::env::var("N_KILLS").map_or(N_KILLS, |n| n.parse().unwrap());
    let (mut n_killed, mut longest) = (0, Duration::ZERO);
    while n_killed < n_kills {
        let goes_on = if lab.saved_step("parts").is_some() { "--resume" } else { "--overwrite" };
        let mut run =
            Lab::running(mpirun(&lab, &vec![process(PRETRAIN, "parts", &[&more[..], &[goes_on]].concat()); 2]));
        let (rank, before) = (n_killed % 2, lab.saved_step("parts"));
        // A process that dies before MPI runs is `mpirun`'s own to notice.
        if n_killed > 1 {
            run.until(|| lab.saved_step("parts") > before);
        } else {
            run.hears("training tokens");
        }
        std::thread::sleep(Duration::from_millis(moments.below(200) as u64)); // a random moment is what this is about
        let pids = rank_pids(&run);
        let Some(&pid) = pids.get(rank) else {
            // It was faster than we, or the last kill came after the last save: another run from its beginning.
            assert!(run.ends().success(), "{}", run.stderr());
            std::fs::remove_dir_all(lab.path("parts")).unwrap();
            continue;
        };
        let killed = Instant::now();
        let _ = kill_process(pid, Signal::KILL);
        let status = run.ends();
        // `mpirun` may be gone before a rank is, which holds the directory until it ends.
        while pids.iter().any(|&pid| test_kill_process(pid).is_ok()) && killed.elapsed() < LONGEST {
            std::thread::sleep(Duration::from_millis(5));
        }
        if status.success() {
            std::fs::remove_dir_all(lab.path("parts")).unwrap();
            continue;
        }
        longest = longest.max(killed.elapsed());
        assert!(killed.elapsed() < LONGEST, "the others ended after {:?}:\n{}", killed.elapsed(), run.stderr());
        assert!(lab.saved_step("parts") >= before, "a checkpoint was lost");
        n_killed += 1;
    }
    let goes_on = if lab.saved_step("parts").is_some() { "--resume" } else { "--overwrite" };
    lab.ok("pretrain", &PRETRAIN.train("parts", &[&more[..], &[goes_on]].concat()));
    lab.assert_same("whole", "parts");
    println!("{n_killed} kills; the others ended after {longest:?} at most");
}

#[test]
fn a_process_that_cannot_write_or_allocate_ends_the_others_with_its_message() {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::before(PRETRAIN);
    let more = set(&[&SHARED[..], &["train.steps=60", "run.save_every=20"]].concat());
    let usual = process(PRETRAIN, "parts", &[&more[..], &["--overwrite"]].concat());
    let behind = |commands: &str| {
        [vec!["sh".to_owned(), "-c".to_owned(), format!("{commands}; exec \"$@\""), "sh".to_owned()], usual.clone()]
            .concat()
    };
    // A file of more than 64 KiB is refused, as on a full disk.
    let full = behind("trap '' XFSZ; ulimit -f 64");
    let panicking = behind("ulimit -v 1");
    for (name, processes, says) in [
        ("a full disk", [full, usual.clone()], Some("error: failed to save the checkpoint of step 20")),
        ("no memory", [usual.clone(), panicking], None),
    ] {
        let start = Instant::now();
        let mut run = Lab::running(mpirun(&lab, &processes));
        assert!(!run.ends().success(), "{name}: {}", run.stderr());
        assert!(start.elapsed() < LONGEST, "{name}: ended after {:?}", start.elapsed());
        assert!(says.is_none_or(|says| run.stderr().contains(says)), "{name}: {}", run.stderr());
    }
}

/// Writes the checkpoint `base` again as `broken`, with a position that no model can read.
fn break_position(lab: &Lab, position: usize) {
    std::fs::create_dir(lab.path("broken")).unwrap();
    for file in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(lab.path("base").join(file), lab.path("broken").join(file)).unwrap();
    }
    let (mut tensors, _) = hf::read_file(&lab.path("base/model.safetensors"), |_| true).unwrap();
    let positions = tensors.get_mut("transformer.wpe.weight").expect("GPT-2's name");
    let d_model = positions.shape[1];
    positions.data[position * d_model..(position + 1) * d_model].fill(f32::MAX);
    let bytes = tensors.values().map(|tensor| tensor.data.iter().flat_map(|x| x.to_le_bytes()).collect());
    let bytes: Vec<Vec<u8>> = bytes.collect();
    let views = tensors.iter().zip(&bytes).map(|((name, tensor), bytes)| {
        (name, TensorView::new(Dtype::F32, tensor.shape.clone(), bytes).expect("as many bytes as the shape says"))
    });
    std::fs::write(lab.path("broken/model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn a_gradient_that_is_not_finite_on_one_rank_ends_all_and_the_rank_is_named() {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::before(SFT);
    break_position(&lab, 24);
    // One conversation of eight is long enough to see the position.
    let conversation = |answer: &str| {
        let messages = [("user", "what?"), ("assistant", answer)];
        json!({ "messages": messages.map(|(role, content)| json!({ "role": role, "content": content })) }).to_string()
    };
    let long = "the fox sees a red boat. the owl likes a big tree. the hare wants an old bell. a mouse finds a ball.";
    let records: Vec<String> = (0..8).map(|i| conversation(if i == 3 { long } else { "a fox." })).collect();
    lab.write("data/sft.train.jsonl", records.join("\n"));
    let broken = Stage { inputs: &["--init", "broken"], ..SFT };
    for how in ["train.shard_optimizer=false", "train.shard_optimizer=true", "train.reduce='fast'"] {
        let more = set(&[&SHARED[..], &[how]].concat());
        let mut run = Lab::running(mpirun(&lab, &vec![process(broken, "out", &more); 2]));
        assert_eq!(run.ends().code(), Some(1), "{}", run.stderr());
        let says = run.stderr();
        assert!(says.contains("error: the gradient became NaN at step 1"), "{how}: {says}");
        assert_eq!(says.matches("a gradient that rank ").count(), 1, "{how}: {says}");
        std::fs::remove_dir_all(lab.path("out")).unwrap();
    }
}
