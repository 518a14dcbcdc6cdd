//! `--resume`: what a run goes on with, and whether it goes on as it began.
//!
//! A resumed run ends as if it had not been stopped, so what decides its result has to be what it was. The `--set` flags
//! of earlier calls are remembered; settings and inputs that differ from the saved ones are refused, unless they are
//! among those that [`may_change`] names. `docs/resuming.md` says the same to users.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use toml::{Table, Value};

use super::together::PLACES;
use super::{Plan, Progress};
use crate::checkpoint::{Checkpoint, Manifest, STATE_FILE_PATH, Stage};
use crate::cli::StageArgs;
use crate::config::{self, Configuration};
use crate::files::read_if_there;
use crate::kernels::Precision;
use crate::model::{Adapters, Gpt, LoraConfig, NamedTensors, ScalarGpt};
use crate::optim::{AdamW, OptimizerConfig};
use crate::rng::Streams;
use crate::runtime::Runtime;

/// Characters of a hash that a message shows.
const SHORT_HASH: usize = 8;

/// The saved state of a resumed run.
#[derive(Debug)]
pub struct Restored {
    /// The checkpoint itself.
    pub checkpoint: Checkpoint,
    pub(super) tensors: BTreeMap<String, NamedTensors>,
    pub(super) updates: BTreeMap<String, u64>,
}

/// The language model and the optimiser that training begins with, from `init`, or goes on with, where there is a run
/// `restored`; with `lora` adapters beside the frozen weights of `init`.
///
/// # Errors
/// As [`Runtime::gpt_to_train`], [`Restored::gpt`] and [`Restored::optimizer`].
pub fn gpt_and_optimizer(
    restored: Option<Restored>,
    init: &mut Checkpoint,
    lora: Option<&LoraConfig>,
    optimizer: &OptimizerConfig,
    runtime: &Runtime,
    streams: &Streams,
) -> anyhow::Result<(Gpt, AdamW)> {
    let Some(mut restored) = restored else {
        return Ok((runtime.gpt_to_train(init, lora, streams)?, runtime.optimizer(optimizer)));
    };
    let gpt = match lora {
        Some(_) => restored.adapted_gpt(runtime.trunk(init)?, runtime)?,
        None => restored.gpt(runtime)?,
    };
    Ok((gpt, restored.optimizer("optimizer", optimizer, runtime)?))
}

impl Restored {
    /// Takes the tensors saved as `state/<name>.safetensors`.
    fn tensors(&mut self, name: &str) -> anyhow::Result<NamedTensors> {
        self.tensors.remove(name).with_context(|| format!("the checkpoint lacks `state/{name}.safetensors`"))
    }

    /// The moving average of the trained weights.
    ///
    /// # Errors
    /// If the checkpoint has none.
    pub fn average(&mut self) -> anyhow::Result<NamedTensors> {
        self.tensors("average")
    }

    /// The language model that was trained.
    ///
    /// # Errors
    /// If its weights are missing or do not fit the architecture.
    pub fn gpt(&mut self, runtime: &Runtime) -> anyhow::Result<Gpt> {
        let weights = self.tensors("weights")?;
        Ok(runtime.gpt_of(self.checkpoint.model_config(), weights)?)
    }

    /// The language model of which adapters beside `trunk` were trained.
    ///
    /// # Errors
    /// As [`gpt`](Self::gpt).
    pub fn adapted_gpt(&mut self, trunk: Gpt, runtime: &Runtime) -> anyhow::Result<Gpt> {
        let weights = self.tensors("weights")?;
        Ok(trunk.with_adapters(self.adapters()?, weights, &runtime.device)?)
    }

    /// The reward model that was trained, its scores not normalised.
    ///
    /// # Errors
    /// As [`gpt`](Self::gpt).
    pub fn scalar(&mut self, runtime: &Runtime) -> anyhow::Result<ScalarGpt> {
        let weights = self.tensors("weights")?;
        Ok(runtime.scalar_of(self.checkpoint.model_config(), weights)?)
    }

    /// The reward model of which the head and adapters beside `trunk` were trained, its scores not normalised.
    ///
    /// # Errors
    /// As [`gpt`](Self::gpt).
    pub fn adapted_scalar(&mut self, trunk: Gpt, runtime: &Runtime) -> anyhow::Result<ScalarGpt> {
        let weights = self.tensors("weights")?;
        Ok(ScalarGpt::with_adapters(trunk, self.adapters()?, weights, 0.0, &runtime.device)?)
    }

