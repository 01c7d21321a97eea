//! How likely a model finds given continuations: batches of examples of different lengths, padded behind.

use crate::model::Decoder;
use crate::params::Weights;
use anyhow::{Result, ensure};

/// Tokens of one forward pass, at most, padding included.
const TOKENS_AT_ONCE: usize = 4096;

/// A text whose end is scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    pub ids: Vec<u32>,
    /// How many ids at the end are scored; at least one id stands before them.
    pub scored: usize,
}

/// What the model made of an example's continuation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Summed negative log-likelihood, in nats.
    pub nll: f64,
    pub tokens: usize,
    /// Whether every token of it is the likeliest one (of equal ones the lowest id).
    pub greedy: bool,
}

impl Example {
    /// The continuation's ids are those of the whole text behind those of the context, as lm-evaluation-harness has it.
    pub fn new(context: &[u32], whole: Vec<u32>) -> Self {
        let scored = whole.len().saturating_sub(context.len());
        Self { ids: whole, scored }
    }

    /// Drops ids from the beginning until at most `context` stand before the last one; whether any were.
    pub fn cut(&mut self, context: usize) -> bool {
        let surplus = self.ids.len().saturating_sub(context + 1);
        self.ids.drain(..surplus);
        self.scored = self.scored.min(self.ids.len().saturating_sub(1));
        surplus > 0
    }
}

/// Scores every example; `on_progress` hears how many are done. The longest come first, so that rows of a batch have
/// nearly the same length; the result does not depend on the batches beyond f32 rounding.
///
/// # Errors
/// When an example has nothing to score or before it, is longer than the context, or holds an id outside the vocabulary.
pub fn score(
    model: &mut Decoder,
    weights: Weights,
    examples: &[Example],
    on_progress: &mut dyn FnMut(usize),
) -> Result<Vec<Score>> {
    let (context, vocabulary) = (model.n_positions(), model.vocab_size());
    for Example { ids, scored } in examples {
        ensure!(*scored > 0 && *scored < ids.len(), "{scored} of {} tokens cannot be scored", ids.len());
        ensure!(ids.len() <= context + 1, "an example has {} tokens, the model's context holds {context}", ids.len());
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
            anyhow::bail!("an example holds the id {id}, the vocabulary has {vocabulary}");
        }
    }
    let mut order: Vec<usize> = (0..examples.len()).collect();
    order.sort_by_key(|&place| (std::cmp::Reverse(examples[place].ids.len()), place));
    let mut scores = vec![Score::default(); examples.len()];
    let mut done = 0;
    while done < order.len() {
        let time = examples[order[done]].ids.len() - 1;
        let rows = (TOKENS_AT_ONCE / time).clamp(1, order.len() - done);
        let batch = &order[done..done + rows];
        score_batch(model, weights, examples, batch, time, &mut scores)?;
        done += rows;
        on_progress(done);
    }
    Ok(scores)
}

/// Scores the examples `batch`, each padded to `time` inputs.
fn score_batch(
    model: &mut Decoder,
    weights: Weights,
    examples: &[Example],
    batch: &[usize],
    time: usize,
    scores: &mut [Score],
) -> Result<()> {
    // Attention looks back only, so what stands behind a text changes nothing in it.
    let mut inputs = vec![0; batch.len() * time];
    let mut places = Vec::new();
    for (row, &place) in batch.iter().enumerate() {
        let Example { ids, scored } = &examples[place];
        let given = &ids[..ids.len() - 1];
        inputs[row * time..][..given.len()].copy_from_slice(given);
        places.extend((given.len() - scored..given.len()).map(|position| row * time + position));
    }
    let logits = model.logits_at(weights, &inputs, batch.len(), &places)?;
    let mut rows = logits.chunks_exact(model.vocab_size());
    for &place in batch {
        let Example { ids, scored } = &examples[place];
        let mut score = Score { nll: 0.0, tokens: *scored, greedy: true };
        for (target, logits) in ids[ids.len() - scored..].iter().zip(rows.by_ref()) {
            let (nll, likeliest) = negative_log_likelihood(logits, *target as usize);
            ensure!(nll.is_finite(), "the model's logits are not finite: its weights are poisoned");
            score.nll += nll;
            score.greedy &= likeliest == *target as usize;
        }
        scores[place] = score;
    }
    Ok(())
}

