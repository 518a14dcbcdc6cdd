//! Memory that the machines have, and whether the ranks on each of them fit into it.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{GIB, Lengths, Needs, Settings, Trained};
use crate::group::{Group, GroupError, Share};
use crate::kernels::{Kernels, TrunkPrecision};
use crate::model::GptConfig;
use crate::model::footprint::Batch;
use crate::model::params::Output;
use crate::reduce::Reduce;

/// The ranks that train together, and the memory that each of them shares with others.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranks {
    shares: Vec<Share>,
    pools: Vec<Pool>,
}

/// Memory for some ranks together.
#[derive(Debug, Clone, PartialEq)]
struct Pool {
    ranks: Vec<usize>,
    host: String,
    available: f64,
}

/// The memory around a rank, in bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Room {
    /// The machine's name.
    host: String,
    /// What tells it from others with that name, or is the same behind different names: the number of its start.
    machine: String,
    /// The control groups of the process.
    scope: String,
    /// What the machine has, for all processes.
    of_machine: f64,
    /// What the control groups may take, all of their processes together; infinite without a limit.
    of_scope: f64,
    /// What this process may take.
    of_process: f64,
}

impl Ranks {
    /// The ranks of `group`, each of which says what there is around it, unless it does not check. Every rank has to ask.
    ///
    /// # Errors
    /// If a rank has ended.
    pub fn gathered(group: &Group, checks: bool) -> Result<Self, GroupError> {
        let room = if checks { Room::here() } else { None };
        Ok(Self::of(&group.gather(room)?))
    }

    /// `n` ranks on this machine.
    pub fn on_this_machine(n: usize) -> Self {
        Self::of(&vec![Room::here(); n])
    }

    fn of(rooms: &[Option<Room>]) -> Self {
        let mut pools: BTreeMap<String, Pool> = BTreeMap::new();
        for (rank, room) in rooms.iter().enumerate() {
            let Some(Room { host, machine, scope, of_machine, of_scope, of_process }) = room else { continue };
            for (key, available) in [
                (format!("machine {machine}"), *of_machine),
                // A container has a name and groups that are called as those of another one.
                (format!("scope {machine} {host} {scope}"), *of_scope),
                (format!("process {rank}"), *of_process),
            ] {
                let pool = pools.entry(key);
                let pool = pool.or_insert_with(|| Pool { ranks: Vec::new(), host: host.clone(), available });
                pool.ranks.push(rank);
                pool.available = pool.available.min(available);
            }
        }
        Self { shares: Share::all(rooms.len()).collect(), pools: pools.into_values().collect() }
    }

    /// Each rank's share of any list.
    pub fn shares(&self) -> &[Share] {
        &self.shares
    }

    /// What all ranks together may use at most; `None` where it is not known.
    pub fn available(&self) -> Option<f64> {
        let of_all = self.pools.iter().filter(|pool| pool.ranks.len() == self.shares.len());
        of_all.map(|pool| pool.available).reduce(f64::min)
    }

    /// The memory that is too small for ranks that need `peaks`, by the most.
    fn exceeded(&self, peaks: &[f64]) -> Option<&Pool> {
        let excess = |pool: &Pool| pool.needed(peaks) / pool.available;
        self.pools.iter().filter(|pool| excess(pool) > 1.0).max_by(|a, b| excess(a).total_cmp(&excess(b)))
    }

    /// Whether there is enough for ranks that need `peaks`, or nobody knows.
    pub fn have(&self, peaks: &[f64]) -> bool {
        self.exceeded(peaks).is_none()
    }
}

impl Pool {
    fn needed(&self, peaks: &[f64]) -> f64 {
        self.ranks.iter().map(|&rank| peaks[rank]).sum()
    }
}

/// Refuses a run that needs more memory than there is: first as if every item of its data were as long as the context,
/// which costs nothing to ask, and then, where that does not fit, with the `lengths` that they have.
///
/// # Errors
/// If it does not fit, or the data cannot be read.
pub fn check_run(
    ranks: &Ranks,
    batch_size: usize,
    settings: Settings,
    context: usize,
    lengths: impl FnOnce() -> anyhow::Result<Lengths>,
    needs: impl Fn(&Lengths, Settings) -> Needs,
) -> anyhow::Result<()> {
    let unknown = Lengths::unknown(context);
    if check(ranks, batch_size, settings, |settings| needs(&unknown, settings)).is_ok() {
        return Ok(());
    }
    let lengths = lengths()?;
    Ok(check(ranks, batch_size, settings, |settings| needs(&lengths, settings))?)
}

