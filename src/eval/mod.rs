//! Scoring: what a model's output is worth, by the rules that published numbers were made with.

pub mod exact_match;
pub mod gsm8k_answer;
pub mod perplexity;
