//! Conversations as ids: the special tokens that the template writes are special, what looks like one in a message is
//! the text that it is.

use super::chat_template::{ChatTemplate, Message, ReplyOpening};
use super::tokenizer::TextTokenizer;
use anyhow::{Context, Result, anyhow, ensure};
use std::collections::BTreeMap;
use std::ops::Range;
use tokenizers::{AddedToken, PostProcessorWrapper, Tokenizer};

/// Unicode's noncharacters, which no text holds. Between two of the first stands a special token of the template,
/// between two of the second one that a message spells out.
const MARK: char = '\u{FDD0}';
const SPELT: char = '\u{FDD1}';

/// A tokenizer for rendered conversations.
pub struct ChatTokenizer {
    /// In which marks are tokens, and special tokens are not.
    tokenizer: Tokenizer,
    /// The texts of the special tokens, longest first, and what stands for each.
    special: Vec<String>,
    marks: Vec<String>,
    spelt: Vec<String>,
    /// From the ids of the marks to those of the special tokens.
    ids: BTreeMap<u32, u32>,
}

/// A token of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatToken {
    pub id: u32,
    /// Bytes of the rendered text that it stands for.
    pub place: Range<usize>,
    /// Whether it is a special token of the template.
    pub special: bool,
}

impl ChatTokenizer {
    pub fn new(tokenizer: &TextTokenizer) -> Result<Self> {
        let mut special: Vec<(u32, AddedToken)> =
            tokenizer.tokenizer().get_added_tokens_decoder().into_iter().collect();
        special.retain(|(_, token)| token.special && !token.content.is_empty());
        special.sort_by_key(|(id, token)| (std::cmp::Reverse(token.content.len()), *id));
        let mut tokenizer = tokenizer.tokenizer().clone();
        // It would trim the places of tokens; the special tokens of a conversation are its template's.
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        tokenizer.set_encode_special_tokens(true);
        let between = |mark: char, number: usize| format!("{mark}{number}{mark}");
        let marks: Vec<String> = (0..special.len()).map(|number| between(MARK, number)).collect();
        let added = special.iter().zip(&marks).map(|((_, token), mark)| {
            // As greedy about the spaces beside it as the token that it stands for.
            AddedToken { content: mark.clone(), special: false, normalized: false, ..token.clone() }
        });
        tokenizer.add_tokens(added.collect::<Vec<_>>()).map_err(|error| anyhow!(error)).context("cannot add tokens")?;
        let id = |mark: &String| tokenizer.token_to_id(mark).context("an added token has no id");
        let ids = marks.iter().zip(&special).map(|(mark, (special, _))| Ok((id(mark)?, *special)));
        let ids = ids.collect::<Result<_>>()?;
        let spelt = (0..special.len()).map(|number| between(SPELT, number)).collect();
        let special = special.into_iter().map(|(_, token)| token.content).collect();
        Ok(Self { tokenizer, special, marks, spelt, ids })
    }

    /// The conversation as text, in which marks stand for the template's special tokens.
    ///
    /// # Errors
    /// When the template refuses the conversation, or a message holds one of the marks' characters.
    pub fn render(&self, template: &ChatTemplate, messages: &[Message], opening: ReplyOpening) -> Result<String> {
        let escaped = messages.iter().map(|message| {
            ensure!(
                !message.content.contains([MARK, SPELT]),
                "a message holds U+FDD0 or U+FDD1, which are no characters of any text: take them out"
            );
            Ok(Message::new(message.role.as_str(), replaced(&message.content, &self.special, &self.spelt)))
        });
        let text = template.render(&escaped.collect::<Result<Vec<_>>>()?, opening)?;
        Ok(replaced(&replaced(&text, &self.special, &self.marks), &self.spelt, &self.special))
    }

    /// The tokens of a rendered text.
    pub fn encode(&self, rendered: &str) -> Result<Vec<ChatToken>> {
        let encoding = self.tokenizer.encode(rendered, false).map_err(|error| anyhow!(error));
        let encoding = encoding.context("cannot tokenize the conversation")?;
        let tokens = encoding.get_ids().iter().zip(encoding.get_offsets());
        let token = |(id, &(start, end)): (&u32, &(usize, usize))| {
            let special = self.ids.get(id);
            ChatToken { id: *special.unwrap_or(id), place: start..end, special: special.is_some() }
        };
        Ok(tokens.map(token).collect())
    }

    /// The ids of a conversation.
    pub fn ids(&self, template: &ChatTemplate, messages: &[Message], opening: ReplyOpening) -> Result<Vec<u32>> {
        let tokens = self.encode(&self.render(template, messages, opening)?)?;
        Ok(tokens.into_iter().map(|token| token.id).collect())
    }
}

/// `text` with `to[i]` in place of each `from[i]`; where several begin, the first of them in the list is meant.
fn replaced(text: &str, from: &[String], to: &[String]) -> String {
    let begins = |rest: &str| from.iter().position(|from| rest.starts_with(from.as_str()));
    let mut out = String::with_capacity(text.len());
    let mut plain = 0;
    let mut at = 0;
    while at < text.len() {
        match begins(&text[at..]) {
            Some(found) => {
                out += &text[plain..at];
                out += &to[found];
                at += from[found].len();
                plain = at;
            }
            None => at += text[at..].chars().next().map_or(1, char::len_utf8),
        }
    }
    out + &text[plain..]
}
