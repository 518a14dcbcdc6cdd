//! The page's comparison of four models, in Chromium: how it looks, what a screen reader is told, and going back.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value, json};

use crate::page::{ESCAPE, opened, records};
use crate::server::Server;
use crate::webdriver::Browser;

/// `WebDriver`'s name of the key.
const RIGHT: &str = "\u{e014}";

/// `WebDriver`'s name of the key.
const ENTER: &str = "\u{e007}";

/// `WebDriver`'s name of the key.
const TAB: &str = "\u{e004}";

fn server(labels: &Path) -> Server {
    let models = ["base=lm", "sft=long-winded", "ppo=lm", "dpo=long-winded"];
    let models = models.iter().flat_map(|model| ["--checkpoint", model]);
    let flags = ["--reward-model", "reward-model", "--labels", labels.to_str().unwrap()];
    Server::start(&models.chain(flags).collect::<Vec<_>>())
}

/// A page whose four models answer differently, by chance.
fn compared(browser: &Browser, server: &Server) {
    opened(browser, server);
    browser.click("#tab-compare");
    browser.script("document.querySelector('#seed').value = ''");
}

/// Asks, and waits until all four have answered.
fn ask(browser: &Browser, question: &str) {
    browser.script("document.querySelector('#question').value = ''");
    browser.keys("#question", &format!("{question}\n"));
    browser.wait_for(
        "!document.querySelector('#verdicts').hidden && document.querySelectorAll('#answers li').length === 4",
    );
}

fn shown(browser: &Browser) -> Vec<String> {
    let texts =
        browser.script("return [...document.querySelectorAll('#answers .text')].map((text) => text.textContent)");
    serde_json::from_value(texts).unwrap()
}

/// The models in the order of their answers, which stands there once they are judged.
fn order(browser: &Browser) -> String {
    let names =
        "return [...document.querySelectorAll('#answers .note')].map((note) => note.textContent.split(',')[0]).join()";
    browser.script(names).as_str().unwrap().to_owned()
}

/// Presses the key of a judgement and waits until the page says it was kept.
fn judge(browser: &Browser, key: &str, said: &str) {
    browser.press(key);
    browser.wait_for(&format!("document.querySelector('#verdict').textContent.startsWith({said:?})"));
}

#[test]
fn four_answers_stand_side_by_side_where_there_is_room_and_below_each_other_where_not() {
    let Some(browser) = Browser::start(false) else { return };
    let dir = tempfile::tempdir().unwrap();
    let server = server(&dir.path().join("labels.jsonl"));
    compared(&browser, &server);
    ask(&browser, "Tell me a story about a fox and a red boat.");
    let columns = || {
        browser.script(
            "return new Set([...document.querySelectorAll('#answers li')].map((li) => li.getBoundingClientRect().left)).size",
        )
    };
    let fits = || browser.script("return document.documentElement.scrollWidth <= innerWidth");
    for theme in ["light", "dark"] {
        browser.script(&format!(
            "if (document.documentElement.dataset.theme !== '{theme}') document.querySelector('#theme').click()"
        ));
        let is_dark =
            "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((x) => Number(x) < 100)";
        assert_eq!(browser.script(is_dark), theme == "dark", "whatever the system has");
        browser.resize(1280, 900);
        assert_eq!((columns(), fits()), (json!(4), json!(true)));
        browser.screenshot(&format!("four-{theme}-wide"));
        browser.resize(400, 900);
        assert_eq!((columns(), fits()), (json!(1), json!(true)));
        browser.screenshot(&format!("four-{theme}-narrow"));
    }
    browser.resize(1280, 900);
    judge(&browser, "c", "C judged best.");
    browser.screenshot("four-dark-judged");
    assert!(browser.log().is_empty(), "{:?}", browser.log());
}

