//! `recipe new`: a small recipe for one's own files.
//!
//! The text is named where it lies. Of conversations, pairs and prompts, which need held-out records, every twentieth is
//! put aside: they are written to `data/` in the folder of the recipe, one JSON object a line.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use common::checkpoint::{Checkpoint, Stage};
use common::conversation::{Message, Role};
use common::data::files::expand;
use common::data::records::{self, OnBadRecord, Separator, Texts};
use common::exit::UsageError;
use common::files::{is_filled, write_whole};
use common::logging::counted;
use serde_json::{Value, json};

use crate::cli::NewArgs;
use crate::steps::Step;

/// One record in this many is held out.
const HELD_OUT_EVERY: usize = 20;

/// Windows of a step of pretraining, as the template has it.
const WINDOWS_PER_STEP: f64 = 16.0;

/// Fraction of the text that is held out, as the template has it.
const VAL_FRACTION: f64 = 0.1;

/// Lengths of a window to choose from: the held-out text has to fill one.
const WINDOWS: [usize; 4] = [256, 128, 64, 32];

/// Bytes of a long token.
const MAX_BYTES_PER_TOKEN: f64 = 8.0;

/// Bytes of a token, roughly, for counting passes over a text.
const BYTES_PER_TOKEN: f64 = 4.0;

/// Passes over the text, and the steps that they are held to.
const PASSES: f64 = 4.0;
const STEPS: (f64, f64) = (100.0, 5000.0);

/// Column of the comments in what is written.
const COMMENTS: usize = 30;

const TEMPLATES: [(Step, &str); 4] = [
    (Step::Pretrain, include_str!("pretrain.toml")),
    (Step::Sft, include_str!("sft.toml")),
    (Step::RewardModel, include_str!("reward-model.toml")),
    (Step::Ppo, include_str!("ppo.toml")),
];

/// Writes the recipe and returns what `recipe new` prints: what was written, and what to run next.
///
/// # Errors
/// If the folder holds files, a file cannot be read or has a malformed record, or no stage is left to train.
pub fn new(args: &NewArgs) -> Result<String> {
    let stages = stages(args)?;
    let dir = &args.dir;
    if is_filled(dir)? {
        bail!("`{}` is not empty\nhint: name a new folder", dir.display());
    }
    if let Some(init) = &args.init {
        let of_stage = |found: Checkpoint| found.of_stage(&[Stage::Pretrain, Stage::Sft]);
        Checkpoint::open(init).and_then(of_stage).context("cannot start from the model of `--init`")?;
    }
    let mut summary = String::new();
    // All files are read before the first is written.
    let text = args.text.as_deref().filter(|_| stages.contains(&Step::Pretrain)).map(read_text).transpose()?;
    let mut files: Vec<(String, String)> = Vec::new();
    let mut n_records = BTreeMap::new();
    if let Some(text) = &text {
        summary += &format!(
            "pretrain: {} bytes in {}; the last tenth is held out\n",
            text.n_bytes,
            counted(text.n_documents, "document", "documents")
        );
    }
    for (step, name, path) in [
        (Step::Sft, "sft", &args.sft),
        (Step::RewardModel, "pairs", &args.pairs),
        (Step::Ppo, "prompts", &args.prompts),
    ] {
        let Some(path) = path.as_deref().filter(|_| stages.contains(&step)) else { continue };
        let (train, val) = divide(read_records(step, path)?, path)?;
        let records = counted(train.len(), "record", "records");
        summary += &format!("{step}: {records} to train on, {} held out\n", val.len());
        n_records.insert(step, train.len());
        files.push((format!("data/{name}.train.jsonl"), lines(&train)));
        files.push((format!("data/{name}.val.jsonl"), lines(&val)));
    }
    for (step, template) in TEMPLATES.iter().filter(|(step, _)| stages.contains(step)) {
        let values = match (&text, n_records.get(step)) {
            (Some(text), None) => text.values(),
            (_, n_records) => amounts(*step, n_records.copied().unwrap_or(0), args.init.is_some()),
        };
        let filled = values.iter().fold((*template).to_owned(), |text, (mark, value)| text.replace(mark, value));
        files.push((format!("{step}.toml"), aligned(&filled)));
    }
    files.push(("recipe.toml".to_owned(), recipe_toml(args, &stages)?));
    files.push(("README.md".to_owned(), readme(args, &stages)));
    let is_new = !dir.exists();
    if let Err(error) = write(dir, &files) {
        // Half a recipe would be in the way of the next try; only the first failure matters.
        let _ = fs::remove_dir_all(dir.join("data"));
        for (name, _) in &files {
            let _ = fs::remove_file(dir.join(name));
        }
        if is_new {
            let _ = fs::remove_dir(dir);
        }
        return Err(error);
    }
    Ok(summary + &next(args, &stages))
}