/// Refuses a run that needs more memory than there is.
///
/// `needs` says how much it needs with other settings than its own, so that the error can name some that would do, and on
/// another rank.
///
/// # Errors
/// If it does not fit: the same error on every rank.
pub fn check(
    ranks: &Ranks,
    batch_size: usize,
    settings: Settings,
    needs: impl Fn(Settings) -> Needs,
) -> Result<(), TooLarge> {
    if ranks.pools.is_empty() {
        return Ok(());
    }
    let of_all =
        |settings: Settings| -> Vec<Needs> { ranks.shares.iter().map(|&share| needs(settings.of(share))).collect() };
    let peaks = |needs: &[Needs]| -> Vec<f64> { needs.iter().map(Needs::peak).collect() };
    let needed = of_all(settings);
    let Some(pool) = ranks.exceeded(&peaks(&needed)) else { return Ok(()) };
    let fits = |settings: &Settings| ranks.have(&peaks(&of_all(*settings)));
    let smaller = |checkpoint_activations: bool| {
        (1..=settings.micro_batch_size)
            .rev()
            .filter(|&micro| batch_size.is_multiple_of(micro))
            .map(|micro_batch_size| Settings { micro_batch_size, checkpoint_activations, ..settings })
            .find(fits)
    };
    let mut would_fit = Vec::new();
    if ranks.shares.len() > 1 && !settings.shard_optimizer {
        would_fit.extend(Some(Settings { shard_optimizer: true, ..settings }).filter(fits));
    }
    would_fit.extend(smaller(settings.checkpoint_activations));
    if !settings.checkpoint_activations {
        would_fit.extend(smaller(true));
    }
    let of_pool = pool.ranks.iter().map(|&rank| needed[rank]);
    let total = of_pool.fold(Needs::default(), |mut total, needs| {
        total += needs;
        total
    });
    Err(TooLarge {
        needed: Box::new(total),
        peak: pool.needed(&peaks(&needed)),
        available: pool.available,
        settings,
        would_fit,
        or_with: None,
        at: (ranks.shares.len() > 1).then(|| Box::new(Place { ranks: pool.ranks.clone(), host: pool.host.clone() })),
    })
}

/// A run that needs more memory than there is.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "{} about {:.1} GiB of memory{} ({needed}), and {:.1} GiB are available{}\nhint: {}",
    self.who(), self.peak / GIB, self.together(), available / GIB, self.place(), self.hint()
)]
pub struct TooLarge {
    needed: Box<Needs>,
    peak: f64,
    available: f64,
    settings: Settings,
    /// Settings with which it would fit.
    would_fit: Vec<Settings>,
    /// A setting of the stage's own with which it would fit too, and what it costs.
    or_with: Option<String>,
    /// Where there are several ranks.
    at: Option<Box<Place>>,
}

/// Whose memory is too small.
#[derive(Debug, Clone, PartialEq)]
struct Place {
    /// Those that share it.
    ranks: Vec<usize>,
    /// The name of their machine.
    host: String,
}

impl TooLarge {
    /// The same error, whose hint also names `setting`, with which the run would fit.
    #[must_use]
    pub fn or_with(self, setting: Option<String>) -> Self {
        Self { or_with: setting, ..self }
    }

    /// The sentence's beginning.
    fn who(&self) -> String {
        let Some(place) = &self.at else { return "this run needs".to_owned() };
        if let [rank] = place.ranks[..] {
            return format!("rank {rank} needs");
        }
        let block = |block: Range<usize>| match block.len() {
            1 => block.start.to_string(),
            _ => format!("{} to {}", block.start, block.end - 1),
        };
        let blocks: Vec<String> = blocks(&place.ranks).into_iter().map(block).collect();
        format!("ranks {} need", blocks.join(", "))
    }

    fn together(&self) -> &'static str {
        if self.at.as_ref().is_some_and(|place| place.ranks.len() > 1) { " together" } else { "" }
    }

    fn place(&self) -> String {
        self.at.as_ref().map_or_else(String::new, |place| format!(" on `{}`", place.host))
    }

    fn hint(&self) -> String {
        let own = self.settings;
        let named = |settings: &Settings| {
            let shards =
                (settings.shard_optimizer != own.shard_optimizer).then(|| "`train.shard_optimizer=true`".to_owned());
            let micro = (settings.micro_batch_size != own.micro_batch_size)
                .then(|| format!("`train.micro_batch_size={}`", settings.micro_batch_size));
            let checkpoints = (settings.checkpoint_activations != own.checkpoint_activations)
                .then(|| "`train.checkpoint_activations=true`".to_owned());
            shards.into_iter().chain(micro).chain(checkpoints).collect::<Vec<_>>().join(" and ")
        };
        let fitting: Vec<String> = self.would_fit.iter().map(named).chain(self.or_with.clone()).collect();
        let instead = if !fitting.is_empty() {
            format!("it would fit with {}", fitting.join(", or with "))
        } else if self.at.is_some() {
            "no smaller micro-batch would fit: start fewer processes on that machine, train adapters (`[lora]`), or use a \
             smaller model"
                .to_owned()
        } else {
            "no smaller micro-batch would fit: train adapters (`[lora]`), or use a smaller model".to_owned()
        };
        format!("{instead}; `run.check_memory=false` tries it all the same")
    }
}

