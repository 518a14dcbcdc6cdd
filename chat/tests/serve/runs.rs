//! The page's view of training, in Chromium: folders and rows that lack something, and colours.

use std::path::Path;

use serde_json::{Value, json};

use crate::page::opened;
use crate::server::Server;
use crate::webdriver::Browser;

fn server(folder: &Path) -> Server {
    Server::start(&["--checkpoint", "lm", "--runs", folder.to_str().unwrap()])
}

fn write(folder: &Path, run: &str, rows: &[Value]) {
    std::fs::create_dir_all(folder.join(run)).unwrap();
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(folder.join(run).join("metrics.jsonl"), lines).unwrap();
}

#[test]
fn a_folder_without_runs_says_so_and_a_row_may_lack_its_counts() {
    let Some(browser) = Browser::start(false) else { return };
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path());
    opened(&browser, &server);
    browser.click("#tab-training");
    browser.wait_for("document.querySelector('#progress').textContent === 'There are no runs yet.'");
    assert_eq!(browser.script("return document.querySelector('#more-curves').hidden"), true, "there is nothing in it");
    browser.screenshot("training-no-runs");
    let progress = |expected: &str| {
        browser.wait_for(&format!("document.querySelector('#progress').textContent === {expected:?}"));
    };
    write(dir.path(), "sft", &[json!({ "step": 7, "seconds": 1.2, "train/loss": 2.5 })]);
    progress("Step 7 · 1 s");
    write(dir.path(), "sft", &[json!({ "step": 8000, "tokens": 1234, "train/loss": 2.5 })]);
    progress("Step 8,000 · 1,234 tokens");
    write(dir.path(), "sft", &[json!({ "step": 9, "train/loss": 2.5 })]);
    progress("Step 9");
    assert_eq!(browser.script("return document.querySelector('#problem').hidden"), true);
}

#[test]
fn held_out_data_has_one_colour_in_every_figure() {
    let Some(browser) = Browser::start(false) else { return };
    let dir = tempfile::tempdir().unwrap();
    let row = |step: f64| {
        json!({
            "step": step, "seconds": step, "tokens": step, "val/loss": 3.0 - step, "val/score": step.sin(),
            "objective/score": step, "objective/rlhf_reward": -step, "objective/kl": step, "val/kl": 2.0 * step,
            "gold/score": step, "gold/val_score": step + 1.0, "rewards/accuracies": step, "policy/loss": step,
            "val/eos_rate": step
        })
    };
    write(dir.path(), "ppo", &[1.0, 2.0, 3.0].map(row));
    let server = server(dir.path());
    opened(&browser, &server);
    browser.click("#tab-training");
    browser.wait_for("document.querySelectorAll('#curves figure').length === 5");
    browser.click("#more-curves summary");
    browser.screenshot("training-colours");
    // The curve and its name in the legend.
    let colours = browser.script(
        "return [...document.querySelectorAll('figure')].map((figure) => { \
             const curves = [...figure.querySelectorAll('.curve')].map((curve) => curve.classList[1]); \
             return [...figure.querySelectorAll('.legend span')].map((name, i) => \
                 [name.textContent, curves[i].at(-1), name.parentElement.className.at(-1)].join(' ')) })",
    );
    let expected = json!([
        ["val/loss 1 1"],
        ["objective/score 0 0", "objective/rlhf_reward 2 2", "val/score 1 1"],
        ["gold/score 0 0", "gold/val_score 1 1"],
        ["objective/kl 0 0", "val/kl 1 1"],
        ["rewards/accuracies 0 0"],
        ["policy/loss 0 0"],
        ["val/eos_rate 1 1"]
    ]);
    assert_eq!(colours, expected);
}

#[test]
fn the_views_and_the_theme_stand_in_one_line_of_a_telephone() {
    let Some(browser) = Browser::start(false) else { return };
    let dir = tempfile::tempdir().unwrap();
    // So many figures that the page has a scrollbar beside it.
    let figures =
        ["train/loss", "objective/score", "objective/kl", "gold/score"].map(|name| (name.to_owned(), json!(1)));
    let row: serde_json::Map<String, Value> = figures.into_iter().chain([("step".to_owned(), json!(1))]).collect();
    write(dir.path(), "ppo", &[Value::Object(row)]);
    let server = server(dir.path());
    opened(&browser, &server);
    for (width, theme, tab) in [(390, "Dark", "chat"), (390, "Light", "training"), (360, "Light", "chat")] {
        browser.resize(width, 800);
        browser.click(&format!("#tab-{tab}"));
        let n_figures = if tab == "training" { 4 } else { 0 };
        browser
            .wait_for(&format!("document.querySelectorAll('#training:not([hidden]) figure').length === {n_figures}"));
        if browser.text("#theme") != theme {
            browser.click("#theme");
        }
        let lines = browser.script(
            "const middle = ({ top, bottom }) => Math.round((top + bottom) / 2); \
             const parts = [...document.querySelectorAll('h1, nav button, #theme')]; \
             const lines = parts.map((part) => middle(part.getBoundingClientRect())); \
             return [innerWidth, parts.length, Math.max(...lines) - Math.min(...lines) < 3, \
                     document.documentElement.scrollWidth <= innerWidth]",
        );
        browser.screenshot(&format!("header-{width}-{tab}"));
        assert_eq!(lines, json!([width, 5, true, true]), "{theme} {tab}");
    }
}
