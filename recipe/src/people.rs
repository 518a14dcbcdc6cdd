//! Preference pairs that people label.
//!
//! The step asks its questions in a file, stops, and is carried out again by the same command until `<out>/labels/` has
//! enough decisions about them. A label is never removed by the recipe: it is somebody's work.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use common::checkpoint::{self, Checkpoint};
use common::data::records::{Appended, LABELS_ENDING, Label, OnBadRecord, Verdict, read_appended, read_labels};
use common::files::{read_if_there, write_whole};
use common::logging::counted;
use reward_model::agreement::{self, Agreement};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::answers;
use crate::collect::{Collector, PairFiles, Sampled};
use crate::config::BasePrompt;
use crate::gold::GoldScorer;
use crate::steps::{Progress, Step};

/// The summary's name in the output directory.
const SUMMARY_FILE: &str = "labels.json";

/// The file of the pairs that are to be labelled, in a recipe's output directory.
pub(crate) fn questions_file(out: &Path) -> PathBuf {
    out.join("data/pairs.questions.jsonl")
}

/// What people's labels came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Summary {
    /// Decisions used.
    pub(crate) decisions: usize,
    /// Those for one of the answers; the others teach nothing.
    pub(crate) preferences: usize,
    /// Decisions of each person.
    pub(crate) people: BTreeMap<String, usize>,
    /// Fraction of the preferences that are in the order of the gold scores, where these are known and differ.
    pub(crate) gold_accuracy: Option<f64>,
    /// How far people agree who were asked the same.
    pub(crate) agreement: Value,
}

impl Summary {
    /// The summary in a recipe's output directory, if people labelled there.
    pub(crate) fn read(out: &Path) -> Result<Option<Self>> {
        let path = out.join(SUMMARY_FILE);
        let Some(text) = read_if_there(&path)? else { return Ok(None) };
        serde_json::from_str(&text).map(Some).with_context(|| format!("`{}` is no summary of labels", path.display()))
    }
}

/// Settings that change what is done with the labels, and not what is asked.
const NOT_ASKED: [&str; 4] = [
    "recipe.collect.n_labels",
    "recipe.collect.n_val_prompts",
    "recipe.collect.label_temperature",
    "recipe.collect.least_difference",
];

/// Asks, or takes the answers: see the module. What was asked stays while it would be asked again.
pub(crate) fn collect(collector: &Collector<'_>) -> Result<Progress> {
    let out = &collector.setup.out;
    let path = questions_file(out);
    let (key_file, key) = (path.with_extension("key"), collector.setup.inputs(Step::Collect)?.without(&NOT_ASKED));
    let key = key.fingerprint();
    if !path.is_file() || read_if_there(&key_file)?.is_none_or(|old| old != key) {
        let Some(sampled) = collector.sample_all()? else { return Ok(Progress::Interrupted) };
        collector.prepare_data_dir()?;
        let certainty = certainty(collector, &sampled);
        if collector.interrupt.requested() {
            return Ok(Progress::Interrupted);
        }
        let certainty = certainty?;
        write_whole(&path, questions(&sampled, collector.config.samples_per_prompt, certainty.as_deref())?)?;
        collector.write_test(sampled.test)?;
        write_whole(&key_file, key)?;
    }
    let asked = read_labels(&path, OnBadRecord::Fail)?;
    let n_wanted = match collector.config.n_labels {
        0 => asked.len(),
        n => n,
    };
    check_n_labels(n_wanted, asked.len())?;
    let said = labels_about(&asked, &out.join("labels"))?;
    if said.decisions.len() < n_wanted {
        say_how(collector, &path, said.decisions.len(), n_wanted)?;
        return Ok(Progress::Waiting);
    }
    let n_prompts = asked.iter().map(prompt_key).collect::<HashSet<_>>().len();
    write_pairs(collector, &said, n_prompts)?;
    Ok(Progress::Finished)
}

/// Says how many labels came after the pairs in `out` were made, if any.
pub(crate) fn say_unused(out: &Path) -> Result<()> {
    let Some(summary) = Summary::read(out)? else { return Ok(()) };
    let n = labels_about(&read_labels(&questions_file(out), OnBadRecord::Fail)?, &out.join("labels"))?.decisions.len();
    if n > summary.decisions {
        tracing::warn!(
            "{} came after the pairs were made of {}: `--set recipe.collect.n_labels={n} --overwrite` takes all",
            counted(n - summary.decisions, "label", "labels"),
            summary.decisions
        );
    }
    Ok(())
}

