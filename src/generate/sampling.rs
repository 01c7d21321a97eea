//! Choosing the next token from its logits: greedy, or drawn after temperature, top-k and top-p.
//!
//! ```
//! # fn main() -> Result<(), vrtrain::generate::sampling::SamplingError> {
//! use vrtrain::generate::sampling::{Sampler, SamplingOptions};
//! let options = SamplingOptions { temperature: 0.8, top_k: Some(50), top_p: Some(0.95) };
//! let mut sampler = Sampler::new(options, 4, 1337)?;
//! let id = sampler.next(&[0.1, 2.0, -1.0, 0.5])?;
//! assert!(id < 4);
//! # Ok(())
//! # }
//! ```

use crate::random::{Stream, generator};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;
use std::cmp::Ordering;

/// How the next token is chosen. The steps apply in the order of the fields.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingOptions {
    /// Logits are divided by it; 0 takes the largest logit, of equal ones the lowest id.
    pub temperature: f64,
    /// Only so many tokens of the largest logits are kept (of equal ones the lower ids).
    pub top_k: Option<usize>,
    /// Only the smallest set of the likeliest tokens whose probability reaches this is kept, at least one.
    pub top_p: Option<f64>,
}

impl SamplingOptions {
    /// Always the likeliest token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: None, top_p: None };
}

/// Options that mean nothing, or logits that no token can be chosen from.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SamplingError {
    #[error("temperature must be a number from 0, found {0}")]
    Temperature(f64),
    #[error("top-k must be at least 1, found 0; leave it out to keep all tokens")]
    TopK,
    #[error("top-p must be over 0 and at most 1, found {0}; leave it out to keep all tokens")]
    TopP(f64),
    #[error("no token can be drawn from an empty vocabulary")]
    EmptyVocabulary,
    #[error("the model gave {found} logits for a vocabulary of {vocabulary} tokens")]
    MissingLogits { found: usize, vocabulary: usize },
    #[error("the logit of token {id} is {value}: the model's weights or activations are broken")]
    BrokenLogit { id: usize, value: f32 },
    #[error("every logit is -inf: no token is possible")]
    NothingPossible,
}

/// A token and its probability's numerator.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    logit: f32,
    weight: f64,
}

/// Draws tokens; the same options, seed and logits give the same tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplingOptions,
    vocabulary: usize,
    random: ChaCha8Rng,
    /// Kept between calls for its memory.
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler for a vocabulary of so many tokens; logits behind it (a padded head) are never drawn.
    ///
    /// # Errors
    /// When an option is out of its range.
    pub fn new(options: SamplingOptions, vocabulary: usize, seed: u64) -> Result<Self, SamplingError> {
        if !(options.temperature.is_finite() && options.temperature >= 0.0) {
            return Err(SamplingError::Temperature(options.temperature));
        }
        if options.top_k == Some(0) {
            return Err(SamplingError::TopK);
        }
        if let Some(top_p) = options.top_p
            && !(top_p > 0.0 && top_p <= 1.0)
        {
            return Err(SamplingError::TopP(top_p));
        }
        if vocabulary == 0 {
            return Err(SamplingError::EmptyVocabulary);
        }
        Ok(Self { options, vocabulary, random: generator(seed, Stream::Generate), candidates: Vec::new() })
    }

    /// Chooses the next token.
    ///
    /// # Errors
    /// When there are fewer logits than tokens, one of them is NaN or +inf, or all are -inf.
    pub fn next(&mut self, logits: &[f32]) -> Result<u32, SamplingError> {
        let Some(logits) = logits.get(..self.vocabulary) else {
            return Err(SamplingError::MissingLogits { found: logits.len(), vocabulary: self.vocabulary });
        };
        let likeliest = likeliest(logits)?;
        if self.options.temperature == 0.0 {
            return Ok(likeliest as u32);
        }
        weigh(&self.options, logits, logits[likeliest], &mut self.candidates);
        let total: f64 = self.candidates.iter().map(|candidate| candidate.weight).sum();
        let target = uniform(&mut self.random) * total;
        let mut cumulative = 0.0;
        for candidate in &self.candidates {
            cumulative += candidate.weight;
            if target < cumulative {
                return Ok(candidate.id);
            }
        }
        // Only if rounding took `target` up to the total; the likeliest token is always possible.
        Ok(likeliest as u32)
    }
}

