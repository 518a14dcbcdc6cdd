//! `chat generate`: one prompt, one answer.

use std::io::{ErrorKind, Read, Write};
use std::ops::ControlFlow;

use anyhow::{Context, ensure};
use common::conversation::{Message, Role, encode_prompt};
use common::exit::UsageError;
use common::runtime::on_pool;
use serde::Serialize;

use crate::answer::{Answer, Answerer};
use crate::cli::GenerateArgs;
use crate::terminal;

/// Carries out `chat generate`: the answer as it comes, or one JSON object, on stdout.
pub(crate) fn run(args: &GenerateArgs) -> anyhow::Result<()> {
    args.runtime.start()?;
    on_pool(|| answer_once(args))
}

fn answer_once(args: &GenerateArgs) -> anyhow::Result<()> {
    let answerer = Answerer::load(&args.checkpoint, &args.sampling, &args.runtime)?;
    let prompt = read_prompt(&args.prompt)?;
    let ids = if args.raw { encode_raw(&answerer, &prompt)? } else { encode_chat(&answerer, args, prompt)? };
    let (n_tokens, max_seq_len) = (ids.len(), answerer.max_seq_len());
    ensure!(
        n_tokens < max_seq_len,
        "the prompt is too long: {n_tokens} tokens, but the model's context window holds {max_seq_len} and needs room \
         for an answer\nhint: shorten the prompt, or use a model with a larger `max_seq_len`"
    );

    let mut out = std::io::stdout().lock();
    let mut written = Ok(());
    let mut on_text = |text: &str| {
        if !args.json {
            written = terminal::write(&mut out, text);
        }
        if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    };
    let answer = answerer.answer(ids.clone(), 0, &mut on_text)?;
    let ended = if args.json {
        let json = serde_json::to_string(&Printed { prompt_token_ids: &ids, answer: &answer })?;
        writeln!(out, "{json}")
    } else {
        written.and_then(|()| writeln!(out))
    };
    match ended {
        // Whoever reads has had enough, as `head` does.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        ended => ended.context("failed to write the answer"),
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Printed<'a> {
    #[serde(flatten)]
    answer: &'a Answer,
    /// What the model was given.
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
fn encode_raw(answerer: &Answerer, prompt: &str) -> anyhow::Result<Vec<u32>> {
    let tokenizer = answerer.tokenizer();
    let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
    ids.extend(tokenizer.encode(prompt).context("failed to encode the prompt")?);
    Ok(ids)
}

/// A user's message, after the system's if there is one.
fn encode_chat(answerer: &Answerer, args: &GenerateArgs, prompt: String) -> anyhow::Result<Vec<u32>> {
    if prompt.trim().is_empty() {
        return Err(UsageError("the prompt is empty".to_owned()).into());
    }
    let mut messages: Vec<Message> = args.system.iter().map(|system| Message::new(Role::System, system)).collect();
    messages.push(Message::new(Role::User, prompt));
    encode_prompt(answerer.tokenizer(), &messages).context("failed to encode the prompt")
}