/// Writes the files of a recipe into `dir`.
fn write(dir: &Path, files: &[(String, String)]) -> Result<()> {
    fs::create_dir_all(dir.join("data")).with_context(|| format!("failed to make `{}`", dir.display()))?;
    for (name, text) in files {
        write_whole(&dir.join(name), text)?;
    }
    Ok(())
}

/// The stages whose data is given and whose initial model another stage or `--init` gives.
fn stages(args: &NewArgs) -> Result<Vec<Step>> {
    let has_base = args.text.is_some() || args.init.is_some();
    if !has_base {
        return Err(UsageError(
            "there is no model to start from: pass `--text` to pretrain one, or `--init` with the directory of one"
                .to_owned(),
        )
        .into());
    }
    let mut stages = Vec::new();
    let left_out = |step: Step, given: bool, missing: Option<&str>, stages: &mut Vec<Step>| match (given, missing) {
        (true, None) => stages.push(step),
        (true, Some(missing)) => tracing::warn!("the stage `{step}` is left out: it needs {missing} as well"),
        (false, _) => {}
    };
    left_out(Step::Pretrain, args.text.is_some(), None, &mut stages);
    left_out(Step::Sft, args.sft.is_some(), None, &mut stages);
    let sft = args.sft.is_none().then_some("`--sft`");
    left_out(Step::RewardModel, args.pairs.is_some(), sft, &mut stages);
    let reward_model = sft.or(args.pairs.is_none().then_some("`--pairs`"));
    left_out(Step::Ppo, args.prompts.is_some(), reward_model, &mut stages);
    if stages.is_empty() {
        return Err(UsageError(
            "there is nothing to train on: pass `--text`, `--sft`, `--pairs` or `--prompts`".to_owned(),
        )
        .into());
    }
    Ok(stages)
}

/// A text to pretrain on.
struct Text {
    path: String,
    seq_len: usize,
    n_documents: usize,
    n_bytes: usize,
}

fn read_text(path: &Path) -> Result<Text> {
    let (mut n_documents, mut n_bytes) = (0, 0);
    for file in expand(path)? {
        for text in Texts::open(&file, &Separator::default(), OnBadRecord::Fail.into())? {
            n_documents += 1;
            n_bytes += text?.len();
        }
    }
    let absolute = std::path::absolute(path).with_context(|| format!("failed to find `{}`", path.display()))?;
    let least = |seq_len: usize| seq_len as f64 * MAX_BYTES_PER_TOKEN / VAL_FRACTION;
    let Some(seq_len) = WINDOWS.into_iter().find(|&seq_len| n_bytes as f64 >= least(seq_len)) else {
        bail!("`{}` has {n_bytes} bytes of text, expected at least {}", path.display(), least(WINDOWS[3]));
    };
    Ok(Text { path: absolute.display().to_string(), seq_len, n_documents, n_bytes })
}

