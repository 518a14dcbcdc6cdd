//! `chat`: a conversation in the terminal, or with whatever is at the other end of a pipe.

use std::io::{BufRead, ErrorKind, IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use common::runtime::on_pool;
use rustyline::error::ReadlineError;
use rustyline::history::MemHistory;
use rustyline::{Config, Editor};

use crate::cli::ConversationArgs;
use crate::history::History;
use crate::model::{ChatModel, FinishReason};
use crate::terminal;

const HELP: &str = "\
/reset        forget the conversation, but not the system message
/system TEXT  set the system message; without TEXT, remove it
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
    args.runtime.check_base([checkpoint])?;
    let model = ChatModel::load(checkpoint, &args.sampling, &args.runtime)?.with_thinking(args.thinking)?;
    tracing::info!("{}", model.description());
    let mut conversation = Conversation { model, history: History::new(args.system.clone()), n_answers: 0 };
    let ended =
        if std::io::stdin().is_terminal() { in_terminal(&mut conversation) } else { in_pipe(&mut conversation) };
    match ended {
        // The reader closed the pipe, as `head` does.
        Err(error) if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) => {
            Ok(())
        }
        ended => ended,
    }
}

/// One message a line, until the input ends. A message without an answer leaves an empty line, so that the others can
/// still be told apart.
fn in_pipe(conversation: &mut Conversation) -> anyhow::Result<()> {
    for (number, line) in (1..).zip(std::io::stdin().lock().lines()) {
        let line = line.context("failed to read standard input")?;
        match conversation.take(&line)? {
            Next::Line => {}
            Next::Refused(reason) => {
                notice(&format!("error: line {number}: {reason}"));
                writeln!(std::io::stdout())?;
            }
            Next::End => break,
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
        AT_PROMPT.store(true, Ordering::SeqCst);
        let line = editor.readline("> ");
        AT_PROMPT.store(false, Ordering::SeqCst);
        match line {
            Ok(line) => match conversation.take(&line)? {
                Next::Line => {}
                Next::Refused(reason) => notice(&format!("error: {reason}")),
                Next::End => return Ok(()),
            },
            Err(ReadlineError::Interrupted) => notice("Ctrl-D or /quit leaves"),
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(error).context("failed to read from the terminal"),
        }
    }
}

/// The response to a line.
enum Next {
    /// The next line: this one was answered or carried out.
    Line,
    /// The next line, though this message cannot be answered, for this reason; it is forgotten.
    Refused(String),
    /// The end: the user leaves.
    End,
}

/// The model and the conversation with it so far.
struct Conversation {
    model: ChatModel,
    history: History,
    n_answers: u64,
}

impl Conversation {
    /// Carries out one line.
    fn take(&mut self, line: &str) -> anyhow::Result<Next> {
        let line = line.trim();
        let (command, text) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match command {
            "" => {}
            "/quit" => return Ok(Next::End),
            "/reset" => {
                self.history.reset();
                notice(if self.history.has_system() {
                    "(a new conversation, with the same system message)"
                } else {
                    "(a new conversation)"
                });
            }
            "/system" => {
                self.history.set_system(text.trim_start());
                notice(if self.history.has_system() { "(system message set)" } else { "(no system message)" });
            }
            "/help" => notice(HELP),
            unknown if unknown.starts_with('/') => notice(&format!("unknown command `{unknown}`; /help lists them")),
            _ => return self.reply(line),
        }
        Ok(Next::Line)
    }

    /// Answers a message and remembers both.
    fn reply(&mut self, message: &str) -> anyhow::Result<Next> {
        let prompt = match self.history.prompt(self.model.tokenizer(), message, self.model.prompt_budget()) {
            Ok(prompt) => prompt,
            Err(error) => return Ok(Next::Refused(error.to_string())),
        };
        match prompt.n_dropped {
            0 => {}
            1 => tracing::info!("the conversation outgrew the context window: forgot its oldest turn"),
            n => tracing::info!("the conversation outgrew the context window: forgot its {n} oldest turns"),
        }
        let (n_tokens, max_seq_len) = (prompt.ids.len(), self.model.max_seq_len());
        if n_tokens >= max_seq_len {
            let reason = format!("the message is too long: {n_tokens} tokens for a context window of {max_seq_len}");
            return Ok(Next::Refused(reason));
        }

        let mut out = std::io::stdout().lock();
        let mut written = Ok(());
        let mut on_text = |text: &str| {
            written = terminal::write(&mut out, text);
            if written.is_err() || broken_off().is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        *broken_off() = None;
        let answer = self.model.complete(prompt.ids, self.n_answers, &mut on_text);
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
        Ok(Next::Line)
    }
}

/// Whether the user is being asked for a line.
static AT_PROMPT: AtomicBool = AtomicBool::new(false);

/// When Ctrl-C was last pressed, since the last answer began.
static BROKEN_OFF: Mutex<Option<Instant>> = Mutex::new(None);

fn broken_off() -> MutexGuard<'static, Option<Instant>> {
    BROKEN_OFF.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes Ctrl-C end the answer and nothing else. One that comes more than a second after the first ends the program, as
/// does SIGTERM at the prompt, where the line editor takes Ctrl-C and SIGINT.
fn catch_ctrl_c() -> anyhow::Result<()> {
    const AGAIN: Duration = Duration::from_secs(1);
    ctrlc::set_handler(|| {
        let mut broken_off = broken_off();
        match *broken_off {
            Some(at) if at.elapsed() < AGAIN => {}
            None if !AT_PROMPT.load(Ordering::SeqCst) => *broken_off = Some(Instant::now()),
            _ => std::process::exit(130),
        }
    })
    .context("failed to catch Ctrl-C")
}

/// Tells the user something that is no answer.
fn notice(text: &str) {
    // Nothing is left to try if stderr itself is gone.
    let _ = writeln!(std::io::stderr(), "{text}");
}
