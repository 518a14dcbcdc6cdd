//! Many clients, well and badly behaved, for as long as one likes.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::rng::{Rng, Streams};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::server::{PATIENCE, Server, chat_body, generate};

/// Clients at a time.
const CLIENTS: u64 = 64;

/// Seeds that are asked for.
const SEEDS: u64 = 12;

/// By how many KiB resident memory may grow after the first minute: two huge pages, of which freed memory holds now more, now
/// fewer until it is given back.
const BREATH: u64 = 4096;

/// Threads of a server that has nothing to do, at most: the main one, the model's, two that compute, the signals' and the eight
/// that encode prompts and write judgements.
const MAX_THREADS: u64 = 13;

/// A request and the text that answers it.
struct Asked {
    body: Value,
    text: String,
}

/// What the clients know of the server.
struct Crowd<'a> {
    server: &'a Server,
    asked: &'a [Asked],
    /// Judgements that the server said it kept.
    kept: Mutex<Vec<String>>,
}

/// How a visit ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Visit {
    /// With a whole answer, which was the right one.
    Answered,
    /// With 429: the queue was full.
    SentAway,
    /// The client did not want an answer, or deserved none.
    Misbehaved,
}

#[test]
#[ignore = "a minute; KINDLING_SOAK_SECONDS says how long"]
fn a_crowd_of_clients_gets_the_same_answers_for_as_long_as_it_lasts() {
    let seconds = std::env::var("KINDLING_SOAK_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    let asked: Vec<Asked> = (0..SEEDS).map(asked_with).collect();
    let dir = tempfile::tempdir().unwrap();
    let labels = dir.path().join("labels.jsonl");
    let flags = ["--slots", "12", "--queue", "12", "--labels", labels.to_str().unwrap()];
    let server = Server::start(&[&["--checkpoint", "lm"], &flags[..]].concat());
    server.wait_for("kindling_answers_running{model=\"lm\"}", 0.0);
    let n_files = open_files(&server);
    let crowd = Crowd { server: &server, asked: &asked, kept: Mutex::default() };
    let (began, all) = (Instant::now(), Duration::from_secs(seconds));
    let mut memory = Vec::new();
    let visits = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let crowd = &crowd;
                scope.spawn(move || {
                    let mut rng = Streams::new(1).get("client", client);
                    let mut visits = Vec::new();
                    while began.elapsed() < all {
                        visits.push(crowd.visit(&mut rng));
                    }
                    visits
                })
            })
            .collect();
        while began.elapsed() < all {
            std::thread::sleep(Duration::from_millis(500));
            memory.push((began.elapsed(), resident(&server)));
        }
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect::<Vec<_>>()
    });
    server.wait_for("kindling_answers_running{model=\"lm\"}", 0.0);
    server.wait_for("kindling_answers_waiting{model=\"lm\"}", 0.0);
    // Those who hang up and those who say half are forgotten, not only let go: nothing of them is left open. What a client
    // keeps to send more, such as the connection of this test, was there before.
    wait_for_files(&server, n_files);
    let n = |kind| visits.iter().filter(|visit| **visit == kind).count();
    let n_kept = crowd.kept.lock().unwrap().len();
    eprintln!(
        "{seconds} s: {} answers, {} sent away, {} misbehaved, {n_kept} judgements",
        n(Visit::Answered) - n_kept,
        n(Visit::SentAway),
        n(Visit::Misbehaved)
    );
    assert!(n(Visit::Answered) as u64 > seconds && n_kept > 0);
    let log = server.log();
    assert!(!log.contains("panicked") && !log.contains("error"), "{log}");

    // What the first minute took is enough for the rest; of a shorter run, its first third.
    let settled = Duration::from_mins(1).min(all / 3);
    let most = |from: Duration, to: Duration| {
        memory.iter().filter(|(at, _)| (from..=to).contains(at)).map(|(_, kib)| *kib).max().unwrap()
    };
    let of_minutes = memory.chunks(120).map(|minute| minute.iter().map(|(_, kib)| kib).max().unwrap());
    let n_threads = status(&server, "Threads");
    eprintln!("most memory of each minute, in KiB: {:?}; {n_threads} threads", of_minutes.collect::<Vec<_>>());
    assert!(n_threads <= MAX_THREADS, "{n_threads} threads");
    let (first, last) = (most(Duration::ZERO, settled), most(all * 9 / 10, all * 2));
    crowd.kill_among_judgements();
    let said = kept_in(&labels);
    let kept = crowd.kept.lock().unwrap();
    assert!(kept.len() > n_kept, "nobody judged before the end");
    let lost = kept.iter().filter(|text| !said.contains(text.as_str())).count();
    assert_eq!(lost, 0, "of {} judgements that were kept", kept.len());
    eprintln!("{} judgements kept, none lost by the kill", kept.len());
    assert!(last <= first + BREATH, "memory grew from {first} KiB to {last} KiB");
}