/// Whether so many labels can be waited for.
pub(crate) fn check_n_labels(n_wanted: usize, n_pairs: usize) -> Result<()> {
    ensure!(
        n_wanted <= n_pairs,
        "`collect.n_labels` is {n_wanted}, but there are {n_pairs} pairs to label\nhint: lower it, or raise \
         `collect.n_prompts` or `collect.samples_per_prompt`"
    );
    Ok(())
}

/// The scores by which an earlier reward model tells the sampled answers apart, if the recipe names one.
fn certainty(collector: &Collector<'_>, sampled: &Sampled) -> Result<Option<Vec<f64>>> {
    let config = collector.config;
    let Some(dir) = &config.order_by else { return Ok(None) };
    let of_sft = collector.setup.dir(Step::Sft);
    let sft = Checkpoint::open_with(&of_sft, collector.setup.opening(&of_sft))?;
    let mut model = checkpoint::open_reward_model(dir, collector.setup.opening(dir), &sft)
        .context("failed to load `recipe.collect.order_by`")?;
    let prompts: Vec<_> = sampled
        .prompts
        .iter()
        .flat_map(|prompt| std::iter::repeat_n(prompt.messages.clone(), config.samples_per_prompt))
        .collect();
    let scalar = collector.runtime.open()?.take_scalar(&mut model)?;
    let (tokenizer, model) = (model.require_tokenizer()?, scalar);
    // As texts, which is what a reward model learns from.
    let form = BasePrompt::Raw;
    let scores =
        answers::scores(&model, tokenizer, &prompts, &sampled.answers, form, config.batch_size, collector.interrupt)?;
    // What does not fit the reward model cannot be judged by it.
    Ok(Some(scores.into_iter().map(|score| score.unwrap_or(f64::INFINITY)).collect()))
}

/// Every two different answers to a prompt: one pair of each prompt before the second of any or, with the answers' `scores`, those of
/// the nearest scores first.
fn questions(sampled: &Sampled, k: usize, scores: Option<&[f64]>) -> Result<String> {
    let mut asked = Vec::new();
    for a in 0..k {
        for b in a + 1..k {
            for (i, (prompt, answers)) in sampled.prompts.iter().zip(sampled.answers.chunks(k)).enumerate() {
                if answers[a].text != answers[b].text {
                    let tied = [&answers[a].text, &answers[b].text];
                    let apart = scores.map_or(0.0, |scores| (scores[i * k + a] - scores[i * k + b]).abs());
                    let apart = if apart.is_nan() { f64::INFINITY } else { apart };
                    asked.push((apart, json!({ "prompt": prompt.messages, "tied": tied })));
                }
            }
        }
    }
    ensure!(!asked.is_empty(), "no prompt has two different answers\nhint: raise `collect.temperature`");
    asked.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    Ok(asked.into_iter().map(|(_, question)| format!("{question}\n")).collect())
}

/// What people said about what was asked.
struct Said {
    /// Each person's last word on a question, in the order of the questions.
    decisions: Vec<Label>,
    /// Their words on questions that they had decided before.
    repeats: Vec<Label>,
}

/// Reads the labels in `dir` about what was asked.
fn labels_about(asked: &[Label], dir: &Path) -> Result<Said> {
    let number: HashMap<String, usize> = asked
        .iter()
        .enumerate()
        .map(|(number, label)| (Label::question(&label.prompt, &label.answers), number))
        .collect();
    let mut said: BTreeMap<(usize, String), Label> = BTreeMap::new();
    let (mut repeats, mut n_foreign) = (Vec::new(), 0);
    for path in label_files(dir)? {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let Appended { labels, is_torn, .. } = read_appended(&path)?;
        if is_torn {
            tracing::warn!("`{}` ends in the middle of a record, which is left out", path.display());
        }
        for mut label in labels {
            let Some(&number) = number.get(&Label::question(&label.prompt, &label.answers)) else {
                n_foreign += 1;
                continue;
            };
            let person = label.annotator.get_or_insert_with(|| stem.clone()).clone();
            if label.repeat {
                repeats.push(label);
            } else {
                said.insert((number, person), label);
            }
        }
    }
    if n_foreign > 0 {
        let labels = counted(n_foreign, "label", "labels");
        tracing::warn!("{labels} in `{}` left out: about answers that were not asked about", dir.display());
    }
    Ok(Said { decisions: said.into_values().collect(), repeats })
}

