//! vrtrain: pre-train small GPTs and fine-tune LLMs from a terminal, with VRAdam.
//!
//! The binary is a thin shell over this library. Directions of the modules (a test over the sources enforces them):
//! `cli -> commands -> {train, eval, generate, quickstart} -> {data, model, optim, hub} -> {params, ops} -> config`;
//! `cuda`, below them all, starts kernels.

pub mod cli;
pub mod commands;
pub mod config;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod data;
pub mod eval;
pub mod generate;
pub mod hub;
pub mod lab;
pub mod model;
pub mod ops;
pub mod optim;
pub mod params;
pub mod quickstart;
pub mod random;
pub mod report;
pub mod train;
