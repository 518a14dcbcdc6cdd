//! People judge on the page of `chat serve`, and a reward model learns from what they said.

#![cfg(unix)]
#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message
#![allow(clippy::print_stderr)] // a test that is skipped says why

#[path = "../chat/tests/serve/webdriver.rs"]
#[allow(dead_code)] // the tests of the page itself use all of it
mod webdriver;

use pipeline_tests::{Lab, REWARD_MODEL, Running};
use rustix::process::Signal;
use serde_json::{Value, json};
use webdriver::Browser;

/// Judgements of one person, then of another on the first of the same answers.
const MIAS: usize = 25;
const TOMS: usize = 15;

/// Starts the server and opens the page to compare.
fn opened(lab: &Lab, browser: &Browser) -> Running {
    let models = ["--checkpoint", "base", "--checkpoint", "sft"];
    let labels = ["--labels", "labels.jsonl", "--port", "0", "--threads", "1"];
    let mut server = lab.start("chat", &[&["serve"], &models[..], &labels].concat());
    server.hears("listening on ");
    let log = server.stderr();
    browser.open(log.split_once("listening on ").unwrap().1);
    browser.wait_for("!document.querySelector('#views').hidden");
    // With a seed, both people see the same answers.
    browser.script("document.querySelector('#max-tokens').value = 8; document.querySelector('#seed').value = 1");
    browser.click("#tab-compare");
    server
}

/// Asks for two answers and says that the one which sorts later is better, or that neither is.
fn judge(browser: &Browser, n: usize) {
    browser.script("document.querySelector('#question').value = ''");
    browser.keys("#question", &format!("Tell me story {n}.\n"));
    browser.wait_for("!document.querySelector('#verdicts').hidden");
    let answers =
        browser.script("return [...document.querySelectorAll('#answers .text')].map((text) => text.textContent)");
    let key = match [0, 1].map(|i| answers[i].as_str().unwrap()) {
        _ if n.is_multiple_of(5) => "x",
        [a, b] if a > b => "a",
        [a, b] if a < b => "b",
        _ => "t",
    };
    browser.press(key);
    browser.wait_for("document.querySelectorAll('#answers .note').length === 2");
}

#[test]
fn forty_judgements_on_the_page_train_a_reward_model_and_a_kill_loses_none() {
    let Some(browser) = Browser::start(false) else { return };
    let lab = Lab::before(REWARD_MODEL);
    let mut server = opened(&lab, &browser);
    browser.keys("#annotator", "mia");
    for n in 1..=MIAS {
        judge(&browser, n);
        assert_eq!(lab.lines("labels.jsonl").len(), n, "it is on the disk before the page says so");
    }
    server.signal(Signal::KILL);
    drop(server);
    assert_eq!(lab.lines("labels.jsonl").len(), MIAS);

    let _server = opened(&lab, &browser);
    browser.keys("#annotator", "tom");
    (1..=TOMS).for_each(|n| judge(&browser, n));
    let labels = lab.lines("labels.jsonl");
    let pairs: Vec<&Value> = labels.iter().filter(|label| label.get("chosen").is_some()).collect();
    assert!(pairs.len() > 20, "{labels:#?}");
    assert_eq!(labels.len(), MIAS + TOMS);
    let said = (1..=MIAS).map(|n| ("mia", n)).chain((1..=TOMS).map(|n| ("tom", n)));
    for ((annotator, n), label) in said.zip(&labels) {
        assert_eq!(label["prompt"], json!(format!("Tell me story {n}.")));
        assert_eq!(label["annotator"], annotator);
        assert!(label["seconds"].as_f64().unwrap() > 0.0);
    }
    for pair in &pairs {
        assert!(pair["chosen"].as_str() > pair["rejected"].as_str(), "{pair}");
        let mut models = [&pair["models"]["chosen"], &pair["models"]["rejected"]].map(|model| model.as_str().unwrap());
        models.sort_unstable();
        assert_eq!(models, ["base", "sft"]);
    }
    let shows_first =
        |model: &str| pairs.iter().any(|pair| pair["models"][pair["shown_first"].as_str().unwrap()] == model);
    assert!(shows_first("base") && shows_first("sft"), "the order is drawn");
    assert!(labels.iter().any(|label| label["both_bad"] == true));

    lab.write(
        "configs/people.toml",
        "[data]\ntrain = ['../labels.jsonl']\nval = ['../labels.jsonl']\n[train]\nsteps = 2\nbatch_size = 4\n\
         [normalisation]\nsamples = 4\nmax_tokens = 4\n",
    );
    let args = ["train", "--config", "configs/people.toml", "--init", "sft", "--out", "people"];
    let trained = lab.run("reward-model", &args);
    let said = format!("{} training pairs", pairs.len());
    assert!(trained.status.success() && trained.stderr.contains(&said), "{}", trained.stderr);
    let agreement: Value = serde_json::from_str(&lab.ok("reward-model", &["agreement", "labels.jsonl"])).unwrap();
    assert_eq!((&agreement["shared"], &agreement["pairs"][0]["agreement"]), (&json!(TOMS), &json!(1.0)), "{agreement}");
}
