//! Pairs of answers from a file, which people judge on the page.

use std::collections::HashSet;
use std::path::Path;

use anyhow::ensure;
use axum::extract::State;
use axum::http::StatusCode;
use common::data::records::{Label, OnBadRecord, read_labels};
use serde_json::{Value, json};

use super::compare::Who;
use super::error::ApiError;
use super::params::Params;
use super::shapes::Json;
use super::state::App;

/// What people are asked.
#[derive(Debug)]
pub(super) struct Questions {
    /// The pairs, whatever the file says about them, each with its [`Label::question`].
    asked: Vec<(Label, String)>,
}

impl Questions {
    /// The pairs in a file.
    ///
    /// # Errors
    /// If it cannot be read, or holds none.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let mut asked = Vec::new();
        for label in read_labels(path, OnBadRecord::Fail)? {
            let question = Label::question(&label.prompt, &label.answers);
            asked.push((label, question));
        }
        ensure!(!asked.is_empty(), "`{}` holds no pair to judge", path.display());
        tracing::info!("{} pairs of `{}` are judged on the page", asked.len(), path.display());
        Ok(Self { asked })
    }

    /// Each [`Label::question`].
    pub(super) fn keys(&self) -> HashSet<String> {
        self.asked.iter().map(|(_, question)| question.clone()).collect()
    }

    /// How many there are.
    pub(super) fn n(&self) -> usize {
        self.asked.len()
    }

    /// The first pair behind number `after` for which `is_open`, else the first of all.
    fn next(&self, after: Option<usize>, is_open: impl Fn(&str) -> bool) -> Option<(usize, &Label)> {
        let first = after.map_or(0, |after| after.saturating_add(1)).min(self.n());
        let mut order = (first..self.n()).chain(0..first);
        order.find(|&i| is_open(&self.asked[i].1)).map(|i| (i, &self.asked[i].0))
    }
}

/// `POST /compare/question`: the next pair that this person has not judged; `after` the number of the one before, which is
/// skipped if they have not judged it either.
pub(super) async fn question(State(app): State<App>, mut params: Params) -> Result<Json, ApiError> {
    let who = Who::from(params.take::<String>("annotator", "a text")?);
    let after = params.take::<usize>("after", "the number of a pair")?;
    params.finish()?;
    let (Some(questions), Some(labels)) = (&app.questions, &app.labels) else {
        return Err(ApiError::of_status(
            StatusCode::NOT_FOUND,
            "there are no pairs to judge: `--questions` names a file",
        ));
    };
    let judged = labels.judged_by(&who);
    let next = questions
        .next(after, |question| !judged.contains(question))
        .map(|(number, label)| json!({ "number": number, "messages": label.prompt, "answers": label.answers }));
    let n_judged = questions.asked.iter().filter(|(_, question)| judged.contains(question)).count();
    Ok(Json(json!({ "question": next.unwrap_or(Value::Null), "n": questions.n(), "judged": n_judged })))
}