/// A request with this seed, and what `chat generate` answers.
fn asked_with(seed: u64) -> Asked {
    let prompt = "x".repeat(1 + 5 * seed as usize);
    let expected =
        generate(&["--checkpoint", "lm", "--prompt", &prompt, "--seed", &seed.to_string(), "--max-tokens", "24"]);
    Asked {
        body: chat_body(&prompt, &json!({ "seed": seed, "max_tokens": 24 })),
        text: expected[0]["text"].as_str().unwrap().to_owned(),
    }
}

/// Connections and files that the server has open.
fn open_files(server: &Server) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", server.id())).unwrap().count()
}

/// Waits until the server has no more than `n` open.
fn wait_for_files(server: &Server, n: usize) {
    let began = Instant::now();
    while open_files(server) > n {
        assert!(began.elapsed() < PATIENCE, "{} files are open, {n} were before the clients came", open_files(server));
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Memory of the server, in KiB.
fn resident(server: &Server) -> u64 {
    status(server, "VmRSS")
}

/// A number of the server's process.
fn status(server: &Server, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap().trim().trim_end_matches(" kB").parse().unwrap()
}

/// The preferred answers in a file of labels whose last record may be cut off.
fn kept_in(labels: &Path) -> std::collections::HashSet<String> {
    let text = std::fs::read_to_string(labels).unwrap();
    let whole = text.rfind('\n').map_or("", |at| &text[..at]);
    let chosen = |line| serde_json::from_str::<Value>(line).unwrap()["chosen"].as_str().unwrap().to_owned();
    whole.lines().map(chosen).collect()
}

impl Crowd<'_> {
    /// One request of one kind or another.
    fn visit(&self, rng: &mut Rng) -> Visit {
        let asked = &self.asked[rng.below(self.asked.len())];
        match rng.below(10) {
            0 | 1 => self.hang_up(asked, rng),
            2 => self.send_rubbish(rng),
            3 => self.send_half(rng),
            4 => self.read_slowly(asked, rng),
            5 => self.judge(rng),
            6 => self.ask(asked, false),
            _ => self.ask(asked, true),
        }
    }

    fn ask(&self, asked: &Asked, is_stream: bool) -> Visit {
        let mut body = asked.body.clone();
        body["stream"] = is_stream.into();
        let reply = self.server.post("/v1/chat/completions", &body);
        if reply.status == 429 {
            std::thread::sleep(Duration::from_millis(50));
            return Visit::SentAway;
        }
        assert_eq!(reply.status, 200, "{}", reply.text);
        let text = if is_stream {
            let events = reply.events();
            events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect()
        } else {
            reply.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
        };
        assert_eq!(text, asked.text, "{body}");
        Visit::Answered
    }

    /// At once, or in the midst of the answer.
    fn hang_up(&self, asked: &Asked, rng: &mut Rng) -> Visit {
        let mut body = asked.body.clone();
        body["stream"] = (rng.below(2) == 0).into();
        let mut client = self.server.open("/v1/chat/completions", &body);
        if rng.below(2) == 0 {
            let _ = client.read(&mut [0; 600]);
        }
        Visit::Misbehaved
    }

    /// No HTTP at all, and a body that is no JSON.
    fn send_rubbish(&self, rng: &mut Rng) -> Visit {
        let mut rubbish = vec![0; 300];
        rubbish.fill_with(|| rng.below(256) as u8);
        let _ = self.connect().write_all(&rubbish);
        let reply = self.server.send("/v1/completions", &rubbish, &[("content-type", "application/json")]);
        assert_eq!(reply.status, 400, "{}", reply.text);
        Visit::Misbehaved
    }

    /// Half a head or half a body, and then nothing for a while.
    fn send_half(&self, rng: &mut Rng) -> Visit {
        let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
        let whole = format!("{head}Content-Length: 500\r\n\r\n{{\"model\": \"lm\", \"mess");
        let mut client = self.connect();
        let n = 1 + rng.below(whole.len());
        let _ = client.write_all(&whole.as_bytes()[..n]);
        if n < head.len() && rng.below(20) == 0 {
            // Until the server has had enough of it.
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut said = Vec::new();
            client.read_to_end(&mut said).unwrap();
            assert!(said.is_empty() || said.starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&said));
        } else {
            std::thread::sleep(Duration::from_millis(rng.below(400) as u64));
        }
        Visit::Misbehaved
    }

    fn read_slowly(&self, asked: &Asked, rng: &mut Rng) -> Visit {
        let mut body = asked.body.clone();
        body["stream"] = true.into();
        let mut client = self.server.open("/v1/chat/completions", &body);
        let (mut read, mut buffer) = (Vec::new(), [0; 256]);
        while !read.ends_with(b"\r\n0\r\n\r\n") {
            std::thread::sleep(Duration::from_millis(rng.below(20) as u64));
            let n = client.read(&mut buffer).unwrap();
            assert!(n > 0, "the answer ended early: {}", String::from_utf8_lossy(&read));
            read.extend_from_slice(&buffer[..n]);
            if read.starts_with(b"HTTP/1.1 429") {
                return Visit::SentAway;
            }
        }
        let text = String::from_utf8(read).unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        // An event comes in one piece.
        let events = text.lines().filter_map(|line| line.strip_prefix("data: {"));
        let events = events.map(|event| serde_json::from_str::<Value>(&format!("{{{event}")).unwrap());
        let said: String =
            events.filter_map(|event| event["choices"][0]["delta"]["content"].as_str().map(str::to_owned)).collect();
        assert_eq!(said, asked.text, "{body}");
        Visit::Answered
    }

    /// Judges two answers of which the better one is like no other.
    fn judge(&self, rng: &mut Rng) -> Visit {
        let better = format!("{:016x}{:016x}", rng.below(usize::MAX), rng.below(usize::MAX));
        let answers = [&*better, "worse"].map(|text| json!({ "model": "lm", "text": text }));
        let body = json!({ "messages": [{ "role": "user", "content": "hi" }], "answers": answers, "verdict": 0 });
        let Some(reply) = self.server.try_post("/compare/judge", &body) else { return Visit::Misbehaved };
        assert_eq!(reply.status, 200, "{}", reply.text);
        self.kept.lock().unwrap().push(better);
        Visit::Answered
    }

    /// Kills the server with SIGKILL while several people judge.
    fn kill_among_judgements(&self) {
        std::thread::scope(|scope| {
            for person in 0..8 {
                scope.spawn(move || {
                    let mut rng = Streams::new(2).get("person", person);
                    while self.judge(&mut rng) == Visit::Answered {}
                });
            }
            std::thread::sleep(Duration::from_millis(500));
            self.server.signal(Signal::KILL);
        });
    }

    fn connect(&self) -> TcpStream {
        TcpStream::connect(("127.0.0.1", self.server.port)).unwrap()
    }
}
