//! Chat templates: Jinja as transformers renders it, within limits.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use minijinja::machinery::{
    CompiledTemplate, Instruction, Instructions, TemplateConfig, Token, eval, make_string_output, tokenize,
};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value, context};
use regex::Regex;
use serde_json::Map;

use super::marks::content;
use super::{TokenizerError, jinja};

/// The Jinja template of our conversations, as written to `tokenizer_config.json`.
///
/// It renders what `conversation::encode` encodes. It has no `{% generation %}` marks:
/// plain Jinja does not know them.
pub const CHAT_TEMPLATE: &str = "{{- '<|bos|>' }}\
{%- for message in messages %}\
{%- if message['role'] not in ['system', 'user', 'assistant'] %}\
{{- raise_exception('unknown role ' + message['role']) }}\
{%- endif %}\
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}\
{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}";

/// The budget of a template: one for an instruction, one for 64 bytes that it makes. Today's longest templates spend
/// some hundreds a message.
const FUEL: u64 = 2_000_000;

/// How many bytes a template may write, beside a multiple of its messages'.
const MAX_OUTPUT: usize = 1 << 20;

/// How many bytes a template may have. The longest of today, with tools, have some 20 thousand.
const MAX_SOURCE: usize = 1 << 20;

/// How many tokens a tag of a template may have.
const MAX_TOKENS: usize = 2000;

/// Stand in the output where a `{% generation %}` block begins and ends. Private-use characters, which no text has.
const GENERATION: [char; 2] = ['\u{10fffa}', '\u{10fffb}'];

/// The characters that a text may not have where a template renders it: they stand for something else there.
const RESERVED: std::ops::RangeInclusive<char> = GENERATION[0]..='\u{10fffd}';

/// The function behind `{% generation %}`.
const GENERATION_FUNCTION: &str = "__generation__";

/// The functions behind `+` and `~`.
const ADD_FUNCTION: &str = "__add__";
const CONCAT_FUNCTION: &str = "__concat__";

/// A chat template and what it may use.
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    config: TemplateConfig,
    /// As written.
    source: String,
    /// With calls in place of `{% generation %}` blocks.
    jinja: String,
    has_generation: bool,
    /// The value of `enable_thinking`, if it is to be defined.
    thinking: Option<bool>,
}

