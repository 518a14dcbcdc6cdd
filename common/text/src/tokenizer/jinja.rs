//! Additions of transformers to Jinja, and Python's strings where minijinja's differ.

use std::fmt::Write as _;
use std::io::{self, Write};

use chrono::Local;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::Formatter;

/// How many bytes `tojson` may write: a list can hold one long text many times.
const MAX_JSON: usize = 1 << 24;

/// The longest list that an addition may make.
const MAX_ITEMS: usize = 1 << 16;

/// The operator `+`, with its result paid for before it is made.
pub(super) fn add(state: &State, a: &Value, b: &Value) -> Result<Value, Error> {
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        state.consume_fuel((a.len() + b.len()) as u64 / 64)?;
        return Ok(Value::from([a, b].concat()));
    }
    if is_list(a) && is_list(b) {
        let n_items = a.len().zip(b.len()).map(|(a, b)| a.saturating_add(b)).filter(|n| *n <= MAX_ITEMS);
        let n_items = n_items.ok_or_else(|| Error::from(ErrorKind::OutOfFuel))?;
        state.consume_fuel(n_items as u64)?;
        return Ok(a.try_iter()?.chain(b.try_iter()?).collect());
    }
    state.env().compile_expression("a + b")?.eval(context! { a, b })
}

/// The operator `~`, likewise.
pub(super) fn concat(state: &State, a: &Value, b: &Value) -> Result<Value, Error> {
    let [a, b] = [printed(a)?, printed(b)?];
    state.consume_fuel((a.len() + b.len()) as u64 / 64)?;
    Ok(Value::from(a + &b))
}

/// Writes `value` to the output.
pub(super) fn write(out: &mut Output, _: &mut State, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => out.write_str(text)?,
        None => out.write_str(&printed(value)?)?,
    }
    Ok(())
}

/// The filter `string`.
pub(super) fn string(value: &Value) -> Result<String, Error> {
    printed(value)
}

/// `value` as text. Of lists and dictionaries Python writes another form, and their text can be without end.
fn printed(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map | ValueKind::Plain => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("a {} cannot be written but by `tojson`", value.kind()),
        )),
        _ => Ok(value.to_string()),
    }
}

/// The filter `join`, with each item paid for before it is written: a list can hold one long text many times.
pub(super) fn join(state: &State, items: &Value, separator: Option<&str>) -> Result<String, Error> {
    let separator = separator.unwrap_or_default();
    let mut text = String::new();
    for (i, item) in items.try_iter()?.enumerate() {
        let item = printed(&item)?;
        state.consume_fuel(1 + (separator.len() + item.len()) as u64 / 64)?;
        if i > 0 {
            text += separator;
        }
        text += &item;
    }
    Ok(text)
}

/// The filter `indent`: `width` spaces before each line but the first and empty ones.
#[expect(clippy::needless_pass_by_value, reason = "the signature of a filter")]
pub(super) fn indent(
    state: &State,
    text: &str,
    width: Option<usize>,
    first: Option<bool>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let width = width.or(kwargs.get("width")?).unwrap_or(4);
    let first = first.or(kwargs.get("first")?).unwrap_or(false);
    let blank: Option<bool> = kwargs.get("blank")?;
    kwargs.assert_all_used()?;
    let mut indented = String::new();
    let ended = format!("{text}\n");
    for (i, line) in lines(&ended).enumerate() {
        let width = if (i == 0 && first) || (i > 0 && (blank == Some(true) || !line.is_empty())) { width } else { 0 };
        state.consume_fuel(1 + (width as u64).saturating_add(line.len() as u64) / 64)?;
        indented.push_str(if i == 0 { "" } else { "\n" });
        indented.extend(std::iter::repeat_n(' ', width));
        indented += line;
    }
    Ok(indented)
}

/// The lines of `text` as Python's `splitlines` ends them.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    let is_end = |c: char| {
        matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let Some(end) = rest.find(is_end) else { return Some(std::mem::take(&mut rest)) };
        let line = &rest[..end];
        let n_bytes =
            if rest[end..].starts_with("\r\n") { 2 } else { rest[end..].chars().next().map_or(0, char::len_utf8) };
        rest = &rest[end + n_bytes..];
        Some(line)
    })
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

/// Methods of Python's strings, lists and dictionaries.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), name, args) {
        (Some(text), "strip", []) => Ok(Value::from(text.trim_matches(is_space))),
        (Some(text), "lstrip", []) => Ok(Value::from(text.trim_start_matches(is_space))),
        (Some(text), "rstrip", []) => Ok(Value::from(text.trim_end_matches(is_space))),
        (Some(text), "split", []) => {
            Ok(text.split(is_space).filter(|word| !word.is_empty()).map(Value::from).collect())
        }
        (Some(text), "splitlines", []) => Ok(lines(text).map(Value::from).collect()),
        (Some(text), "title", []) => Ok(Value::from(title(text))),
        (Some(text), "join", [items]) => Ok(Value::from(join(state, items, Some(text))?)),
        _ => unknown_method_callback(state, value, name, args),
    }
}