/// -log softmax(logits)[target], and the place of the largest logit.
fn negative_log_likelihood(logits: &[f32], target: usize) -> (f64, usize) {
    let mut best = 0;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = id;
        }
    }
    let largest = f64::from(logits[best]);
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
    (largest + sum.ln() - f64::from(logits[target]), best)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Recompute;
    use crate::model::gpt2::Gpt2Config;
    use crate::model::{Batch, Documents, Engine, Head, IGNORE, ModelShape};
    use crate::ops::product::Precision;
    use crate::params::{Layout, ParameterStore};
    use candle_core::Device;
    use std::sync::Arc;

    /// A model with random weights, and examples of many lengths.
    fn case() -> Result<(ModelShape, ParameterStore, Vec<Example>)> {
        let shape = ModelShape::Gpt2(Gpt2Config {
            n_layer: 2,
            n_head: 2,
            n_embd: 32,
            n_inner: 64,
            n_positions: 40,
            vocab_size: 50,
            layer_norm_epsilon: 1e-5,
            head: Head::Tied,
        });
        let layout = Arc::new(Layout::new(shape.parameter_specs()));
        let mut store = ParameterStore::new(Arc::clone(&layout), &Device::Cpu)?;
        let mut weights = vec![0.0; layout.len()];
        shape.initialize(&layout, 1, &mut weights);
        store.set_weights(weights)?;
        let example = |number: u32| {
            let length = 3 + number * 7 % 38;
            let ids = (0..length).map(|place| (place * 31 + number * 17) % 50).collect();
            Example { ids, scored: 1 + number as usize % 2 }
        };
        Ok((shape, store, (0..20).map(example).collect()))
    }

    #[test]
    fn batches_of_different_lengths_give_the_loss_of_each_example_alone() -> Result<()> {
        let (shape, store, examples) = case()?;
        let mut model = Decoder::with_precision(&shape, store.layout(), Precision::F32);
        let mut done = 0;
        let scores = store.read(|weights| score(&mut model, weights, &examples, &mut |now| done = now))??;
        assert_eq!(done, examples.len());
        let mut engine = Engine::new(&shape, store.layout(), &Device::Cpu, Recompute::None, Precision::F32);
        for (Example { ids, scored }, score) in examples.iter().zip(&scores) {
            let mut targets = ids[1..].to_vec();
            let masked = targets.len() - scored;
            targets[..masked].fill(IGNORE);
            let inputs = &ids[..ids.len() - 1];
            let batch = Batch { inputs, targets: &targets, rows: 1, documents: Documents::Whole };
            let alone = engine.loss(&store, batch)?;
            assert_eq!(alone.count as usize, score.tokens);
            assert!((alone.sum - score.nll).abs() < 1e-5 * alone.sum, "{} {}", alone.sum, score.nll);
        }
        Ok(())
    }

    #[test]
    fn a_continuation_is_greedy_where_every_token_is_the_likeliest() -> Result<()> {
        assert_eq!(negative_log_likelihood(&[0.0, 2.0, 2.0], 1).1, 1);
        let (nll, _) = negative_log_likelihood(&[0.0, 2.0, 2.0], 0);
        assert!((nll - (1.0 + 2.0 * 2f64.exp()).ln()).abs() < 1e-12);
        Ok(())
    }

    #[test]
    fn an_example_that_is_too_long_keeps_its_end() {
        let mut example = Example { ids: (0..10).collect(), scored: 3 };
        assert!(example.cut(5) && !example.cut(5));
        assert_eq!(example, Example { ids: (4..10).collect(), scored: 3 });
        assert!(example.cut(2));
        assert_eq!(example, Example { ids: vec![7, 8, 9], scored: 2 });
    }

    #[test]
    fn what_cannot_be_scored_is_refused() -> Result<()> {
        let (shape, store, _) = case()?;
        let mut model = Decoder::with_precision(&shape, store.layout(), Precision::F32);
        for (ids, scored) in [(vec![1], 1), (vec![1, 2], 0), (vec![1, 50], 1), (vec![1; 42], 1)] {
            let example = [Example { ids, scored }];
            assert!(store.read(|weights| score(&mut model, weights, &example, &mut |_| {}))?.is_err(), "{example:?}");
        }
        Ok(())
    }
}
