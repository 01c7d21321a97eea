//! Scoring: what a model's output is worth, by the rules that published numbers were made with.

pub mod continuation;
pub mod exact_match;
pub mod gsm8k;
pub mod gsm8k_answer;
pub mod hellaswag;
pub mod mcnemar;
pub mod perplexity;
pub mod python_random;
