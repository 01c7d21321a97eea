//! The embedded quickstart: its word problems and its tokenizer, made from a seed without any file or network.

pub mod corpus;
pub mod tokenizer;

mod draw;
mod problems;
