//! `chat serve`: OpenAI's HTTP interface to one or several checkpoints.
//!
//! Each model runs on a thread of its own (`engine.rs`), which decodes whatever requests there are together. Requests are
//! read, encoded and answered on one thread of tokio (`http.rs`, `params.rs`, `answer.rs`, `shapes.rs`); what it hands to
//! an engine is bounded (`Engine::admit`), and so is everything else that a client can send.

mod answer;
mod compare;
mod engine;
mod error;
mod http;
mod page;
mod params;
mod questions;
mod record;
mod score;
mod shapes;
mod state;
mod training;

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use axum::Router;
use axum::http::HeaderValue;
use common::checkpoint::{Checkpoint, Stage};
use common::exit::UsageError;
use common::hash::sha256_of;
use common::interrupt::{Interrupt, Stopping};
use common::kernels::memory::give_back_freed;
use common::runtime::on_pool;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpStream;

use crate::cli::{NamedCheckpoint, ServeArgs, ServeLimits};
use crate::model::Loaded;
use compare::Labels;
use engine::{Bounds, Engine};
use questions::Questions;
use record::Metrics;
use score::Scorer;
use state::{App, RequestLimits, Shared};

/// How often freed memory is given back to the system. A step takes most of what the one before has freed, so that giving it
/// back often would cost time; what is never given back stays resident, the memory in which the models were read too.
const MEMORY_INTERVAL: Duration = Duration::from_secs(10);

/// How often a request to stop is looked for.
const LOOK: Duration = Duration::from_millis(50);

/// How long a client may take to send the head of a request, from its connection or its last response on; `--timeout`
/// where that is less.
const HEAD_TIME: Duration = Duration::from_secs(30);

/// Threads that encode prompts, score and wait for the disk. Each keeps about a megabyte, and more of them than this would
/// only wait for each other.
const MAX_BLOCKING: usize = 8;

/// How long clients may take to read that their answers were broken off.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Carries out `chat serve`, until a signal asks it to stop.
pub(crate) fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let origins = origins(&args.allow_origin)?;
    check_names(&args.checkpoint)?;
    check_files(args)?;
    args.runtime.start()?;
    give_back_freed(MEMORY_INTERVAL);
    let first = "no more requests are taken, those that run are finished";
    let interrupt = Interrupt::install_with(Stopping { first, second: "stopped" })?;
    let key = args.api_key_file.as_deref().map(read_key).transpose()?;
    // Before the models are loaded: a port that is taken is an error at once.
    let (host, port) = (&*args.host, args.port);
    let listener = TcpListener::bind((host, port)).with_context(|| format!("failed to listen on `{host}:{port}`"))?;
    let address = listener.local_addr()?;
    let is_loopback = address.ip().is_loopback();
    if !is_loopback && key.is_none() {
        tracing::warn!("whoever reaches {address} can use the server: `--api-key-file` asks for a key");
    }
    let app = Arc::new(Shared {
        checks_host: is_loopback && key.is_none(),
        key: key.map(|key| sha256_of(key.as_bytes())),
        ..until_asked_to_stop(interrupt, || load(args))?
    });
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(MAX_BLOCKING).build()?;
    runtime.block_on(async {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        tracing::info!("listening on http://{address}");
        serve(app, origins, listener, interrupt, Duration::from_secs(args.limits.grace)).await
    })?;
    // What was not finished in time is not waited for.
    runtime.shutdown_background();
    Err(interrupt.stopped().into())
}

/// Answers requests until the signal, then up to `grace` those that run.
async fn serve(
    app: App,
    origins: Vec<HeaderValue>,
    listener: tokio::net::TcpListener,
    interrupt: Interrupt,
    grace: Duration,
) -> anyhow::Result<()> {
    let router = http::router(App::clone(&app), origins);
    let connections = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME.min(app.limits.timeout));
    let accept = async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => connect(stream, &http, &router, &connections),
                Err(error) => {
                    // The client left, or there are as many open files as the system allows.
                    tracing::debug!("failed to accept a connection: {error}");
                    tokio::time::sleep(LOOK).await;
                }
            }
        }
    };
    tokio::select! {
        () = accept => {}
        () = asked_to_stop(interrupt) => {}
    }
    drop(listener);
    let break_off = async {
        tokio::time::sleep(grace).await;
        tracing::warn!("requests that ran longer than {} seconds are broken off", grace.as_secs());
        app.engines.iter().for_each(|(_, engine)| engine.break_off());
        tokio::time::sleep(LAST_WORDS).await;
    };
    tokio::select! {
        () = connections.shutdown() => {}
        () = break_off => {}
    }
    Ok(())
}

/// Answers the requests of a connection. One whose client takes too long to say what it wants is closed.
fn connect(stream: TcpStream, http: &http1::Builder, router: &Router, connections: &GracefulShutdown) {
    // A token is a packet: waiting for more to send would only delay it.
    let _ = stream.set_nodelay(true);
    let service = TowerToHyperService::new(router.clone());
    let connection = connections.watch(http.serve_connection(TokioIo::new(stream), service));
    tokio::spawn(async move {
        // The client left, or sent what is no HTTP.
        let _ = connection.await;
    });
}

/// Waits for the signal.
async fn asked_to_stop(interrupt: Interrupt) {
    while !interrupt.requested() {
        tokio::time::sleep(LOOK).await;
    }
}

/// Does `work`, before there are requests to finish: a signal ends the program meanwhile.
fn until_asked_to_stop<T>(interrupt: Interrupt, work: impl FnOnce() -> T) -> T {
    let (done, is_done) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while is_done.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                if interrupt.requested() {
                    std::process::exit(i32::from(interrupt.stopped().exit_code()));
                }
            }
        });
        let result = work();
        // The thread hears of it at once.
        drop(done);
        result
    })
}

