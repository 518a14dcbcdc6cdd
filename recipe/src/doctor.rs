//! The doctor before PPO: `ppo doctor` on the recipe's own models and data, kept for the report.

use std::path::Path;

use anyhow::{Context, Result, bail};
use common::cli::RuntimeArgs;
use common::files::{read_if_there, write_whole};
use common::interrupt::Interrupt;
use ppo::doctor::{Verdict, examine};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::setup::Setup;
use crate::steps::Step;

/// In the output directory: the result of the examination.
pub const DOCTOR_FILE: &str = "doctor.json";

/// `[doctor]`: the examination of SFT model, reward model and data before PPO, as `ppo doctor` makes it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DoctorConfig {
    /// What a failed check does.
    pub on_fail: OnFail,
}

/// What a failed check does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnFail {
    /// Warn, and run PPO all the same.
    #[default]
    Warn,
    /// End the recipe before PPO.
    Stop,
}

/// Examines what PPO would start from, and writes the result into the output directory.
///
/// # Errors
/// If that cannot be done, a check fails and the recipe says to stop, or `interrupt` ends it.
pub fn run(setup: &Setup, runtime: &RuntimeArgs, interrupt: Interrupt) -> Result<()> {
    let step = Step::Ppo;
    let mut data = setup.configs.ppo.as_ref().context("the recipe has no PPO")?.data.train.clone();
    setup.recipe.resolver(step).resolve_files("data.train", &mut data)?;
    let (policy, reward_model) = (setup.dir(Step::Sft), setup.dir(Step::RewardModel));
    let runtime = runtime.among_own([&*policy, &*reward_model]);
    let args = ppo::DoctorArgs {
        policy,
        reward_model,
        data,
        config: Some(setup.recipe.stage_config(step)),
        overrides: setup.recipe.run_overrides(step)?,
        pairs: setup.test_pairs().filter(|pairs| pairs.is_file()),
        train_pairs: None,
        json: false,
        runtime,
    };
    let report = examine(&args, interrupt).context("failed to examine what PPO starts from")?;
    let path = setup.out.join(DOCTOR_FILE);
    write_whole(&path, serde_json::to_string_pretty(&report)?)?;
    let failed: Vec<_> = report.with(Verdict::Fail).collect();
    for check in &failed {
        let ppo::doctor::Check { id, stage, reason, meaning, hint, .. } = check;
        tracing::warn!("the doctor: `{id}` failed, look at {stage}: {reason}. {meaning} {hint}");
    }
    if setup.recipe.config.doctor.on_fail == OnFail::Stop && !failed.is_empty() {
        bail!(
            "{} of {} checks of the doctor failed; `{}` has all\nhint: mend what they name, or set `doctor.on_fail` to \
             \"warn\" in recipe.toml",
            failed.len(),
            report.checks.len(),
            path.display()
        );
    }
    let count = |verdict| report.with(verdict).count();
    tracing::info!(
        "the doctor: {} checks passed, {} warned, {} failed",
        count(Verdict::Pass),
        count(Verdict::Warn),
        failed.len()
    );
    Ok(())
}

/// The result in `out`, without the numbers of checks that have none; `None` where there is none.
///
/// # Errors
/// If it cannot be read.
pub fn read(out: &Path) -> Result<Option<Value>> {
    let path = out.join(DOCTOR_FILE);
    let Some(text) = read_if_there(&path)? else { return Ok(None) };
    let mut report: Value =
        serde_json::from_str(&text).with_context(|| format!("failed to read `{}`", path.display()))?;
    for check in report["checks"].as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
        check.retain(|_, value| !value.is_null());
    }
    Ok(Some(report))
}
