//! What the page asks beyond OpenAI's interface: judgements of compared answers, kept as preference records.

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::http::StatusCode;
use common::conversation::{Message, Role};
use common::data::DataError;
use common::data::records::{Label, LabelFile, Verdict};
use serde::Deserialize;
use serde_json::{Value, json};

use super::answer::messages;
use super::engine::one_line;
use super::error::ApiError;
use super::params::Params;
use super::shapes::Json;
use super::state::{App, causes, on_disk};

/// Most answers that are compared.
const MAX_ANSWERS: usize = 4;

/// Judgements that can be taken back one after the other.
const MAX_UNDO: usize = 1000;

/// Most characters of an annotator's name.
const MAX_NAME: usize = 64;

/// Most seconds that a judgement may have taken: a year, as when a page is left open.
const MAX_SECONDS: f64 = 365.0 * 86_400.0;

/// The file that judgements go to.
#[derive(Debug)]
pub(super) struct Labels {
    written: Mutex<Written>,
    /// Held while the disk is waited for: else each judgement would wait for the one before on a thread of its own.
    turn: tokio::sync::Mutex<()>,
}

/// A person by name, or all who give none.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Who(String);

impl From<Option<String>> for Who {
    fn from(name: Option<String>) -> Self {
        Self(name.unwrap_or_default())
    }
}

/// Who judged what people are asked about; `None` of what they asked themselves.
type Noted = Option<(Who, String)>;

#[derive(Debug)]
struct Written {
    file: LabelFile,
    /// The latest judgements that are kept, each with its number and what its records are about, where that was asked.
    kept: VecDeque<(u64, Vec<Noted>)>,
    next: u64,
    /// Each [`Label::question`] that people are asked.
    asked: HashSet<String>,
    /// How many records of the file each person has on them.
    judged: HashMap<Who, HashMap<String, usize>>,
}

impl Labels {
    /// Judgements that are appended to the file at `path`; people are asked about `asked`, each a [`Label::question`]. The
    /// second of what is returned is how many records there are already.
    ///
    /// # Errors
    /// As of [`LabelFile::open`].
    pub(super) fn open(path: &Path, asked: HashSet<String>) -> Result<(Self, usize), DataError> {
        let (file, said) = LabelFile::open(path)?;
        // A page that was open before the server was started again must not take back what another one judged since. In
        // milliseconds, numbers stay exact in JavaScript.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let next = since.as_millis() as u64;
        let mut written = Written { file, kept: VecDeque::new(), next, asked, judged: HashMap::new() };
        for label in &said {
            written.note(label);
        }
        Ok((Self { written: Mutex::new(written), turn: tokio::sync::Mutex::default() }, said.len()))
    }

    /// Appends the records of a judgement and waits until they are on the disk; returns the judgement's number.
    ///
    /// # Errors
    /// If they cannot be written; none of them is kept then.
    fn keep(&self, records: &[Label]) -> Result<u64, DataError> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let number = written.next;
        written.next += 1;
        for (n_before, record) in records.iter().enumerate() {
            if let Err(error) = written.file.append(record) {
                // The first failure is the one to tell.
                let _ = (0..n_before).try_for_each(|_| written.file.undo().map(drop));
                return Err(error);
            }
        }
        let about = records.iter().map(|record| written.note(record)).collect();
        written.kept.push_back((number, about));
        if written.kept.len() > MAX_UNDO {
            written.kept.pop_front();
        }
        Ok(number)
    }

    /// Takes a judgement back; `false` if it is not the last one that is kept.
    fn undo(&self, id: u64) -> Result<bool, DataError> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let Written { file, kept, judged, .. } = &mut *written;
        let Some((_, about)) = kept.back_mut().filter(|(number, _)| *number == id) else { return Ok(false) };
        // Where the file cannot be written, what is left of the judgement can be taken back later.
        while !about.is_empty() {
            file.undo()?;
            let noted = about.pop().flatten();
            if let Some(n) = noted.and_then(|(who, question)| judged.get_mut(&who)?.get_mut(&question)) {
                *n -= 1;
            }
        }
        kept.pop_back();
        Ok(true)
    }

    /// The questions that somebody has judged.
    pub(super) fn judged_by(&self, who: &Who) -> HashSet<String> {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let judged = written.judged.get(who).into_iter().flatten();
        judged.filter(|(_, n)| **n > 0).map(|(question, _)| question.clone()).collect()
    }
}

impl Written {
    /// Notes who has judged what, if that was asked.
    fn note(&mut self, label: &Label) -> Noted {
        let question = Label::question(&label.prompt, &label.answers);
        self.asked.contains(&question).then(|| {
            let who = Who::from(label.annotator.clone());
            *self.judged.entry(who.clone()).or_default().entry(question.clone()).or_default() += 1;
            (who, question)
        })
    }
}

/// An answer that was shown.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shown {
    /// Which served model it comes from, if any does.
    model: Option<String>,
    text: String,
}

