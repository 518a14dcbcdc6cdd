//! Chat templates: ours, and those of other checkpoints.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value, context};

use super::{Tokenizer, TokenizerError};

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

/// What stands for a message's text while a template is rendered: private-use characters around its number.
const MARK: [char; 2] = ['\u{f8f0}', '\u{f8f1}'];

impl Tokenizer {
    /// Renders the tokenizer's chat template for `messages` of role and text.
    ///
    /// # Errors
    /// If there is no template, or it fails or uses more than plain Jinja.
    pub fn render_chat_template(
        &self,
        messages: &[(&str, &str)],
        add_generation_prompt: bool,
    ) -> Result<String, TokenizerError> {
        let failed = |error: &Error| TokenizerError::Template(error.to_string());
        let template = self.chat_template();
        if template.is_empty() {
            return Err(TokenizerError::Template("there is none".to_owned()));
        }
        let mut environment = Environment::new();
        // As transformers sets it.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| failed(&e))?);
        environment.add_function("raise_exception", |reason: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, reason))
        });
        environment.add_template("chat", template).map_err(|e| failed(&e))?;
        let messages: Vec<Value> = messages.iter().map(|&(role, content)| context! { role, content }).collect();
        let chat = environment.get_template("chat").map_err(|e| failed(&e))?;
        chat.render(context! {
            messages,
            add_generation_prompt,
            bos_token => self.configured("bos_token").unwrap_or_default(),
            eos_token => self.configured("eos_token").unwrap_or_default(),
            pad_token => self.configured("pad_token").unwrap_or_default(),
            unk_token => self.configured("unk_token").unwrap_or_default(),
        })
        .map_err(|e| failed(&e))
    }

    /// Token ids of a prompt in the format of the tokenizer's own chat template, whatever that is.
    ///
    /// The template's marks become special tokens; the messages' texts never do: they are encoded apart.
    ///
    /// # Errors
    /// As [`render_chat_template`](Self::render_chat_template) and [`encode`](Self::encode).
    pub fn encode_chat_template(&self, messages: &[(&str, &str)]) -> Result<Vec<u32>, TokenizerError> {
        let marks: Vec<String> = (0..messages.len()).map(|i| format!("{}{i}{}", MARK[0], MARK[1])).collect();
        let marked: Vec<(&str, &str)> =
            messages.iter().zip(&marks).map(|((role, _), mark)| (*role, mark.as_str())).collect();
        let rendered = self.render_chat_template(&marked, true)?;

        let mut with_specials = self.library.clone();
        with_specials.set_encode_special_tokens(false);
        let mut ids = Vec::new();
        for (i, part) in rendered.split(MARK).enumerate() {
            // Odd parts are numbers of messages.
            if i % 2 == 1 {
                let message = part.parse().ok().and_then(|n: usize| messages.get(n));
                let (_, content) =
                    message.ok_or_else(|| TokenizerError::Template("it changes the text of a message".to_owned()))?;
                ids.extend(self.encode(content)?);
            } else if !part.is_empty() {
                let encoding = with_specials.encode_fast(part, false);
                let encoding = encoding.map_err(|e| TokenizerError::library("encode the chat template", &*e))?;
                ids.extend_from_slice(encoding.get_ids());
            }
        }
        Ok(ids)
    }
}
