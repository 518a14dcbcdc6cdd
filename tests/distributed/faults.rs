//! A process that dies or fails ends the others within moments, and the last checkpoint goes on.

use std::time::{Duration, Instant};

use common::rng::Streams;
use pipeline_tests::{Lab, PRETRAIN};
use rustix::process::{Signal, kill_process};

use common::testing::has_mpirun;

use crate::mpirun::{mpirun, process, rank_pids, set};
use crate::together::SHARED;

/// The longest that the others may outlive a process.
const LONGEST: Duration = Duration::from_secs(30);

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
        let Some(&pid) = rank_pids(&run).get(rank) else {
            // It was faster than we, or the last kill came after the last save: another run from its beginning.
            assert!(run.ends().success(), "{}", run.stderr());
            std::fs::remove_dir_all(lab.path("parts")).unwrap();
            continue;
        };
        let killed = Instant::now();
        let _ = kill_process(pid, Signal::KILL);
        let status = run.ends();
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
