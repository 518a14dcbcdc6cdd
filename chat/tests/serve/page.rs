//! The page, in Chromium.

use std::path::Path;

use serde_json::{Value, json};

use crate::server::Server;
use crate::webdriver::Browser;

/// `WebDriver`'s name of the key.
pub(crate) const ESCAPE: &str = "\u{e00c}";

/// The other key, which typing holds down until it comes again.
const SHIFT: &str = "\u{e008}";

fn server(more: &[&str]) -> Server {
    let models = ["--checkpoint", "lm", "--checkpoint", "other=long-winded", "--checkpoint", "long=long-winded"];
    let flags = ["--reward-model", "reward-model", "--max-tokens", "60000", "--max-context", "65536"];
    Server::start(&[&models[..], &flags, more].concat())
}

/// A page that is ready for messages.
pub(crate) fn opened(browser: &Browser, server: &Server) {
    browser.open(&server.url("/"));
    browser.wait_for("!document.querySelector('#views').hidden && document.querySelector('#model').value");
    browser.script("document.querySelector('#max-tokens').value = 20; document.querySelector('#seed').value = 1");
}

#[test]
fn the_page_may_run_and_ask_nothing_but_its_own() {
    let server = server(&[]);
    for path in ["/", "/app.js", "/style.css"] {
        let reply = server.get(path, &[]);
        let policy = reply.header("content-security-policy").unwrap();
        assert!(
            policy.starts_with("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"),
            "{policy}"
        );
        assert!(!policy.contains("unsafe") && policy.contains("frame-ancestors 'none'"), "{policy}");
        assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
    }
    assert!(server.get("/app.js", &[]).header("content-type").unwrap().starts_with("text/javascript"));
    let Some(browser) = Browser::start(false) else { return };
    opened(&browser, &server);
    let tried = browser.script(
        "return (async () => { const made = (tag) => document.body.appendChild(document.createElement(tag)); \
         const attempts = { \
             html: () => { made('p').innerHTML = '<b>hi</b>' }, \
             script: () => { made('script').textContent = 'window.ran = true' }, \
             handler: () => { made('p').setAttribute('onclick', 'window.ran = true') }, \
             style: () => { const p = made('p'); p.setAttribute('style', 'color: red'); if (p.style.color !== 'red') throw 0 }, \
             policy: () => { trustedTypes.createPolicy('default', {}) }, \
         }; \
         const done = Object.keys(attempts).filter((name) => { try { attempts[name](); return true } catch { return false } }); \
         const asked = await fetch('http://127.0.0.1:9/').then(() => true, () => false); \
         const image = made('img'); image.src = 'http://127.0.0.1:9/'; \
         const shown = await image.decode().then(() => true, () => false); \
         return [...done, ...(window.ran ? ['ran'] : []), ...(asked ? ['asked'] : []), ...(shown ? ['shown'] : [])] })()",
    );
    assert_eq!(tried, json!([]));
    let log = browser.log().join("\n");
    for refused in ["connect-src", "img-src", "style-src"] {
        assert!(log.contains(refused), "{refused}: {log}");
    }
}

