//! Scores of answers, one JSON line each.

use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use common::checkpoint::{Checkpoint, Stage};
use common::conversation::{self, Message};
use common::data::ids;
use common::data::records::{self, Answers, OnBadRecord};
use common::model::ScalarGpt;
use common::score::score_rows;
use common::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

use crate::cli::ScoreArgs;

/// A line to print: the fields it came with, and the suffix of each score's name.
struct Line {
    fields: Map<String, Value>,
    suffixes: &'static [&'static str],
}

/// Carries out `reward-model score`.
///
/// Each line has the fields of its record, then `score` and `raw_score`, which is without the bias of the
/// normalisation; for pairs `score_chosen`, `score_rejected`, `raw_score_chosen` and `raw_score_rejected`; for token
/// ids the field `ids`.
pub(crate) fn run(args: &ScoreArgs) -> anyhow::Result<()> {
    args.runtime.check_base([&*args.checkpoint])?;
    let mut checkpoint =
        Checkpoint::open_with(&args.checkpoint, args.runtime.opening())?.of_stage(&[Stage::RewardModel])?;
    let model = args.runtime.open()?.take_scalar(&mut checkpoint)?;
    let (lines, rows) = match (&args.data, &args.ids) {
        (Some(file), _) => of_records(file, checkpoint.require_tokenizer()?, model.config().max_seq_len)?,
        (None, Some(file)) => of_ids(file, &model)?,
        (None, None) => bail!("either `--data` or `--ids` is needed"),
    };
    let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
    let mut scores = score_rows(&model, &rows, args.batch_size.get())?.into_iter();
    let mut out = BufWriter::new(std::io::stdout().lock());
    for Line { mut fields, suffixes } in lines {
        for suffix in suffixes {
            let score = f64::from(scores.next().context("each line has its scores")?);
            ensure!(score.is_finite(), "a score is not finite: the weights have diverged");
            fields.insert(format!("score{suffix}"), json!(score));
            fields.insert(format!("raw_score{suffix}"), json!(score - model.score_bias()));
        }
        writeln!(out, "{}", Value::Object(fields)).context("failed to write the scores")?;
    }
    out.flush().context("failed to write the scores")
}

/// The records of a file and the token rows to score, two for a pair.
fn of_records(file: &Path, tokenizer: &Tokenizer, max_seq_len: usize) -> anyhow::Result<(Vec<Line>, Vec<Vec<u32>>)> {
    let encode = |prompt: &[Message], response: &str| -> anyhow::Result<Vec<u32>> {
        let mut row = conversation::encode_prompt(tokenizer, prompt)?;
        row.extend(conversation::encode_response(tokenizer, response)?);
        ensure!(
            row.len() <= max_seq_len,
            "a prompt and its answer have {} tokens, the context {max_seq_len}\nhint: shorten them before scoring, so \
             that you know what is scored",
            row.len()
        );
        Ok(row)
    };
    let (mut lines, mut rows) = (Vec::new(), Vec::new());
    for (i, record) in records::read_answers(file, OnBadRecord::Fail)?.into_iter().enumerate() {
        let (suffixes, answers): (&'static [&'static str], _) = match &record.answers {
            Answers::One { prompt, response } => (&[""], vec![(prompt, response)]),
            Answers::Two(pair) => {
                (&["_chosen", "_rejected"], vec![(&pair.prompt, &pair.chosen), (&pair.prompt, &pair.rejected)])
            }
        };
        for (prompt, response) in answers {
            let row = encode(prompt, response);
            rows.push(row.with_context(|| format!("failed to encode record {} of `{}`", i + 1, file.display()))?);
        }
        lines.push(Line { fields: record.fields, suffixes });
    }
    Ok((lines, rows))
}

/// The token rows of a file, as they are.
fn of_ids(file: &Path, model: &ScalarGpt) -> anyhow::Result<(Vec<Line>, Vec<Vec<u32>>)> {
    let rows = ids::read(file, model.config().vocab_size, model.config().max_seq_len)?;
    let lines = rows.iter().map(|row| Line { fields: Map::from_iter([("ids".into(), json!(row))]), suffixes: &[""] });
    Ok((lines.collect(), rows))
}
