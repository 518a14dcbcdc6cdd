//! Headless Chromium, driven through `WebDriver`.
//!
//! # Source
//! W3C, "`WebDriver`", the endpoints used here: new session, navigate, element click and send keys, execute script, take
//! screenshot, set window rect; `se/log` and `goog/cdp/execute`, which speaks the `DevTools` protocol, are chromedriver's own.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_mins(2);

/// The key under which `WebDriver` names an element.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// A browser without a window that asks nobody but the page's server.
const FLAGS: [&str; 10] = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
];

/// A browser with one window; closes with the value.
pub(crate) struct Browser {
    driver: Child,
    agent: ureq::Agent,
    session: String,
    /// What the browser keeps: nothing of any other.
    _profile: TempDir,
}

impl Browser {
    /// Starts Chromium, if it is there with its driver; else says why the test is skipped.
    pub(crate) fn start(dark: bool) -> Option<Self> {
        let driver = Command::new("chromedriver").arg("--port=0").stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let Ok(mut driver) = driver else {
            eprintln!("skipped: there is no `chromedriver` (Debian: chromium and chromium-driver)");
            return None;
        };
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port =
            lines.find_map(|line| line.unwrap().strip_suffix('.')?.rsplit_once("on port ")?.1.parse::<u16>().ok());
        let config = ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(PATIENCE));
        let profile = tempfile::tempdir().unwrap();
        let kept = format!("--user-data-dir={}", profile.path().display());
        let mut browser = Self { driver, agent: config.build().into(), session: String::new(), _profile: profile };
        browser.session = format!("http://127.0.0.1:{}/session", port.expect("chromedriver says its port"));
        let mut flags = vec![&*kept];
        flags.extend(FLAGS);
        flags.extend(dark.then_some("--force-dark-mode"));
        let chrome = json!({
            "goog:chromeOptions": { "args": flags },
            "goog:loggingPrefs": { "browser": "ALL" },
        });
        let begun = browser.call("", &json!({ "capabilities": { "alwaysMatch": chrome } }));
        browser.session += &format!("/{}", begun["sessionId"].as_str().unwrap());
        Some(browser)
    }

    fn call(&self, path: &str, body: &Value) -> Value {
        let request = self.agent.post(format!("{}{path}", self.session)).header("content-type", "application/json");
        let mut response = request.send(body.to_string().as_bytes()).unwrap();
        let text = response.body_mut().with_config().limit(50 << 20).read_to_string().unwrap();
        assert!(response.status().is_success(), "{path}: {text}");
        serde_json::from_str::<Value>(&text).unwrap()["value"].take()
    }

    /// Opens a page.
    pub(crate) fn open(&self, url: &str) {
        self.call("/url", &json!({ "url": url }));
    }

    /// What a script returns.
    pub(crate) fn script(&self, script: &str) -> Value {
        self.call("/execute/sync", &json!({ "script": script, "args": [] }))
    }

    /// Waits until an expression is true.
    #[track_caller]
    pub(crate) fn wait_for(&self, expression: &str) {
        let began = Instant::now();
        while self.script(&format!("return Boolean({expression})")) != true {
            let page = self.script("return document.body.innerText");
            assert!(began.elapsed() < PATIENCE, "`{expression}` stays false: {page}; {:?}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The text that an element shows.
    #[track_caller]
    pub(crate) fn text(&self, selector: &str) -> String {
        let text = self.script(&format!("return document.querySelector({selector:?})?.innerText"));
        text.as_str().unwrap_or_else(|| panic!("there is no `{selector}`")).to_owned()
    }

    fn element(&self, selector: &str) -> String {
        let found = self.call("/element", &json!({ "using": "css selector", "value": selector }));
        found[ELEMENT].as_str().unwrap().to_owned()
    }

    /// Clicks as a person does: what cannot be seen or is covered cannot be clicked.
    pub(crate) fn click(&self, selector: &str) {
        self.call(&format!("/element/{}/click", self.element(selector)), &json!({}));
    }

    /// Types into an element.
    pub(crate) fn keys(&self, selector: &str, text: &str) {
        self.call(&format!("/element/{}/value", self.element(selector)), &json!({ "text": text }));
    }

    /// Presses a key, wherever the focus is.
    pub(crate) fn press(&self, key: &str) {
        let actions = json!([{ "type": "keyDown", "value": key }, { "type": "keyUp", "value": key }]);
        self.call("/actions", &json!({ "actions": [{ "type": "key", "id": "keyboard", "actions": actions }] }));
    }

    /// Has the system prefer the theme `light` or `dark` from now on.
    ///
    /// # Source
    /// Chrome's `DevTools` protocol, `Emulation.setEmulatedMedia`.
    pub(crate) fn prefer(&self, theme: &str) {
        let params = json!({ "features": [{ "name": "prefers-color-scheme", "value": theme }] });
        self.call("/goog/cdp/execute", &json!({ "cmd": "Emulation.setEmulatedMedia", "params": params }));
    }

    /// Sets the size of the window, in CSS pixels.
    pub(crate) fn resize(&self, width: u32, height: u32) {
        self.call("/window/rect", &json!({ "width": width, "height": height }));
    }

    /// Saves what the window shows as PNG where `KINDLING_SCREENSHOTS` names a folder.
    pub(crate) fn screenshot(&self, name: &str) {
        let Some(folder) = std::env::var_os("KINDLING_SCREENSHOTS") else { return };
        let response = self.agent.get(format!("{}/screenshot", self.session)).call().unwrap();
        let text = response.into_body().with_config().limit(50 << 20).read_to_string().unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        let path = Path::new(&folder).join(format!("{name}.png"));
        std::fs::write(path, from_base64(json["value"].as_str().unwrap())).unwrap();
    }

    /// What a screen reader is told: `role name` of each part of the page that is there for it, in the page's order.
    ///
    /// # Source
    /// Chrome's `DevTools` protocol, `Accessibility.getFullAXTree`.
    pub(crate) fn accessible(&self) -> Vec<String> {
        let tree = self.call("/goog/cdp/execute", &json!({ "cmd": "Accessibility.getFullAXTree", "params": {} }));
        let nodes: HashMap<&str, &Value> =
            tree["nodes"].as_array().unwrap().iter().map(|node| (node["nodeId"].as_str().unwrap(), node)).collect();
        let root = tree["nodes"].as_array().unwrap().iter().find(|node| node.get("parentId").is_none()).unwrap();
        let (mut said, mut to_visit) = (Vec::new(), vec![root]);
        while let Some(node) = to_visit.pop() {
            if node["ignored"] == false {
                said.push(described(node));
            }
            let children = node["childIds"].as_array().unwrap().iter().rev();
            to_visit.extend(children.filter_map(|id| nodes.get(id.as_str().unwrap())));
        }
        said
    }

    /// What the browser's console says: warnings and errors, refusals of the security policy among them.
    pub(crate) fn log(&self) -> Vec<String> {
        let log = self.call("/se/log", &json!({ "type": "browser" }));
        log.as_array().unwrap().iter().map(|entry| entry["message"].as_str().unwrap().to_owned()).collect()
    }
}

/// `role name`, and what of it changes with use: whether it is checked, selected, expanded or told of when it changes.
fn described(node: &Value) -> String {
    let text = |field: &Value| field["value"].as_str().unwrap_or_default().trim().to_owned();
    let mut said = format!("{} {}", text(&node["role"]), text(&node["name"]));
    for property in node["properties"].as_array().into_iter().flatten() {
        let name = property["name"].as_str().unwrap();
        let value = &property["value"]["value"];
        match name {
            "checked" | "selected" | "expanded" | "live" | "busy" => {
                let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                said += &format!(" [{name} {value}]");
            }
            _ => {}
        }
    }
    said
}

/// The bytes that base64 stands for (RFC 4648, section 4).
fn from_base64(text: &str) -> Vec<u8> {
    let digits = ('A'..='Z').chain('a'..='z').chain('0'..='9').chain(['+', '/']).collect::<String>();
    let value = |c: char| digits.find(c).unwrap() as u32;
    let groups = text.as_bytes().chunks(4).map(|group| std::str::from_utf8(group).unwrap().trim_end_matches('='));
    groups
        .flat_map(|group| {
            let bits = group.chars().enumerate().fold(0, |bits, (i, c)| bits | value(c) << (18 - 6 * i));
            bits.to_be_bytes()[1..group.len()].to_vec()
        })
        .collect()
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Closes Chromium with it.
        let _ = self.agent.delete(&self.session).call();
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}
