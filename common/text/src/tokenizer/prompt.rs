//! Conversations by a chat template, as token ids: the template's marks are marks, a message's text never is.
//!
//! The text goes through the template as transformers lets it, and the ids are those of the rendered text, so for
//! ordinary messages they are what `apply_chat_template` gives. Where the rendered text holds a mark one has to know
//! who wrote it. So the template is rendered once more with every character of the messages replaced by a character of
//! its own, from a private-use plane. Put back, that must give the same text, and shows letter by letter what came from
//! a message. A template that looks at its messages (`'quick' in content`, `upper`) gives another text; then only the
//! characters that marks are made of are replaced, and if that too gives another text, the marks must at least be the
//! same ones in the same order. Else the conversation is refused: the prompt is never silently another one.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

use tokenizers::{Encoding, Tokenizer as Library};

use super::marks::{self, Marks};
use super::template::{ChatTemplate, Rendered};
use super::{Tokenizer, TokenizerError};

/// Where the private-use plane begins whose characters stand for those of messages.
const SHADOWS: u32 = 0xf_0000;

/// How many characters it has.
const N_SHADOWS: usize = 0xfffe;

/// Everything needed to write conversations by a template.
#[derive(Debug)]
pub(super) struct Chat {
    template: ChatTemplate,
    /// Takes marks in a text for marks.
    marked: Library,
    /// Takes marks in a text for text and their names for marks.
    named: Library,
    /// The characters that marks are made of, words aside.
    symbols: BTreeSet<char>,
}

/// A conversation as token ids.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EncodedChat {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Whether the assistant wrote the id at the same place.
    pub generated: Vec<bool>,
}

/// Who wrote a character of a rendered text.
enum Writers {
    /// Per byte: whether it is a message's.
    Known(Vec<bool>),
    /// Per byte: whether it is a message's character of those that marks are made of.
    OfSymbols(Vec<bool>),
    /// All marks are the template's.
    Template,
}

/// A mark in a rendered text.
struct Found {
    id: u32,
    /// Where it stands, in bytes.
    at: Range<usize>,
}

impl Chat {
    /// Sets up what the tokenizer's chat template needs.
    ///
    /// # Errors
    /// If the template cannot be used.
    pub(super) fn new(tokenizer: &Tokenizer) -> Result<Self, TokenizerError> {
        let template = ChatTemplate::compile(&tokenizer.settings, tokenizer.thinking)?;
        let mut marked = tokenizer.library.clone();
        marked.set_encode_special_tokens(false);
        let mut named = match &tokenizer.twin {
            Some(twin) => Library::clone(twin),
            None => tokenizer.marks.twin(&tokenizer.parts()?)?,
        };
        named.set_encode_special_tokens(false);
        Ok(Self { template, marked, named, symbols: symbols(&tokenizer.marks) })
    }

    /// Where in `text`, rendered from `messages`, the first character of message `i` begins, or its `last` one ends;
    /// `None` if the text does not have it or changes with it.
    fn edge(&self, messages: &[(&str, &str)], i: usize, text: &str, last: bool) -> Option<usize> {
        let content = messages[i].1;
        let mut visible = content.char_indices().filter(|(_, c)| !c.is_whitespace());
        let (at, c) = if last { visible.next_back() } else { visible.next() }?;
        let shadow = Shadows::of(std::iter::once(c))?;
        let (before, after) = (&content[..at], &content[at + c.len_utf8()..]);
        let content = [before, &shadow.cast(&c.to_string()), after].concat();
        let mut messages = messages.to_vec();
        messages[i].1 = &content;
        let (lifted, was_shadow) = shadow.lift(&self.template.render(&messages, false).ok()?.text);
        let shadows = |at: &bool| *at;
        let edge =
            if last { was_shadow.iter().rposition(shadows)? + 1 } else { was_shadow.iter().position(shadows)? };
        (lifted == text).then_some(edge)
    }
}

/// The characters that are no letters, digits or white space; all where a mark has none else.
fn symbols(marks: &Marks) -> BTreeSet<char> {
    let is_symbol = |c: &char| !c.is_alphanumeric() && !c.is_whitespace();
    let mut symbols = BTreeSet::new();
    for spelling in marks.spellings() {
        let n_before = symbols.len();
        symbols.extend(spelling.chars().filter(is_symbol));
        if symbols.len() == n_before && !spelling.chars().any(|c| symbols.contains(&c)) {
            symbols.extend(spelling.chars());
        }
    }
    symbols
}

