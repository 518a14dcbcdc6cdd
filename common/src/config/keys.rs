//! Every key of a configuration, with its type, range, default and meaning, as the types and their doc comments say.
//!
//! A configuration derives [`JsonSchema`]; `#[schemars(range(min = 1))]` or `extend("exclusiveMinimum" = 0)` on a field is
//! the only place where the range of a number is stated. [`check`] holds a file to it, [`print`](super::print) and the
//! reference in `docs/` show it.

use std::fmt;

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema};
use serde::de::{DeserializeSeed, IntoDeserializer, Visitor};
use serde_json::{Map, Value};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The largest integer that TOML can express.
const LARGEST_INTEGER: i128 = i64::MAX as i128;

/// From this value on, digits are grouped by underscores.
const GROUPED_FROM: i128 = 10_000;

/// A table of a configuration and its keys.
#[derive(Debug, Clone, PartialEq)]
pub struct Section {
    /// Dotted path of the table; empty for the top level.
    pub path: String,
    /// Meaning of the table.
    pub doc: String,
    /// Whether the table may be absent, which is then its default.
    pub optional: bool,
    /// The keys in their order in the program.
    pub keys: Vec<Key>,
}

/// One key of a [`Section`].
#[derive(Debug, Clone, PartialEq)]
pub struct Key {
    /// Name within the section.
    pub name: String,
    /// Meaning of the key.
    pub doc: String,
    /// The values it accepts.
    pub kind: Kind,
    /// The default as JSON; `None` where the key may be absent or has to be given.
    pub default: Option<Value>,
    /// Whether the key has to be given wherever its section is.
    pub required: bool,
}

/// The values that a key accepts.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A whole number, both bounds included.
    Integer {
        /// The least.
        min: i128,
        /// The largest.
        max: i128,
    },
    /// A finite number.
    Number(Interval),
    /// Any string.
    Text,
    /// One of these strings, each with its meaning.
    Choice(Vec<(String, String)>),
    /// A list, of a fixed length where there is one.
    List(Box<Kind>, Option<u64>),
}

/// An interval of the real line.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Interval {
    min: Option<f64>,
    above: Option<f64>,
    max: Option<f64>,
    below: Option<f64>,
}

impl Interval {
    /// The lower and the upper end, where there is one.
    pub fn ends(&self) -> [Option<f64>; 2] {
        [self.min.or(self.above), self.max.or(self.below)]
    }

    fn contains(&self, x: f64) -> bool {
        x.is_finite()
            && self.min.is_none_or(|min| x >= min)
            && self.above.is_none_or(|above| x > above)
            && self.max.is_none_or(|max| x <= max)
            && self.below.is_none_or(|below| x < below)
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lower = self.min.map(|x| ("of at least", short(x))).or(self.above.map(|x| ("above", short(x))));
        let upper = self.max.map(|x| ("at most", short(x))).or(self.below.map(|x| ("below", short(x))));
        match (lower, upper) {
            (Some((_, min)), Some((_, max))) if self.min.is_some() && self.max.is_some() => {
                write!(f, "a number from {min} to {max}")
            }
            (Some((lower, x)), Some((upper, y))) => write!(f, "a number {lower} {x} and {upper} {y}"),
            (Some((lower, x)), None) => write!(f, "a number {lower} {x}"),
            (None, Some(("at most", y))) => write!(f, "a number of at most {y}"),
            (None, Some((upper, y))) => write!(f, "a number {upper} {y}"),
            (None, None) => f.write_str("a number"),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool => f.write_str("`true` or `false`"),
            // Everywhere but in an error the largest number that TOML can express is no limit.
            Self::Integer { min, max: LARGEST_INTEGER } if !f.alternate() => {
                write!(f, "a whole number of at least {}", grouped(*min))
            }
            Self::Integer { min, max } => write!(f, "a whole number from {} to {}", grouped(*min), grouped(*max)),
            Self::Number(interval) => interval.fmt(f),
            Self::Text => f.write_str("a string"),
            Self::Choice(choices) => {
                let names: Vec<String> = choices.iter().map(|(name, _)| format!("`{name}`")).collect();
                match names.split_last() {
                    Some((last, rest)) if !rest.is_empty() => write!(f, "{} or {last}", rest.join(", ")),
                    _ => f.write_str(&names.concat()),
                }
            }
            Self::List(item, length) => {
                let item = item.to_string();
                let each = item.strip_prefix("a ").unwrap_or(&item);
                match length {
                    Some(length) => write!(f, "a list of {length}, each a {each}"),
                    None => write!(f, "a list, each a {each}"),
                }
            }
        }
    }
}

