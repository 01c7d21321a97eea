//! Both models reading prompts together: not a bit differs from what each prompt has alone.

use super::testing::{Small, decoder};
use super::{Decoder, KeyValueCache, Prompt};
use crate::ops::product::Precision;
use crate::params::Weights;
use anyhow::Result;

/// On both sides of where the products' kernels change: at 32 rows, and in f32 at more, layer by layer.
const LENGTHS: [usize; 12] = [64, 1, 300, 7, 33, 2, 100, 31, 32, 40, 300, 33];
const CONTEXT: usize = 310;
const VOCABULARY: usize = 211;
/// Wide enough for every kernel.
const MODEL: Small = Small { width: 264, heads: 4, inner: 700, context: CONTEXT, vocabulary: VOCABULARY };
const FACTOR: f32 = 3.0;

/// Logits of what follows the prompts, and of what follows two more tokens, which see every key and value kept.
fn logits(
    decoder: &mut Decoder,
    weights: Weights,
    prompts: &[(usize, &[u32])],
    sequences: usize,
) -> Result<Vec<Vec<f32>>> {
    let mut cache: KeyValueCache = decoder.cache(sequences, CONTEXT);
    let mut logits = vec![f32::NAN; prompts.len() * VOCABULARY];
    let read: Vec<Prompt> = prompts.iter().map(|&(sequence, tokens)| Prompt { sequence, tokens }).collect();
    decoder.prefill(weights, &mut cache, &read, &mut logits)?;
    let mut found: Vec<Vec<f32>> = logits.chunks_exact(VOCABULARY).map(<[f32]>::to_vec).collect();
    cache.extend_only(&prompts.iter().map(|&(sequence, _)| sequence).collect::<Vec<_>>());
    for token in [3, 9] {
        decoder.decode(weights, &mut cache, &vec![token; prompts.len()], &mut logits)?;
        found.iter_mut().zip(logits.chunks_exact(VOCABULARY)).for_each(|(found, row)| found.extend_from_slice(row));
    }
    Ok(found)
}

#[test]
fn prompts_read_together_have_the_logits_keys_and_values_that_each_has_alone_in_any_order() -> Result<()> {
    let prompts = MODEL.prompts(&LENGTHS);
    for (shape, precision) in
        MODEL.shapes().into_iter().flat_map(|shape| [Precision::F32, Precision::Bf16].map(|p| (shape.clone(), p)))
    {
        let (store, mut decoder) = decoder(&shape, precision, FACTOR)?;
        store.read(|weights| -> Result<()> {
            let alone: Vec<Vec<f32>> = prompts
                .iter()
                .map(|prompt| Ok(logits(&mut decoder, weights, &[(0, prompt)], 1)?.remove(0)))
                .collect::<Result<_>>()?;
            assert!(alone.iter().flatten().all(|logit| logit.is_finite()));
            let forwards: Vec<usize> = (0..prompts.len()).collect();
            let backwards: Vec<usize> = forwards.iter().rev().copied().collect();
            let orders: [&[usize]; 6] = [&forwards, &backwards, &[1, 3, 5], &[7, 8, 4, 11], &[2, 9], &[6, 0, 10, 2, 4]];
            for order in orders {
                // Sequences of the cache in another order than the prompts, and one that is left out.
                let list: Vec<(usize, &[u32])> =
                    order.iter().enumerate().map(|(row, &prompt)| (order.len() - row, &prompts[prompt][..])).collect();
                let together = logits(&mut decoder, weights, &list, order.len() + 1)?;
                for (row, &prompt) in order.iter().enumerate() {
                    let same = together[row].iter().zip(&alone[prompt]).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{precision:?}, {} tokens in {order:?} of {shape:?}", prompts[prompt].len());
                }
            }
            Ok(())
        })??;
    }
    Ok(())
}

#[test]
fn more_prompts_than_the_head_takes_at_once_are_read_as_each_alone() -> Result<()> {
    let prompts = MODEL.prompts(&LENGTHS);
    let (store, mut decoder) = decoder(&MODEL.shapes()[1], Precision::F32, FACTOR)?;
    store.read(|weights| -> Result<()> {
        let mut read = |places: &[usize]| -> Result<Vec<f32>> {
            let mut cache = decoder.cache(places.len(), CONTEXT);
            let mut logits = vec![0.0; places.len() * VOCABULARY];
            let prompt = |(sequence, &place): (usize, &usize)| Prompt { sequence, tokens: &prompts[place] };
            let list: Vec<Prompt> = places.iter().enumerate().map(prompt).collect();
            decoder.prefill(weights, &mut cache, &list, &mut logits)?;
            Ok(logits)
        };
        let places: Vec<usize> = (0..40).map(|place| place % 12).collect();
        let together = read(&places)?;
        for (place, logits) in places.into_iter().zip(together.chunks_exact(VOCABULARY)) {
            assert!(read(&[place])? == logits, "prompt {place}");
        }
        Ok(())
    })?
}

#[test]
fn an_empty_prompt_and_one_that_is_too_long_are_refused_among_others() -> Result<()> {
    for shape in MODEL.shapes() {
        let (store, mut decoder) = decoder(&shape, Precision::F32, FACTOR)?;
        let mut refusal = |tokens: &[u32]| -> Result<String> {
            let mut cache = decoder.cache(2, 50);
            let list = [Prompt { sequence: 0, tokens: &[1, 2] }, Prompt { sequence: 1, tokens }];
            let mut logits = vec![0.0; 2 * VOCABULARY];
            let result = store.read(|weights| decoder.prefill(weights, &mut cache, &list, &mut logits))?;
            Ok(result.expect_err("a bad prompt").to_string())
        };
        assert!(refusal(&[])?.contains("the prompt is empty"));
        assert!(refusal(&[1; 51])?.contains("the prompt has 51 tokens, the context holds 50"));
        assert!(refusal(&[VOCABULARY as u32])?.contains(&VOCABULARY.to_string()));
    }
    Ok(())
}
