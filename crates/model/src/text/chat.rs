//! Conversations to prompts, by the model's own chat template.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use super::jinja::{Budget, Error, ErrorKind, Moment, Template, Value};
use super::{SpecialTokens, TextError};

/// The largest template, in bytes. Released ones have up to 20,000.
const SOURCE_BYTES_MAX: usize = 1 << 20;
/// The largest conversation, in bytes as data.
const INPUT_BYTES_MAX: u64 = 1 << 30;
/// What every render may do, and what it may do more for each byte of the conversation.
const STEPS: u64 = 10_000_000;
const STEPS_PER_INPUT_BYTE: u64 = 16;
const BYTES: u64 = 64 << 20;
const BYTES_PER_INPUT_BYTE: u64 = 32;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, or what the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
    /// Everything else, such as `tool_calls`.
    #[serde(flatten)]
    pub extra: Map<String, Json>,
}

impl Message {
    /// A message with nothing but role and content.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), extra: Map::new() }
    }
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RenderedChat {
    /// The prompt.
    pub text: String,
    /// Byte ranges of what the template marks as the assistant's (`{% generation %}`), in order.
    pub generated: Vec<Range<usize>>,
}

/// A model's chat template, ready to render.
///
/// It renders as transformers' `apply_chat_template` does. A template comes with a download and is
/// not trusted: its time and memory are bounded, in proportion to the conversation.
pub struct ChatTemplate {
    template: Template,
    specials: SpecialTokens,
    now: Option<Moment>,
}

impl ChatTemplate {
    /// Parses a template. `specials` are the special tokens that it may name (`bos_token`, ..).
    ///
    /// # Errors
    /// A source that is no template, or uses tags that are not supported.
    pub fn new(source: &str, specials: SpecialTokens) -> Result<Self, TextError> {
        if source.len() > SOURCE_BYTES_MAX {
            let message = format!("the template has more than {SOURCE_BYTES_MAX} bytes");
            return Err(TextError::TemplateSyntax { line: 0, message });
        }
        let template = Template::parse(source).map_err(template_error)?;
        Ok(Self { template, specials, now: None })
    }

    /// Sets the time that the template sees, in seconds since 1970, UTC: some write today's date into the prompt. Without
    /// it they have no `strftime_now`; those that can do without then write a date of their own, the others fail.
    #[must_use]
    pub fn with_time(mut self, unix_seconds: i64) -> Self {
        self.now = Some(Moment(unix_seconds));
        self
    }

    /// Renders a conversation. `kwargs` are further variables for the template, such as
    /// `enable_thinking`; `add_generation_prompt` lets the assistant speak next.
    ///
    /// # Errors
    /// What the template refuses, in its own words ([`TextError::TemplateRaised`]); a template that fails, or wants more time
    /// or memory than it may have.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&Json>,
        kwargs: &Map<String, Json>,
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let messages =
            serde_json::to_value(messages).map_err(|error| TextError::Conversation { message: error.to_string() })?;
        let chat = self.render_json(&messages, tools, kwargs, add_generation_prompt)?;
        Ok(chat.text)
    }

    /// Renders a conversation given as JSON: a list of objects, of any form that the template knows
    /// (contents of several parts, contents that are null).
    ///
    /// # Errors
    /// As [`ChatTemplate::render`], and messages that are not a list of objects.
    pub fn render_json(
        &self,
        messages: &Json,
        tools: Option<&Json>,
        kwargs: &Map<String, Json>,
        add_generation_prompt: bool,
    ) -> Result<RenderedChat, TextError> {
        let messages = with_reasoning_names(messages)?;
        let input = Budget::new(u64::MAX, INPUT_BYTES_MAX);
        let json = |value: &Json| Value::from_json(value, &input).map_err(conversation_error);
        let mut variables = Vec::new();
        for (name, token) in self.specials.iter() {
            variables.push((name.to_owned(), json(&Json::from(token))?));
        }
        for (name, value) in kwargs {
            if matches!(name.as_str(), "messages" | "tools" | "add_generation_prompt") {
                let message = format!("'{name}' is no further variable: it is given by itself");
                return Err(TextError::Conversation { message });
            }
            variables.push((name.clone(), json(value)?));
        }
        if !kwargs.contains_key("documents") {
            variables.push(("documents".to_owned(), Value::None));
        }
        variables.push(("messages".to_owned(), json(&messages)?));
        variables.push(("tools".to_owned(), json(tools.unwrap_or(&Json::Null))?));
        variables.push(("add_generation_prompt".to_owned(), Value::Bool(add_generation_prompt)));
        let spent = input.spent_bytes();
        let budget = Budget::new(STEPS + STEPS_PER_INPUT_BYTE * spent, BYTES + BYTES_PER_INPUT_BYTE * spent);
        let rendered = self.template.render(variables, self.now, &budget).map_err(template_error)?;
        Ok(RenderedChat { text: rendered.text, generated: rendered.generated })
    }
}

/// Checks the form, and gives reasoning the names that templates look for, as transformers does.
fn with_reasoning_names(messages: &Json) -> Result<Json, TextError> {
    let wrong = |message: &str| TextError::Conversation { message: message.to_owned() };
    let list = messages.as_array().ok_or_else(|| wrong("it must be a list of messages"))?;
    let mut out = Vec::with_capacity(list.len());
    for message in list {
        let message = message.as_object().ok_or_else(|| wrong("each message must be an object"))?;
        let named = ["reasoning_content", "thinking", "reasoning"].iter();
        let reasoning = named.filter_map(|name| message.get(*name)).find(|value| !value.is_null());
        let mut message = message.clone();
        if let Some(reasoning) = reasoning.cloned() {
            let mut with_thinking = Map::new();
            with_thinking.insert("thinking".to_owned(), reasoning.clone());
            with_thinking.extend(message);
            with_thinking.insert("reasoning_content".to_owned(), reasoning);
            message = with_thinking;
        }
        out.push(Json::Object(message));
    }
    Ok(Json::Array(out))
}

fn conversation_error(error: Error) -> TextError {
    TextError::Conversation { message: error.message }
}

fn template_error(error: Error) -> TextError {
    let Error { kind, message, line } = error;
    match kind {
        ErrorKind::Syntax => TextError::TemplateSyntax { line, message },
        ErrorKind::Raised => TextError::TemplateRaised { message },
        ErrorKind::Runtime => TextError::TemplateFailed { line, message },
        ErrorKind::Limit => TextError::TemplateLimit { line, message },
    }
}

#[cfg(test)]
mod tests;