/// The filter `trim`, which in Jinja is `str.strip`.
#[expect(clippy::needless_pass_by_value, reason = "the signature of a filter")]
pub(super) fn trim(text: String, chars: Option<String>) -> String {
    match chars {
        Some(chars) => text.trim_matches(|c| chars.contains(c)).to_owned(),
        None => text.trim_matches(is_space).to_owned(),
    }
}

/// Letters after others in lower case, the rest in upper case.
fn title(text: &str) -> String {
    let mut in_word = false;
    let mut titled = String::with_capacity(text.len());
    for c in text.chars() {
        if in_word {
            titled.extend(c.to_lowercase());
        } else {
            titled.extend(c.to_uppercase());
        }
        in_word = c.is_lowercase() || c.is_uppercase();
    }
    titled
}

/// White space in Python: Unicode's and four control characters.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// The local time by a format of C's `strftime`.
pub(super) fn strftime_now(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    write!(text, "{}", Local::now().format(format)).map_err(|_| {
        Error::new(ErrorKind::InvalidOperation, format!("`{format}` is not a format of `strftime_now`"))
    })?;
    Ok(text)
}

/// The filter `tojson` of transformers: Python's `json.dumps`, without HTML's escapes.
#[expect(clippy::needless_pass_by_value, reason = "the signature of a filter")]
pub(super) fn to_json(state: &State, value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let failed = |reason: &str| Error::new(ErrorKind::InvalidOperation, format!("`tojson`: {reason}"));
    let ensure_ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators: Option<Value> = kwargs.get("separators")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    kwargs.assert_all_used()?;
    if value.kind() == ValueKind::Undefined {
        return Err(failed("the value is undefined"));
    }
    if indent.is_some_and(|width| width > 16) {
        return Err(failed("`indent` is at most 16"));
    }
    let separator = |i: usize| separators.as_ref()?.get_item_by_index(i).ok()?.as_str().map(str::to_owned);
    let [items, keys] = match (separators.as_ref(), separator(0), separator(1)) {
        (None, ..) if indent.is_some() => [",".to_owned(), ": ".to_owned()],
        (None, ..) => [", ".to_owned(), ": ".to_owned()],
        (Some(_), Some(items), Some(keys)) => [items, keys],
        _ => return Err(failed("`separators` are two texts")),
    };
    let python = PythonJson { items, keys, indent, depth: 0, is_empty: true };
    let mut text = dump(value, python.clone()).map_err(|e| failed(&e))?;
    if sort_keys == Some(true) {
        let mut sorted: serde_json::Value = serde_json::from_str(&text).map_err(|e| failed(&e.to_string()))?;
        sorted.sort_all_objects();
        text = dump(&sorted, python).map_err(|e| failed(&e))?;
    }
    state.consume_fuel(text.len() as u64 / 4)?;
    Ok(Value::from(if ensure_ascii == Some(true) { ascii(&text) } else { text }))
}

fn dump(value: &impl Serialize, python: PythonJson) -> Result<String, String> {
    let mut out = Bounded(Vec::new());
    value.serialize(&mut Serializer::with_formatter(&mut out, python)).map_err(|e| e.to_string())?;
    String::from_utf8(out.0).map_err(|e| e.to_string())
}

/// Bytes, up to [`MAX_JSON`].
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_JSON {
            return Err(io::Error::other("the value is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `text` with everything beyond ASCII as `\u` escapes.
fn ascii(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}"); // a `String` takes everything
            }
        }
    }
    out
}

/// JSON with the white space that Python's `json.dumps` gives it.
#[derive(Clone)]
struct PythonJson {
    items: String,
    keys: String,
    indent: Option<usize>,
    depth: usize,
    is_empty: bool,
}

impl PythonJson {
    fn open<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.is_empty = true;
        out.write_all(bracket)
    }

    fn close<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.is_empty {
            self.break_line(out)?;
        }
        self.is_empty = false;
        out.write_all(bracket)
    }

    fn item<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            out.write_all(self.items.as_bytes())?;
        }
        self.is_empty = false;
        self.break_line(out)
    }

    fn break_line<W: ?Sized + Write>(&self, out: &mut W) -> io::Result<()> {
        match self.indent {
            Some(width) => write!(out, "\n{}", " ".repeat(width * self.depth)),
            None => Ok(()),
        }
    }
}

impl Formatter for PythonJson {
    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.keys.as_bytes())
    }
}