#[test]
fn enter_that_is_pressed_again_and_keys_that_are_held_down_judge_nothing() {
    let Some(browser) = Browser::start(false) else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("labels.jsonl");
    let server = server(&file);
    compared(&browser, &server);
    let enter = || (0..3).for_each(|_| browser.press(ENTER));
    let hold = |key: &str| {
        let event = format!("new KeyboardEvent('keydown', {{ key: '{key}', repeat: true, bubbles: true }})");
        browser.script(&format!("document.activeElement.dispatchEvent({event})"));
    };
    let undo = || {
        browser.press("U");
        browser.wait_for("document.querySelector('#verdict').textContent === 'Taken back.'");
        assert!(records(&file).is_empty());
    };
    ask(&browser, "hi");
    enter();
    hold("b");
    // The first that is a judgement, in either case. That it is kept says that none was before.
    judge(&browser, "T", "Judged alike.");
    assert_eq!(records(&file).len(), 6);
    // Nor is it taken back, or what was taken back judged again.
    enter();
    hold("u");
    assert_eq!(records(&file).len(), 6);
    undo();
    enter();
    judge(&browser, "X", "Judged bad.");
    undo();
    judge(&browser, "C", "C judged best.");
    assert_eq!(records(&file).len(), 3);
    ask(&browser, "who");
    browser.press("U");
    browser.wait_for("document.querySelector('#asked').textContent === 'hi'");
    judge(&browser, "a", "A judged best.");
    enter();
    browser.press("N");
    assert_eq!(browser.text("#asked"), "who");
    enter();
    assert_eq!(records(&file).len(), 3);
    browser.screenshot("four-light-again");
    assert!(browser.log().is_empty(), "{:?}", browser.log());
}

#[test]
fn judgements_are_taken_back_step_by_step_and_what_was_on_the_screen_comes_again() {
    let Some(browser) = Browser::start(false) else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("labels.jsonl");
    let server = server(&file);
    compared(&browser, &server);
    let prompts = || -> Vec<Value> {
        let mut prompts: Vec<Value> = records(&file).iter().map(|record| record["prompt"].clone()).collect();
        prompts.dedup();
        prompts
    };
    let (mut answers, mut orders) = (Vec::new(), BTreeSet::new());
    for question in ["one", "two", "three"] {
        ask(&browser, question);
        answers.push(shown(&browser));
        judge(&browser, "a", "A judged best.");
        orders.insert(order(&browser));
    }
    assert_eq!((records(&file).len(), prompts()), (9, vec!["one".into(), "two".into(), "three".into()]));
    ask(&browser, "four");
    let last = shown(&browser);

    // Back past what has not been judged yet, to the second.
    for (question, expected) in [("three", &answers[2]), ("two", &answers[1])] {
        browser.press("u");
        browser.wait_for(&format!("document.querySelector('#asked').textContent === {question:?}"));
        assert_eq!(&shown(&browser), expected);
        assert_eq!(browser.script("return document.querySelectorAll('#answers .note').length"), 0, "unnamed again");
    }
    assert_eq!(prompts(), ["one"]);
    judge(&browser, "b", "B judged best. N: the next answers.");
    let chosen: Vec<Value> = records(&file)[3..].iter().map(|record| record["chosen"].clone()).collect();
    assert_eq!(chosen, vec![json!(answers[1][1]); 3]);

    // Forward again, in the order in which they were asked.
    browser.press("n");
    assert_eq!((browser.text("#asked"), shown(&browser)), ("three".to_owned(), answers[2].clone()));
    judge(&browser, "t", "Judged alike. N: the next answers.");
    browser.click("#next");
    assert_eq!((browser.text("#asked"), shown(&browser)), ("four".to_owned(), last));
    judge(&browser, "x", "Judged bad. N: the next message.");
    assert_eq!(prompts(), ["one", "two", "three", "four"]);
    orders.insert(order(&browser));
    assert!(orders.len() > 1, "each of four questions has its own order, by chance: {orders:?}");
    assert_eq!(browser.script("return document.querySelector('#next').hidden"), true);
    for left in [3, 2, 1, 0] {
        browser.press("u");
        browser.wait_for("document.querySelector('#verdict').textContent === 'Taken back.'");
        browser.wait_for("!document.querySelector('#verdicts').hidden");
        assert_eq!(prompts().len(), left);
        browser.script("document.querySelector('#verdict').textContent = ''");
    }
    assert_eq!(browser.script("return document.querySelector('#undo').hidden"), true);
    assert!(browser.log().is_empty(), "{:?}", browser.log());
}