#[test]
fn a_conversation_goes_on_is_tried_again_and_is_edited() {
    let Some(browser) = Browser::start(false) else { return };
    let server = server(&[]);
    opened(&browser, &server);
    let expected = server
        .chat("<b>hi</b> & you", &json!({ "seed": 1, "max_tokens": 20, "temperature": 0.8, "top_p": 0.95 }))
        .json();
    browser.keys("#message", "<b>hi</b> & you\n");
    browser.wait_for("document.querySelector('.assistant button')?.disabled === false");
    assert_eq!(browser.text(".user .text"), "<b>hi</b> & you");
    assert_eq!(
        browser.script("return document.querySelector('.assistant .text').textContent"),
        expected["choices"][0]["message"]["content"]
    );
    assert!(browser.text(".assistant .note").contains("Cut off"));

    // Tried again, it is the answer of the seed that is set now.
    let said = |seed: u32, messages: &Value| {
        let more = json!({ "messages": messages, "seed": seed, "max_tokens": 20, "temperature": 0.8, "top_p": 0.95 });
        server.chat("", &more).json()["choices"][0]["message"]["content"].clone()
    };
    let user = |content: &str| json!({ "role": "user", "content": content });
    browser.script("document.querySelector('#seed').value = 2");
    browser.click(".assistant button");
    browser.wait_for("document.querySelector('.assistant button')?.disabled === false");
    let answers = || -> Vec<Value> {
        let texts = "return [...document.querySelectorAll('.assistant .text')].map((text) => text.textContent)";
        serde_json::from_value(browser.script(texts)).unwrap()
    };
    assert_eq!(answers(), [said(2, &json!([user("<b>hi</b> & you")]))]);
    assert_ne!(answers()[0], expected["choices"][0]["message"]["content"], "another answer");

    browser.click(".user button");
    browser.script("document.querySelector('.user textarea').value = ''");
    browser.keys(".user textarea", "not this");
    browser.click(".user form .quiet");
    assert_eq!(browser.text(".user .text"), "<b>hi</b> & you", "an edit that is given up changes nothing");
    browser.click(".user button");
    browser.script("document.querySelector('.user textarea').value = ''");
    browser.keys(".user textarea", "who");
    browser.click(".user form button");
    browser.wait_for("document.querySelector('.assistant button')?.disabled === false");
    assert_eq!(
        (browser.text(".user .text"), browser.script("return document.querySelectorAll('#messages > li').length")),
        ("who".to_owned(), json!(2))
    );

    // What was said before is part of the question.
    let earlier = json!({ "role": "assistant", "content": answers()[0] });
    browser.keys("#message", &format!("two{SHIFT}\n{SHIFT}lines\n"));
    browser.wait_for("document.querySelectorAll('.assistant').length === 2");
    browser.wait_for("document.querySelector('#messages > li:last-child button')?.disabled === false");
    assert_eq!(answers()[1], said(2, &json!([user("who"), earlier, user("two\nlines")])));
    assert!(browser.log().is_empty(), "{:?}", browser.log());
}

#[test]
fn an_answer_is_stopped_by_key_and_by_button_and_a_narrow_window_holds_it() {
    let Some(browser) = Browser::start(false) else { return };
    let server = server(&[]);
    opened(&browser, &server);
    browser
        .script("document.querySelector('#model').value = 'long'; document.querySelector('#max-tokens').value = 60000");
    for (message, by_key) in [("more", true), ("again", false)] {
        browser.keys("#message", &format!("{message}\n"));
        browser.wait_for("document.querySelector('#messages > li:last-child .text').textContent.length > 40");
        if by_key {
            browser.press(ESCAPE);
        } else {
            browser.click("#stop");
        }
        browser.wait_for("document.querySelector('#messages > li:last-child .note')?.textContent === 'Stopped.'");
        server.wait_for("kindling_answers_running{model=\"long\"}", 0.0);
        let kept = "return document.querySelector('#messages > li:last-child .text').textContent.length > 40";
        assert_eq!(browser.script(kept), true, "what had come stays");
    }
    browser.screenshot("chat-light-wide");
    browser.resize(400, 800);
    browser.screenshot("chat-light-narrow");
    assert_eq!(
        browser.script("return document.documentElement.scrollWidth <= innerWidth"),
        true,
        "it scrolls sideways"
    );
    let wide =
        "return document.querySelector('#message').offsetWidth > 0.9 * document.querySelector('#say').offsetWidth";
    assert_eq!(browser.script(wide), true, "the message has the whole width of a narrow window");
    browser.click("#clear");
    assert_eq!(browser.script("return document.querySelectorAll('#messages > li').length"), 0);
    // A word that is longer than a line is broken.
    browser.script("document.querySelector('#model').value = 'lm'; document.querySelector('#max-tokens').value = 2");
    browser.keys("#message", &format!("{}\n", "m".repeat(60)));
    browser.wait_for("document.querySelector('.assistant button')?.disabled === false");
    assert_eq!(browser.script("return document.documentElement.scrollWidth <= innerWidth"), true);
    assert!(browser.log().is_empty(), "{:?}", browser.log());
}

