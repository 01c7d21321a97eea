//! The embedded quickstart: its word problems and its tokenizer, made from a seed without any file or network.

pub mod corpus;
pub mod tokenizer;

mod draw;
mod problems;

/// The quickstart's run configuration, as `pretrain` without `--config` reads it.
pub const CONFIG: &str = include_str!("../../configs/quickstart.toml");
