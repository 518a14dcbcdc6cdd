//! One model and the requests that it answers, on a thread of its own: a token of each running request a step.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use axum::http::StatusCode;
use common::generate::{
    Failed, Finish, GenerateError, Generated, Limits, Request, SampledToken, SamplingConfig, Scheduler,
};
use common::kernels;
use common::model::Gpt;
use common::rng::Rng;
use common::runtime::on_pool;
use common::tokenizer::Tokenizer;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;
use crate::model::{FinishReason, Loaded, Transcript};

/// Tokens of a prompt that are read between two tokens of the running requests. Fewer make the pauses shorter and the
/// reading slower, since each pass goes over all weights.
const PROMPT_PIECE: NonZeroUsize = NonZeroUsize::new(128).expect("not zero");

/// How long an engine computes before it makes way for another one on the same threads.
const TURN: Duration = Duration::from_millis(20);

/// The bounds of an engine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Most answers that are decoded together.
    pub slots: usize,
    /// Most answers that wait.
    pub queue: usize,
    /// Most tokens of a prompt and its answer.
    pub context: usize,
}

/// A model that answers requests.
#[derive(Debug)]
pub(super) struct Engine {
    /// Of the model.
    pub tokenizer: Arc<Tokenizer>,
    /// The tokens that end an answer.
    pub stop: Vec<u32>,
    /// Most tokens of a prompt and its answer.
    pub context: usize,
    /// Size of the model's vocabulary.
    pub vocab_size: usize,
    /// Whether the model has learnt plain text alone.
    pub is_base: bool,
    jobs: mpsc::Sender<Job>,
    /// A permit for each answer that runs or waits.
    room: Arc<Semaphore>,
    n_places: usize,
    running: Arc<AtomicUsize>,
    /// Set where what runs is to be broken off.
    stops: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// An answer to give.
#[derive(Debug)]
pub(super) struct Job {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingConfig,
    /// The answer's own random stream.
    pub rng: Rng,
    /// Texts at which the answer ends.
    pub stop_texts: Vec<String>,
    /// How many alternatives are told with each token.
    pub n_likeliest: usize,
    /// The answer's place among those of its request.
    pub choice: usize,
    /// When it is given up.
    pub deadline: Instant,
    /// Where its tokens go; nobody wants them any more when that is closed.
    pub events: UnboundedSender<(usize, Event)>,
}

/// What happens to an answer.
#[derive(Debug)]
pub(super) enum Event {
    /// The next token; not the one that ends the answer.
    Token(Token),
    /// The end.
    End {
        /// The text that was held back.
        text: String,
        /// Why it ended.
        finish: FinishReason,
        /// Tokens that were sampled, the one that ended it among them.
        n_tokens: usize,
    },
    /// There is no more, for this reason.
    Failed(ApiError),
}

/// A token of an answer.
#[derive(Debug)]
pub(super) struct Token {
    /// The token.
    pub id: u32,
    /// Its log-probability, in nats.
    pub log_prob: f32,
    /// The likeliest tokens in its place, with their log-probabilities.
    pub likeliest: Vec<(u32, f32)>,
    /// The text that became certain with it, often that of tokens before it.
    pub text: String,
}

impl Engine {
    /// Starts the thread of a model.
    ///
    /// # Errors
    /// If the system refuses the thread.
    pub(super) fn start(name: &str, loaded: Loaded, bounds: Bounds) -> anyhow::Result<Self> {
        let Loaded { gpt, tokenizer, stop, is_base, .. } = loaded;
        let context = bounds.context.min(gpt.config().max_seq_len);
        let limits = Limits {
            max_rows: bounds.slots,
            capacity: context,
            batch_invariant: true,
            prompt_piece: Some(PROMPT_PIECE),
        };
        let vocab_size = gpt.config().vocab_size;
        let tokenizer = Arc::new(tokenizer);
        let running = Arc::new(AtomicUsize::new(0));
        let stops = Arc::new(AtomicBool::new(false));
        let (jobs, to_do) = mpsc::channel();
        let thread = std::thread::Builder::new().name(format!("engine {name}")).spawn({
            let (tokenizer, running, stops) = (Arc::clone(&tokenizer), Arc::clone(&running), Arc::clone(&stops));
            move || work(&gpt, &tokenizer, limits, to_do, &running, &stops)
        });
        let thread = thread.context("failed to start the thread of a model")?;
        let n_places = bounds.slots + bounds.queue;
        let room = Arc::new(Semaphore::new(n_places));
        Ok(Self { tokenizer, stop, context, vocab_size, is_base, jobs, room, n_places, running, stops, thread })
    }

    /// Room for `n` answers, until the permit is dropped.
    ///
    /// # Errors
    /// If the queue is full, or could never hold as many.
    pub(super) fn admit(&self, n: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        if n > self.n_places {
            let message = format!("{n} answers at once exceed the {} that run and wait at most", self.n_places);
            return Err(ApiError::unprocessable("n", message));
        }
        Arc::clone(&self.room).try_acquire_many_owned(n as u32).map_err(|_| ApiError::busy())
    }

    /// Hands a job to the thread. Where that has ended, the job's events end at once.
    pub(super) fn submit(&self, job: Job) {
        let _ = self.jobs.send(job);
    }

    /// Breaks off what runs and waits, each with an error.
    pub(super) fn break_off(&self) {
        self.stops.store(true, Ordering::Relaxed);
    }

    /// Whether the thread still works.
    pub(super) fn is_alive(&self) -> bool {
        !self.thread.is_finished()
    }