#[test]
fn an_answer_that_breaks_off_says_so_and_keeps_what_had_come() {
    let Some(browser) = Browser::start(false) else { return };
    let server = server(&[]);
    opened(&browser, &server);
    browser
        .script("document.querySelector('#model').value = 'long'; document.querySelector('#max-tokens').value = 60000");
    browser.keys("#message", "hi\n");
    browser.wait_for("document.querySelector('.assistant .text').textContent.length > 40");
    browser.resize(400, 300);
    drop(server);
    browser.wait_for("document.querySelector('.assistant .note')?.textContent === 'Broken off.'");
    assert_eq!(browser.text("#problem"), "The answer ended early: the server has stopped.");
    let is_seen = "scrollTo(0, document.body.scrollHeight); \
                   const { top, bottom } = document.querySelector('#problem').getBoundingClientRect(); \
                   return [scrollY > 150, top >= 0 && bottom <= innerHeight]";
    assert_eq!(browser.script(is_seen), json!([true, true]), "however far the conversation goes");
    assert!(browser.text(".assistant .text").len() > 40);
    // A message that nobody answers goes back to where it was written.
    browser.keys("#message", "are you there?\n");
    browser.wait_for("document.querySelector('#message').value === 'are you there?'");
    assert_eq!(browser.text("#problem"), "The server cannot be reached.");
    assert_eq!(browser.script("return document.querySelectorAll('#messages > li').length"), 2);
    let is_gone = "document.querySelector('#temperature').dispatchEvent(new Event('input', { bubbles: true })); \
                   return document.querySelector('#problem').hidden";
    assert_eq!(browser.script(is_gone), true, "who changes a setting does something about it");
}

#[test]
fn the_system_text_and_the_settings_are_sent() {
    let Some(browser) = Browser::start(true) else { return };
    let server = server(&["--log-text"]);
    opened(&browser, &server);
    browser.click("#settings summary");
    browser.keys("#system", "be kind");
    browser.script("document.querySelector('#temperature').value = 0");
    browser.keys("#message", "hi\n");
    browser.wait_for("document.querySelector('.assistant button')?.disabled === false");
    let asked = json!([{ "role": "system", "content": "be kind" }, { "role": "user", "content": "hi" }]);
    let expected = server.chat("", &json!({ "messages": asked, "temperature": 0, "max_tokens": 20 })).json();
    assert_eq!(
        browser.script("return document.querySelector('.assistant .text').textContent"),
        expected["choices"][0]["message"]["content"]
    );
    let theme = || browser.script("return document.documentElement.dataset.theme");
    // As light as the ground is, and the text on it.
    let lightness = || -> Vec<f64> {
        let of = "return ['backgroundColor', 'color'].map((name) => \
             getComputedStyle(document.body)[name].match(/\\d+/g).slice(0, 3).reduce((sum, x) => sum + Number(x), 0))";
        serde_json::from_value(browser.script(of)).unwrap()
    };
    assert_eq!(theme(), "dark", "as the system has it");
    browser.prefer("light");
    browser.wait_for("document.documentElement.dataset.theme === 'light'");
    browser.prefer("dark");
    browser.wait_for("document.documentElement.dataset.theme === 'dark'");
    assert!(lightness()[0] < 150.0 && lightness()[1] > 600.0, "{:?}", lightness());
    browser.click("#theme");
    assert_eq!(theme(), "light");
    assert!(lightness()[0] > 600.0 && lightness()[1] < 150.0, "{:?}", lightness());
    opened(&browser, &server);
    assert_eq!(theme(), "light", "a choice is remembered");
    browser.prefer("light");
    browser.prefer("dark");
    assert_eq!(browser.script("return matchMedia('(prefers-color-scheme: dark)').matches"), true);
    assert_eq!(theme(), "light", "whatever the system has later");
    browser.click("#theme");
    assert_eq!(theme(), "dark");
    browser.keys("#message", "Tell me a story about a fox.\n");
    browser.wait_for("document.querySelector('.assistant button')?.disabled === false");
    browser.screenshot("chat-dark-wide");
}

#[test]
fn a_model_that_goes_on_writing_is_said_to() {
    let Some(browser) = Browser::start(false) else { return };
    let server = Server::start(&["--checkpoint", "lm", "--checkpoint", "base"]);
    opened(&browser, &server);
    let choose = |model: &str| {
        browser.script(&format!(
            "const model = document.querySelector('#model'); model.value = '{model}'; \
             model.dispatchEvent(new Event('change'))"
        ));
    };
    let said = "base has learnt plain text alone, not conversations: it goes on writing instead of answering.";
    for (model, expected) in [("lm", ""), ("base", said), ("lm", "")] {
        choose(model);
        let shown = browser
            .script("const { hidden, innerText } = document.querySelector('#base'); return hidden ? '' : innerText");
        assert_eq!(shown, expected, "{model}");
    }
}

#[test]
fn a_single_model_cannot_be_compared_and_the_page_says_why() {
    let Some(browser) = Browser::start(false) else { return };
    let server = Server::start(&["--checkpoint", "lm"]);
    opened(&browser, &server);
    browser.click("#tab-compare");
    assert!(browser.text("#lacks").starts_with("There is one model only: start the server with several --checkpoint"));
    let shown = browser.script("return ['#ask', '#rivals'].filter((id) => document.querySelector(id).offsetParent)");
    assert_eq!(shown, json!([]), "what cannot be used");
}

