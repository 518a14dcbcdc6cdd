//! A configuration as TOML with every key, its meaning in comments: what `--print-config` shows.

use std::fmt::Write as _;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

use super::keys::{Key, Kind, Section, sections};

/// Columns of a comment.
const WIDTH: usize = 100;

/// `config` with all keys and their doc comments; keys and tables that are absent appear commented out.
///
/// The text is TOML that [`parse`](super::parse) reads back as `config`.
///
/// # Panics
/// If a map in `config` has keys that are not strings; no configuration has.
pub fn print<T: Serialize + JsonSchema>(config: &T) -> String {
    print_as("", config)
}

/// [`print`] of one configuration among several: as the table `name`, unless that is empty.
///
/// # Panics
/// As `print`.
pub fn print_as<T: Serialize + JsonSchema>(name: &str, config: &T) -> String {
    let values = serde_json::to_value(config).expect("a configuration is a table of strings, numbers and lists");
    let mut text = String::new();
    for mut section in sections::<T>() {
        let table = section.path.split('.').filter(|name| !name.is_empty()).try_fold(&values, |v, name| v.get(name));
        let names = [name, &section.path];
        section.path = names.into_iter().filter(|name| !name.is_empty()).collect::<Vec<_>>().join(".");
        section.print(table, &mut text);
    }
    text
}

impl Section {
    fn print(&self, table: Option<&Value>, text: &mut String) {
        let mark = if table.is_some() { "" } else { "# " };
        if self.path.is_empty() {
            comment(&self.doc, text);
        } else {
            text.push('\n');
            comment(&self.doc, text);
            let _ = writeln!(text, "{mark}[{}]", self.path);
        }
        for key in &self.keys {
            text.push('\n');
            comment(&key.meaning(), text);
            let value = match table {
                Some(table) => table.get(&key.name).filter(|value| !value.is_null()),
                None => key.default.as_ref(),
            };
            let _ = match value {
                Some(value) => writeln!(text, "{mark}{} = {}", key.name, toml_text(value)),
                None => writeln!(text, "# {} =", key.name),
            };
        }
    }
}

impl Key {
    /// Meaning and accepted values, as a comment says them.
    fn meaning(&self) -> String {
        let mut text = self.doc.clone();
        match &self.kind {
            Kind::Bool | Kind::Text => {}
            Kind::Choice(choices) => {
                for (name, doc) in choices {
                    let doc = doc.split("\n\n").next().unwrap_or_default();
                    let _ = write!(text, "\n  {}: {doc}", toml_text(&Value::String(name.clone())));
                }
            }
            Kind::List(item, None) if matches!(**item, Kind::Text) => {}
            kind => {
                let kind = kind.to_string();
                let mut letters = kind.chars();
                let first = letters.next().map_or(String::new(), |first| first.to_uppercase().to_string());
                let _ = write!(text, " {first}{}.", letters.as_str());
            }
        }
        text
    }
}

/// Appends `doc` as comment lines.
fn comment(doc: &str, text: &mut String) {
    for paragraph in doc.lines().filter(|line| !line.trim().is_empty()) {
        let indent = &paragraph[..paragraph.len() - paragraph.trim_start().len()];
        let mut line = format!("# {indent}");
        for (i, word) in paragraph.split_whitespace().enumerate() {
            if i > 0 && line.chars().count() + 1 + word.chars().count() > WIDTH {
                let _ = writeln!(text, "{line}");
                // The text after a choice's name stands under it, further in.
                line = format!("# {indent}{indent}");
            } else if i > 0 {
                line.push(' ');
            }
            line.push_str(word);
        }
        let _ = writeln!(text, "{line}");
    }
}

/// `value` as TOML on one line; numbers in their shortest form.
pub fn toml_text(value: &Value) -> String {
    match value {
        Value::String(text) => toml::Value::String(text.clone()).to_string(),
        Value::Array(items) => format!("[{}]", items.iter().map(toml_text).collect::<Vec<_>>().join(", ")),
        other => other.to_string(),
    }
}