    fn adapters(&self) -> anyhow::Result<&Adapters> {
        Ok(&self.checkpoint.adapter().context("the checkpoint has no adapter")?.adapters)
    }

    /// The optimiser saved under `name`.
    ///
    /// # Errors
    /// If the checkpoint has no such optimiser or its moments do not pair up.
    pub fn optimizer(&mut self, name: &str, config: &OptimizerConfig, runtime: &Runtime) -> anyhow::Result<AdamW> {
        let n_updates = *self.updates.get(name).with_context(|| format!("the checkpoint lacks optimiser `{name}`"))?;
        let device = runtime.device.clone().inner();
        let optimizer = AdamW::from_named(config, runtime.kernels, n_updates, self.tensors(name)?, &device)?;
        Ok(optimizer.with_precision(runtime.precision).with_share(runtime.share))
    }
}

/// Settings that may differ from those a run began with: its length, how often it logs, evaluates and saves, how much of
/// itself it shows and checks, the memory it takes, and the work after the last step. Less memory at a time is at most
/// another rounding of sums and another draw of dropout.
///
/// Data files may have moved; their content is compared instead.
fn may_change(key: &str) -> bool {
    const EXACTLY: [&str; 11] = [
        "train.epochs",
        "train.steps",
        "train.micro_batch_size",
        "train.checkpoint_activations",
        "train.shard_optimizer",
        "train.reduce",
        "train.rollout_batch_size",
        "train.n_samples",
        "ppo.ratio_tolerance",
        "ppo.on_alarm",
        "ptx.eval_windows",
    ];
    const BELOW: [&str; 5] = ["run.", "normalisation.", "tokenizer.", "train.eval_", "train.sample_"];
    EXACTLY.contains(&key) || PLACES.contains(&key) || BELOW.iter().any(|prefix| key.starts_with(prefix))
}

/// Reads what a run goes on with, and checks that it goes on as it began.
pub(super) fn restore<C: Configuration>(
    args: &StageArgs,
    plan: &Plan<'_, C>,
    data: &BTreeMap<String, String>,
) -> anyhow::Result<(Progress, Restored)> {
    let checkpoint = Checkpoint::open_with(&args.out, args.runtime.opening());
    let checkpoint = checkpoint.and_then(|found| found.of_stage(&[plan.stage]));
    let mut checkpoint = checkpoint.context("failed to resume")?;
    let state = checkpoint.state().context("failed to read what `--resume` needs")?;
    check(&args.out, &checkpoint, plan, data)?;
    if checkpoint.adapter().is_some() {
        // The trunk is that of the checkpoint it began from.
        checkpoint.release();
    }
    let mut progress: Progress = serde_json::from_value(state.json)
        .context("`state/state.json` is damaged, or was written by another version")?;
    ensure!(
        plan.total_steps >= progress.step,
        "`{}` stands at step {}, past the {} steps asked for\nhint: ask for more with `--set train.steps=N`, or start \
         again in another `--out`",
        args.out.display(),
        progress.step,
        plan.total_steps
    );
    // A longer schedule or more patience than before continues a finished run.
    progress.finished &= progress.step == plan.total_steps || plan.run.is_stale(progress.evals_since_best);
    progress.overrides = overrides(args)?;
    if !progress.finished {
        tracing::info!("resuming at step {} of {}", progress.step, plan.total_steps);
    }
    let updates = progress.updates.clone();
    Ok((progress, Restored { checkpoint, tensors: state.tensors, updates }))
}

/// Warns where a run starts from one that was stopped before its end.
pub(super) fn warn_of_unfinished(flag: &str, parent: &Checkpoint) -> anyhow::Result<()> {
    if parent.is_finished()? == Some(false) {
        let manifest = parent.manifest();
        let step = manifest.map_or(0, |manifest| manifest.step);
        let of = manifest.and_then(|m| m.total_steps).map_or(String::new(), |total| format!(" of {total}"));
        let scores =
            if parent.stage() == Some(Stage::RewardModel) { ", and its scores are not normalised yet" } else { "" };
        tracing::warn!(
            "`{flag} {}` is unfinished: it was stopped at step {step}{of}{scores}; `--resume` finishes it",
            parent.dir().display()
        );
    }
    Ok(())
}