#[test]
fn the_page_asks_for_the_key() {
    let Some(browser) = Browser::start(false) else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("key");
    std::fs::write(&file, "open-sesame").unwrap();
    let server = server(&["--api-key-file", file.to_str().unwrap()]);
    browser.open(&server.url("/"));
    browser.wait_for("!document.querySelector('#login').hidden");
    browser.keys("#key", "open-sesame\n");
    browser.wait_for("!document.querySelector('#views').hidden");
}

/// The records of a file.
pub(crate) fn records(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Asks, and waits until both have answered.
fn ask_two(browser: &Browser, question: &str) {
    browser.script("document.querySelector('#question').value = ''");
    browser.keys("#question", &format!("{question}\n"));
    browser.wait_for(
        "!document.querySelector('#verdicts').hidden && document.querySelectorAll('#answers .text').length === 2",
    );
}

#[test]
fn judgements_are_kept_unnamed_until_then_and_can_be_taken_back() {
    let Some(browser) = Browser::start(false) else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("labels.jsonl");
    let server = server(&["--labels", file.to_str().unwrap()]);
    opened(&browser, &server);
    browser.click("#tab-compare");
    // Both have the same weights: they differ by chance alone.
    browser.script(
        "document.querySelectorAll('#rivals input')[2].checked = false; document.querySelector('#seed').value = ''",
    );
    browser.keys("#annotator", "mia");
    let shown = || -> Vec<String> {
        let texts =
            browser.script("return [...document.querySelectorAll('#answers .text')].map((text) => text.textContent)");
        serde_json::from_value(texts).unwrap()
    };
    ask_two(&browser, "hi");
    let answers = shown();
    assert!(
        !browser.text("#answers").contains("lm") || answers.iter().any(|answer| answer.contains("lm")),
        "named before"
    );
    browser.press("b");
    browser.wait_for("document.querySelectorAll('#answers .note').length === 2");
    let record = records(&file).remove(0);
    assert_eq!(
        (&record["prompt"], &record["chosen"], &record["rejected"]),
        (&json!("hi"), &json!(answers[1]), &json!(answers[0]))
    );
    assert_eq!(record["annotator"], "mia");
    assert!(record["seconds"].as_f64().unwrap() > 0.0);
    let notes =
        browser.script("return [...document.querySelectorAll('#answers .note')].map((note) => note.textContent)");
    let names: Vec<&str> =
        notes.as_array().unwrap().iter().map(|note| note.as_str().unwrap().split(',').next().unwrap()).collect();
    assert_eq!(
        (record["models"]["chosen"].as_str(), record["models"]["rejected"].as_str()),
        (Some(names[1]), Some(names[0]))
    );
    assert!(notes[0].as_str().unwrap().contains("score"), "{notes}");
    let best = "return [...document.querySelectorAll('#answers li')].map((item) => item.classList.contains('best'))";
    assert_eq!(browser.script(best), json!([false, true]));
    browser.screenshot("compare-light-wide");
    browser.press("u");
    browser.wait_for("!document.querySelector('#verdicts').hidden");
    assert!(records(&file).is_empty());
    browser.click("#verdicts button:nth-child(2)");
    browser.wait_for("document.querySelector('#verdict').textContent.startsWith('B judged best')");
    assert_eq!(records(&file)[0]["chosen"], json!(answers[1]));
    browser.click("#undo");
    browser.wait_for("!document.querySelector('#verdicts').hidden");
    browser.click("#verdicts button:nth-last-child(2)");
    browser.wait_for("document.querySelector('#verdict').textContent.startsWith('Judged alike')");
    assert_eq!(records(&file)[0]["tied"], json!(answers));
    ask_two(&browser, "who");
    browser.press("x");
    browser.wait_for("document.querySelector('#verdict').textContent.startsWith('Judged bad')");
    // The same seed: none can be better.
    browser.script("document.querySelector('#seed').value = '1'");
    ask_two(&browser, "why");
    assert_eq!(browser.text("#verdicts"), "Tie (T)\nBoth bad (X)");
    browser.press("a");
    // Whatever happens to the program, what was judged is there.
    assert!(browser.log().is_empty(), "{:?}", browser.log());
    drop(server);
    let kept = records(&file);
    assert_eq!((kept.len(), &kept[1]["both_bad"]), (2, &json!(true)));
    browser.resize(400, 900);
    browser.script("localStorage.theme = 'dark'; document.documentElement.dataset.theme = 'dark'");
    browser.screenshot("compare-dark-narrow");
    assert_eq!(
        browser.script("return document.documentElement.scrollWidth <= innerWidth"),
        true,
        "it scrolls sideways"
    );
}

#[test]
fn a_run_is_shown_as_it_goes_on() {
    let Some(browser) = Browser::start(false) else { return };
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("tiny/ppo");
    std::fs::create_dir_all(&run).unwrap();
    let metrics = run.join("metrics.jsonl");
    // Another one, which changed last.
    let another = dir.path().join("other");
    let row = |step: u32| {
        let value = f64::from(step);
        let row = json!({
            "step": step, "seconds": 2.0 * value, "tokens": 100 * step, "objective/score": value.sin(), "objective/kl": value,
            "val/kl": value / 2.0, "policy/loss": -value, "gold/score": 1e-5 * value
        });
        format!("{row}\n")
    };
    std::fs::write(&metrics, (1..=50).map(row).collect::<String>()).unwrap();
    let hostile = "<img src=x onerror=\"document.title='taken'\"> & more";
    let sample = json!({ "step": 50, "prompt": "Tell me.", "response": hostile, "score": 0.5 });
    std::fs::write(run.join("samples.jsonl"), format!("{sample}\n")).unwrap();
    std::fs::create_dir(&another).unwrap();
    std::fs::write(
        another.join("metrics.jsonl"),
        json!({ "step": 7, "seconds": 1, "tokens": 9, "train/loss": 2.5 }).to_string() + "\n",
    )
    .unwrap();
    let server = server(&["--runs", dir.path().to_str().unwrap()]);
    opened(&browser, &server);
    browser.click("#tab-training");
    browser.wait_for("document.querySelectorAll('#run option').length === 2");
    for name in ["other", "tiny/ppo"] {
        browser.script(&format!(
            "const run = document.querySelector('#run'); run.value = '{name}'; run.dispatchEvent(new Event('change'))"
        ));
        let step = if name == "other" { 7 } else { 50 };
        browser.wait_for(&format!("document.querySelector('#progress').textContent.startsWith('Step {step} ')"));
    }
    browser.wait_for("document.querySelector('#progress').textContent === 'Step 50 · 100 s · 5,000 tokens'");
    let titles =
        browser.script("return [...document.querySelectorAll('#curves figcaption')].map((title) => title.textContent)");
    assert_eq!(titles, json!(["Reward", "Gold score", "KL from the reference (nats)"]));
    let said = browser.script("return document.querySelectorAll('#curves svg')[2].getAttribute('aria-label')");
    assert_eq!(said, "objective/kl: 1 at step 1, 50 at step 50; val/kl: 0.5 at step 1, 25 at step 50");
    browser.wait_for("document.querySelector('#samples li')");
    assert_eq!(browser.script("return document.querySelector('#samples .text:last-child').textContent"), hostile);
    browser.screenshot("training-light-wide");

    let append = |text: &str| {
        use std::io::Write as _;
        std::fs::OpenOptions::new().append(true).open(&metrics).unwrap().write_all(text.as_bytes()).unwrap();
    };
    append(&row(51));
    browser.wait_for("document.querySelector('#progress').textContent === 'Step 51 · 102 s · 5,100 tokens'");
    // Resumed from an earlier step, and begun anew.
    append(&row(40));
    browser.wait_for("document.querySelector('#progress').textContent.startsWith('Step 40 ')");
    let last = "document.querySelectorAll('#curves svg')[2].getAttribute('aria-label')";
    browser.wait_for(&format!("{last}.startsWith('objective/kl: 1 at step 1, 40 at step 40')"));
    std::fs::write(&metrics, row(3)).unwrap();
    browser.wait_for(&format!("{last}.startsWith('objective/kl: 3 at step 3, 3 at step 3')"));
    browser.click("#more-curves summary");
    assert_eq!(browser.text("#other-curves figcaption"), "policy/loss");
    browser.script("document.querySelector('#theme').click()");
    browser.resize(400, 900);
    browser.screenshot("training-dark-narrow");
    assert_eq!(
        browser.script("return document.documentElement.scrollWidth <= innerWidth"),
        true,
        "it scrolls sideways"
    );
    assert_ne!(browser.script("return document.title"), "taken");
    assert!(browser.log().is_empty(), "{:?}", browser.log());
    assert!(!server.log().contains("/training/"), "looks are not logged: {}", server.log());
}
