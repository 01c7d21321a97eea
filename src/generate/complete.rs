//! Completing a batch of prompts token by token, with keys and values kept.

use super::sampling::Sampler;
use crate::model::{Decoder, Prompt};
use crate::params::Weights;
use anyhow::{Result, ensure};
use std::collections::VecDeque;

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
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flow {
    Continue,
    Stop,
    /// Go on as if the model had written these tokens next (a calculator's result). The caller is not told of them.
    Insert(Vec<u32>),
}

/// Bounds of a completion.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// Inserted tokens count.
    pub max_new_tokens: usize,
    /// Any of these tokens ends a text.
    pub end_of_text: &'a [u32],
}

/// Completes every prompt at once; `on_token(prompt, token)` sees each new token as it comes.
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
    let choose = &mut |_: usize, logits: &[f32]| Ok(sampler.next(logits)?);
    let mut completions = vec![None; prompts.len()];
    let on_end = &mut |prompt: usize, completion| {
        completions[prompt] = Some(completion);
        Ok(())
    };
    complete_in_turn(model, weights.into(), prompts, prompts.len(), limits, choose, on_token, on_end)?;
    Ok(completions.into_iter().flatten().collect())
}

/// Completes the prompts, `places` of them at a time: as soon as one ends, the next takes its place. Prompts for places
/// that are free at the same time are read together.
///
/// `choose(prompt, logits)` picks a token, `on_token(prompt, token)` sees it, and `on_end(prompt, completion)` gets each
/// completion as it ends. What follows a prompt does not depend on the others, nor on how many places there are, to the
/// last bit (as long as there are at most [`crate::ops::linear::FEW_ROWS`] places).
///
/// # Errors
/// When a prompt is empty, longer than the context or holds an id outside the vocabulary, or a logit is not finite.
#[allow(clippy::too_many_arguments, reason = "a model, its work, and three callbacks")]
pub fn complete_in_turn(
    model: &mut Decoder,
    weights: Weights,
    prompts: &[Vec<u32>],
    places: usize,
    limits: Limits,
    choose: &mut dyn FnMut(usize, &[f32]) -> Result<u32>,
    on_token: &mut dyn FnMut(usize, u32) -> Result<Flow>,
    on_end: &mut dyn FnMut(usize, Completion) -> Result<()>,
) -> Result<()> {
    let (vocabulary, context) = (model.vocab_size(), model.n_positions());
    for prompt in prompts {
        check(prompt, vocabulary, context)?;
    }
    if limits.max_new_tokens == 0 {
        let nothing = || Completion { ids: Vec::new(), end: End::Length };
        return (0..prompts.len()).try_for_each(|prompt| on_end(prompt, nothing()));
    }
    let places = places.clamp(1, prompts.len().max(1));
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let mut cache = model.cache(places, longest + limits.max_new_tokens);
    let mut logits = vec![0.0; places * vocabulary];
    let mut open: Vec<Option<Writing>> = (0..places).map(|_| None).collect();
    let mut waiting = 0..prompts.len();
    loop {
        // All free places at once, and again those whose completions ended with the first token.
        loop {
            let free: Vec<usize> = (0..places).filter(|&place| open[place].is_none()).collect();
            let taken: Vec<(usize, usize)> = free.into_iter().zip(waiting.by_ref()).collect();
            if taken.is_empty() {
                break;
            }
            let prompt = |&(sequence, prompt): &(usize, usize)| Prompt { sequence, tokens: &prompts[prompt] };
            let read: Vec<Prompt> = taken.iter().map(prompt).collect();
            let logits = &mut logits[..read.len() * vocabulary];
            model.prefill(weights, &mut cache, &read, logits)?;
            for (&(place, prompt), logits) in taken.iter().zip(logits.chunks_exact(vocabulary)) {
                let mut writing = Writing { prompt, ids: Vec::new(), inserted: VecDeque::new() };
                match writing.take(logits, prompts[prompt].len(), context, limits, choose, on_token)? {
                    Some(end) => on_end(prompt, Completion { ids: writing.ids, end })?,
                    None => open[place] = Some(writing),
                }
            }
        }
        let active: Vec<usize> = (0..places).filter(|&place| open[place].is_some()).collect();
        if active.is_empty() {
            return Ok(());
        }
        let tokens: Vec<u32> = open.iter().flatten().filter_map(|writing| writing.ids.last().copied()).collect();
        cache.extend_only(&active);
        let logits = &mut logits[..active.len() * vocabulary];
        model.decode(weights, &mut cache, &tokens, logits)?;
        for (&place, logits) in active.iter().zip(logits.chunks_exact(vocabulary)) {
            let Some(mut writing) = open[place].take() else { continue };
            let length = prompts[writing.prompt].len();
            match writing.take(logits, length, context, limits, choose, on_token)? {
                Some(end) => on_end(writing.prompt, Completion { ids: writing.ids, end })?,
                None => open[place] = Some(writing),
            }
        }
    }
}

fn check(prompt: &[u32], vocabulary: usize, context: usize) -> Result<()> {
    ensure!(!prompt.is_empty(), "the prompt is empty: give at least one token");
    ensure!(prompt.len() <= context, "the prompt has {} tokens, the model's context holds {context}", prompt.len());
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocabulary) {
        anyhow::bail!("the prompt holds the id {id}, the vocabulary has {vocabulary}");
    }
    Ok(())
}

#[cfg(test)]
mod tests;

/// A completion that is being written.
struct Writing {
    prompt: usize,
    ids: Vec<u32>,
    /// Tokens that come before the model's next own one.
    inserted: VecDeque<u32>,
}

impl Writing {
    /// Adds the next token; why the completion is over, if it is.
    fn take(
        &mut self,
        logits: &[f32],
        prompt_length: usize,
        context: usize,
        limits: Limits,
        choose: &mut dyn FnMut(usize, &[f32]) -> Result<u32>,
        on_token: &mut dyn FnMut(usize, u32) -> Result<Flow>,
    ) -> Result<Option<End>> {
        if let Some(token) = self.inserted.pop_front() {
            self.ids.push(token);
        } else {
            let token = choose(self.prompt, logits)?;
            if limits.end_of_text.contains(&token) {
                return Ok(Some(End::EndOfText));
            }
            self.ids.push(token);
            match on_token(self.prompt, token)? {
                Flow::Continue => {}
                Flow::Stop => return Ok(Some(End::Stopped)),
                Flow::Insert(tokens) => self.inserted.extend(tokens),
            }
        }
        if self.ids.len() >= limits.max_new_tokens {
            return Ok(Some(End::Length));
        }
        Ok((prompt_length + self.ids.len() > context).then_some(End::Context))
    }
}
