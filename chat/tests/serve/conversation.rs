//! The page's conversation, in Chromium: what is kept where no answer comes, and where the reader stands.

use serde_json::{Value, json};

use crate::page::{ESCAPE, opened};
use crate::server::Server;
use crate::webdriver::Browser;

fn server() -> Server {
    let models = ["--checkpoint", "lm", "--checkpoint", "long=long-winded"];
    Server::start(&[&models[..], &["--max-tokens", "60000", "--max-context", "65536"]].concat())
}

/// Asks, and waits until the answer has ended.
fn ask(browser: &Browser, message: &str) {
    browser.keys("#message", &format!("{message}\n"));
    browser.wait_for("document.querySelector('#messages > li:last-child button')?.disabled === false");
}

/// What is said, by whom and in which words.
fn said(browser: &Browser) -> Value {
    browser.script("return [...document.querySelectorAll('#messages .text')].map((text) => text.textContent)")
}

/// From now on a request for an answer waits for `go()`.
fn hold(browser: &Browser) {
    browser.script(
        "const real = window.fetch; window.fetch = (path, options) => new Promise((resolve, reject) => { \
             window.go = () => resolve(real(path, options)); \
             options.signal?.addEventListener('abort', () => reject(options.signal.reason)) })",
    );
}

#[test]
fn an_answer_is_kept_until_the_other_one_begins() {
    let Some(browser) = Browser::start(false) else { return };
    let server = server();
    opened(&browser, &server);
    ask(&browser, "hi");
    let before = said(&browser);
    hold(&browser);
    browser.script("document.querySelector('#seed').value = 2");
    let retry = || {
        browser.click(".assistant button");
        browser.wait_for("!document.querySelector('#stop').hidden");
        assert_eq!(said(&browser), before, "while nothing has come");
        assert_eq!(browser.script("return document.querySelector('.assistant').ariaBusy"), "true");
    };
    retry();
    browser.screenshot("chat-retry-waits");
    browser.press(ESCAPE);
    browser.wait_for("document.querySelector('#stop').hidden");
    assert_eq!(said(&browser), before);
    let state = "const { ariaBusy, className } = document.querySelector('.assistant'); return [ariaBusy, className]";
    assert_eq!(browser.script(state), json!([null, "message assistant"]), "as if nobody had asked");
    retry();
    browser.script("window.go()");
    browser.wait_for("document.querySelector('#stop').hidden");
    let after = said(&browser);
    assert_eq!((after.as_array().unwrap().len(), &after[0]), (2, &before[0]));
    assert_ne!(after[1], before[1]);

    // What was written meanwhile stays where it is.
    browser.keys("#message", "one\n");
    browser.keys("#message", "two");
    browser.press(ESCAPE);
    browser.wait_for("document.querySelector('#stop').hidden");
    assert_eq!(said(&browser), after);
    assert_eq!(browser.script("return document.querySelector('#message').value"), "one\ntwo");
    assert!(browser.log().is_empty(), "{:?}", browser.log());
}

#[test]
fn a_server_that_has_stopped_costs_neither_the_answer_nor_what_was_written() {
    let Some(browser) = Browser::start(false) else { return };
    let server = server();
    opened(&browser, &server);
    ask(&browser, "hi");
    ask(&browser, "more");
    let before = said(&browser);
    drop(server);
    browser.keys("#message", "a draft");
    let failed = || {
        browser.wait_for("document.querySelector('#stop').hidden && !document.querySelector('#problem').hidden");
        assert_eq!(browser.text("#problem"), "The server cannot be reached.");
        assert_eq!(browser.script("return document.querySelector('#message').value"), "a draft");
    };
    browser.click("#messages > li:last-child button");
    failed();
    assert_eq!(said(&browser), before);

    // An edit is what it was too, and can be sent again.
    browser.click("#messages > li:first-child button");
    browser.script("document.querySelector('.user textarea').value = ''");
    browser.keys(".user textarea", "changed\n");
    failed();
    assert_eq!(browser.script("return document.querySelector('.user textarea').value"), "changed");
    assert_eq!(browser.script("return document.querySelectorAll('#messages > li').length"), 4);
    browser.screenshot("chat-edit-failed");
    browser.click(".user form .quiet");
    assert_eq!(said(&browser), before);
}

#[test]
fn who_reads_the_end_of_an_answer_sees_its_end() {
    let Some(browser) = Browser::start(false) else { return };
    let server = server();
    opened(&browser, &server);
    browser.resize(400, 600);
    browser
        .script("document.querySelector('#model').value = 'long'; document.querySelector('#max-tokens').value = 900");
    ask(&browser, "hi");
    assert_eq!(browser.text(".assistant .note"), "Cut off at the token limit.");
    let end = browser.script(
        "const box = document.querySelector('#say').getBoundingClientRect(); \
         const { bottom } = document.querySelector('.assistant button').getBoundingClientRect(); \
         const { scrollHeight } = document.documentElement; \
         return [scrollY > 100, scrollHeight - innerHeight - scrollY < 1, bottom <= box.top]",
    );
    browser.screenshot("chat-end-narrow");
    assert_eq!(end, json!([true, true, true]), "long, at its end, and nothing is covered");

    // Who reads elsewhere is left there.
    browser.script("document.querySelector('#max-tokens').value = 60000");
    browser.keys("#message", "more\n");
    browser.wait_for("document.querySelector('#messages > li:last-child .text').textContent.length > 900");
    browser.script("scrollTo(0, 100)");
    browser.press(ESCAPE);
    browser.wait_for("document.querySelector('#messages > li:last-child .note')");
    assert_eq!(browser.script("return scrollY"), 100);
}

#[test]
fn a_seed_keeps_its_64_bits() {
    let Some(browser) = Browser::start(false) else { return };
    let server = server();
    opened(&browser, &server);
    browser.click("#settings summary");
    let set = |seed: &str| {
        browser.script("document.querySelector('#seed').value = ''");
        browser.keys("#seed", seed);
        browser.click("#clear");
    };
    let sampling = json!({ "max_tokens": 20, "temperature": 0.8, "top_p": 0.95 });
    for (typed, seed) in [
        ("9007199254740993", json!(9_007_199_254_740_993_u64)),
        ("18446744073709551615", json!(u64::MAX)),
        ("-9223372036854775807", json!(i64::MIN + 1)),
        ("007", json!(7)),
        ("1e3", json!(1000)),
    ] {
        set(typed);
        ask(&browser, "hi");
        let mut more = sampling.clone();
        more["seed"] = seed;
        let expected = server.chat("hi", &more).json()["choices"][0]["message"]["content"].clone();
        assert_eq!(said(&browser)[1], expected, "{typed}");
    }
    for none in ["1.5", "18446744073709551616", "-9223372036854775809"] {
        set(none);
        browser.script("document.querySelector('#message').value = ''");
        browser.keys("#message", "hi\n");
        browser.wait_for("!document.querySelector('#problem').hidden");
        assert_eq!(browser.text("#problem"), "invalid `seed`: expected a whole number of 64 bits", "{none}");
    }
}