impl Tokenizer {
    /// Renders the tokenizer's chat template for `messages` of role and text.
    ///
    /// # Errors
    /// If there is no template, or it fails, or takes more time or memory than a template may.
    pub fn render_chat_template(
        &self,
        messages: &[(&str, &str)],
        add_generation_prompt: bool,
    ) -> Result<String, TokenizerError> {
        Ok(self.chat()?.template.render(messages, add_generation_prompt)?.text)
    }

    /// Token ids of `messages`, of role and text, in the format of the tokenizer's own chat template.
    ///
    /// They are those of transformers' `apply_chat_template`, but that a text which spells a mark stays text. What the
    /// assistant wrote is told by the template's `{% generation %}` blocks; else it is what an assistant's message
    /// adds to the prompt before it, up to the mark that ends it.
    ///
    /// # Errors
    /// As [`render_chat_template`](Self::render_chat_template); if it cannot be told whether the template or a message
    /// wrote a mark; without `add_generation_prompt`, if the template does not tell what the assistant wrote.
    pub fn encode_chat_template(
        &self,
        messages: &[(&str, &str)],
        add_generation_prompt: bool,
    ) -> Result<EncodedChat, TokenizerError> {
        let chat = self.chat()?;
        let rendered = chat.template.render(messages, add_generation_prompt)?;
        let encoding = encode(&chat.marked, &rendered.text)?;
        let found = self.marks_in(&rendered.text, &encoding);
        let writers = self.writers(chat, messages, add_generation_prompt, &rendered, &found)?;
        let (by_template, by_messages): (Vec<Found>, Vec<Found>) =
            found.into_iter().partition(|mark| !writers.is_of_message(&mark.at));
        if let Some(mark) = by_template.iter().find(|mark| !writers.is_certain(self, chat, messages, mark)) {
            return Err(self.ambiguous(mark.id));
        }
        let generated =
            if add_generation_prompt { vec![] } else { self.generated(chat, messages, &rendered, &by_template)? };
        if by_messages.is_empty() {
            return Ok(EncodedChat { ids: encoding.get_ids().to_vec(), generated: flags(&encoding, &generated) });
        }
        self.encode_named(chat, &rendered.text, &by_template, &generated)
    }

    /// Encodes `text`, in which only `marks` are marks.
    fn encode_named(
        &self,
        chat: &Chat,
        text: &str,
        marks: &[Found],
        generated: &[Range<usize>],
    ) -> Result<EncodedChat, TokenizerError> {
        let mut named = String::with_capacity(text.len());
        // Where a byte of `text` stands in `named`, for those at which a range can begin or end.
        let mut moved = vec![0; text.len() + 1];
        let mut end = 0;
        let append = |from: Range<usize>, named: &mut String, moved: &mut Vec<usize>| {
            for at in from.clone() {
                moved[at] = named.len() + at - from.start;
            }
            *named += &text[from];
        };
        for mark in marks {
            append(end..mark.at.start, &mut named, &mut moved);
            moved[mark.at.clone()].fill(named.len());
            named += &Marks::name(mark.id);
            end = mark.at.end;
        }
        append(end..text.len(), &mut named, &mut moved);
        moved[text.len()] = named.len();
        let encoding = encode(&chat.named, &named)?;
        let is_mark = |id: &&u32| self.marks.contains(**id);
        let ids: Vec<u32> = encoding.get_ids().iter().filter(is_mark).copied().collect();
        if ids.iter().ne(marks.iter().map(|mark| &mark.id)) {
            return Err(TokenizerError::Template(
                "a message spells a mark, and its tokens cannot be kept apart from the template's".to_owned(),
            ));
        }
        let generated: Vec<_> = generated.iter().map(|range| moved[range.start]..moved[range.end]).collect();
        Ok(EncodedChat { ids: encoding.get_ids().to_vec(), generated: flags(&encoding, &generated) })
    }

    /// The marks of an encoded text, and where they stand in it.
    fn marks_in(&self, text: &str, encoding: &Encoding) -> Vec<Found> {
        let tokens = encoding.get_ids().iter().zip(encoding.get_offsets());
        let marks = tokens.filter_map(|(&id, &(start, end))| Some((id, self.marks.spelling(id)?, start..end)));
        let marks = marks.map(|(id, spelling, token)| {
            // A mark can take the white space around it.
            let found = text.get(token.clone()).and_then(|part| part.find(spelling));
            let at = found.map_or(token.clone(), |at| token.start + at..token.start + at + spelling.len());
            Found { id, at }
        });
        marks.collect()
    }