    /// How many answers run, and how many wait or are being sent.
    pub(super) fn load(&self) -> (usize, usize) {
        let running = self.running.load(Ordering::Relaxed);
        (running, (self.n_places - self.room.available_permits()).saturating_sub(running))
    }
}

/// An answer that is being given.
struct Answer<'t> {
    choice: usize,
    deadline: Instant,
    events: UnboundedSender<(usize, Event)>,
    transcript: Transcript<'t>,
    n_tokens: usize,
}

impl Answer<'_> {
    fn tell(&self, event: Event) {
        // A client that has gone is noticed before the next step.
        let _ = self.events.send((self.choice, event));
    }
}

/// The thread of an engine.
struct Work<'m> {
    jobs: mpsc::Receiver<Job>,
    tokenizer: &'m Tokenizer,
    scheduler: Scheduler<'m>,
    answers: HashMap<usize, Answer<'m>>,
    n_taken: usize,
    stops: &'m AtomicBool,
}

/// Answers what comes, until nobody can send any more.
fn work(
    gpt: &Gpt,
    tokenizer: &Tokenizer,
    limits: Limits,
    jobs: mpsc::Receiver<Job>,
    running: &AtomicUsize,
    stops: &AtomicBool,
) {
    let scheduler = Scheduler::new(gpt, limits).expect("limits within the model's context");
    let mut work = Work { jobs, tokenizer, scheduler, answers: HashMap::new(), n_taken: 0, stops };
    while let Ok(job) = work.jobs.recv() {
        work.take(job);
        while !work.answers.is_empty() {
            on_pool(|| work.turn(running));
        }
        running.store(0, Ordering::Relaxed);
    }
}

impl Work<'_> {
    /// Steps until the turn is over or there is nothing to do.
    fn turn(&mut self, running: &AtomicUsize) {
        let began = Instant::now();
        kernels::with_workers(|| {
            loop {
                while let Ok(job) = self.jobs.try_recv() {
                    self.take(job);
                }
                self.give_up();
                self.step();
                running.store(self.scheduler.n_running(), Ordering::Relaxed);
                if self.answers.is_empty() || began.elapsed() >= TURN {
                    return;
                }
            }
        });
    }

    /// Submits a job.
    fn take(&mut self, job: Job) {
        let id = self.n_taken;
        self.n_taken += 1;
        let Job { prompt, sampling, rng, stop_texts, n_likeliest, choice, deadline, events } = job;
        let transcript = Transcript::new(self.tokenizer, stop_texts);
        let answer = Answer { choice, deadline, events, transcript, n_tokens: 0 };
        match self.scheduler.submit(Request { id, prompt, sampling, rng, n_likeliest }) {
            Ok(()) => {
                self.answers.insert(id, answer);
            }
            Err(error) => answer.tell(Event::Failed(ApiError::unprocessable("prompt", one_line(&error)))),
        }
    }

    /// Ends the answers that nobody waits for any more, those that took too long and, where the server stops, all.
    fn give_up(&mut self) {
        let now = Instant::now();
        let stops = self.stops.load(Ordering::Relaxed);
        let scheduler = &mut self.scheduler;
        self.answers.retain(|&id, answer| {
            let is_late = now > answer.deadline;
            if is_late {
                let message = "the answer took longer than the server allows";
                answer.tell(Event::Failed(ApiError::server(StatusCode::GATEWAY_TIMEOUT, message).coded("timeout")));
            }
            if stops && !is_late {
                answer.tell(Event::Failed(ApiError::server(StatusCode::SERVICE_UNAVAILABLE, "the server is stopping")));
            }
            let goes_on = !is_late && !stops && !answer.events.is_closed();
            if !goes_on {
                scheduler.cancel(id);
            }
            goes_on
        });
    }

    /// One step of the scheduler.
    fn step(&mut self) {
        match self.scheduler.step_each() {
            Ok(tokens) => tokens.into_iter().for_each(|token| self.deliver(token)),
            Err(error) => {
                tracing::error!("{}", one_line(&error));
                for (id, answer) in self.answers.drain() {
                    self.scheduler.cancel(id);
                    answer.tell(Event::Failed(failure(&error)));
                }
            }
        }
    }

    /// Tells of a token, or why there is none.
    fn deliver(&mut self, token: Result<SampledToken, Failed>) {
        let SampledToken { request, id, log_prob, finish, likeliest } = match token {
            Ok(token) => token,
            Err((request, error)) => {
                tracing::error!("{}", one_line(&error));
                if let Some(answer) = self.answers.remove(&request) {
                    answer.tell(Event::Failed(failure(&error)));
                }
                return;
            }
        };
        let Some(answer) = self.answers.get_mut(&request) else { return };
        answer.n_tokens += 1;
        let text = answer.transcript.push(id);
        let stopped = answer.transcript.stopped;
        if finish != Some(Finish::Stop) {
            answer.tell(Event::Token(Token { id, log_prob, likeliest, text }));
        }
        if finish.is_none() && !stopped {
            return;
        }
        self.scheduler.cancel(request);
        if let Some(Answer { choice, events, transcript, n_tokens, .. }) = self.answers.remove(&request) {
            let finish = finish.unwrap_or(Finish::Interrupted);
            let (text, completion) = transcript.finish(Generated { ids: vec![], log_probs: vec![], finish });
            let _ = events.send((choice, Event::End { text, finish: completion.finish_reason, n_tokens }));
        }
    }
}

fn failure(error: &GenerateError) -> ApiError {
    ApiError::server(StatusCode::INTERNAL_SERVER_ERROR, one_line(error))
}

/// An error without the hint for people at the command line.
pub(super) fn one_line(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    text.lines().take_while(|line| !line.starts_with("hint: ")).collect::<Vec<_>>().join(" ")
}
