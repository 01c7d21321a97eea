//! Completing a batch of prompts token by token, with keys and values kept.

use super::sampling::Sampler;
use crate::model::Decoder;
use crate::params::Weights;
use anyhow::{Result, ensure};

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It has as many new tokens as were asked for.
    Length,
    /// The model wrote the end-of-text token (which is not part of the completion).
    EndOfText,
    /// The caller said so.
    Stopped,
    /// The model's context is full.
    Context,
}

impl End {
    /// The word that JSON output uses.
    pub fn word(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::EndOfText => "end_of_text",
            Self::Stopped => "stop",
            Self::Context => "context",
        }
    }
}

/// What follows one prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    pub ids: Vec<u32>,
    pub end: End,
}

/// What a caller says to a new token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    Continue,
    Stop,
}

/// Bounds of a completion.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    pub max_new_tokens: usize,
    /// Any of these tokens ends a text.
    pub end_of_text: &'a [u32],
}

/// Completes every prompt; `on_token(prompt, token)` sees each new token as it comes.
///
/// # Errors
/// When a prompt is empty, longer than the context or holds an id outside the vocabulary, or a logit is not finite.
pub fn complete<'a>(
    model: &mut Decoder,
    weights: impl Into<Weights<'a>>,
    prompts: &[Vec<u32>],
    limits: Limits,
    sampler: &mut Sampler,
    on_token: &mut dyn FnMut(usize, u32) -> Result<Flow>,
) -> Result<Vec<Completion>> {
    let weights = weights.into();
    let vocabulary = model.vocab_size();
    let context = model.n_positions();
    for prompt in prompts {
        ensure!(!prompt.is_empty(), "the prompt is empty: give at least one token");
        ensure!(prompt.len() <= context, "the prompt has {} tokens, the model's context holds {context}", prompt.len());
        if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocabulary) {
            anyhow::bail!("the prompt holds the id {id}, the vocabulary has {vocabulary}");
        }
    }
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let mut cache = model.cache(prompts.len(), longest + limits.max_new_tokens);
    let mut logits = vec![0.0; prompts.len() * vocabulary];
    for (place, prompt) in prompts.iter().enumerate() {
        model.prefill(weights, &mut cache, place, prompt, &mut logits[place * vocabulary..][..vocabulary])?;
    }
    let mut open: Vec<Option<Vec<u32>>> = vec![Some(Vec::new()); prompts.len()];
    let mut done: Vec<Option<Completion>> = vec![None; prompts.len()];
    // A finished sequence goes on from an empty cache, unheard, until the others are done.
    let mut next = vec![0u32; prompts.len()];
    loop {
        for place in 0..prompts.len() {
            let Some(mut ids) = open[place].take() else { continue };
            if ids.len() == limits.max_new_tokens {
                done[place] = Some(Completion { ids, end: End::Length });
                continue;
            }
            let token = sampler.next(&logits[place * vocabulary..][..vocabulary])?;
            if limits.end_of_text.contains(&token) {
                done[place] = Some(Completion { ids, end: End::EndOfText });
                continue;
            }
            ids.push(token);
            next[place] = token;
            let full = prompts[place].len() + ids.len() > context;
            match on_token(place, token)? {
                Flow::Stop => done[place] = Some(Completion { ids, end: End::Stopped }),
                Flow::Continue if ids.len() == limits.max_new_tokens => {
                    done[place] = Some(Completion { ids, end: End::Length });
                }
                Flow::Continue if full => done[place] = Some(Completion { ids, end: End::Context }),
                Flow::Continue => open[place] = Some(ids),
            }
        }
        if open.iter().all(Option::is_none) {
            return Ok(done.into_iter().flatten().collect());
        }
        for place in (0..prompts.len()).filter(|&place| open[place].is_none()) {
            cache.rewind(place);
        }
        model.decode(weights, &mut cache, &next, &mut logits)?;
    }
}
