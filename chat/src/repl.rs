//! `chat`: a conversation in the terminal, or with whatever is at the other end of a pipe.

use std::io::{BufRead, ErrorKind, IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use common::runtime::on_pool;
use rustyline::error::ReadlineError;
use rustyline::history::MemHistory;
use rustyline::{Config, Editor};

use crate::answer::{Answerer, FinishReason};
use crate::cli::ConversationArgs;
use crate::history::History;
use crate::terminal;

const HELP: &str = "\
/reset        forget the conversation, but not the system message
/system TEXT  set the system message; without TEXT there is none
/quit         leave, as Ctrl-D does
/help         this list
Anything else is a message. Ctrl-C ends an answer.";

/// Carries out `chat`: answers on stdout, all else on stderr.
pub(crate) fn run(args: &ConversationArgs) -> anyhow::Result<()> {
    args.runtime.start()?;
    on_pool(|| converse(args))
}

fn converse(args: &ConversationArgs) -> anyhow::Result<()> {
    let checkpoint = args.checkpoint.as_deref().expect("clap requires --checkpoint where there is no command");
    let answerer = Answerer::load(checkpoint, &args.sampling, &args.runtime)?;
    let mut conversation = Conversation { answerer, history: History::new(args.system.clone()), n_answers: 0 };
    let ended =
        if std::io::stdin().is_terminal() { in_terminal(&mut conversation) } else { in_pipe(&mut conversation) };
    match ended {
        // Whoever reads has had enough, as `head` does.
        Err(error) if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) => {
            Ok(())
        }
        ended => ended,
    }
}

/// One message a line, until the input ends.
fn in_pipe(conversation: &mut Conversation) -> anyhow::Result<()> {
    for line in std::io::stdin().lock().lines() {
        let line = line.context("failed to read standard input")?;
        if conversation.take(&line)?.is_break() {
            break;
        }
    }
    Ok(())
}

/// With line editing; what was typed can be called back, and is forgotten at the end.
fn in_terminal(conversation: &mut Conversation) -> anyhow::Result<()> {
    catch_ctrl_c()?;
    let config = Config::builder().auto_add_history(true).build();
    let mut editor =
        Editor::<(), MemHistory>::with_history(config, MemHistory::new()).context("failed to open the terminal")?;
    notice("/help lists the commands, Ctrl-D leaves");
    loop {
        match editor.readline("> ") {
            Ok(line) => {
                if conversation.take(&line)?.is_break() {
                    return Ok(());
                }
            }
            Err(ReadlineError::Interrupted) => notice("Ctrl-D or /quit leaves"),
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(error).context("failed to read from the terminal"),
        }
    }
}

/// Who speaks, and what was said.
struct Conversation {
    answerer: Answerer,
    history: History,
    n_answers: u64,
}

impl Conversation {
    /// Carries out one line; `Break` leaves.
    fn take(&mut self, line: &str) -> anyhow::Result<ControlFlow<()>> {
        let line = line.trim();
        let (command, text) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match command {
            "" => {}
            "/quit" => return Ok(ControlFlow::Break(())),
            "/reset" => self.history.reset(),
            "/system" => self.history.set_system(text.trim_start()),
            "/help" => notice(HELP),
            unknown if unknown.starts_with('/') => notice(&format!("unknown command `{unknown}`; /help lists them")),
            _ => self.reply(line)?,
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Answers a message and remembers both. A message that cannot be answered is said so and forgotten.
    fn reply(&mut self, message: &str) -> anyhow::Result<()> {
        let budget = self.answerer.prompt_budget();
        let prompt = match self.history.prompt(self.answerer.tokenizer(), message, budget) {
            Ok(prompt) => prompt,
            Err(error) => {
                notice(&format!("error: {error}"));
                return Ok(());
            }
        };
        match prompt.n_dropped {
            0 => {}
            1 => tracing::info!("the conversation outgrew the context window: forgot its oldest turn"),
            n => tracing::info!("the conversation outgrew the context window: forgot its {n} oldest turns"),
        }
        let max_seq_len = self.answerer.max_seq_len();
        if prompt.ids.len() >= max_seq_len {
            let n_tokens = prompt.ids.len();
            notice(&format!("error: the message is too long: {n_tokens} tokens for a context window of {max_seq_len}"));
            return Ok(());
        }

        let mut out = std::io::stdout().lock();
        let mut written = Ok(());
        let mut on_text = |text: &str| {
            written = terminal::write(&mut out, text);
            if written.is_err() || BREAK_OFF.load(Ordering::SeqCst) {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        BREAK_OFF.store(false, Ordering::SeqCst);
        ANSWERING.store(true, Ordering::SeqCst);
        let answer = self.answerer.answer(prompt.ids, self.n_answers, &mut on_text);
        ANSWERING.store(false, Ordering::SeqCst);
        let answer = answer?;
        written?;
        writeln!(out)?;
        out.flush()?;
        match answer.finish_reason {
            FinishReason::Stop => {}
            FinishReason::Length => tracing::debug!("the answer was cut at {} tokens", answer.token_ids.len()),
            FinishReason::Interrupted => notice("(broken off)"),
        }
        self.n_answers += 1;
        self.history.push(message.to_owned(), answer.text);
        Ok(())
    }
}

static ANSWERING: AtomicBool = AtomicBool::new(false);
static BREAK_OFF: AtomicBool = AtomicBool::new(false);

/// Makes Ctrl-C end the answer; the second one, or one while there is none, ends the program.
fn catch_ctrl_c() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if !ANSWERING.load(Ordering::SeqCst) || BREAK_OFF.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })
    .context("failed to catch Ctrl-C")
}

/// Tells the user something that is no answer.
fn notice(text: &str) {
    // Nothing is left to try if stderr itself is gone.
    let _ = writeln!(std::io::stderr(), "{text}");
}