/// The files of labels, in the order of their names.
fn label_files(dir: &Path) -> Result<Vec<PathBuf>> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let entries = dir.read_dir().with_context(|| format!("failed to read `{}`", dir.display()))?;
    let all = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let (mut files, others): (Vec<PathBuf>, Vec<PathBuf>) =
        all.partition(|path| path.extension().is_some_and(|ending| ending == LABELS_ENDING));
    for other in others {
        tracing::warn!("`{}` left out: its name does not end in `.{LABELS_ENDING}`", other.display());
    }
    files.sort();
    Ok(files)
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let path = path.display().to_string();
    // Only a NUL cannot be quoted, and no path has one.
    shlex::try_quote(&path).map_or_else(|_| path.clone(), Cow::into_owned)
}

/// Tells on stdout how to label, and that the same command goes on.
fn say_how(collector: &Collector<'_>, questions: &Path, n: usize, n_wanted: usize) -> Result<()> {
    let labels = collector.setup.out.join("labels");
    std::fs::create_dir_all(&labels).with_context(|| format!("failed to make `{}`", labels.display()))?;
    common::view::leave();
    writeln!(
        std::io::stdout(),
        "{n} of {n_wanted} labels are there. To label in a terminal, each person under a name:\n  \
         reward-model label --pairs {questions} --out {of_terminal} --annotator NAME\n\
         Or on a page, under Compare:\n  \
         chat serve --checkpoint {sft} --questions {questions} --labels {of_page}\n\
         Then run this command again: it goes on.",
        questions = quoted(questions),
        of_terminal = quoted(&labels.join("NAME.jsonl")),
        of_page = quoted(&labels.join("page.jsonl")),
        sft = quoted(&collector.setup.dir(Step::Sft)),
    )
    .context("failed to write the result")
}

/// How many of `n_labelled` prompts are for validation, where `n_val` of `n_asked` are to be: as large a part, at least one, and
/// at least one is left to train on.
fn n_for_validation(n_labelled: usize, n_val: usize, n_asked: usize) -> usize {
    (n_labelled * n_val).div_ceil(n_asked.max(1)).clamp(1, n_labelled.max(2) - 1)
}

/// Writes the pairs to train on and to validate by, and the summary; questions about `n_asked` prompts were asked.
fn write_pairs(collector: &Collector<'_>, said: &Said, n_asked: usize) -> Result<()> {
    let (config, out, labels) = (collector.config, &collector.setup.out, &said.decisions);
    let preferences: Vec<&Label> = labels.iter().filter(|label| is_preference(label)).collect();
    let mut prompts: HashMap<String, usize> = HashMap::new();
    for label in &preferences {
        let n = prompts.len();
        prompts.entry(prompt_key(label)).or_insert(n);
    }
    // The part that the recipe keeps for validation, spread evenly: people start at the beginning.
    let n = prompts.len();
    let n_val = n_for_validation(n, config.n_val_prompts, n_asked);
    let is_val = |number: usize| (number + 1) * n_val / n > number * n_val / n; // of a label, so that `n` is not 0
    let files = PairFiles::in_out(out);
    let (mut train, mut val, mut right, mut n_known) = (String::new(), String::new(), 0_usize, 0_usize);
    for label in &preferences {
        let (record, is_right) = record(label, collector.gold);
        n_known += usize::from(is_right.is_some());
        right += usize::from(is_right == Some(true));
        let part = if is_val(prompts[&prompt_key(label)]) { &mut val } else { &mut train };
        writeln!(part, "{record}")?;
    }
    ensure!(
        !train.is_empty() && !val.is_empty(),
        "{n} prompts have a label that prefers an answer: too few to train and to validate\nhint: label more, or lower \
         `collect.n_val_prompts`"
    );
    write_whole(&files.train, train)?;
    write_whole(&files.val, val)?;
    let mut people = BTreeMap::new();
    for label in labels {
        *people.entry(label.annotator.clone().unwrap_or_default()).or_insert(0) += 1;
    }
    let all = [labels.as_slice(), &said.repeats].concat();
    let Agreement { pairs, alpha, shared, consistency, .. } = agreement::of_labels(&all);
    let summary = Summary {
        decisions: labels.len(),
        preferences: preferences.len(),
        people,
        gold_accuracy: (n_known > 0).then(|| right as f64 / n_known as f64),
        agreement: json!({ "pairs": pairs, "alpha": alpha, "shared": shared, "consistency": consistency }),
    };
    tracing::info!(
        "{} decisions of {} people, {} preferences",
        summary.decisions,
        summary.people.len(),
        preferences.len()
    );
    Ok(write_whole(&out.join(SUMMARY_FILE), serde_json::to_string_pretty(&summary)?)?)
}

