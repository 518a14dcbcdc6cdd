//! Many clients, well and badly behaved, for as long as one likes.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::rng::{Rng, Streams};
use serde_json::{Value, json};

use crate::server::{Server, chat_body, generate};

/// Clients at a time.
const CLIENTS: u64 = 64;

/// Seeds that are asked for.
const SEEDS: u64 = 12;

/// A request and the text that answers it.
struct Asked {
    body: Value,
    text: String,
}

#[test]
#[ignore = "a minute; KINDLING_SOAK_SECONDS says how long"]
fn a_crowd_of_clients_gets_the_same_answers_for_as_long_as_it_lasts() {
    let seconds = std::env::var("KINDLING_SOAK_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    let asked: Vec<Asked> = (0..SEEDS)
        .map(|seed| {
            let prompt = "x".repeat(1 + 5 * seed as usize);
            let seed = seed.to_string();
            let expected =
                generate(&["--checkpoint", "lm", "--prompt", &prompt, "--seed", &seed, "--max-tokens", "24"]);
            let body = chat_body(&prompt, &json!({ "seed": seed.parse::<u64>().unwrap(), "max_tokens": 24 }));
            Asked { body, text: expected[0]["text"].as_str().unwrap().to_owned() }
        })
        .collect();
    let server = Server::start(&["--checkpoint", "lm", "--slots", "16", "--queue", "32"]);
    let end = Instant::now() + Duration::from_secs(seconds);
    let memory = |server: &Server| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.id())).unwrap_or_default();
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        kib.map_or(0, |kib| kib.trim().parse::<u64>().unwrap())
    };
    let (mut answered, mut first, mut last) = (0, 0, 0);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (server, asked) = (&server, &asked);
                scope.spawn(move || {
                    let mut rng = Streams::new(1).get("client", client);
                    let mut n = 0;
                    while Instant::now() < end {
                        n += u64::from(visit(server, &asked[rng.below(asked.len())], &mut rng));
                    }
                    n
                })
            })
            .collect();
        while Instant::now() < end {
            std::thread::sleep(Duration::from_secs(seconds.div_ceil(10)));
            last = memory(&server);
            // The allocator has what it needs after the first part.
            first = if answered < 3 { last } else { first };
            answered += 1;
        }
        answered = clients.into_iter().map(|client| client.join().unwrap()).sum();
    });
    server.wait_for("kindling_answers_running{model=\"lm\"}", 0.0);
    server.wait_for("kindling_answers_waiting{model=\"lm\"}", 0.0);
    let log = server.log();
    assert!(!log.contains("panicked") && !log.contains("error"), "{log}");
    assert!(answered > seconds, "only {answered} answers in {seconds} seconds");
    assert!(last <= first + first / 10 + 8192, "memory grew from {first} KiB to {last} KiB");
    eprintln!("{answered} answers in {seconds} s, memory from {first} KiB to {last} KiB");
}

/// One request of one kind or another; whether it was answered.
fn visit(server: &Server, asked: &Asked, rng: &mut Rng) -> bool {
    let mut body = asked.body.clone();
    match rng.below(8) {
        // Hangs up at once, or in the midst of the answer.
        0 | 1 => {
            body["stream"] = (rng.below(2) == 0).into();
            let mut client = server.open("/v1/chat/completions", &body);
            if rng.below(2) == 0 {
                let _ = client.read(&mut [0; 600]);
            }
            false
        }
        // Sends rubbish, or half a request.
        2 => {
            let mut garbage = vec![0; 300];
            garbage.fill_with(|| rng.below(256) as u8);
            let mut client = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
            let _ = client.write_all(&garbage);
            let reply = server.send("/v1/completions", &garbage, &[("content-type", "application/json")]);
            assert_eq!(reply.status, 400, "{}", reply.text);
            false
        }
        // Reads slowly.
        3 => {
            body["stream"] = true.into();
            let mut client = server.open("/v1/chat/completions", &body);
            client.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
            let (mut text, mut buffer) = (String::new(), [0; 256]);
            while !text.contains("[DONE]") {
                std::thread::sleep(Duration::from_millis(rng.below(20) as u64));
                match client.read(&mut buffer) {
                    Ok(n) if n > 0 => text += &String::from_utf8_lossy(&buffer[..n]),
                    other => panic!("{other:?} after {text}"),
                }
                if text.contains("rate_limit_error") {
                    return false;
                }
            }
            true
        }
        kind => {
            body["stream"] = (kind < 6).into();
            let reply = server.post("/v1/chat/completions", &body);
            if reply.status == 429 {
                std::thread::sleep(Duration::from_millis(50));
                return false;
            }
            assert_eq!(reply.status, 200, "{}", reply.text);
            let text: String = if kind < 6 {
                let events = reply.events();
                events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect()
            } else {
                reply.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
            };
            assert_eq!(text, asked.text, "{body}");
            true
        }
    }
}
