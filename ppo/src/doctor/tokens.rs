//! Tokenizer, chat template, padding and lengths.

use std::path::Path;

use common::checkpoint::Checkpoint;
use common::conversation::{self, Message, Role};
use common::data::records::{OnBadRecord, read_prompts};
use common::score::{Prompts, ScoreError, TooLong};
use common::tokenizer::Tokenizer;
use serde_json::Value;

use super::about;
use super::report::{Check, Verdict};
use crate::config::PpoConfig;

/// Prompts that the checks of texts look at.
const MAX_TEXTS: usize = 256;

/// Why a check of texts is not made.
const NO_PROMPTS: &str = "there are no prompts";

/// Whether text comes back from its tokens.
pub(super) fn round_trip(tokenizer: &Tokenizer, texts: &[String]) -> Check {
    if texts.is_empty() {
        return Check::skipped(&about::ROUND_TRIP, NO_PROMPTS);
    }
    let letters = |text: &str| text.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect();
    let (mut n_exact, mut n_letters) = (0, 0);
    let mut first_lost = None;
    for text in texts {
        let decoded = tokenizer.encode(text).map_or_else(|error| error.to_string(), |ids| tokenizer.decode(&ids));
        let [before, after]: [String; 2] = [letters(text), letters(&decoded)];
        n_exact += usize::from(decoded == *text);
        n_letters += usize::from(before == after);
        if decoded != *text && first_lost.is_none() {
            first_lost = Some(format!(": `{}` came back as `{}`", shown(text), shown(&decoded)));
        }
    }
    let n = texts.len();
    let verdict = match (n_exact == n, 2 * n_letters < n) {
        (true, _) => Verdict::Pass,
        (false, false) => Verdict::Warn,
        (false, true) => Verdict::Fail,
    };
    let reason = format!("{n_exact} of {n} texts decode to themselves{}", first_lost.unwrap_or_default());
    Check::measured(&about::ROUND_TRIP, verdict, n_exact as f64 / n as f64, 1.0, reason)
}

/// The beginning of a text, on one line.
fn shown(text: &str) -> String {
    const MOST: usize = 40;
    let line: String = text.chars().take(MOST).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().count() > MOST { line + "…" } else { line }
}

/// Whether SFT's conversations are PPO's prompts and answers, their end trained on.
pub(super) fn template(tokenizer: &Tokenizer, prompts: &[Vec<Message>]) -> Check {
    if prompts.is_empty() {
        return Check::skipped(&about::TEMPLATE, NO_PROMPTS);
    }
    let mut faults = Vec::new();
    for messages in prompts {
        if let Some(fault) = template_fault(tokenizer, messages) {
            faults.push(fault);
        }
    }
    let (n, n_faults) = (prompts.len(), faults.len());
    let first = faults.into_iter().next().map_or(String::new(), |fault| format!(": {fault}"));
    let reason = format!("{} of {n} conversations are encoded alike in SFT and in PPO{first}", n - n_faults);
    let verdict = if n_faults == 0 { Verdict::Pass } else { Verdict::Fail };
    Check::measured(&about::TEMPLATE, verdict, (n - n_faults) as f64 / n as f64, 1.0, reason)
}

/// What is wrong with one conversation.
fn template_fault(tokenizer: &Tokenizer, messages: &[Message]) -> Option<String> {
    // The question as the answer: a text of this data, which a tokenizer of its characters knows.
    let answer = messages.last().map_or("", |message| message.content.as_str());
    let whole = [messages, &[Message::new(Role::Assistant, answer)]].concat();
    let encoded = conversation::encode(tokenizer, &whole)
        .and_then(|whole| Ok((whole, conversation::encode_prompt(tokenizer, messages)?)))
        .and_then(|(whole, prompt)| Ok((whole, prompt, conversation::encode_response(tokenizer, answer)?)));
    let (whole, prompt, response) = match encoded {
        Ok(encoded) => encoded,
        Err(error) => return Some(chain(error)),
    };
    let n = prompt.len() + response.len();
    // A template may write more after a turn, such as a newline.
    if whole.ids.get(..n) != Some(&[prompt.as_slice(), &response].concat()) {
        return Some("the prompt and its answer are not the beginning of the conversation".to_owned());
    }
    let end = response.len().checked_sub(1).map(|last| prompt.len() + last);
    match end.filter(|&end| whole.trained[end] && tokenizer.end_ids().contains(&whole.ids[end])) {
        Some(_) => None,
        None => Some("the answer's last token is none that ends answers, or SFT does not train on it".to_owned()),
    }
}