/// What was said of the answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
enum Judgement {
    /// This one is the best.
    Best(usize),
    /// None is better than the others.
    None(NoneBetter),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum NoneBetter {
    /// All are alike.
    Tie,
    /// All are bad.
    Bad,
}

/// `POST /compare/judge`: keeps a judgement and tells what the reward model thinks.
pub(super) async fn judge(State(app): State<App>, mut params: Params) -> Result<Json, ApiError> {
    let prompt = messages(&mut params)?;
    let answers: Vec<Shown> = params.take("answers", "a list of objects with `text` and `model`")?.unwrap_or_default();
    let judgement = params.take("verdict", "the index of an answer, `tie` or `bad`")?;
    let annotator = params.take::<String>("annotator", "a text")?;
    let seconds = params.take::<f64>("seconds", "a number")?;
    params.finish()?;
    check(&app, &prompt, &answers)?;
    let judgement = match judgement {
        Some(Judgement::Best(best)) if best >= answers.len() => None,
        judgement => judgement,
    };
    let judgement = judgement.ok_or_else(|| ApiError::unprocessable("verdict", "the verdict is about no answer"))?;
    let is_name = |name: &String| name.chars().count() <= MAX_NAME && !name.chars().any(char::is_control);
    if !annotator.as_ref().is_none_or(is_name) {
        return Err(ApiError::unprocessable("annotator", format!("expected a name of up to {MAX_NAME} characters")));
    }
    if seconds.is_some_and(|seconds| !(0.0..=MAX_SECONDS).contains(&seconds)) {
        let message = format!("invalid `seconds`: expected a number from 0 to {MAX_SECONDS}");
        return Err(ApiError::unprocessable("seconds", message));
    }
    let records = records(&prompt, &answers, judgement, annotator.as_deref(), seconds)?;
    let kept = write(&app, move |labels| labels.keep(&records)).await?;
    Ok(Json(json!({ "kept": kept, "scores": scores(&app, &prompt, &answers).await })))
}

/// `POST /compare/undo`: takes the last judgement that is kept back.
pub(super) async fn undo(State(app): State<App>, mut params: Params) -> Result<Json, ApiError> {
    let id = params.take::<u64>("id", "the number of a judgement")?.unwrap_or(0);
    params.finish()?;
    if write(&app, move |labels| labels.undo(id)).await? == Some(true) {
        return Ok(Json(json!({ "undone": id })));
    }
    Err(ApiError::of_status(
        StatusCode::CONFLICT,
        "another judgement came after this one: it can no longer be taken back",
    ))
}

/// Waits until `work` has changed the file of judgements, if there is one. Whoever runs the server can mend a disk that
/// is full, and the person at the page cannot: the log has the reason too.
async fn write<T: Send + 'static>(
    app: &App,
    work: impl FnOnce(&Labels) -> Result<T, DataError> + Send + 'static,
) -> Result<Option<T>, ApiError> {
    let Some(labels) = &app.labels else { return Ok(None) };
    let _turn = labels.turn.lock().await;
    let labels = Arc::clone(labels);
    let told = |error: &DataError| tracing::error!("the judgements cannot be changed: {}", causes(error));
    on_disk(move || work(&labels).inspect_err(told)).await.map(Some)
}

fn check(app: &App, prompt: &[Message], answers: &[Shown]) -> Result<(), ApiError> {
    common::conversation::validate(prompt).map_err(|error| ApiError::unprocessable("messages", one_line(&error)))?;
    if prompt.last().is_some_and(|last| last.role == Role::Assistant) {
        return Err(ApiError::unprocessable(
            "messages",
            "the last message is the assistant's: there is nothing to answer",
        ));
    }
    if prompt.iter().any(|message| message.role != Role::System && message.content.trim().is_empty()) {
        return Err(ApiError::unprocessable("messages", "a message is empty: no record can have it"));
    }
    if !(2..=MAX_ANSWERS).contains(&answers.len()) {
        return Err(ApiError::unprocessable("answers", format!("expected 2 to {MAX_ANSWERS} answers")));
    }
    answers.iter().filter_map(|answer| answer.model.clone()).try_for_each(|model| app.engine(Some(model)).map(|_| ()))
}

/// A record for each pair of answers that the judgement is about.
///
/// # Errors
/// If the best answer is the same as all others.
fn records(
    prompt: &[Message],
    answers: &[Shown],
    judgement: Judgement,
    annotator: Option<&str>,
    seconds: Option<f64>,
) -> Result<Vec<Label>, ApiError> {
    let label = |first: usize, second: usize, verdict: Verdict| Label {
        prompt: prompt.to_vec(),
        answers: [first, second].map(|i| answers[i].text.clone()),
        verdict,
        annotator: annotator.map(str::to_owned),
        seconds,
        models: answers[first].model.clone().zip(answers[second].model.clone()).map(<[String; 2]>::from),
        repeat: false,
    };
    let pairs = (0..answers.len()).flat_map(|i| (i + 1..answers.len()).map(move |j| (i, j)));
    let labels: Vec<Label> = match judgement {
        Judgement::Best(best) => pairs
            .filter(|&(i, j)| (i == best || j == best) && answers[i].text != answers[j].text)
            .map(|(i, j)| label(i, j, if i == best { Verdict::First } else { Verdict::Second }))
            .collect(),
        Judgement::None(NoneBetter::Tie) => pairs.map(|(i, j)| label(i, j, Verdict::Tie)).collect(),
        Judgement::None(NoneBetter::Bad) => pairs.map(|(i, j)| label(i, j, Verdict::BothBad)).collect(),
    };
    if labels.is_empty() {
        return Err(ApiError::unprocessable("verdict", "the answers are the same, so that none is better"));
    }
    Ok(labels)
}

/// The score of each answer; none where there is no reward model, or it cannot score one of them.
async fn scores(app: &App, prompt: &[Message], answers: &[Shown]) -> Value {
    let Some(scorer) = &app.scorer else { return Value::Null };
    let mut scores = Vec::new();
    for answer in answers {
        let conversation = [prompt, &[Message::new(Role::Assistant, &answer.text)]].concat();
        match scorer.score(conversation).await {
            Ok(score) => scores.push(score),
            Err(_) => return Value::Null,
        }
    }
    json!(scores)
}