/// Loads the models and starts their threads.
fn load(args: &ServeArgs) -> anyhow::Result<Shared> {
    let given = args.checkpoint.iter().map(|named| &*named.dir).chain(args.reward_model.as_deref());
    args.runtime.check_base(given)?;
    let runtime = args.runtime.open()?;
    let ServeLimits { slots, queue, max_tokens, max_context, max_body, timeout, .. } = args.limits;
    let bounds = Bounds { slots: slots as usize, queue: queue as usize, context: max_context as usize };
    let mut engines = Vec::new();
    for NamedCheckpoint { name, dir } in &args.checkpoint {
        let loaded = on_pool(|| Loaded::open(dir, &runtime, args.runtime.opening()))?;
        tracing::info!("model `{name}`: {}", loaded.description);
        engines.push((name.clone(), Engine::start(name, loaded, bounds)?));
    }
    let scorer = args.reward_model.as_deref().map(|dir| -> anyhow::Result<Scorer> {
        let mut checkpoint = Checkpoint::open_with(dir, args.runtime.opening())?.of_stage(&[Stage::RewardModel])?;
        let tokenizer = checkpoint.require_tokenizer()?.clone();
        Ok(Scorer::new(on_pool(|| runtime.take_scalar(&mut checkpoint))?, tokenizer, queue as usize))
    });
    let questions =
        args.questions.as_deref().map(Questions::open).transpose().context("failed to read the questions")?;
    let asked = questions.as_ref().map_or_else(HashSet::new, Questions::keys);
    Ok(Shared {
        engines,
        scorer: scorer.transpose().context("failed to load the reward model")?,
        runs: args.runs.as_deref().map(folder).transpose()?,
        labels: args.labels.as_deref().map(|path| labels(path, asked)).transpose()?,
        questions,
        limits: RequestLimits {
            max_tokens: max_tokens as usize,
            max_body: max_body as usize,
            timeout: Duration::from_secs(timeout),
        },
        key: None,
        checks_host: true,
        log_text: args.log_text,
        metrics: Metrics::new()?,
        started: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
    })
}

/// The folder of runs; there may be none in it yet.
fn folder(path: &Path) -> anyhow::Result<PathBuf> {
    path.read_dir().with_context(|| format!("failed to read the runs in `{}`", path.display()))?;
    Ok(path.to_owned())
}

/// The file that judgements are appended to.
fn labels(path: &Path, asked: HashSet<String>) -> anyhow::Result<Arc<Labels>> {
    let (labels, n_said) = Labels::open(path, asked).context("failed to open the labels")?;
    tracing::info!("judgements go to `{}`, which has {n_said} so far", path.display());
    Ok(Arc::new(labels))
}

/// Refuses two models of one name.
fn check_names(checkpoints: &[NamedCheckpoint]) -> Result<(), UsageError> {
    for (i, NamedCheckpoint { name, .. }) in checkpoints.iter().enumerate() {
        if checkpoints[..i].iter().any(|earlier| earlier.name == *name) {
            return Err(UsageError(format!(
                "two checkpoints are named `{name}`\nhint: name them with `--checkpoint NAME=DIR`"
            )));
        }
    }
    Ok(())
}

/// Refuses to append judgements to the file of what is to be judged.
fn check_files(args: &ServeArgs) -> Result<(), UsageError> {
    let (Some(labels), Some(questions)) = (&args.labels, &args.questions) else { return Ok(()) };
    let is_same = labels.canonicalize().is_ok_and(|labels| questions.canonicalize().is_ok_and(|other| other == labels));
    if !is_same {
        return Ok(());
    }
    let shown = labels.display();
    Err(UsageError(format!(
        "`--labels` and `--questions` are the same file `{shown}`\nhint: name a file of its own for the judgements; it need \
         not be there yet"
    )))
}

/// The origins of pages that may use the server, as browsers name them.
fn origins(origins: &[String]) -> Result<Vec<HeaderValue>, UsageError> {
    let is_origin = |origin: &str| {
        let host = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        host.is_some_and(|host| !host.is_empty() && !host.contains(['/', '*', ' ', '@']))
    };
    let parse = |origin: &String| {
        let parsed = HeaderValue::from_str(origin).ok().filter(|_| is_origin(origin));
        parsed.ok_or_else(|| {
            let expected = "expected an origin such as `https://chat.example`";
            UsageError(format!("invalid `--allow-origin`: {expected}, found `{origin}`"))
        })
    };
    origins.iter().map(parse).collect()
}

/// Most bytes of a file that holds a key.
const MAX_KEY_FILE: u64 = 4096;

/// The key that clients have to send: the one line of a file.
fn read_key(path: &Path) -> anyhow::Result<String> {
    let shown = path.display();
    let hint = "hint: write the key into a file of its own, as the only line";
    let failed = || format!("failed to read the API key from `{shown}`");
    // A device may have no end, and a pipe nobody who writes.
    ensure!(path.metadata().with_context(failed)?.is_file(), "`{shown}` holds no API key: it is not a file\n{hint}");
    let mut text = String::new();
    let file = File::open(path).with_context(failed)?;
    file.take(MAX_KEY_FILE + 1).read_to_string(&mut text).with_context(failed)?;
    let is_short = text.len() as u64 <= MAX_KEY_FILE;
    ensure!(is_short, "`{shown}` holds no API key: it has more than {MAX_KEY_FILE} bytes\n{hint}");
    let key = text.trim();
    let is_key = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
    ensure!(is_key, "`{shown}` holds no API key: expected one line without spaces");
    Ok(key.to_owned())
}