impl Text {
    /// The values of the marks in the template of pretraining.
    fn values(&self) -> Vec<(&'static str, String)> {
        let tokens_per_step = WINDOWS_PER_STEP * self.seq_len as f64;
        let pass = self.n_bytes as f64 / BYTES_PER_TOKEN / tokens_per_step;
        let steps = (PASSES * pass).clamp(STEPS.0, STEPS.1).round();
        // Small texts give small vocabularies: a token is worth learning that occurs some hundred times.
        let vocab_size = if self.n_bytes < 1_000_000 { 1024 } else { 4096 };
        vec![
            ("{train}", common::config::toml_text(&Value::String(self.path.clone()))),
            ("{vocab_size}", vocab_size.to_string()),
            ("{warmup_steps}", (steps / 10.0).min(100.0).round().to_string()),
            ("{steps}", steps.to_string()),
            ("{passes}", ((steps / pass).clamp(1.0, 9999.0).round()).to_string()),
            ("{seq_len}", self.seq_len.to_string()),
            ("{tokens_per_step}", tokens_per_step.to_string()),
            ("{eval_every}", (steps / 5.0).round().to_string()),
        ]
    }
}

/// The values of the marks in the template of a stage that trains on `n` records. Few records are seen in smaller batches
/// and more often, so that there are steps enough to learn from them.
fn amounts(step: Step, n: usize, pretrained: bool) -> Vec<(&'static str, String)> {
    // Optimiser steps wanted, passes at least and at most. More than a few passes over pairs overfit.
    let (wanted, least, most) = if step == Step::Sft { (100, 2, 10) } else { (50, 1, 3) };
    let batch_size = if n < 32 * wanted / least { 8 } else { 32 };
    let epochs = (wanted * batch_size).div_ceil(n.max(1)).clamp(least, most);
    let steps = epochs * n.div_ceil(batch_size);
    let (lr, min_lr, value_lr) = match (step, pretrained) {
        (Step::Ppo, false) => ("1e-4", "0", "2e-4"),
        (Step::Ppo, true) => ("1e-6", "0", "1e-5"),
        (_, false) => ("3e-4", "3e-5", ""),
        (_, true) => ("1e-5", "1e-6", ""),
    };
    vec![
        ("{batch_size}", batch_size.to_string()),
        ("{epochs}", epochs.to_string()),
        ("{steps}", steps.to_string()),
        ("{warmup_steps}", (steps / 10).min(10).to_string()),
        ("{eval_every}", (steps / 4).clamp(1, 50).to_string()),
        ("{lr}", lr.to_owned()),
        ("{min_lr}", min_lr.to_owned()),
        ("{value_lr}", value_lr.to_owned()),
    ]
}

/// `text` with the comments behind values in one column.
fn aligned(text: &str) -> String {
    let line = |line: &str| match line.split_once(" # ") {
        Some((value, comment)) => format!("{:<COMMENTS$} # {comment}\n", value.trim_end()),
        None => format!("{line}\n"),
    };
    text.lines().map(line).collect()
}

/// The records of a stage's files in the one form that `data/` has them in.
fn read_records(step: Step, path: &Path) -> Result<Vec<Value>> {
    Ok(expand(path)?.iter().map(|file| records_of(step, file)).collect::<Result<Vec<_>>>()?.concat())
}

fn records_of(step: Step, path: &Path) -> Result<Vec<Value>> {
    let on_bad = OnBadRecord::Fail;
    let prompt = |messages: &[Message]| match messages {
        [Message { role: Role::User, content }] => json!(content),
        messages => json!(messages),
    };
    Ok(match step {
        Step::Sft => {
            records::read_conversations(path, on_bad)?.iter().map(|c| json!({ "messages": c.messages })).collect()
        }
        Step::RewardModel => records::read_pairs(path, on_bad)?
            .iter()
            .map(|pair| {
                let mut record =
                    json!({ "prompt": prompt(&pair.prompt), "chosen": pair.chosen, "rejected": pair.rejected });
                if let Some(margin) = pair.margin {
                    record["margin"] = json!(margin);
                }
                record
            })
            .collect(),
        _ => records::read_prompts(path, on_bad)?.iter().map(|p| json!({ "prompt": prompt(&p.messages) })).collect(),
    })
}