/// All sections of the configuration `T`, the top level first.
pub fn sections<T: JsonSchema>() -> Vec<Section> {
    let root = schema_of::<T>();
    let mut sections = Vec::new();
    collect("", root.as_object(), None, false, &mut sections);
    sections
}

fn schema_of<T: JsonSchema>() -> Schema {
    let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    settings.into_generator().into_root_schema_for::<T>()
}

/// Adds the table `schema` and the tables in it. `default` is the value that the table around it takes by default.
fn collect(
    path: &str,
    schema: Option<&Map<String, Value>>,
    default: Option<&Value>,
    optional: bool,
    into: &mut Vec<Section>,
) {
    let Some(schema) = schema else { return };
    let at = into.len();
    into.push(Section { path: path.to_owned(), doc: doc(schema), optional, keys: Vec::new() });
    let required: Vec<&str> =
        schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    for (name, property) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let Some(property) = property.as_object() else { continue };
        let own = default.and_then(|table| table.get(name)).or(property.get("default")).filter(|v| !v.is_null());
        if let Some((table, optional)) = as_table(property) {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            let mut table = table.clone();
            // The field says more than the type.
            if let Some(description) = property.get("description") {
                table.insert("description".into(), description.clone());
            }
            collect(&path, Some(&table), own, optional, into);
        } else if let Some(kind) = kind(property) {
            into[at].keys.push(Key {
                name: name.clone(),
                doc: doc(property),
                kind,
                default: own.cloned(),
                required: required.contains(&name.as_str()),
            });
        }
    }
}

/// The schema of a table, and whether it may be absent.
fn as_table(schema: &Map<String, Value>) -> Option<(&Map<String, Value>, bool)> {
    if schema.contains_key("properties") {
        return Some((schema, has_type(schema, "null")));
    }
    let variants = schema.get("anyOf")?.as_array()?;
    variants.iter().filter_map(Value::as_object).find(|s| s.contains_key("properties")).map(|table| (table, true))
}

fn kind(schema: &Map<String, Value>) -> Option<Kind> {
    if let Some(variants) = schema.get("anyOf").and_then(Value::as_array) {
        return variants.iter().filter_map(Value::as_object).find_map(kind);
    }
    let number = |name: &str| schema.get(name).and_then(Value::as_f64);
    let integer = |name: &str| schema.get(name).and_then(|v| v.as_i64().or_else(|| v.as_f64().map(|x| x as i64)));
    if let Some(variants) = schema.get("oneOf").and_then(Value::as_array) {
        let choices = variants.iter().filter_map(Value::as_object).flat_map(|variant| {
            let names = variant
                .get("const")
                .into_iter()
                .chain(variant.get("enum").and_then(Value::as_array).into_iter().flatten());
            names.filter_map(Value::as_str).map(|name| (name.to_owned(), doc(variant)))
        });
        return Some(Kind::Choice(choices.collect()));
    }
    if let Some(names) = schema.get("enum").and_then(Value::as_array) {
        return Some(Kind::Choice(
            names.iter().filter_map(Value::as_str).map(|n| (n.to_owned(), String::new())).collect(),
        ));
    }
    if has_type(schema, "boolean") {
        Some(Kind::Bool)
    } else if has_type(schema, "integer") {
        let min = integer("minimum").map_or(i128::from(i64::MIN), i128::from);
        Some(Kind::Integer { min, max: integer("maximum").map_or(LARGEST_INTEGER, i128::from) })
    } else if has_type(schema, "number") {
        Some(Kind::Number(Interval {
            min: number("minimum"),
            above: number("exclusiveMinimum"),
            max: number("maximum"),
            below: number("exclusiveMaximum"),
        }))
    } else if has_type(schema, "array") {
        // Bounds stated on a list are those of its items.
        let mut item = schema.get("items")?.as_object()?.clone();
        for bound in ["minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"] {
            item.extend(schema.get(bound).map(|value| (bound.to_owned(), value.clone())));
        }
        let length = schema.get("minItems").filter(|min| Some(*min) == schema.get("maxItems")).and_then(Value::as_u64);
        Some(Kind::List(Box::new(kind(&item)?), length))
    } else {
        has_type(schema, "string").then_some(Kind::Text)
    }
}

fn has_type(schema: &Map<String, Value>, name: &str) -> bool {
    match schema.get("type") {
        Some(Value::String(only)) => only == name,
        Some(Value::Array(several)) => several.iter().any(|one| one == name),
        _ => false,
    }
}