#[test]
fn a_question_has_the_system_text_can_be_broken_off_and_the_name_is_remembered() {
    let Some(browser) = Browser::start(false) else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("labels.jsonl");
    let models = ["--checkpoint", "a=long-winded", "--checkpoint", "b=long-winded", "--labels", file.to_str().unwrap()];
    let server = Server::start(&[&models[..], &["--max-tokens", "60000", "--max-context", "65536"]].concat());
    opened(&browser, &server);
    browser.keys("#tab-chat", RIGHT);
    assert_eq!(browser.script("return document.activeElement.id"), "tab-compare");
    assert_eq!(browser.script("return document.querySelector('#compare').hidden"), false);
    browser.keys("#annotator", "mia\t");
    browser.script("document.querySelector('#max-tokens').value = 60000; document.querySelector('#seed').value = ''");
    for by_key in [true, false] {
        browser.script("document.querySelector('#question').value = ''");
        browser.keys("#question", "hi\n");
        // Both are shown as they come.
        let come = "[...document.querySelectorAll('#answers .text')].every((text) => text.textContent.length > 40)";
        browser.wait_for(&format!("document.querySelectorAll('#answers .text').length === 2 && {come}"));
        if by_key {
            browser.press(ESCAPE);
        } else {
            browser.click("#ask-stop");
        }
        browser.wait_for("document.querySelector('#ask-stop').hidden && !document.querySelector('#answers li')");
        assert_eq!(browser.script("return document.querySelector('#question').value"), "hi", "to be asked again");
        server.wait_for("kindling_answers_running{model=\"a\"}", 0.0);
    }
    browser.script("document.querySelector('#max-tokens').value = 20");
    browser.click("#settings summary");
    browser.keys("#system", "be kind");
    browser.script("document.querySelector('#question').value = ''");
    browser.keys("#question", "hi\n");
    browser.wait_for("!document.querySelector('#verdicts').hidden");
    assert_eq!(browser.script("return document.querySelector('#question').value"), "", "it stands above its answers");
    judge(&browser, "a", "A judged best.");
    let asked = json!([{ "role": "system", "content": "be kind" }, { "role": "user", "content": "hi" }]);
    assert_eq!((&records(&file)[0]["prompt"], &records(&file)[0]["annotator"]), (&asked, &json!("mia")));
    opened(&browser, &server);
    assert_eq!(browser.script("return document.querySelector('#annotator').value"), "mia");
    assert!(browser.log().is_empty(), "{:?}", browser.log());
}

#[test]
fn pairs_of_a_file_are_judged_one_after_the_other() {
    /// So many that their sides, which are drawn, are all the same once in eight million runs.
    const N_PAIRS: usize = 24;
    let Some(browser) = Browser::start(false) else { return };
    let dir = tempfile::tempdir().unwrap();
    let [labels, questions] = ["labels.jsonl", "questions.jsonl"].map(|name| dir.path().join(name));
    let pair = |i: usize| json!({ "prompt": format!("p{i}"), "tied": [format!("good {i}"), format!("bad {i}")] });
    std::fs::write(&questions, (0..N_PAIRS).map(|i| format!("{}\n", pair(i))).collect::<String>()).unwrap();
    let files = ["--labels", labels.to_str().unwrap(), "--questions", questions.to_str().unwrap()];
    let server = Server::start(&[&["--checkpoint", "lm"], &files[..]].concat());
    opened(&browser, &server);
    browser.click("#tab-compare");
    assert_eq!(
        (browser.text("#pairs-judged"), browser.text("#lacks")),
        (format!("{N_PAIRS} pairs wait for you."), String::new())
    );
    browser.keys("#annotator", "mia");
    browser.click("#ask-pair");
    for i in 0..N_PAIRS {
        browser.wait_for(&format!("document.querySelector('#asked').textContent === 'p{i}'"));
        let is_first = shown(&browser)[0].starts_with("good");
        if i == 2 {
            // A slip, mended.
            judge(&browser, if is_first { "b" } else { "a" }, if is_first { "B judged" } else { "A judged" });
            browser.press("u");
            browser.wait_for("document.querySelector('#verdict').textContent === 'Taken back.'");
        }
        let said = if is_first { "A judged best. N: the next pair." } else { "B judged best. N: the next pair." };
        judge(&browser, if is_first { "a" } else { "b" }, said);
        browser.press("n");
    }
    browser.wait_for("document.querySelector('#verdict').textContent === 'All pairs are judged.'");
    assert_eq!(browser.text("#pairs-judged"), format!("{N_PAIRS} of {N_PAIRS} judged."));
    let kept = records(&labels);
    for (i, record) in kept.iter().enumerate() {
        let chosen = (record["prompt"].clone(), record["chosen"].clone());
        assert_eq!(chosen, (json!(format!("p{i}")), json!(format!("good {i}"))));
        assert_eq!((&record["annotator"], record.get("models")), (&json!("mia"), None));
    }
    assert_eq!(kept.len(), N_PAIRS);
    assert!(kept.iter().any(|record| record["shown_first"] != kept[0]["shown_first"]), "the sides are drawn");
    browser.screenshot("pairs-light-wide");
    assert!(browser.log().is_empty(), "{:?}", browser.log());
}