/// A conversation rendered by a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rendered {
    /// The text.
    pub text: String,
    /// Where in it, in bytes, `{% generation %}` blocks stand.
    pub generated: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// Compiles the template that `settings`, a `tokenizer_config.json`, hold.
    ///
    /// # Errors
    /// If there is none or several without a default, or it is not Jinja as transformers understands it.
    pub(super) fn compile(
        settings: &Map<String, serde_json::Value>,
        thinking: Option<bool>,
    ) -> Result<Self, TokenizerError> {
        let source = chosen(settings)?.ok_or_else(|| TokenizerError::Template("there is none".to_owned()))?;
        if source.len() > MAX_SOURCE {
            return Err(TokenizerError::Template(format!(
                "it has {} bytes, at most {MAX_SOURCE} are taken",
                source.len()
            )));
        }
        let failed = |error: Error| TokenizerError::Template(message(&error));
        let mut environment = Environment::new();
        // As transformers sets it.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let syntax_config = syntax.map_err(failed)?;
        let config = TemplateConfig { syntax_config, default_auto_escape: Arc::new(|_| AutoEscape::None) };
        environment.set_unknown_method_callback(jinja::method);
        environment.add_filter("tojson", jinja::to_json);
        environment.add_filter("trim", jinja::trim);
        environment.add_filter("string", jinja::string);
        environment.add_filter("join", jinja::join);
        environment.add_filter("indent", jinja::indent);
        environment.add_function("raise_exception", |reason: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, reason))
        });
        environment.add_function("strftime_now", jinja::strftime_now);
        environment.add_function(GENERATION_FUNCTION, generation);
        environment.add_function(ADD_FUNCTION, jinja::add);
        environment.add_function(CONCAT_FUNCTION, jinja::concat);
        environment.set_formatter(jinja::write);
        for token in ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"] {
            if let Some(content) = settings.get(token).and_then(content) {
                environment.add_global(token, content);
            }
        }
        let (jinja, has_generation) = with_generation_calls(source);
        let template = Self { environment, config, source: source.to_owned(), jinja, has_generation, thinking };
        template.check_tags().map_err(failed)?;
        template.instructions().map_err(failed)?;
        Ok(template)
    }

    /// Refuses tags of many tokens: minijinja descends into `1 + 1 + …` until the stack ends.
    fn check_tags(&self) -> Result<(), Error> {
        let mut n_tokens = 0;
        for token in tokenize(&self.jinja, false, self.config.syntax_config.clone()) {
            n_tokens = match token?.0 {
                Token::VariableStart | Token::BlockStart => 0,
                _ => n_tokens + 1,
            };
            if n_tokens > MAX_TOKENS {
                let reason = format!("a tag has more than {MAX_TOKENS} tokens");
                return Err(Error::new(ErrorKind::SyntaxError, reason));
            }
        }
        Ok(())
    }

    /// The template's instructions, with additions that are charged for.
    ///
    /// minijinja adds lists without a charge: forty additions of a list to itself would fill the memory.
    fn instructions(&self) -> Result<CompiledTemplate<'_>, Error> {
        let mut compiled = CompiledTemplate::new("chat", &self.jinja, &self.config)?;
        replace_additions(&mut compiled.instructions);
        compiled.blocks.values_mut().for_each(replace_additions);
        Ok(compiled)
    }

    /// The template as written.
    pub(super) fn source(&self) -> &str {
        &self.source
    }

    /// Whether it says by `{% generation %}` what the assistant writes.
    pub(super) fn has_generation(&self) -> bool {
        self.has_generation
    }

    /// Renders `messages`, pairs of role and text.
    ///
    /// # Errors
    /// If the template fails or takes more than its limits, or a text has a reserved character.
    pub(super) fn render(
        &self,
        messages: &[(&str, &str)],
        add_generation_prompt: bool,
    ) -> Result<Rendered, TokenizerError> {
        let n_bytes: usize = messages.iter().map(|(_, content)| content.len()).sum();
        if let Some(c) = messages.iter().flat_map(|(_, content)| content.chars()).find(|c| RESERVED.contains(c)) {
            return Err(TokenizerError::Template(format!(
                "a message has the private-use character U+{:X}, which stands for a mark while it is rendered",
                u32::from(c)
            )));
        }
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL + n_bytes as u64));
        let messages: Vec<Value> = messages.iter().map(|&(role, content)| context! { role, content }).collect();
        let failed = |error: Error| TokenizerError::Template(message(&error));
        let compiled = self.instructions().map_err(failed)?;
        // `tools` and `documents` are defined in transformers, as `None`.
        let mut root = context! { messages, add_generation_prompt, tools => (), documents => () };
        if let Some(enable_thinking) = self.thinking {
            root = context! { enable_thinking, ..root };
        }
        let mut text = String::new();
        let mut out = make_string_output(&mut text);
        eval(&environment, &compiled.instructions, root, &compiled.blocks, &mut out, AutoEscape::None)
            .map_err(failed)?;
        if text.len() > MAX_OUTPUT + 16 * n_bytes {
            return Err(TokenizerError::Template(format!("its output of {} bytes is too long", text.len())));
        }
        without_sentinels(&text)
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("source", &self.source).finish_non_exhaustive()
    }
}

fn replace_additions(instructions: &mut Instructions<'_>) {
    for i in 0.. {
        match instructions.get_mut(i) {
            Some(instruction @ Instruction::Add) => *instruction = Instruction::CallFunction(ADD_FUNCTION, Some(2)),
            Some(instruction @ Instruction::StringConcat) => {
                *instruction = Instruction::CallFunction(CONCAT_FUNCTION, Some(2));
            }
            Some(_) => {}
            None => return,
        }
    }
}