fn is_preference(label: &Label) -> bool {
    matches!(label.verdict, Verdict::First | Verdict::Second)
}

fn prompt_key(label: &Label) -> String {
    json!(label.prompt).to_string()
}

/// The record of a preference, with the gold scores where there are any, and whether it is in their order.
fn record(label: &Label, gold: Option<&GoldScorer>) -> (Value, Option<bool>) {
    let [first, second] = &label.answers;
    let (chosen, rejected) = if label.verdict == Verdict::First { (first, second) } else { (second, first) };
    let mut record = json!({ "prompt": label.prompt, "chosen": chosen, "rejected": rejected });
    if let Some(annotator) = &label.annotator {
        record["annotator"] = json!(annotator);
    }
    if let Some(seconds) = label.seconds {
        record["seconds"] = json!(seconds);
    }
    let prompt = label.prompt.last().map_or("", |message| message.content.as_str());
    let score = |answer: &str| gold.and_then(|gold| gold.score(prompt, answer));
    let (Some(of_chosen), Some(of_rejected)) = (score(chosen), score(rejected)) else { return (record, None) };
    record["gold_chosen"] = json!(of_chosen);
    record["gold_rejected"] = json!(of_rejected);
    (record, (of_chosen != of_rejected).then_some(of_chosen > of_rejected))
}

#[cfg(test)]
mod tests {
    use common::conversation::{Message, Role};
    use common::data::records::Prompt;
    use common::score::Response;

    use super::*;

    #[test]
    fn the_pairs_that_a_reward_model_knows_least_about_come_first() {
        let prompt = |text: &str| Prompt { messages: vec![Message::new(Role::User, text)], text: text.to_owned() };
        let answers =
            ["a", "b", "c", "d", "d", "e"].map(|text| Response { text: text.to_owned(), ..Response::default() });
        let sampled = Sampled { prompts: vec![prompt("p"), prompt("q")], answers: answers.into(), test: None };
        let tied = |scores| -> Vec<String> {
            let text = questions(&sampled, 3, scores).unwrap();
            let read = |line: &str| serde_json::from_str::<Value>(line).unwrap()["tied"].to_string();
            text.lines().map(read).collect()
        };
        let [ab, ac, bc, de] = [r#"["a","b"]"#, r#"["a","c"]"#, r#"["b","c"]"#, r#"["d","e"]"#];
        assert_eq!(tied(None), [ab, ac, de, bc, de]); // `d` twice: asked as two questions with the same texts
        let scores = [0.0, 3.0, 1.0, 5.0, f64::INFINITY, 5.5];
        assert_eq!(tied(Some(&scores)), [de, ac, bc, ab, de]);
    }

    #[test]
    fn validation_takes_its_part_of_what_is_labelled() {
        assert_eq!(n_for_validation(40, 200, 1000), 8);
        assert_eq!(n_for_validation(41, 200, 1000), 9);
        assert_eq!(n_for_validation(3, 1, 1000), 1);
        assert_eq!(n_for_validation(40, 999, 1000), 39);
        // Too few to divide: the caller says so.
        assert_eq!((n_for_validation(1, 200, 1000), n_for_validation(0, 200, 1000)), (1, 1));
    }
}
