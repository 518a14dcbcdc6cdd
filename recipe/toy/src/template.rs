//! Sentence templates: `[this|that]` chooses, `{name}` is filled in.
//!
//! Choices do not nest, but may hold slots; what fills a slot may itself be a template. The same reader serves the
//! story-teller, which takes one way through a template, and the grammar, which takes them all.

use common::rng::Rng;

use super::words::article;

/// A piece of a template.
#[derive(Debug, PartialEq, Eq)]
pub enum Part<'t> {
    /// Words as they stand.
    Text(&'t str),
    /// Something to fill in.
    Slot(&'t str),
    /// One of these.
    Choice(Vec<Vec<Part<'t>>>),
}

/// The pieces of `template`.
///
/// # Panics
/// If a bracket is left open: templates are part of the program.
pub fn parse(template: &str) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    let mut rest = template;
    while let Some(at) = rest.find(['[', '{']) {
        if at > 0 {
            parts.push(Part::Text(&rest[..at]));
        }
        let close = if rest[at..].starts_with('[') { ']' } else { '}' };
        let end = at + rest[at..].find(close).unwrap_or_else(|| panic!("no `{close}` in `{template}`"));
        let inside = &rest[at + 1..end];
        parts.push(match close {
            ']' => Part::Choice(inside.split('|').map(parse).collect()),
            _ => Part::Slot(inside),
        });
        rest = &rest[end + 1..];
    }
    if !rest.is_empty() {
        parts.push(Part::Text(rest));
    }
    parts
}

/// One way through `template`, chosen by `rng`, with `fill` answering for the slots.
pub fn realise(template: &str, fill: &mut impl FnMut(&str, &mut Rng) -> String, rng: &mut Rng) -> String {
    let mut text = String::new();
    append(&parse(template), fill, rng, &mut text);
    with_articles(&text)
}

fn append(parts: &[Part<'_>], fill: &mut impl FnMut(&str, &mut Rng) -> String, rng: &mut Rng, text: &mut String) {
    for part in parts {
        match part {
            Part::Text(words) => text.push_str(words),
            Part::Choice(ways) => append(&ways[rng.below(ways.len())], fill, rng, text),
            Part::Slot(name) => {
                let filling = fill(name, rng);
                append(&parse(&filling), fill, rng, text);
            }
        }
    }
}

/// `text` with each `a` and `A` made `an` and `An` where the next word asks for it.
fn with_articles(text: &str) -> String {
    let mut words: Vec<&str> = text.split(' ').collect();
    for i in 1..words.len() {
        let next = words[i].trim_start_matches('"');
        words[i - 1] = match (words[i - 1], article(next)) {
            ("a", right) => right,
            ("A", "an") => "An",
            (other, _) => other,
        };
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::rng::Streams;

    #[test]
    fn a_template_is_text_choices_and_slots() {
        assert_eq!(
            parse("A [b|{c} d] e{f}"),
            [
                Part::Text("A "),
                Part::Choice(vec![vec![Part::Text("b")], vec![Part::Slot("c"), Part::Text(" d")]]),
                Part::Text(" e"),
                Part::Slot("f"),
            ]
        );
    }

    #[test]
    fn a_becomes_an_before_a_vowel() {
        let mut rng = Streams::new(0).get("test", 0);
        let mut fill = |_: &str, _: &mut Rng| "orange [owl|owl]".to_owned();
        assert_eq!(realise("A {x} saw a cat.", &mut fill, &mut rng), "An orange owl saw a cat.");
    }
}
