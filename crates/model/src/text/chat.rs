//! Conversations to prompts, by the model's own chat template.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use super::template::Template;
use super::{SpecialTokens, TextError};

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

/// A model's chat template, ready to render.
///
/// It renders as transformers' `apply_chat_template` does. A template comes with a download and is
/// not trusted: its steps and its output are bounded, in proportion to the conversation.
pub struct ChatTemplate {
    template: Template,
    specials: SpecialTokens,
    now: Option<i64>,
}

impl ChatTemplate {
    /// Parses a template. `specials` are the special tokens that it may name (`bos_token`, ..).
    pub fn new(source: &str, specials: SpecialTokens) -> Result<Self, TextError> {
        Ok(Self { template: Template::new(source)?, specials, now: None })
    }

    /// Sets the time that the template sees, in seconds since 1970, UTC: some write today's date into the prompt.
    /// Without it they have no `strftime_now`; those that can do without then write a date of their own, the others
    /// fail.
    #[must_use]
    pub fn with_time(mut self, unix_seconds: i64) -> Self {
        self.now = Some(unix_seconds);
        self
    }

    /// Renders a conversation. `kwargs` are further variables for the template, such as
    /// `enable_thinking`; `add_generation_prompt` lets the assistant speak next.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&Json>,
        kwargs: &Map<String, Json>,
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let messages =
            serde_json::to_value(messages).map_err(|error| TextError::Conversation { message: error.to_string() })?;
        self.render_json(&messages, tools, kwargs, add_generation_prompt)
    }

    /// Renders a conversation given as JSON: a list of objects, of any form that the template knows
    /// (contents of several parts, contents that are null).
    pub fn render_json(
        &self,
        messages: &Json,
        tools: Option<&Json>,
        kwargs: &Map<String, Json>,
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let mut variables = Map::new();
        variables.insert("documents".to_owned(), Json::Null);
        for (name, token) in self.specials.iter() {
            variables.insert(name.to_owned(), token.into());
        }
        for (name, value) in kwargs {
            if matches!(name.as_str(), "messages" | "tools" | "add_generation_prompt") {
                let message = format!("'{name}' is no further variable: it is given by itself");
                return Err(TextError::Conversation { message });
            }
            variables.insert(name.clone(), value.clone());
        }
        variables.insert("messages".to_owned(), with_reasoning_names(messages)?);
        variables.insert("tools".to_owned(), tools.cloned().unwrap_or_default());
        variables.insert("add_generation_prompt".to_owned(), add_generation_prompt.into());
        self.template.render(&variables, self.now)
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

#[cfg(test)]
mod tests;