/// Divides records into those to train on and those held out; records of one prompt that follow each other stay together.
fn divide(records: Vec<Value>, path: &Path) -> Result<(Vec<Value>, Vec<Value>)> {
    let mut groups: Vec<Vec<Value>> = Vec::new();
    for record in records {
        match groups.last_mut() {
            Some(group) if !record["prompt"].is_null() && group[0]["prompt"] == record["prompt"] => group.push(record),
            _ => groups.push(vec![record]),
        }
    }
    if groups.len() < 2 {
        bail!("`{}` has records of one prompt only, expected at least 2: one is held out", path.display());
    }
    let every = HELD_OUT_EVERY.min(groups.len());
    let (val, train): (Vec<_>, Vec<_>) = groups.into_iter().enumerate().partition(|(i, _)| i % every == every - 1);
    let flat = |numbered: Vec<(usize, Vec<Value>)>| numbered.into_iter().flat_map(|(_, group)| group).collect();
    Ok((flat(train), flat(val)))
}

fn lines(records: &[Value]) -> String {
    records.iter().map(|record| format!("{record}\n")).collect()
}

fn recipe_toml(args: &NewArgs, stages: &[Step]) -> Result<String> {
    let quoted = |text: &str| common::config::toml_text(&Value::String(text.to_owned()));
    let names: Vec<String> = stages.iter().map(|step| quoted(step.name())).collect();
    let mut text = format!(
        "# Every key: docs/configuration.md, or `--print-config` of a stage. Paths are relative to this folder.\n\
         title = {}\nseed = 1                       # of weights, order and sampling: the same seed gives the same model\n\
         stages = [{}]\n",
        quoted(&name(args)),
        names.join(", ")
    );
    if let Some(init) = args.init.as_deref().filter(|_| !stages.contains(&Step::Pretrain)) {
        let init = std::path::absolute(init).with_context(|| format!("failed to find `{}`", init.display()))?;
        text += &format!("init = {}\n", quoted(&init.display().to_string()));
    }
    if stages.contains(&Step::Ppo) {
        text += "\n[evaluate]                     # every model answers the held-out prompts, for the report\n\
                 prompts = \"data/prompts.val.jsonl\"\npairs = \"data/pairs.val.jsonl\"\n\
                 temperature = 1.0              # as in ppo.toml\nmax_tokens = 96                # as in ppo.toml\n";
    }
    Ok(text)
}

/// The folder's own name.
fn name(args: &NewArgs) -> String {
    let absolute = std::path::absolute(&args.dir).unwrap_or_else(|_| args.dir.clone());
    absolute.file_name().map_or_else(|| "recipe".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// The commands to run next.
fn next(args: &NewArgs, stages: &[Step]) -> String {
    let (dir, name) = (args.dir.display(), name(args));
    let last = stages.iter().rfind(|step| **step != Step::RewardModel).unwrap_or(&Step::Pretrain);
    let trial: Vec<String> = stages
        .iter()
        .map(|step| format!("--set {step}.train.steps={}", if *step == Step::Ppo { 2 } else { 20 }))
        .collect();
    format!(
        "a quick trial:  recipe run {dir} --out runs/{name}-trial {}\n\
         the whole run:  recipe run {dir} --out runs/{name}\n\
         then:           chat --checkpoint runs/{name}/{last}\n",
        trial.join(" ")
    )
}

fn readme(args: &NewArgs, stages: &[Step]) -> String {
    format!("# {}\n\nWritten by `recipe new`.\n\n```\n{}```\n", name(args), next(args, stages))
}
