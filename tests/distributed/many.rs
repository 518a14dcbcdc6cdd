//! Many faults of every kind, one after the other, each at a random moment of a run.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::rng::{Rng, Streams};
use common::testing::has_mpirun;
use pipeline_tests::{Lab, PRETRAIN};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};

use crate::faults::LONGEST;
use crate::mpirun::{mpirun, process, rank_pids, set};
use crate::together::SHARED;

/// Faults in all, unless the variable `N_FAULTS` says otherwise.
const N_FAULTS: usize = 200;

/// What happens to one process of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// SIGKILL.
    Killed,
    /// SIGSTOP.
    Stopped,
    /// No file of rank 0 can grow, as on a full disk.
    FullDisk,
    /// SIGABRT, which an allocation raises that fails. (So small a run asks for no memory after its first steps that could
    /// be denied.)
    Aborted,
    /// A setting is not that of rank 0.
    OtherSettings,
    /// A file is not that of rank 0.
    OtherData,
}

const KINDS: [Fault; 6] =
    [Fault::Killed, Fault::Stopped, Fault::FullDisk, Fault::Aborted, Fault::OtherSettings, Fault::OtherData];

/// What was seen of one kind.
#[derive(Debug, Default)]
struct Seen {
    n: usize,
    longest: Duration,
    /// Runs that had ended when the fault came, or did not notice it.
    too_late: usize,
}

impl Fault {
    /// Does it to a process.
    fn strike(self, pid: Pid) {
        // One that has ended has it behind it.
        let _ = match self {
            Self::Killed => kill_process(pid, Signal::KILL).is_ok(),
            Self::Aborted => kill_process(pid, Signal::ABORT).is_ok(),
            Self::Stopped => kill_process(pid, Signal::STOP).is_ok(),
            Self::FullDisk => {
                prlimit(Some(pid), Resource::Fsize, Rlimit { current: Some(1), maximum: Some(1) }).is_ok()
            }
            Self::OtherSettings | Self::OtherData => true,
        };
    }

    /// Whether it is there before the run starts.
    const fn comes_first(self) -> bool {
        matches!(self, Self::OtherSettings | Self::OtherData)
    }

    /// What the others say of it, where they can.
    const fn says(self) -> &'static str {
        match self {
            Self::Killed => "signal 9",
            Self::Stopped => "has not answered for",
            Self::FullDisk => "",
            Self::Aborted => "signal 6",
            Self::OtherSettings => "differs from rank 0: `optimizer.lr` is",
            Self::OtherData => "differs from rank 0: file 1 of `data.train`",
        }
    }
}

#[test]
#[ignore = "200 faults take an hour; `N_FAULTS=10` a few minutes"]
fn every_fault_ends_the_run_and_the_rest_is_the_same_to_the_byte() {
    if !has_mpirun() {
        return;
    }
    let n_faults = std::env::var("N_FAULTS").map_or(N_FAULTS, |n| n.parse().unwrap());
    let lab = Lab::before(PRETRAIN);
    lab.write("data/other.txt", "quite another text, long enough for a window of the model. ".repeat(40));
    let usual = ["train.steps=60", "run.save_every=5", "run.group_timeout=5"];
    let settings: Vec<Vec<&str>> = ["train.shard_optimizer=false", "train.shard_optimizer=true"]
        .map(|how| set(&[&SHARED[..], &usual, &[how]].concat()))
        .to_vec();
    for (out, more) in ["whole", "whole-of-parts"].iter().zip(&settings) {
        lab.ok("pretrain", &PRETRAIN.train(out, more));
    }
    let mut moments = Streams::new(29).get("tests/many", 0);
    let mut seen: BTreeMap<Fault, Seen> = BTreeMap::new();
    let mut n = 0;
    while n < n_faults {
        let (fault, how, n_ranks) = (KINDS[moments.below(KINDS.len())], moments.below(2), 2 + moments.below(2));
        let of_kind = seen.entry(fault).or_default();
        let Some(took) = one(&lab, fault, &settings[how], n_ranks, &mut moments) else {
            of_kind.too_late += 1;
            continue;
        };
        n += 1;
        of_kind.n += 1;
        of_kind.longest = of_kind.longest.max(took);
        let goes_on = if lab.saved_step("parts").is_some() { "--resume" } else { "--overwrite" };
        let more = [&settings[how][..], &[goes_on]].concat();
        let rest = lab.finish(mpirun(&lab, &vec![process(PRETRAIN, "parts", &more); 1 + moments.below(3)]));
        assert!(rest.status.success(), "after {fault:?}:\n{}", rest.stderr);
        lab.assert_same(["whole", "whole-of-parts"][how], "parts");
        if n.is_multiple_of(10) {
            println!("{n} faults: {seen:?}");
        }
    }
    println!("{n} faults: {seen:#?}");
}

/// Starts a run, lets the fault happen to one of its processes, and gives the time until all ended; `None` if they did not
/// fail.
fn one(lab: &Lab, fault: Fault, more: &[&str], n_ranks: usize, moments: &mut Rng) -> Option<Duration> {
    let _ = std::fs::remove_dir_all(lab.path("parts"));
    let struck = if fault == Fault::FullDisk { 0 } else { moments.below(n_ranks) };
    let other_data = format!("data.train=['{}']", lab.path("data/other.txt").display());
    let of_rank = |rank: usize| {
        let other = match fault {
            Fault::OtherSettings if rank == struck => vec!["--set", "optimizer.lr=0.5"],
            Fault::OtherData if rank == struck => vec!["--set", &other_data],
            _ => Vec::new(),
        };
        // A write beyond the limit is to fail, and not to kill.
        let patient = ["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"].map(str::to_owned);
        [&patient[..], &process(PRETRAIN, "parts", &[more, &other].concat())].concat()
    };
    let mut run = Lab::running(mpirun(lab, &(0..n_ranks).map(of_rank).collect::<Vec<_>>()));
    let start = Instant::now();
    if !fault.comes_first() {
        run.hears("training tokens");
        std::thread::sleep(Duration::from_millis(moments.below(1500) as u64)); // a random moment is what this is about
        fault.strike(*rank_pids(&run).get(struck)?);
    }
    let since = if fault.comes_first() { start } else { Instant::now() };
    let status = run.ends();
    if status.success() {
        return None;
    }
    let (took, says) = (since.elapsed(), run.stderr());
    assert!(took < LONGEST, "{fault:?} of rank {struck}: ended after {took:?}:\n{says}");
    assert!(says.contains(fault.says()), "{fault:?} of rank {struck}:\n{says}");
    Some(took)
}