/// The index of the largest logit, the lowest of equal ones.
fn likeliest(logits: &[f32]) -> Result<usize, SamplingError> {
    let mut best = 0;
    for (id, &value) in logits.iter().enumerate() {
        if value.is_nan() || value == f32::INFINITY {
            return Err(SamplingError::BrokenLogit { id, value });
        }
        if value > logits[best] {
            best = id;
        }
    }
    if logits[best] == f32::NEG_INFINITY { Err(SamplingError::NothingPossible) } else { Ok(best) }
}

/// Fills `candidates` with the tokens that may be drawn and their weights exp((logit - largest) / temperature).
///
/// Without top-k and top-p they are in the order of their ids, otherwise the likeliest come first.
fn weigh(options: &SamplingOptions, logits: &[f32], largest: f32, candidates: &mut Vec<Candidate>) {
    candidates.clear();
    candidates.extend(logits.iter().enumerate().map(|(id, &logit)| Candidate { id: id as u32, logit, weight: 0.0 }));
    if let Some(top_k) = options.top_k
        && top_k < candidates.len()
    {
        candidates.select_nth_unstable_by(top_k - 1, likelier_first);
        candidates.truncate(top_k);
    }
    if options.top_k.is_some() || options.top_p.is_some() {
        candidates.sort_unstable_by(likelier_first);
    }
    for candidate in candidates.iter_mut() {
        candidate.weight = ((f64::from(candidate.logit) - f64::from(largest)) / options.temperature).exp();
    }
    if let Some(top_p) = options.top_p
        && top_p < 1.0
    {
        let target = top_p * candidates.iter().map(|candidate| candidate.weight).sum::<f64>();
        let mut cumulative = 0.0;
        let reached = candidates.iter().position(|candidate| {
            cumulative += candidate.weight;
            cumulative >= target
        });
        candidates.truncate(reached.map_or(candidates.len(), |last| last + 1));
    }
}

/// A total order (no logit is NaN here): larger logits first, then lower ids.
fn likelier_first(left: &Candidate, right: &Candidate) -> Ordering {
    right.logit.partial_cmp(&left.logit).unwrap_or(Ordering::Equal).then(left.id.cmp(&right.id))
}

