//! LLaMA (1, 2, 3 and relatives of the same block): shape, Hugging Face files, and its forward and backward.

mod block;
mod config;
mod cpu;
mod decode;
mod generic;
mod hugging_face;
mod load;
pub mod twin;

pub use config::{BlockParameters, LlamaConfig, LlamaParameters, SpecialIds};
pub use cpu::LlamaCpu;
pub use generic::LlamaGeneric;
pub use load::stored;

#[cfg(test)]
mod tests;
