//! Completions of many prompts: the same whichever prompts stand beside them and however many places there are.

use super::*;
use crate::generate::SamplingOptions;
use crate::model::ModelShape;
use crate::model::testing::{Small, decoder};
use crate::ops::product::Precision;
use crate::params::ParameterStore;
use std::cell::RefCell;

const LENGTHS: [usize; 10] = [64, 1, 300, 7, 33, 2, 100, 31, 32, 33];
const CONTEXT: usize = 310;
const VOCABULARY: usize = 151;

const MODEL: Small = Small { width: 132, heads: 2, inner: 280, context: CONTEXT, vocabulary: VOCABULARY };

fn model(shape: &ModelShape, precision: Precision) -> Result<(ParameterStore, Decoder)> {
    decoder(shape, precision, 4.0)
}

fn prompts() -> Vec<Vec<u32>> {
    MODEL.prompts(&LENGTHS)
}

/// Each prompt's completion, and the bits of all logits that it was chosen from. Each prompt has a sampler of its own.
type Written = Vec<(Completion, Vec<u32>)>;

fn write(
    decoder: &mut Decoder,
    weights: Weights,
    prompts: &[Vec<u32>],
    seeds: &[usize],
    places: usize,
    limits: Limits,
) -> Result<Written> {
    let options = SamplingOptions { temperature: 1.0, ..SamplingOptions::GREEDY };
    let samplers = seeds.iter().map(|&seed| Sampler::new(options, VOCABULARY, seed as u64));
    let mut samplers: Vec<Sampler> = samplers.collect::<Result<_, _>>()?;
    let mut bits = vec![Vec::new(); prompts.len()];
    let mut completions = vec![None; prompts.len()];
    complete_in_turn(
        decoder,
        weights,
        prompts,
        places,
        limits,
        &mut |prompt, logits| {
            bits[prompt].extend(logits.iter().map(|logit| logit.to_bits()));
            Ok(samplers[prompt].next(logits)?)
        },
        &mut |_, _| Ok(Flow::Continue),
        &mut |prompt, completion| {
            assert!(completions[prompt].replace(completion).is_none(), "prompt {prompt} ended twice");
            Ok(())
        },
    )?;
    assert!(completions.iter().all(Option::is_some), "a prompt was left out");
    Ok(completions.into_iter().flatten().zip(bits).collect())
}

#[test]
fn completions_do_not_depend_on_other_prompts_nor_on_the_number_of_places() -> Result<()> {
    let prompts = prompts();
    // A third of the vocabulary ends a text, so that places come free at different times, some at the first token.
    let ends: Vec<u32> = (0..VOCABULARY as u32).step_by(3).collect();
    let limits = Limits { max_new_tokens: 12, end_of_text: &ends };
    for (shape, precision) in
        MODEL.shapes().into_iter().flat_map(|shape| [Precision::F32, Precision::Bf16].map(|p| (shape.clone(), p)))
    {
        let (store, mut decoder) = model(&shape, precision)?;
        store.read(|weights| -> Result<()> {
            let alone: Written = (0..prompts.len())
                .map(|prompt| {
                    Ok(write(&mut decoder, weights, &prompts[prompt..=prompt], &[prompt], 1, limits)?.remove(0))
                })
                .collect::<Result<_>>()?;
            let lengths: Vec<usize> = alone.iter().map(|(completion, _)| completion.ids.len()).collect();
            assert!(lengths.contains(&0) && lengths.iter().any(|&length| length > 1), "{lengths:?}");
            for (order, places) in [
                ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 10),
                ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 3),
                ([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], 7),
                ([4, 9, 0, 6, 2, 1, 3, 5, 7, 8], 2),
                ([2, 8, 4, 0, 9, 5, 1, 7, 3, 6], 1),
            ] {
                let chosen: Vec<Vec<u32>> = order.iter().map(|&prompt| prompts[prompt].clone()).collect();
                let together = write(&mut decoder, weights, &chosen, &order, places, limits)?;
                for (prompt, written) in order.into_iter().zip(together) {
                    assert!(written == alone[prompt], "{precision:?} prompt {prompt}, {places} places, {shape:?}");
                }
            }
            Ok(())
        })??;
    }
    Ok(())
}

#[test]
fn without_new_tokens_every_prompt_ends_empty_in_its_turn() -> Result<()> {
    let (store, mut decoder) = model(&MODEL.shapes()[0], Precision::F32)?;
    let limits = Limits { max_new_tokens: 0, end_of_text: &[] };
    let ended = RefCell::new(Vec::new());
    store.read(|weights| {
        complete_in_turn(
            &mut decoder,
            weights,
            &prompts(),
            3,
            limits,
            &mut |_, _| anyhow::bail!("nothing is chosen"),
            &mut |_, _| anyhow::bail!("there is no token"),
            &mut |prompt, completion| {
                assert_eq!(completion, Completion { ids: Vec::new(), end: End::Length });
                ended.borrow_mut().push(prompt);
                Ok(())
            },
        )
    })??;
    assert_eq!(ended.into_inner(), (0..LENGTHS.len()).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn one_sampler_for_all_draws_in_the_order_of_the_prompts_and_a_full_context_ends_a_text() -> Result<()> {
    let (store, mut decoder) = model(&MODEL.shapes()[1], Precision::F32)?;
    let prompts = prompts();
    let chosen = RefCell::new(Vec::new());
    // As many as fit behind the longest, then one: after the context's last token one more can be chosen.
    let limits = Limits { max_new_tokens: 50, end_of_text: &[] };
    let mut ends = vec![None; prompts.len()];
    store.read(|weights| {
        complete_in_turn(
            &mut decoder,
            weights,
            &prompts,
            4,
            limits,
            &mut |prompt, _| {
                chosen.borrow_mut().push(prompt);
                Ok(7)
            },
            &mut |prompt, _| Ok(if prompt == 5 { Flow::Stop } else { Flow::Continue }),
            &mut |prompt, completion| {
                ends[prompt] = Some((completion.end, completion.ids.len()));
                Ok(())
            },
        )
    })??;
    let mut expected = vec![Some((End::Length, 50)); prompts.len()];
    (expected[2], expected[5]) = (Some((End::Context, CONTEXT - 300 + 1)), Some((End::Stopped, 1)));
    assert_eq!(ends, expected);
    let chosen = chosen.into_inner();
    assert_eq!(chosen[..8], [0, 1, 2, 3, 0, 1, 2, 3]);
    let firsts: Vec<usize> = (0..prompts.len()).filter_map(|p| chosen.iter().position(|&prompt| prompt == p)).collect();
    assert!(firsts.is_sorted(), "{firsts:?}");
    Ok(())
}

#[test]
fn bad_prompts_are_refused_before_anything_is_written() -> Result<()> {
    let (store, mut decoder) = model(&MODEL.shapes()[1], Precision::F32)?;
    let mut sampler = Sampler::new(SamplingOptions::GREEDY, VOCABULARY, 0)?;
    let limits = Limits { max_new_tokens: 3, end_of_text: &[] };
    for (bad, message) in [
        (vec![], "the prompt is empty"),
        (vec![1; CONTEXT + 1], "the model's context holds 310"),
        (vec![3, 151], "the prompt holds the id 151"),
    ] {
        let on_token = &mut |_, _| anyhow::bail!("a token was written");
        let prompts = [vec![1, 2], bad];
        let result = store.read(|weights| complete(&mut decoder, weights, &prompts, limits, &mut sampler, on_token))?;
        let error = result.expect_err("a bad prompt").to_string();
        assert!(error.contains(message), "{error}");
    }
    Ok(())
}