/// The doc comment, each paragraph on one line.
fn doc(schema: &Map<String, Value>) -> String {
    let text = schema.get("description").and_then(Value::as_str).unwrap_or_default();
    text.split("\n\n").map(|paragraph| paragraph.replace('\n', " ")).collect::<Vec<_>>().join("\n\n")
}

/// Checks type and range of every value of `root` that belongs to a key of `T`.
///
/// Unknown and missing keys are not looked at: deserialising finds them.
///
/// # Errors
/// At the first value that its key does not accept, with its place in the text.
pub(super) fn check<T: JsonSchema>(root: &DeTable<'_>) -> Result<(), toml::de::Error> {
    for section in sections::<T>() {
        let Some(table) = table_at(root, &section.path) else { continue };
        for key in &section.keys {
            if let Some(value) = table.get(key.name.as_str())
                && let Err(wrong) = key.kind.check(value)
            {
                let expected = format!("`{}` to be {:#}", section.dotted(key), key.kind);
                let refusal = Refusal(format!("invalid value {}, expected {expected}", shown(wrong.get_ref())));
                return refusal.deserialize(Spanned::new(wrong.span(), DeValue::Boolean(false)).into_deserializer());
            }
        }
    }
    Ok(())
}

fn table_at<'a, 'i>(root: &'a DeTable<'i>, path: &str) -> Option<&'a DeTable<'i>> {
    path.split('.').filter(|name| !name.is_empty()).try_fold(root, |table, name| match table.get(name)?.get_ref() {
        DeValue::Table(inner) => Some(inner),
        _ => None,
    })
}

impl Section {
    /// The key's dotted path from the top level, as `--set` takes it.
    pub fn dotted(&self, key: &Key) -> String {
        if self.path.is_empty() { key.name.clone() } else { format!("{}.{}", self.path, key.name) }
    }
}

impl Kind {
    /// The first value within `value` that is not accepted.
    fn check<'a, 'i>(&self, value: &'a Spanned<DeValue<'i>>) -> Result<(), &'a Spanned<DeValue<'i>>> {
        let accepted = match (self, value.get_ref()) {
            // Which strings a choice knows serde says better, with the nearest one.
            (Self::Bool, DeValue::Boolean(_)) | (Self::Text | Self::Choice(_), DeValue::String(_)) => true,
            // A single path may stand for a list of paths.
            (Self::List(item, None), DeValue::String(_)) => **item == Self::Text,
            (Self::Integer { min, max }, DeValue::Integer(found)) => {
                i128::from_str_radix(found.as_str(), found.radix()).is_ok_and(|found| (*min..=*max).contains(&found))
            }
            (Self::Number(interval), DeValue::Integer(found)) => {
                i128::from_str_radix(found.as_str(), found.radix()).is_ok_and(|found| interval.contains(found as f64))
            }
            (Self::Number(interval), DeValue::Float(found)) => {
                found.as_str().parse().is_ok_and(|found| interval.contains(found))
            }
            (Self::List(item, length), DeValue::Array(items)) => {
                for inner in items {
                    item.check(inner)?;
                }
                length.is_none_or(|length| items.len() as u64 == length)
            }
            _ => false,
        };
        if accepted { Ok(()) } else { Err(value) }
    }
}

/// A value in an error, as far as it fits on a line.
fn shown(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("{text:?}"),
        DeValue::Integer(number) => format!("`{number}`"),
        DeValue::Float(number) => format!("`{}`", number.as_str()),
        DeValue::Boolean(either) => format!("`{either}`"),
        DeValue::Datetime(time) => format!("`{time}`"),
        DeValue::Array(items) if items.is_empty() => "`[]`".to_owned(),
        DeValue::Array(_) => "(a list)".to_owned(),
        DeValue::Table(_) => "(a table)".to_owned(),
    }
}

/// Fails to deserialise with this message, to which `toml` adds the place.
struct Refusal(String);

impl<'de> DeserializeSeed<'de> for Refusal {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_bool(self)
    }
}

impl Visitor<'_> for Refusal {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("another value")
    }

    fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<(), E> {
        Err(E::custom(self.0))
    }
}

/// `x` with an exponent where zeros would fill the line.
fn short(x: f64) -> String {
    if x == 0.0 || (1e-3..1e6).contains(&x.abs()) { format!("{x}") } else { format!("{x:e}") }
}

/// `n` with underscores, as TOML accepts it.
fn grouped(n: i128) -> String {
    let digits = n.unsigned_abs().to_string();
    if n.abs() < GROUPED_FROM {
        return n.to_string();
    }
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push('_');
        }
        text.push(digit);
    }
    if n < 0 { format!("-{text}") } else { text }
}
