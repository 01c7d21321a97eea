//! Conversations: rendered by the model's chat template, with the assistant's turns as the answers.

use super::Example;
use crate::data::chat_template::{ChatTemplate, Message, ReplyOpening};
use crate::data::chat_tokens::ChatTokenizer;
use anyhow::{Context, Result, bail, ensure};
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

/// A conversation that ends with a reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    pub messages: Vec<Message>,
    /// Turns of the assistant that are not learned: their `weight` is 0.
    unweighted: Vec<usize>,
    /// Whether a last user turn, which has no reply, was taken off.
    pub unanswered: bool,
}

impl Conversation {
    pub fn new(messages: Vec<Message>) -> Self {
        Self { messages, unweighted: Vec::new(), unanswered: false }
    }
}

/// The turns of a `messages` value: objects with `role` and `content`, or with `from` and `value`, and for the assistant
/// perhaps with `weight`, 0 or 1. They must alternate between user and assistant, after a system turn or none; a trailing
/// user turn, which has no reply, is taken off.
pub fn conversation(value: &Value) -> Result<Conversation> {
    let list = value.as_array().context("it is not a list of messages")?;
    let mut conversation = Conversation::new(Vec::with_capacity(list.len()));
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
        match entry.get("weight").filter(|weight| !weight.is_null()) {
            None => {}
            Some(_) if role != "assistant" => {
                bail!("message {} is of {role:?} and has a `weight`: only the assistant's turns have one", index + 1)
            }
            Some(weight) if weight.as_f64() == Some(0.0) => conversation.unweighted.push(index),
            Some(weight) if weight.as_f64() == Some(1.0) => {}
            Some(weight) => bail!(
                "message {} has the `weight` {weight}: it must be 0 (no loss on this turn) or 1 (as without one)",
                index + 1
            ),
        }
        conversation.messages.push(Message::new(role, content));
    }
    let messages = &mut conversation.messages;
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
    let all = messages.len();
    while messages.last().is_some_and(|message| message.role != "assistant") {
        messages.pop();
    }
    // One without any reply counts as an example with nothing to learn from.
    conversation.unanswered = !messages.is_empty() && messages.len() < all;
    Ok(conversation)
}

/// The conversation's ids. Answers are the tokens of the assistant's turns up to the special token that ends each,
/// that one included; `None` where there is no reply with a text to learn.
pub fn encode(
    template: &ChatTemplate,
    conversation: &Conversation,
    tokenizer: &ChatTokenizer,
) -> Result<Option<Example>> {
    let Conversation { messages, unweighted, .. } = conversation;
    let full = tokenizer.render(template, messages, ReplyOpening::Omit)?;
    let tokens = tokenizer.encode(&full)?;
    let mut answers = Vec::new();
    for turn in 0..messages.len() {
        let message = &messages[turn];
        if message.role != "assistant" || message.content.trim().is_empty() || unweighted.contains(&turn) {
            continue;
        }
        let before = tokenizer.render(template, &messages[..turn], ReplyOpening::Add)?;
        let after = tokenizer.render(template, &messages[..=turn], ReplyOpening::Omit)?;
        ensure!(
            after.starts_with(&before) && full.starts_with(&after),
            "the chat template writes earlier turns anew when a turn is added, so that its replies cannot be found in \
             the text: fine-tune with another template"
        );
        let content = message.content.trim();
        let written = after[before.len()..].find(content).map(|at| before.len() + at + content.len());
        let written = written.context("the chat template leaves out or changes a reply")?;
        // The tokens that stand for some of the turn; one that begins before it belongs to it if it reaches into it.
        let start = tokens.iter().position(|token| token.place.end > before.len()).unwrap_or(tokens.len());
        let end = tokens.iter().position(|token| token.place.start >= after.len()).unwrap_or(tokens.len());
        let closing = (start..end).find(|&place| tokens[place].place.start >= written && tokens[place].special);
        let answer = start.max(1)..closing.map_or(end, |closing| closing + 1);
        if !answer.is_empty() {
            answers.push(answer);
        }
    }
    // What follows the last answer has no loss and no token after it that would need it.
    let Some(end) = answers.last().map(|answer| answer.end) else { return Ok(None) };
    Ok(Some(Example { ids: tokens[..end].iter().map(|token| token.id).collect(), answers }))
}
