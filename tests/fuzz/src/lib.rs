//! What the targets share: a mutator that knows JSON, a folder for files, checks of errors.

#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// The length in bytes of the longest error: no list in it may grow with the file.
const LONGEST_ERROR: usize = 20_000;

/// The file `name` in a folder of this process.
pub fn file(name: &str) -> PathBuf {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| tempfile::tempdir().expect("a temporary folder"));
    folder.path().join(name)
}

/// Writes `content` to the file `name` of `folder`, or removes it if there is none.
pub fn put(folder: &Path, name: &str, content: Option<&[u8]>) {
    let path = folder.join(name);
    match content {
        Some(content) => fs::write(path, content).expect("written"),
        None => drop(fs::remove_file(path)),
    }
}

/// Checks that an error says something, and not too much.
///
/// # Panics
/// If it does not.
pub fn check_error(error: &dyn std::error::Error) {
    let text = error.to_string();
    assert!(!text.trim().is_empty(), "an error without a text: {error:?}");
    assert!(text.len() <= LONGEST_ERROR, "an error of {} bytes", text.len());
}

/// A source of numbers for a mutation.
pub struct Numbers(pub u64);

impl Numbers {
    /// A number below `n`.
    ///
    /// # Source
    /// SplitMix64.
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n.max(1) as u64) as usize
    }

    /// One of `items`.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }
}

/// Mutates the first `size` bytes of `data`: mostly as JSON, so that the result still is some, with `words` for strings.
///
/// Returns the new size.
pub fn mutate(data: &mut [u8], size: usize, max_size: usize, seed: u32, words: &[&str]) -> usize {
    let mut numbers = Numbers(u64::from(seed));
    let parsed = serde_json::from_slice::<Value>(&data[..size]).ok().filter(|_| numbers.below(10) > 0);
    let Some(mut root) = parsed else { return libfuzzer_sys::fuzzer_mutate(data, size, max_size) };
    for _ in 0..=numbers.below(3) {
        let n_nodes = count(&root);
        let mut donor = root.clone();
        let donor = nth(&mut donor, &mut numbers.below(n_nodes)).cloned().unwrap_or_default();
        if let Some(node) = nth(&mut root, &mut numbers.below(n_nodes)) {
            change(node, donor, words, &mut numbers);
        }
    }
    let text = root.to_string();
    if text.len() > max_size {
        return libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    }
    data[..text.len()].copy_from_slice(text.as_bytes());
    text.len()
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(entries) => entries.values().map(count).sum(),
        _ => 0,
    }
}

/// The node at `index`, in the order of the text.
fn nth<'a>(value: &'a mut Value, index: &mut usize) -> Option<&'a mut Value> {
    if *index == 0 {
        return Some(value);
    }
    *index -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| nth(item, index)),
        Value::Object(entries) => entries.values_mut().find_map(|item| nth(item, index)),
        _ => None,
    }
}

fn change(node: &mut Value, donor: Value, words: &[&str], numbers: &mut Numbers) {
    match (numbers.below(8), &mut *node) {
        (0, _) => *node = constant(words, numbers),
        (1, _) => *node = donor,
        (2, _) => *node = json!([node.take()]),
        (3 | 4, Value::Object(entries)) => change_entries(entries, donor, words, numbers),
        (3 | 4, Value::Array(items)) => match numbers.below(4) {
            0 => items.push(donor),
            1 => items.insert(0, donor),
            _ if items.is_empty() => items.push(constant(words, numbers)),
            2 => drop(items.remove(numbers.below(items.len()))),
            _ => items.push(items[numbers.below(items.len())].clone()),
        },
        (_, Value::String(text)) => change_text(text, &donor, words, numbers),
        (_, Value::Number(number)) => {
            let (whole, real) = (number.as_i64().unwrap_or(1), number.as_f64().unwrap_or(1.0));
            *node = match numbers.below(6) {
                0 => json!(whole.wrapping_add(1)),
                1 => json!(whole.wrapping_sub(1)),
                2 => json!(whole.wrapping_mul(2)),
                3 => json!(whole.wrapping_neg()),
                4 => json!(real * 1e10),
                _ => json!(numbers.below(300)),
            }
        }
        (_, Value::Bool(flag)) => *flag = !*flag,
        (_, Value::Array(items)) if items.len() > 1 => {
            let (a, b) = (numbers.below(items.len()), numbers.below(items.len()));
            items.swap(a, b);
        }
        (_, Value::Object(entries)) => change_entries(entries, donor, words, numbers),
        (..) => *node = constant(words, numbers),
    }
}

fn change_entries(entries: &mut Map<String, Value>, donor: Value, words: &[&str], numbers: &mut Numbers) {
    let keys: Vec<String> = entries.keys().cloned().collect();
    match numbers.below(4) {
        0 if !keys.is_empty() => drop(entries.remove(numbers.pick(&keys).as_str())),
        1 if !keys.is_empty() => drop(entries.insert(numbers.pick(&keys).clone(), donor)),
        2 if !keys.is_empty() => {
            let mut key = numbers.pick(&keys).clone();
            let value = entries.remove(&key).unwrap_or_default();
            change_text(&mut key, &donor, words, numbers);
            entries.insert(key, value);
        }
        _ => drop(entries.insert((*numbers.pick(words)).to_owned(), donor)),
    }
}

fn change_text(text: &mut String, donor: &Value, words: &[&str], numbers: &mut Numbers) {
    const CHARS: [char; 16] =
        ['a', ' ', '\n', '\r', '\t', '<', '>', '|', '{', '}', '%', '\'', 'é', '字', '🦊', '\u{0}'];
    let bounds: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    let (a, b) = (*numbers.pick(&bounds), *numbers.pick(&bounds));
    let (start, end) = (a.min(b), a.max(b));
    match numbers.below(7) {
        0 => text.insert_str(start, words[numbers.below(words.len())]),
        1 => text.insert(start, *numbers.pick(&CHARS)),
        2 => text.replace_range(start..end, ""),
        3 if end - start < 200 => text.insert_str(start, &text[start..end].to_owned()),
        4 => text.insert_str(start, donor.as_str().unwrap_or("x")),
        5 => text.replace_range(start..bounds.iter().find(|at| **at > start).map_or(start, |at| *at), ""),
        _ => *text = (*numbers.pick(words)).to_owned(),
    }
}

fn constant(words: &[&str], numbers: &mut Numbers) -> Value {
    match numbers.below(16) {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(false),
        3 => json!(0),
        4 => json!(1),
        5 => json!(-1),
        6 => json!(u32::MAX),
        7 => json!(u64::MAX),
        8 => json!(1e308),
        9 => json!(1e-320),
        10 => json!(-0.0),
        11 => json!([]),
        12 => json!({}),
        13 => json!(""),
        14 => json!(1u64 << 24),
        _ => json!(*numbers.pick(words)),
    }
}