/// Uniform in [0, 1) with 53 bits: enough that tokens rarer than 1 in 16 million keep their share.
fn uniform(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn options(temperature: f64, top_k: Option<usize>, top_p: Option<f64>) -> SamplingOptions {
        SamplingOptions { temperature, top_k, top_p }
    }

    /// softmax(logits / temperature), written independently of the sampler.
    fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
        let largest = logits.iter().fold(f64::NEG_INFINITY, |largest, &logit| largest.max(f64::from(logit)));
        let weights: Vec<f64> =
            logits.iter().map(|&logit| ((f64::from(logit) - largest) / temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / total).collect()
    }

    fn counts(options: SamplingOptions, logits: &[f32], draws: usize) -> Result<Vec<u64>, SamplingError> {
        let mut sampler = Sampler::new(options, logits.len(), 11)?;
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.next(logits)? as usize] += 1;
        }
        Ok(counts)
    }

    /// The tokens that can be drawn at all.
    fn support(options: SamplingOptions, logits: &[f32]) -> Result<Vec<usize>, SamplingError> {
        let drawn = counts(options, logits, 4000)?;
        Ok((0..logits.len()).filter(|&id| drawn[id] > 0).collect())
    }

    /// Pearson's statistic against `expected` probabilities.
    fn chi_square(counts: &[u64], expected: &[f64]) -> f64 {
        let draws: u64 = counts.iter().sum();
        counts.iter().zip(expected).map(|(&n, p)| (n as f64 - p * draws as f64).powi(2) / (p * draws as f64)).sum()
    }

    #[test]
    fn draws_follow_the_softmax_at_any_temperature() -> Result<(), SamplingError> {
        let logits = [0.3, -1.0, 1.2, 0.0, 0.9, -0.4, 1.1, 0.5];
        for temperature in [0.5, 1.0, 2.0] {
            let counts = counts(options(temperature, None, None), &logits, 200_000)?;
            // 7 degrees of freedom: over 29.9 once in 10,000 seeds.
            let statistic = chi_square(&counts, &softmax(&logits, temperature));
            assert!(statistic < 29.9, "temperature {temperature}: chi-square {statistic}");
            let wrong = chi_square(&counts, &softmax(&logits, temperature * 1.1));
            assert!(wrong > 29.9, "the test tells a temperature 10% off: {wrong}");
        }
        Ok(())
    }

    #[test]
    fn what_is_kept_is_drawn_in_its_old_proportions() -> Result<(), SamplingError> {
        let logits = [0.3, -1.0, 1.2, 0.0, 0.9];
        let counts = counts(options(1.0, Some(3), None), &logits, 100_000)?;
        let kept = softmax(&[0.3, 1.2, 0.9], 1.0);
        assert_eq!((counts[1], counts[3]), (0, 0));
        // 2 degrees of freedom: over 18.4 once in 10,000 seeds.
        assert!(chi_square(&[counts[0], counts[2], counts[4]], &kept) < 18.4, "{counts:?}");
        Ok(())
    }

    #[test]
    fn of_equal_logits_the_lower_ids_win() -> Result<(), SamplingError> {
        let logits = [1.0, 2.0, 2.0, 2.0, -3.0];
        assert_eq!(Sampler::new(SamplingOptions::GREEDY, 5, 0)?.next(&logits)?, 1);
        assert_eq!(support(options(1.0, Some(2), None), &logits)?, [1, 2]);
        Ok(())
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_it() -> Result<(), SamplingError> {
        // Probabilities 0.5, 0.25, 0.125, 0.125.
        let logits = [8.0, 4.0, 2.0, 2.0f32].map(f32::ln);
        assert_eq!(support(options(1.0, None, Some(1e-9)), &logits)?, [0]);
        assert_eq!(support(options(1.0, None, Some(0.49)), &logits)?, [0]);
        assert_eq!(support(options(1.0, None, Some(0.51)), &logits)?, [0, 1]);
        assert_eq!(support(options(1.0, None, Some(0.76)), &logits)?, [0, 1, 2]);
        assert_eq!(support(options(1.0, None, Some(1.0)), &logits)?, [0, 1, 2, 3]);
        // After top-k the two kept have 2/3 and 1/3.
        assert_eq!(support(options(1.0, Some(2), Some(0.6)), &logits)?, [0]);
        assert_eq!(support(options(1.0, Some(2), Some(0.7)), &logits)?, [0, 1]);
        Ok(())
    }

    #[test]
    fn extreme_temperatures_are_greedy_and_uniform() -> Result<(), SamplingError> {
        let logits = [1.0, 1.0001, -2.0, f32::MIN];
        assert_eq!(support(options(1e-300, None, None), &logits)?, [1]);
        let counts = counts(options(1e300, None, None), &logits, 40_000)?;
        assert!(chi_square(&counts, &[0.25; 4]) < 21.1, "{counts:?}");
        Ok(())
    }

    #[test]
    fn impossible_and_padded_tokens_are_never_drawn() -> Result<(), SamplingError> {
        let logits = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY, 0.0, 50.0, f32::NAN];
        let mut sampler = Sampler::new(options(5.0, None, None), 4, 3)?;
        for _ in 0..1000 {
            assert!(matches!(sampler.next(&logits)?, 1 | 3));
        }
        assert_eq!(Sampler::new(SamplingOptions::GREEDY, 4, 3)?.next(&logits)?, 1);
        Ok(())
    }

    #[test]
    fn broken_logits_and_options_are_errors() -> Result<(), SamplingError> {
        let next = |logits: &[f32]| Sampler::new(options(1.0, None, None), 3, 0)?.next(logits);
        assert!(matches!(next(&[0.0, f32::NAN, 0.0]), Err(SamplingError::BrokenLogit { id: 1, .. })));
        assert!(matches!(next(&[0.0, 0.0, f32::INFINITY]), Err(SamplingError::BrokenLogit { id: 2, .. })));
        assert_eq!(next(&[f32::NEG_INFINITY; 3]), Err(SamplingError::NothingPossible));
        assert_eq!(next(&[0.0; 2]), Err(SamplingError::MissingLogits { found: 2, vocabulary: 3 }));
        let refused = |options| Sampler::new(options, 3, 0).expect_err("options out of range");
        assert_eq!(refused(options(-1.0, None, None)), SamplingError::Temperature(-1.0));
        assert!(matches!(refused(options(f64::NAN, None, None)), SamplingError::Temperature(_)));
        assert_eq!(refused(options(1.0, Some(0), None)), SamplingError::TopK);
        assert_eq!(refused(options(1.0, None, Some(0.0))), SamplingError::TopP(0.0));
        assert_eq!(refused(options(1.0, None, Some(1.5))), SamplingError::TopP(1.5));
        assert_eq!(Sampler::new(SamplingOptions::GREEDY, 0, 0).err(), Some(SamplingError::EmptyVocabulary));
        Ok(())
    }

    #[test]
    fn the_same_seed_draws_the_same_tokens() -> Result<(), SamplingError> {
        let draw = |seed| -> Result<Vec<u32>, SamplingError> {
            let mut sampler = Sampler::new(options(1.0, None, None), 16, seed)?;
            (0..64).map(|_| sampler.next(&[0.0; 16])).collect()
        };
        assert_eq!(draw(1)?, draw(1)?);
        assert_ne!(draw(1)?, draw(2)?);
        Ok(())
    }

    proptest! {
        /// By definition: with the tokens sorted, a set kept by top-k has k of them, the set kept by top-p is a prefix
        /// that reaches p and that without its last token does not.
        #[test]
        fn kept_sets_meet_their_definitions(
            logits in prop::collection::vec(-6.0f32..6.0, 1..40),
            temperature in 0.2f64..3.0,
            top_k in 1usize..50,
            top_p in 0.01f64..0.999,
        ) {
            let largest = logits.iter().copied().fold(f32::MIN, f32::max);
            let mut kept = Vec::new();
            weigh(&options(temperature, Some(top_k), None), &logits, largest, &mut kept);
            prop_assert_eq!(kept.len(), top_k.min(logits.len()));
            let least = kept.iter().map(|candidate| candidate.logit).fold(f32::MAX, f32::min);
            let chosen: Vec<usize> = kept.iter().map(|candidate| candidate.id as usize).collect();
            prop_assert!((0..logits.len()).all(|id| chosen.contains(&id) || logits[id] <= least));

            weigh(&options(temperature, None, Some(top_p)), &logits, largest, &mut kept);
            let probabilities = softmax(&logits, temperature);
            let mass: f64 = kept.iter().map(|candidate| probabilities[candidate.id as usize]).sum();
            let smallest = kept.last().map_or(0.0, |candidate| probabilities[candidate.id as usize]);
            prop_assert!(mass >= top_p - 1e-9);
            prop_assert!(mass - smallest < top_p + 1e-9);
            prop_assert!(kept.is_sorted_by(|left, right| left.weight >= right.weight));
        }
    }
}
