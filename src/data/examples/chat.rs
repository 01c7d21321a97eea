//! Conversations: rendered by the model's chat template, with the assistant's turns as the answers.

use super::Example;
use super::read::Encoder;
use crate::data::chat_template::{ChatTemplate, Message, ReplyOpening};
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

/// The template of a tokenizer that has none: a line `Role: text` a turn, the end token behind a reply.
pub fn plain_template(end_token: &str) -> String {
    let end_token = end_token.replace('\\', r"\\").replace('\'', r"\'");
    format!(
        "{{% for message in messages %}}{{{{ message['role'] | capitalize }}}}: {{{{ message['content'] }}}}\
         {{% if message['role'] == 'assistant' %}}{{{{ '{end_token}' }}}}{{% endif %}}{{{{ '\\n' }}}}{{% endfor %}}\
         {{% if add_generation_prompt %}}Assistant:{{% endif %}}"
    )
}

/// The turns of a `messages` value: objects with `role` and `content`, or with `from` and `value`. They must alternate
/// between user and assistant, after a system turn or none; a trailing user turn, which has no reply, is taken off.
pub fn messages(value: &Value) -> Result<Vec<Message>> {
    let list = value.as_array().context("it is not a list of messages")?;
    let mut messages = Vec::with_capacity(list.len());
    for (index, entry) in list.iter().enumerate() {
        let text = |keys: [&str; 2]| keys.iter().find_map(|key| entry.get(key)?.as_str());
        let (role, content) = (text(["role", "from"]), text(["content", "value"]));
        let (Some(role), Some(content)) = (role, content) else {
            bail!("message {} has no texts `role` and `content` (or `from` and `value`)", index + 1)
        };
        let role = match role {
            "human" | "prompter" => "user",
            "gpt" | "bot" | "model" => "assistant",
            other => other,
        };
        messages.push(Message::new(role, content));
    }
    let first = usize::from(messages.first().is_some_and(|message| message.role == "system"));
    for (turn, message) in messages[first..].iter().enumerate() {
        let expected = if turn.is_multiple_of(2) { "user" } else { "assistant" };
        ensure!(
            message.role == expected,
            "message {} is of {:?} where {expected:?} is due: after an optional \"system\" the roles must alternate",
            first + turn + 1,
            message.role
        );
    }
    while messages.last().is_some_and(|message| message.role != "assistant") {
        messages.pop();
    }
    Ok(messages)
}

/// The conversation's ids. Answers are the tokens of the assistant's turns up to the special token that ends each,
/// that one included; `None` where there is no reply with a text.
pub fn encode(template: &ChatTemplate, messages: &[Message], encoder: &Encoder) -> Result<Option<Example>> {
    let full = template.render(messages, ReplyOpening::Omit)?;
    let encoding = encoder.rendered.encode(full.as_str(), false).map_err(|error| anyhow!(error));
    let encoding = encoding.context("cannot tokenize the conversation")?;
    // Bytes of the text that each token stands for.
    let (ids, places) = (encoding.get_ids(), encoding.get_offsets());
    let mut answers = Vec::new();
    for turn in 0..messages.len() {
        let message = &messages[turn];
        if message.role != "assistant" || message.content.trim().is_empty() {
            continue;
        }
        let before = template.render(&messages[..turn], ReplyOpening::Add)?;
        let after = template.render(&messages[..=turn], ReplyOpening::Omit)?;
        ensure!(
            after.starts_with(&before) && full.starts_with(&after),
            "the chat template writes earlier turns anew when a turn is added, so that its replies cannot be found in \
             the text: fine-tune with another template"
        );
        let content = message.content.trim();
        let written = after[before.len()..].find(content).map(|at| before.len() + at + content.len());
        let written = written.context("the chat template leaves out or changes a reply")?;
        // The tokens that stand for some of the turn; one that begins before it belongs to it if it reaches into it.
        let start = places.iter().position(|&(_, end)| end > before.len()).unwrap_or(ids.len());
        let end = places.iter().position(|&(start, _)| start >= after.len()).unwrap_or(ids.len());
        let closing = (start..end).find(|&place| places[place].0 >= written && encoder.special.contains(&ids[place]));
        let answer = start.max(1)..closing.map_or(end, |closing| closing + 1);
        if !answer.is_empty() {
            answers.push(answer);
        }
    }
    // What follows the last answer has no loss and no token after it that would need it.
    let Some(end) = answers.last().map(|answer| answer.end) else { return Ok(None) };
    Ok(Some(Example { ids: ids[..end].to_vec(), answers }))
}
