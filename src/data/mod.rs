//! From files to batches: parquet, JSON Lines, text and token files become rows of token ids, shuffled and resumable.
//!
//! [`DataSet::open`] checks every file before any work starts, [`TokenStream`] reads and tokenises ahead of the trainer
//! and cuts rows of T+1 tokens, and a [`Position`] names the next row for a checkpoint.

mod bytes;
mod chat_template;
mod chat_tokens;
mod cifar;
mod data_set;
mod document;
mod documents;
mod examples;
mod feed;
mod files;
mod jsonl;
mod order;
mod parquet_file;
mod pass;
mod pipeline;
mod position;
mod records;
mod stream;
mod text_file;
mod token_file;
mod tokenizer;
mod validation;

#[cfg(test)]
mod tests;

pub use bytes::{ByteSource, LocalFile, MemoryFile};
pub use chat_template::{ChatTemplate, Message, ReplyOpening};
pub use chat_tokens::ChatTokenizer;
pub use cifar::Images;
pub use data_set::{DataSet, Summary};
pub use document::{Document, Opening};
pub use documents::documents_as_ids;
pub use examples::{
    ChatFormat, CompletionFormat, Example, ExampleCounts, ExampleFormat, ExampleLimits, ExampleStream, Examples,
    Packing, Template, plain_template,
};
pub use feed::Feed;
pub use files::{FileKind, NamedFiles, SourceFile, local_files, select};
pub use order::Order;
pub use pass::{Basis, Pass};
pub use position::{Identity, Position};
pub use records::{Record, records};
pub use stream::{Batch, StreamSettings, TokenStream};
pub use tokenizer::{TextEncoder, TextTokenizer};
pub use validation::ValidationSet;