/// The `--set` flags that a run goes by: with `--resume` those of its earlier calls, then those given now.
///
/// # Errors
/// If the checkpoint in `--out` is damaged.
pub(super) fn overrides(args: &StageArgs) -> anyhow::Result<Vec<String>> {
    let mut all = Vec::new();
    let path = args.out.join(STATE_FILE_PATH);
    if args.resume
        && let Some(text) = read_if_there(&path)?
    {
        let progress: Progress = serde_json::from_str(&text)
            .with_context(|| format!("`{}` is damaged, or was written by another version", path.display()))?;
        all = progress.overrides;
    }
    for flag in &args.overrides {
        // One that is repeated counts where it stands last.
        all.retain(|earlier| earlier != flag);
        all.push(flag.clone());
    }
    Ok(all)
}

/// Checks that a run goes on as it began, and says what is different but may be.
///
/// # Errors
/// Naming all that differs and may not, old and new.
pub(super) fn check<C: Configuration>(
    out: &Path,
    checkpoint: &Checkpoint,
    plan: &Plan<'_, C>,
    data: &BTreeMap<String, String>,
) -> anyhow::Result<()> {
    let (Some(manifest), Some(tokenizer)) = (checkpoint.manifest(), checkpoint.tokenizer()) else {
        bail!("`{}` has no manifest or no tokenizer", out.display());
    };
    ensure!(
        tokenizer.sha256() == plan.tokenizer.sha256(),
        "failed to resume: `{}` was trained with another tokenizer",
        out.display()
    );
    // Read as this program reads it, so that a key added since counts as its default.
    let saved: C = config::load(&out.join("config.toml"), &[]).context("failed to read the saved configuration")?;
    let (saved, now) = (config::to_table(&saved)?, config::to_table(plan.config)?);
    let mut refused = Vec::new();
    for Change { key, old, new } in changes(&saved, &now) {
        let change = format!("`{key}` was {old}, is now {new}");
        if !may_change(&key) {
            refused.push(change);
        } else if !PLACES.contains(&&*key) {
            tracing::info!("{change}");
        }
    }
    refused.extend(changed_data(manifest, &saved, plan, data));
    refused.extend(changed_parents(manifest, plan));
    let (began, resumes) = (&manifest.backend, &plan.runtime.label);
    if types_of(began) != types_of(resumes) {
        tracing::warn!(
            "the run began on `{began}` and resumes on `{resumes}`: its numbers will be others; to go on as it began, resume \
             with the same `--precision` and `--trunk`"
        );
    } else if began != resumes {
        tracing::info!(
            "the run began on `{began}` and resumes on `{resumes}`: the last bits of its numbers may differ"
        );
    }
    ensure!(
        refused.is_empty(),
        "cannot resume `{}`: its settings or inputs have changed\n  {}\nhint: resume with what it began with, or start again in another \
         `--out`; docs/resuming.md lists what may change",
        out.display(),
        refused.join("\n  ")
    );
    Ok(())
}

/// What the label of a runtime says of floating-point types.
fn types_of(label: &str) -> Vec<&str> {
    let is_type =
        |part: &&str| Precision::ALL.iter().any(|known| known.name() == *part) || part.starts_with("trunk in ");
    label.split(", ").filter(is_type).collect()
}

/// Every data file whose content is not what the run began with.
fn changed_data<C>(
    manifest: &Manifest,
    saved: &Table,
    plan: &Plan<'_, C>,
    data: &BTreeMap<String, String>,
) -> Vec<String> {
    let name = |path: &str, hash: Option<&String>| match hash {
        Some(hash) => format!("`{path}` (SHA-256 {})", short(hash)),
        None => format!("`{path}`"),
    };
    let mut changed = Vec::new();
    let saved = flat(saved);
    for (key, files) in &plan.data {
        let old = saved.get(*key).and_then(Value::as_array);
        let old: Vec<&str> = old.into_iter().flatten().filter_map(Value::as_str).collect();
        let new: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
        if old.len() != new.len() {
            changed.push(format!("`{key}` was {} files, is now {}", old.len(), new.len()));
        }
        for (old, new) in old.iter().zip(&new) {
            let (was, is) = (manifest.data.get(*old), data.get(new));
            if was.is_some() && was != is {
                changed.push(format!("`{key}` was {}, is now {}", name(old, was), name(new, is)));
            }
        }
    }
    changed
}