/// Whether the padding id ends no answer.
pub(super) fn pad_is_not_end(policy_dir: &Path, policy: &Tokenizer, reward_model: &Checkpoint) -> Check {
    let about = &about::PAD_IS_NOT_END;
    let ends = policy.end_ids();
    if policy.pad().is_none_or(|pad| ends.contains(&pad)) {
        return Check::stated(about, Verdict::Fail, "the policy's tokenizer pads with a token that ends answers");
    }
    if reward_model.tokenizer().is_some_and(|tokenizer| tokenizer.pad().is_none()) {
        return Check::stated(about, Verdict::Fail, "the reward model's tokenizer pads with a token that ends answers");
    }
    let ends_answers = |dir| pad_of_files(dir, policy).filter(|(id, _)| ends.contains(id));
    let stated = |whose: &str, verdict, (pad, file): (u32, &str)| {
        Check::stated(about, verdict, format!("the padding token {pad} of the {whose}'s {file} ends answers"))
    };
    match (ends_answers(reward_model.dir()), ends_answers(policy_dir)) {
        (Some(pad), _) => stated("reward model", Verdict::Fail, pad),
        // No score is read from it, and here the tokenizer's padding counts.
        (None, Some(pad)) => stated("policy", Verdict::Warn, pad),
        (None, None) => Check::stated(about, Verdict::Pass, "answers end with another token than rows are padded with"),
    }
}

/// The padding token that other programs would read in a directory, and where.
fn pad_of_files(dir: &Path, tokenizer: &Tokenizer) -> Option<(u32, &'static str)> {
    const FILES: [&str; 2] = ["config.json", "tokenizer_config.json"];
    let json = |file| {
        let text = std::fs::read_to_string(dir.join(file)).ok()?;
        serde_json::from_str::<Value>(&text).ok()
    };
    let of_model = |file| u32::try_from(json(file)?["pad_token_id"].as_u64()?).ok();
    let of_tokenizer = |file| {
        let pad = &json(file)?["pad_token"];
        tokenizer.token_id(pad.as_str().or_else(|| pad["content"].as_str())?)
    };
    of_model(FILES[0]).map(|pad| (pad, FILES[0])).or_else(|| Some((of_tokenizer(FILES[1])?, FILES[1])))
}

/// The prompts of the run, the messages of the first of them, and what is to be said of them.
pub(super) struct Read {
    /// As PPO takes them; `None` where none can be used.
    pub(super) prompts: Option<Prompts>,
    /// Messages of some of them.
    pub(super) messages: Vec<Vec<Message>>,
    /// Whether they leave room for answers.
    pub(super) check: Check,
}

/// Reads prompts as PPO does, and measures the longest with its answer.
pub(super) fn prompts(config: &PpoConfig, tokenizer: &Tokenizer, max_seq_len: usize) -> Read {
    let about = &about::PROMPTS_FIT;
    let (length, options) = (config.ppo.response_length, config.data.read_options());
    let files = &config.data.train;
    let read = |on_too_long| Prompts::read(files, tokenizer, max_seq_len, length, options, on_too_long);
    let of_total = |total: usize| (total as f64, max_seq_len as f64);
    let (prompts, check) = match read(TooLong::Fail) {
        Ok(prompts) => {
            let longest = prompts.encoded.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
            let (value, limit) = of_total(longest + length);
            let n = prompts.encoded.len();
            let reason = format!(
                "the longest of {n} prompts has {longest} tokens, an answer up to {length}, the context {max_seq_len}"
            );
            (Some(prompts), Check::at_most(about, value, limit, reason))
        }
        Err(error @ ScoreError::TooLong { n_too_long, n, longest, .. }) => {
            let skips = config.data.on_too_long == TooLong::Skip && n_too_long < n;
            let (value, limit) = of_total(longest + length);
            let verdict = if skips { Verdict::Warn } else { Verdict::Fail };
            let reason = first_line(&error);
            (read(TooLong::Skip).ok(), Check::measured(about, verdict, value, limit, reason))
        }
        Err(error) => (None, Check::stated(about, Verdict::Fail, chain(error))),
    };
    let messages = files.iter().flat_map(|file| read_prompts(file, OnBadRecord::Skip).unwrap_or_default());
    Read { prompts, messages: messages.take(MAX_TEXTS).map(|prompt| prompt.messages).collect(), check }
}

/// An error without its hints.
fn first_line(error: &dyn std::error::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// An error with its causes, without their hints.
pub(super) fn chain(error: impl Into<anyhow::Error>) -> String {
    let error: anyhow::Error = error.into();
    let mut text = String::new();
    for cause in error.chain() {
        let line = first_line(cause);
        // Many errors print their source themselves.
        if text.ends_with(&line) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&line);
    }
    text
}