    /// Finds out who wrote what in `rendered`, which has the marks `found`.
    fn writers(
        &self,
        chat: &Chat,
        messages: &[(&str, &str)],
        add_generation_prompt: bool,
        rendered: &Rendered,
        found: &[Found],
    ) -> Result<Writers, TokenizerError> {
        let Some(first) = found.first() else { return Ok(Writers::Template) };
        let chars = || messages.iter().flat_map(|(_, content)| content.chars());
        let render = |shadows: &Shadows| {
            let shadowed: Vec<String> = messages.iter().map(|(_, content)| shadows.cast(content)).collect();
            let shadowed: Vec<(&str, &str)> =
                messages.iter().zip(&shadowed).map(|((role, _), content)| (*role, content.as_str())).collect();
            chat.template.render(&shadowed, add_generation_prompt)
        };
        if let Some(shadows) = Shadows::of(chars().filter(|c| !c.is_whitespace()))
            && let Ok(shadowed) = render(&shadows)
        {
            let (text, writers) = shadows.lift(&shadowed.text);
            if text == rendered.text {
                return Ok(Writers::Known(writers));
            }
        }
        let Some(shadows) = Shadows::of(chars().filter(|c| chat.symbols.contains(c))) else {
            return Err(self.ambiguous(first.id));
        };
        let shadowed = render(&shadows)?;
        let (text, writers) = shadows.lift(&shadowed.text);
        if text == rendered.text {
            return Ok(Writers::OfSymbols(writers));
        }
        let marks = self.marks_in(&shadowed.text, &encode(&chat.marked, &shadowed.text)?);
        if marks.iter().map(|mark| mark.id).eq(found.iter().map(|mark| mark.id)) {
            return Ok(Writers::Template);
        }
        let differs = found.iter().zip(&marks).find(|(a, b)| a.id != b.id).map(|(a, _)| a);
        Err(self.ambiguous(differs.or(found.get(marks.len())).unwrap_or(first).id))
    }

    /// The tokenizer with the switch `enable_thinking` of its chat template set, or `None` if the template has none.
    pub fn with_thinking(self, thinking: bool) -> Option<Self> {
        let has_switch = self.chat_template().contains("enable_thinking");
        has_switch.then(|| Self { thinking: Some(thinking), chat: Arc::default(), ..self })
    }

    /// Token ids of an answer, with the mark that ends it, in the format of the tokenizer's own chat template.
    pub(crate) fn encode_chat_template_response(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let turns = self.encode_chat_template(&[("user", "?"), ("assistant", text)], false)?;
        let answer = turns.ids.iter().zip(&turns.generated).filter(|(_, generated)| **generated);
        Ok(answer.map(|(id, _)| *id).collect())
    }

    /// The token that ends the assistant's turn: `<|end|>`, or the one that the tokenizer's own chat template writes.
    pub fn end_of_turn(&self) -> Option<u32> {
        if !self.writes_by_template() {
            return self.eos();
        }
        let turn = self.encode_chat_template(&[("user", "?"), ("assistant", "!")], false).ok()?;
        let generated = turn.ids.iter().zip(&turn.generated).rev().find(|(_, generated)| **generated);
        generated.map(|(id, _)| *id).filter(|id| self.marks.contains(*id)).or_else(|| self.eos())
    }

    /// Where in `rendered` the assistant wrote.
    fn generated(
        &self,
        chat: &Chat,
        messages: &[(&str, &str)],
        rendered: &Rendered,
        marks: &[Found],
    ) -> Result<Vec<Range<usize>>, TokenizerError> {
        if chat.template.has_generation() {
            return Ok(rendered.generated.clone());
        }
        let answers = messages.iter().enumerate().filter(|(_, (role, _))| *role == "assistant");
        answers.map(|(i, _)| self.answer(chat, messages, i, &rendered.text, marks)).collect()
    }