/// A screen reader is told these parts, each beginning so, one after the other.
#[track_caller]
fn says(browser: &Browser, expected: &[&str]) {
    let said = browser.accessible();
    let mut left = said.iter();
    for part in expected {
        assert!(left.any(|line| line.starts_with(part)), "no `{part}` in its place: {said:#?}");
    }
}

#[test]
fn a_screen_reader_is_told_what_each_part_is_and_what_happens() {
    let Some(browser) = Browser::start(false) else { return };
    let dir = tempfile::tempdir().unwrap();
    let server = server(&dir.path().join("labels.jsonl"));
    opened(&browser, &server);
    let chat = [
        "heading Kindling",
        "tablist View",
        "tab Chat [selected true]",
        "tab Compare [selected false]",
        "button Use the dark theme",
        "tabpanel Chat",
        "combobox Model",
        "button New conversation",
        "list Conversation",
        "textbox Message",
        "button Send",
        "status  [live polite]",
    ];
    says(&browser, &chat);
    browser.keys("#message", "hi\n");
    browser.wait_for("document.querySelector('.assistant button')?.disabled === false");
    let answer = browser.script("return document.querySelector('.assistant .text').textContent");
    says(&browser, &["list Conversation", "heading You", "button Edit", "heading base", "button Retry"]);
    assert_eq!(browser.text("#announce").trim(), format!("base: {}", answer.as_str().unwrap()).trim());

    browser.click("#tab-compare");
    browser.script("document.querySelector('#seed').value = ''");
    let asking = [
        "tab Compare [selected true]",
        "tabpanel Compare",
        "group Two to four models",
        "checkbox base [checked true]",
        "checkbox dpo [checked true]",
        "textbox Your name",
        "textbox Message to all",
        "button Ask",
        "list Answers",
    ];
    says(&browser, &asking);
    ask(&browser, "hi");
    assert_eq!(browser.text("#announce"), "All have answered: which is best?");
    let judging = [
        "heading Message",
        "list Answers",
        "heading A",
        "heading D",
        "group Which answer is better?",
        "button A is best (A)",
        "button D is best (D)",
        "button All alike (T)",
        "button All bad (X)",
        "status ",
    ];
    says(&browser, &judging);
    // The group is told with its name, and the first button is the next thing in it.
    let focused = |property: &str| browser.script(&format!("return document.activeElement.{property}"));
    assert_eq!(focused("ariaLabel"), "Which answer is better?");
    browser.press(TAB);
    assert_eq!(focused("textContent"), "A is best (A)");
    judge(&browser, "b", "B judged best.");
    says(&browser, &["status  [live polite]", "group Back and on", "button Undo (U)"]);
    assert_eq!(focused("ariaLabel"), "Back and on");
    browser.press(TAB);
    assert_eq!(focused("textContent"), "Undo (U)");
    // An error is told at once.
    browser.script("for (const box of document.querySelectorAll('#rivals input')) box.checked = false");
    browser.keys("#question", "hi\n");
    browser.wait_for("!document.querySelector('#problem').hidden");
    says(&browser, &["alert  [live assertive]"]);
    browser.click("#rivals input");
    assert_eq!(browser.script("return document.querySelector('#problem').hidden"), true, "it may be right now");

    // Nothing that can be used is without a name.
    for tab in ["chat", "compare"] {
        browser.click(&format!("#tab-{tab}"));
        for line in browser.accessible() {
            let (role, name) = line.split_once(' ').unwrap();
            let is_control = ["button", "textbox", "checkbox", "combobox", "spinbutton", "tab"].contains(&role);
            assert!(!is_control || !(name.is_empty() || name.starts_with('[')), "{tab}: `{line}` has no name");
        }
    }
}