/// All templates that `settings` hold, with their names.
pub(super) fn sources(settings: &Map<String, serde_json::Value>) -> Vec<(&str, &str)> {
    match settings.get("chat_template") {
        Some(serde_json::Value::String(template)) if !template.is_empty() => vec![("default", template)],
        Some(serde_json::Value::Array(templates)) => {
            templates.iter().filter_map(|t| Some((t["name"].as_str()?, t["template"].as_str()?))).collect()
        }
        Some(serde_json::Value::Object(templates)) => {
            templates.iter().filter_map(|(name, t)| Some((name.as_str(), t.as_str()?))).collect()
        }
        _ => vec![],
    }
}

/// The template for conversations: the only one, or the one of several that is named `default`.
///
/// # Errors
/// If there are several and none is.
pub(super) fn chosen(settings: &Map<String, serde_json::Value>) -> Result<Option<&str>, TokenizerError> {
    let sources = sources(settings);
    match sources.iter().find(|(name, _)| *name == "default") {
        Some((_, template)) => Ok(Some(template)),
        None if sources.is_empty() => Ok(None),
        None => {
            let names: Vec<String> = sources.iter().map(|(name, _)| format!("`{name}`")).collect();
            Err(TokenizerError::Template(format!("there are {} and none is named `default`", names.join(", "))))
        }
    }
}

/// The template with calls in place of `{% generation %}` blocks, and whether it has such blocks.
///
/// # Source
/// transformers' `AssistantTracker` parses the block to the same call.
fn with_generation_calls(source: &str) -> (String, bool) {
    let tag = |name: &str| Regex::new(&format!(r"\{{%([-+]?)\s*{name}\s*([-+]?)%\}}")).expect("a regular expression");
    let begun = tag("generation").replace_all(source, format!("{{%${{1}} call {GENERATION_FUNCTION}() ${{2}}%}}"));
    let has_generation = begun != source;
    let ended = tag("endgeneration").replace_all(&begun, "{%${1} endcall ${2}%}");
    (ended.into_owned(), has_generation)
}

/// The body of a `{% generation %}` block, between sentinels.
#[expect(clippy::needless_pass_by_value, reason = "the signature of a function of templates")]
fn generation(state: &mut State, kwargs: Kwargs) -> Result<String, Error> {
    let caller: Value = kwargs.get("caller")?;
    let body = caller.call(state, &[])?;
    Ok(format!("{}{body}{}", GENERATION[0], GENERATION[1]))
}

/// Takes the sentinels out of `text`.
fn without_sentinels(text: &str) -> Result<Rendered, TokenizerError> {
    let mut rendered = Rendered { text: String::with_capacity(text.len()), generated: vec![] };
    let mut start = None;
    for part in text.split_inclusive(GENERATION) {
        let Some(sentinel) = part.chars().next_back().filter(|c| GENERATION.contains(c)) else {
            rendered.text += part;
            continue;
        };
        rendered.text += &part[..part.len() - sentinel.len_utf8()];
        let at = rendered.text.len();
        match (start.take(), sentinel == GENERATION[0]) {
            (None, true) => start = Some(at),
            (Some(start), false) => rendered.generated.push(start..at),
            _ => return Err(TokenizerError::Template("its `{% generation %}` blocks are cut or nested".to_owned())),
        }
    }
    match start {
        None => Ok(rendered),
        Some(_) => Err(TokenizerError::Template("it cuts off the end of a `{% generation %}` block".to_owned())),
    }
}

/// The error in one line: the template's own words where it raised them.
fn message(error: &Error) -> String {
    if error.kind() == ErrorKind::OutOfFuel {
        "it takes more steps or memory than a chat template may".to_owned()
    } else {
        let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
        match error.detail() {
            Some(detail) => format!("{detail}{line}"),
            None => format!("{}{line}", error.kind()),
        }
    }
}