    /// Where in `text`, rendered from `messages`, message `i` stands, the assistant's: after the prompt before it, up to
    /// and with the mark that ends the turn.
    ///
    /// The end is the first mark behind the last character of the message, if the template writes it there for the
    /// message alone, too: what else follows it may be for the end of the conversation, or the next turn. Without such
    /// a mark, or where the template changes the text of the message, it is all that the message adds. A prompt that ends
    /// in another way than the turn begins (reasoning that is left out later) does not count.
    fn answer(
        &self,
        chat: &Chat,
        messages: &[(&str, &str)],
        i: usize,
        text: &str,
        marks: &[Found],
    ) -> Result<Range<usize>, TokenizerError> {
        let before = match self.render_chat_template(&messages[..i], true) {
            // Without any message many templates fail.
            Err(_) if i == 0 => String::new(),
            before => before?,
        };
        let alone = self.render_chat_template(&messages[..=i], false)?;
        let is_blank = |range: Range<usize>| text[range].trim().is_empty();
        let end = match chat.edge(messages, i, text, true).zip(chat.edge(&messages[..=i], i, &alone, true)) {
            Some((last, last_alone)) => {
                let added = &alone[last_alone..];
                let mark = marks.iter().find(|mark| last <= mark.at.start).map(|mark| mark.at.clone());
                let mark = mark.filter(|at| is_blank(last..at.start) && added.starts_with(&text[last..at.end]));
                let after_all = || text[last..].starts_with(added).then_some(last + added.len());
                mark.map(|at| at.end).or_else(after_all)
            }
            None => text.starts_with(&alone).then_some(alone.len()),
        };
        let begin = if text.starts_with(&before) {
            before.len()
        } else {
            let first = chat.edge(messages, i, text, false);
            let content = messages[i].1;
            let blank = &content[..content.len() - content.trim_start().len()];
            let first = first.map(|first| text[..first].strip_suffix(blank).map_or(first, str::len));
            first.unwrap_or_else(|| common_prefix(text, &before))
        };
        let mut range = begin..end.filter(|end| begin < *end).ok_or(TokenizerError::NoAnswer(i + 1))?;
        // The text after the end of the turn is the template's.
        let inside = marks.iter().rev().find(|mark| range.start <= mark.at.start && mark.at.end <= range.end);
        if let Some(mark) = inside.filter(|mark| is_blank(mark.at.end..range.end)) {
            range.end = mark.at.end;
        }
        Ok(range)
    }

    fn ambiguous(&self, id: u32) -> TokenizerError {
        TokenizerError::Template(format!(
            "whether it or a message wrote `{}` cannot be told: it changes with the messages' text",
            self.marks.spelling(id).unwrap_or_default()
        ))
    }
}

impl Writers {
    /// Whether a message wrote any of `at`.
    fn is_of_message(&self, at: &Range<usize>) -> bool {
        match self {
            Self::Known(writers) | Self::OfSymbols(writers) => writers[at.clone()].contains(&true),
            Self::Template => false,
        }
    }

    /// Whether the template alone wrote `mark`, none of which is known to be a message's.
    ///
    /// If letters are not known, a message could have filled in a mark's: then the template must have it in full, or
    /// from a role's name.
    fn is_certain(&self, tokenizer: &Tokenizer, chat: &Chat, messages: &[(&str, &str)], mark: &Found) -> bool {
        let (source, spelling) = (chat.template.source(), tokenizer.marks.spelling(mark.id).unwrap_or_default());
        let is_named = || {
            let mut settings = tokenizer.settings.iter();
            settings
                .any(|(key, token)| marks::content(token).as_deref() == Some(spelling) && source.contains(key.as_str()))
        };
        let has_role = || messages.iter().any(|(role, _)| spelling.contains(role));
        matches!(self, Self::Known(_)) || source.contains(spelling) || is_named() || has_role()
    }
}

/// Characters, each with a private-use character in its place.
struct Shadows {
    shadow_of: HashMap<char, char>,
    chars: Vec<char>,
}

impl Shadows {
    /// For `chars`; `None` if they are too many.
    fn of(chars: impl Iterator<Item = char>) -> Option<Self> {
        let chars: Vec<char> = chars.collect::<BTreeSet<_>>().into_iter().collect();
        let shadow = |(i, c): (usize, &char)| Some((*c, char::from_u32(SHADOWS + i as u32)?));
        (chars.len() <= N_SHADOWS)
            .then(|| chars.iter().enumerate().filter_map(shadow).collect())
            .map(|shadow_of| Self { shadow_of, chars })
    }

    /// `text` in shadows.
    fn cast(&self, text: &str) -> String {
        text.chars().map(|c| self.shadow_of.get(&c).copied().unwrap_or(c)).collect()
    }

    /// The text behind the shadows in `text`, and for each of its bytes whether it was one.
    fn lift(&self, text: &str) -> (String, Vec<bool>) {
        let mut lifted = String::with_capacity(text.len());
        let mut was_shadow = Vec::with_capacity(text.len());
        for c in text.chars() {
            let behind = u32::from(c).checked_sub(SHADOWS).and_then(|i| self.chars.get(i as usize));
            lifted.push(*behind.unwrap_or(&c));
            was_shadow.resize(lifted.len(), behind.is_some());
        }
        (lifted, was_shadow)
    }
}

/// How many bytes of their beginning two texts have in common, in whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum()
}

fn encode(library: &Library, text: &str) -> Result<Encoding, TokenizerError> {
    super::call(|| library.encode(text, false), "encode the chat template")
}

/// For each token whether it has a part of `ranges`, which are in bytes.
fn flags(encoding: &Encoding, ranges: &[Range<usize>]) -> Vec<bool> {
    let has_part = |&(start, end): &(usize, usize)| ranges.iter().any(|r| start < r.end && r.start < end);
    encoding.get_offsets().iter().map(has_part).collect()
}