/// Every checkpoint whose weights are not those that the run began from.
fn changed_parents<C>(manifest: &Manifest, plan: &Plan<'_, C>) -> Vec<String> {
    let name = |path: &Path, hash: &str| format!("`{}` (weights {})", path.display(), short(hash));
    let mut changed = Vec::new();
    for (i, (flag, checkpoint)) in plan.parents.iter().enumerate() {
        let new = checkpoint.as_parent();
        match manifest.parents.get(i) {
            Some(old) if old.weights_sha256 == new.weights_sha256 => {}
            Some(old) => changed.push(format!(
                "`{flag}` was {}, is now {}",
                name(&old.path, &old.weights_sha256),
                name(&new.path, &new.weights_sha256)
            )),
            None => changed.push(format!("`{flag}` was not given, is now {}", name(&new.path, &new.weights_sha256))),
        }
    }
    for old in manifest.parents.iter().skip(plan.parents.len()) {
        changed.push(format!("it began from {}, which is not given now", name(&old.path, &old.weights_sha256)));
    }
    changed
}

/// The first characters of a hash.
fn short(hash: &str) -> &str {
    hash.get(..SHORT_HASH).unwrap_or(hash)
}

/// A setting and its two values, as TOML.
#[derive(Debug, PartialEq, Eq)]
struct Change {
    key: String,
    old: String,
    new: String,
}

/// Every setting that differs, by its dotted key.
fn changes(old: &Table, new: &Table) -> Vec<Change> {
    let (old, new) = (flat(old), flat(new));
    let keys: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let text = |value: Option<&Value>| value.map_or_else(|| "not set".to_owned(), ToString::to_string);
    keys.into_iter()
        .filter(|key| old.get(*key) != new.get(*key))
        .map(|key| Change { key: key.clone(), old: text(old.get(key)), new: text(new.get(key)) })
        .collect()
}

/// The values of a table by their dotted keys.
pub(super) fn flat(table: &Table) -> BTreeMap<String, Value> {
    let mut values = BTreeMap::new();
    for (key, value) in table {
        match value {
            Value::Table(section) => {
                values.extend(flat(section).into_iter().map(|(inner, value)| (format!("{key}.{inner}"), value)));
            }
            value => {
                values.insert(key.clone(), value.clone());
            }
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Table {
        text.parse().expect("valid")
    }

    #[test]
    fn changes_are_named_by_their_dotted_keys_with_both_values() {
        let old = table("seed = 1\n[train]\nbatch_size = 4\nsteps = 6\n[ppo]\nkl_coef = 0.05");
        let new = table("seed = 1\n[train]\nbatch_size = 8\n[ppo]\nkl_coef = 0.05\nkl_target = 2.0");
        let change = |key: &str, old: &str, new: &str| Change { key: key.into(), old: old.into(), new: new.into() };
        assert_eq!(
            changes(&old, &new),
            [
                change("ppo.kl_target", "not set", "2.0"),
                change("train.batch_size", "4", "8"),
                change("train.steps", "6", "not set")
            ]
        );
    }

    #[test]
    fn length_cadence_samples_and_memory_may_change_and_no_others() {
        for key in [
            "train.steps",
            "train.epochs",
            "train.micro_batch_size",
            "train.checkpoint_activations",
            "train.shard_optimizer",
            "train.reduce",
            "train.rollout_batch_size",
            "train.eval_windows",
            "train.eval_prompts",
            "train.n_samples",
            "train.sample_tokens",
            "run.save_every",
            "run.save_every_minutes",
            "run.patience",
            "ppo.ratio_tolerance",
            "ptx.eval_windows",
            "ptx.data.val",
            "normalisation.samples",
        ] {
            assert!(may_change(key), "{key}");
        }
        for key in [
            "seed",
            "train.batch_size",
            "train.seq_len",
            "train.centring_coef",
            "train.best_by",
            "optimizer.lr",
            "value_optimizer.lr",
            "model.dropout",
            "ppo.kl_coef",
            "ppo.estimator",
            "data.on_bad_record",
            "data.max_record_bytes",
            "data.val_fraction",
            "ptx.batch_size",
            "ptx.data.separator",
        ] {
            assert!(!may_change(key), "{key}");
        }
    }
}