/// The runs of neighbours among ascending numbers.
fn blocks(numbers: &[usize]) -> Vec<Range<usize>> {
    let mut blocks: Vec<Range<usize>> = Vec::new();
    for &number in numbers {
        match blocks.last_mut() {
            Some(block) if block.end == number => block.end += 1,
            _ => blocks.push(number..number + 1),
        }
    }
    blocks
}

/// Refuses a model whose weights, gradients and moments alone do not fit into memory.
///
/// # Errors
/// If they do not fit.
pub fn check_model(model: &GptConfig) -> Result<(), TooLarge> {
    let settings = Settings {
        micro_batch_size: 1,
        checkpoint_activations: true,
        trunk: TrunkPrecision::F32,
        shard_optimizer: false,
        reduce: Reduce::default(),
        share: Share::WHOLE,
    };
    check(&Ranks::on_this_machine(1), 1, settings, |settings| {
        let trained = Trained {
            config: model,
            output: Output::Logits,
            lora: None,
            kernels: Kernels::Fused,
            settings,
            batch: Batch { rows: 1.0, seq: 1.0 },
            n_micro_batches: 1,
        };
        Needs { saving: 0.0, ..trained.needs() }
    })
}

/// Bytes that this process may use: what the system says is available, or the limit set for it or for its group;
/// `None` where neither is known.
pub fn available() -> Option<f64> {
    Room::here().map(|room| room.of_machine.min(room.of_scope).min(room.of_process))
}

impl Room {
    /// The memory around this process; `None` where it is not known.
    fn here() -> Option<Self> {
        #[cfg(target_os = "linux")]
        {
            use rustix::process::{Resource, getrlimit};
            let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
            let text = read("/proc/meminfo");
            let field = |name: &str| {
                let line = text.lines().find_map(|line| line.strip_prefix(name))?;
                line.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib * 1024.0)
            };
            let host = read("/proc/sys/kernel/hostname").trim().to_owned();
            let scope = read("/proc/self/cgroup");
            Some(Self {
                host,
                machine: read("/proc/sys/kernel/random/boot_id").trim().to_owned(),
                of_machine: field("MemAvailable:")? + field("SwapFree:").unwrap_or(0.0),
                of_scope: limit_of(&scope).unwrap_or(f64::INFINITY),
                of_process: getrlimit(Resource::As).current.map_or(f64::INFINITY, |bytes| bytes as f64),
                scope,
            })
        }
        #[cfg(not(target_os = "linux"))]
        None
    }
}

