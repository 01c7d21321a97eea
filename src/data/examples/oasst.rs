//! Open Assistant's exports: message trees become the threads that its own fine-tuning takes.
//!
//! Of every tree that is ready for export, each path from the root to a leaf is a thread unless one of its messages is
//! deleted or synthetic. A trailing prompter turn, which has no reply, is taken off; where a message has several such
//! replies and nothing else, only the first of them makes a thread, so that none comes twice.

use super::ExampleCounts;
use crate::data::chat_template::Message;
use crate::data::records::Record;
use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};
use std::collections::HashMap;

/// Columns of the row format.
pub const COLUMNS: &[&str] =
    &["message_id", "parent_id", "text", "role", "deleted", "synthetic", "message_tree_id", "tree_state"];

/// A thread and where its tree stands.
pub struct Thread {
    pub messages: Vec<Message>,
    pub place: String,
}

/// Whether a record is of such an export: a message, or a whole tree.
pub fn is_oasst(record: &Map<String, Value>) -> bool {
    record.contains_key("message_tree_id") || (record.contains_key("message_id") && record.contains_key("text"))
}

struct Node {
    id: String,
    message: Message,
    /// Deleted or synthetic: no thread goes through it.
    unwanted: bool,
    replies: Vec<usize>,
}

#[derive(Default)]
struct Forest {
    nodes: Vec<Node>,
    /// Roots of the trees that are ready, with their places in the files.
    roots: Vec<(usize, String)>,
}

/// The threads of all records, in the order of the trees, and of the replies in a tree.
pub fn threads(records: &[Record], counts: &mut ExampleCounts) -> Result<Vec<Thread>> {
    let forest = grow(records, counts)?;
    let mut threads = Vec::new();
    for (root, place) in &forest.roots {
        let mut paths = vec![vec![*root]];
        while let Some(path) = paths.pop() {
            let node = &forest.nodes[path[path.len() - 1]];
            if node.replies.is_empty() {
                let thread = forest.thread(&path, place)?;
                counts.unanswered +=
                    usize::from(thread.as_ref().is_some_and(|thread| thread.messages.len() < path.len()));
                threads.extend(thread);
            }
            // The stack gives back last what was put first.
            paths.extend(node.replies.iter().rev().map(|&reply| [&path[..], &[reply]].concat()));
        }
    }
    Ok(threads)
}

impl Forest {
    /// The thread that ends in the leaf of `path`, if there is one.
    fn thread(&self, path: &[usize], place: &str) -> Result<Option<Thread>> {
        let [.., parent, leaf] = path else { return Ok(None) };
        let is_user = |&index: &usize| self.nodes[index].message.role == "user";
        let repeated = is_user(leaf) && self.nodes[*parent].replies.first() != Some(leaf);
        if repeated || path.iter().any(|&index| self.nodes[index].unwanted) {
            return Ok(None);
        }
        let kept = if is_user(leaf) { &path[..path.len() - 1] } else { path };
        for (turn, index) in kept.iter().enumerate() {
            if is_user(index) != turn.is_multiple_of(2) {
                bail!("the roles on the way to message {} ({place}) do not alternate", self.nodes[*index].id);
            }
        }
        let messages = kept.iter().map(|&index| self.nodes[index].message.clone()).collect();
        Ok(Some(Thread { messages, place: place.to_owned() }))
    }

    /// Adds a message with the replies that stand in it.
    fn add(&mut self, record: &Map<String, Value>) -> Result<usize> {
        let text = |key: &str| record.get(key).and_then(Value::as_str).with_context(|| format!("no text in `{key}`"));
        let truth = |key: &str| record.get(key).and_then(Value::as_bool).unwrap_or(false);
        let role = match text("role")? {
            "prompter" => "user",
            "assistant" => "assistant",
            other => bail!("the role {other:?} is neither prompter nor assistant"),
        };
        let index = self.nodes.len();
        let (id, message) = (text("message_id")?.to_owned(), Message::new(role, text("text")?));
        let unwanted = truth("deleted") || truth("synthetic");
        self.nodes.push(Node { id, message, unwanted, replies: Vec::new() });
        for reply in record.get("replies").and_then(Value::as_array).into_iter().flatten() {
            let reply = self.add(reply.as_object().context("a reply is not an object")?)?;
            self.nodes[index].replies.push(reply);
        }
        Ok(index)
    }
}

/// Reads both shapes: a tree a record (its messages nested), or a message a record (named by its parent).
fn grow(records: &[Record], counts: &mut ExampleCounts) -> Result<Forest> {
    let mut forest = Forest::default();
    let mut by_id: HashMap<String, usize> = HashMap::new();
    // Replies, by their parents' names: a parent may come later.
    let mut replies: Vec<(usize, String)> = Vec::new();
    for record in records {
        let place = || record.place().to_owned();
        let value = record.fields();
        let ready = value.get("tree_state").and_then(Value::as_str).is_none_or(|state| state == "ready_for_export");
        let parent = value.get("parent_id").and_then(Value::as_str);
        if !ready && parent.is_none() {
            counts.unready_trees += 1;
        }
        if !ready {
            continue;
        }
        let message = match value.get("prompt") {
            Some(Value::Object(prompt)) => prompt,
            _ => value,
        };
        let index = forest.add(message).with_context(place)?;
        by_id.insert(forest.nodes[index].id.clone(), index);
        match parent {
            None => forest.roots.push((index, place())),
            Some(parent) => replies.push((index, parent.to_owned())),
        }
    }
    for (reply, parent) in replies {
        match by_id.get(&parent) {
            Some(&parent) => forest.nodes[parent].replies.push(reply),
            None => counts.orphans += 1,
        }
    }
    Ok(forest)
}
