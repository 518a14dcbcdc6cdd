//! `chat generate`: one prompt, one answer or several.

use std::io::{self, ErrorKind, Read, StdoutLock, Write};
use std::ops::ControlFlow;

use anyhow::{Context, ensure};
use common::conversation::{Message, Role, encode_prompt};
use common::exit::UsageError;
use common::runtime::on_pool;
use serde::Serialize;

use crate::best_of::{Best, Judge};
use crate::cli::GenerateArgs;
use crate::model::{ChatModel, Completion};
use crate::terminal;

/// Samples decoded together.
const TOGETHER: u64 = 32;

/// Carries out `chat generate`: the answer as it comes, or JSON, on stdout.
pub(crate) fn run(args: &GenerateArgs) -> anyhow::Result<()> {
    args.runtime.start()?;
    on_pool(|| answer(args))
}

fn answer(args: &GenerateArgs) -> anyhow::Result<()> {
    let (flag, n) = args.best_of.map_or(("--num-samples", args.num_samples), |n| ("--best-of", n));
    if n > 1 && !args.sampling.is_random() {
        let message = format!(
            "`{flag} {n}` needs sampling: beams and temperature 0 have one answer\n\
             hint: leave out `--beams` and set `--temperature` above 0, or leave out `{flag}`"
        );
        return Err(UsageError(message).into());
    }
    args.runtime.check_base([&args.checkpoint].into_iter().chain(&args.reward_model).map(|dir| &**dir))?;
    let model = ChatModel::load(&args.checkpoint, &args.sampling, &args.runtime)?.with_thinking(args.thinking)?;
    if let (Some(ensemble), [_]) = (args.ensemble, &args.reward_model[..]) {
        let message = format!("`--ensemble {ensemble}` needs several reward models: repeat `--reward-model`");
        return Err(UsageError(message).into());
    }
    let judge = (!args.reward_model.is_empty()).then(|| Judge::load(args, &model)).transpose();
    let judge = judge.context("failed to load the reward model")?;
    let prompt = read_prompt(&args.prompt)?;
    let ids = if args.raw { encode_raw(&model, &prompt)? } else { encode_chat(&model, args, prompt)? };
    let (n_tokens, max_seq_len) = (ids.len(), model.max_seq_len());
    ensure!(
        n_tokens < max_seq_len,
        "the prompt is too long: {n_tokens} tokens, but the model's context window holds {max_seq_len} and needs room \
         for an answer\nhint: shorten the prompt, or use a model with a larger `max_seq_len`"
    );
    let mut out = std::io::stdout().lock();
    let written = if let (Some(judge), Some(n)) = (&judge, args.best_of) {
        write_best(&mut out, &judge.best(&model, &ids, n)?, args.json, &ids)?
    } else if args.num_samples > 1 {
        write_samples(&mut out, &model, args, &ids)?
    } else {
        write_answer(&mut out, &model, args, &ids)?
    };
    match written {
        // The reader closed the pipe, as `head` does.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("failed to write the answer"),
    }
}

/// One answer, as it comes unless as JSON.
fn write_answer(
    out: &mut StdoutLock<'_>,
    model: &ChatModel,
    args: &GenerateArgs,
    prompt: &[u32],
) -> anyhow::Result<io::Result<()>> {
    let mut written = Ok(());
    let mut on_text = |text: &str| {
        if !args.json {
            written = terminal::write(out, text);
        }
        if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    };
    let completion = model.complete(prompt.to_vec(), 0, &mut on_text)?;
    if args.json {
        return write_json(out, &Printed { completion: &completion, sample: 0, score: None, prompt_token_ids: prompt });
    }
    Ok(written.and_then(|()| writeln!(out)))
}

/// The best answer of several.
fn write_best(out: &mut StdoutLock<'_>, best: &Best, json: bool, prompt: &[u32]) -> anyhow::Result<io::Result<()>> {
    let Best { sample, completion, score } = best;
    if json {
        let printed = Printed { completion, sample: *sample, score: Some(*score), prompt_token_ids: prompt };
        return write_json(out, &printed);
    }
    Ok(terminal::write(out, &completion.text).and_then(|()| writeln!(out)))
}

/// Several answers, some at a time.
fn write_samples(
    out: &mut StdoutLock<'_>,
    model: &ChatModel,
    args: &GenerateArgs,
    prompt: &[u32],
) -> anyhow::Result<io::Result<()>> {
    for first in (0..args.num_samples).step_by(TOGETHER as usize) {
        let rows = first..args.num_samples.min(first + TOGETHER);
        for (sample, completion) in rows.clone().zip(model.samples(prompt, rows)?) {
            let written = if args.json {
                write_json(out, &Printed { completion: &completion, sample, score: None, prompt_token_ids: prompt })?
            } else {
                let separated = if sample > 0 { writeln!(out, "---") } else { Ok(()) };
                separated.and_then(|()| terminal::write(out, &completion.text)).and_then(|()| writeln!(out))
            };
            if written.is_err() {
                return Ok(written);
            }
        }
    }
    Ok(Ok(()))
}

fn write_json(out: &mut StdoutLock<'_>, printed: &Printed<'_>) -> anyhow::Result<io::Result<()>> {
    let json = serde_json::to_string(printed)?;
    Ok(writeln!(out, "{json}"))
}

/// The output of `--json`.
#[derive(Serialize)]
struct Printed<'a> {
    #[serde(flatten)]
    completion: &'a Completion,
    /// Which of `--num-samples` or `--best-of`, from 0.
    sample: u64,
    /// The reward model's score, of the best answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    score: Option<f32>,
    /// The model's input.
    prompt_token_ids: &'a [u32],
}

/// The prompt itself, or standard input without its last line break.
fn read_prompt(prompt: &str) -> anyhow::Result<String> {
    if prompt != "-" {
        return Ok(prompt.to_owned());
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("failed to read the prompt from standard input")?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    Ok(text.strip_suffix('\r').unwrap_or(text).to_owned())
}

/// Plain text after the token that begins a document, where the tokenizer has one.
fn encode_raw(model: &ChatModel, prompt: &str) -> anyhow::Result<Vec<u32>> {
    let tokenizer = model.tokenizer();
    let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
    ids.extend(tokenizer.encode(prompt).context("failed to encode the prompt")?);
    Ok(ids)
}

/// A user's message, after the system's if there is one.
fn encode_chat(model: &ChatModel, args: &GenerateArgs, prompt: String) -> anyhow::Result<Vec<u32>> {
    if prompt.trim().is_empty() {
        return Err(UsageError("the prompt is empty".to_owned()).into());
    }
    let mut messages: Vec<Message> = args.system.iter().map(|system| Message::new(Role::System, system)).collect();
    messages.push(Message::new(Role::User, prompt));
    encode_prompt(model.tokenizer(), &messages).context("failed to encode the prompt")
}