/// The least limit of the control groups that `/proc/self/cgroup` names, of either version.
#[cfg(target_os = "linux")]
fn limit_of(groups: &str) -> Option<f64> {
    let mut least: Option<f64> = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            "memory" => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => continue,
        };
        // A group has no more than any of those around it. In a container the path may be that of the outside.
        for path in std::path::Path::new(path).ancestors() {
            let file = std::path::Path::new(root).join(path.strip_prefix("/").unwrap_or(path)).join(file);
            let limit = std::fs::read_to_string(file).ok().and_then(|text| text.trim().parse::<f64>().ok());
            least = [least, limit].into_iter().flatten().reduce(f64::min);
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory that grows with the micro-batch: 1 GiB a sequence, a quarter of it with checkpoints, and 2 GiB of weights.
    fn needs(settings: Settings) -> Needs {
        let each = if settings.checkpoint_activations { 0.25 } else { 1.0 };
        Needs { weights: 2.0 * GIB, activations: each * settings.micro_batch_size as f64 * GIB, ..Needs::default() }
    }

    fn settings(micro_batch_size: usize) -> Settings {
        Settings {
            micro_batch_size,
            checkpoint_activations: false,
            trunk: TrunkPrecision::F32,
            shard_optimizer: false,
            reduce: Reduce::default(),
            share: Share::WHOLE,
        }
    }

    /// That of a machine without limits, in GiB.
    fn room(host: &str, available: f64) -> Room {
        Room {
            host: host.to_owned(),
            machine: host.to_owned(),
            scope: "0::/".to_owned(),
            of_machine: available * GIB,
            of_scope: f64::INFINITY,
            of_process: f64::INFINITY,
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_settings_that_would() {
        let check = |available: f64, micro_batch_size: usize| {
            let ranks = Ranks::of(&[Some(room("desk", available))]);
            check(&ranks, 12, settings(micro_batch_size), needs).map_err(|error| error.to_string())
        };
        assert_eq!(check(8.0, 4), Ok(()));
        let refused = check(8.0, 12).expect_err("needs 16");
        assert_eq!(
            refused,
            "this run needs about 16.9 GiB of memory (weights 2.0, activations 12.0), and 8.0 GiB are available\nhint: \
             it would fit with `train.micro_batch_size=4`, or with `train.checkpoint_activations=true`; \
             `run.check_memory=false` tries it all the same"
        );
        let refused = check(3.2, 12).expect_err("needs 16");
        assert!(
            refused.contains("with `train.micro_batch_size=2` and `train.checkpoint_activations=true`;"),
            "{refused}"
        );
        let refused = check(1.0, 12).expect_err("needs 16");
        assert!(refused.contains("no smaller micro-batch would fit"), "{refused}");
    }

    #[test]
    fn models_beyond_any_machine_are_refused() {
        let small = GptConfig::gpt2(1000);
        assert_eq!(check_model(&small), Ok(()));
        let wide = GptConfig { d_model: 1_000_000, ..small };
        assert!(check_model(&wide).is_err());
    }

    /// 3 GiB on every rank, of which the optimiser is 2.
    fn of_ranks(settings: Settings) -> Needs {
        let kept = if settings.shard_optimizer { settings.share.fraction() } else { 1.0 };
        Needs { weights: GIB, moments: 2.0 * GIB * kept, ..Needs::default() }
    }

    #[test]
    fn ranks_of_a_machine_share_its_memory_and_those_of_others_do_not() {
        // Each needs 3.6 GiB and what the program takes.
        let check = |rooms: [Room; 4]| {
            let ranks = Ranks::of(&rooms.map(Some));
            check(&ranks, 4, settings(1), of_ranks).map_err(|error| error.to_string())
        };
        let [near, far] = [8.0, 20.0].map(|available| move |name| room(name, available));
        assert_eq!(check([near("a"), near("a"), near("b"), near("b")]), Ok(()));
        assert_eq!(check([far("a"), far("a"), far("a"), far("a")]), Ok(()));
        assert_eq!(
            check([far("a"), near("b"), near("b"), near("b")]).expect_err("needs 11.0"),
            "ranks 1 to 3 need about 11.0 GiB of memory together (weights 3.0, moments 6.0), and 8.0 GiB are available on \
             `b`\nhint: it would fit with `train.shard_optimizer=true`; `run.check_memory=false` tries it all the same"
        );
        let parted = check([near("b"), far("a"), near("b"), near("b")]).expect_err("needs 11.0");
        assert!(parted.starts_with("ranks 0, 2 to 3 need about"), "{parted}");
        let tight = |name| room(name, 2.0);
        let refused = check([tight("a"), tight("a"), far("b"), far("b")]).expect_err("too little either way");
        assert!(refused.contains("start fewer processes on that machine, train adapters"), "{refused}");
    }

    #[test]
    fn a_limit_of_a_group_is_for_all_in_it_and_that_of_a_process_for_itself() {
        let check = |rooms: [Room; 2]| {
            let ranks = Ranks::of(&rooms.map(Some));
            check(&ranks, 4, settings(1), of_ranks).map_err(|error| error.to_string())
        };
        let limited = |scope: &str| Room { scope: scope.to_owned(), of_scope: 5.0 * GIB, ..room("a", 20.0) };
        assert_eq!(check([limited("0::/one"), limited("0::/other")]), Ok(()));
        let together = check([limited("0::/one"), limited("0::/one")]).expect_err("needs 7.3");
        assert!(together.starts_with("ranks 0 to 1 need about 7.3 GiB of memory together"), "{together}");
        let own = |of_process: f64| Room { of_process: of_process * GIB, ..room("a", 20.0) };
        assert_eq!(check([own(5.0), own(5.0)]), Ok(()));
        let alone = check([own(5.0), own(3.0)]).expect_err("needs 3.7");
        assert!(alone.starts_with("rank 1 needs about 3.7 GiB of memory ("), "{alone}");
    }

    #[test]
    fn ranks_that_do_not_check_are_not_counted() {
        let ranks = Ranks::of(&[Some(room("a", 4.0)), None]);
        assert_eq!(check(&ranks, 4, settings(1), of_ranks), Ok(()));
        assert_eq!(check(&Ranks::of(&[None]), 4, settings(1), |_| Needs { weights: 1e18, ..Needs::default() }), Ok(()));
    }
}
