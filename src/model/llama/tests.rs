//! The fast path against the twin from candle primitives in f64, the twin against finite differences.

use super::twin::{self, Rotation};
use super::*;
use crate::config::Recompute;
use crate::model::twin::Places;
use crate::model::{
    Batch, Decoder, Documents, Engine, Extent, Head, IGNORE, Labels, LossSum, ModelShape, Prompt, twin as shared_twin,
};
use crate::ops::product::Precision;
use crate::ops::rotary::Scaling;
use crate::params::{Layout, ParameterStore, slice, slice_mut};
use crate::random::{Stream, below, fill_normal, generator};
use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use std::sync::Arc;

const ROWS: usize = 3;

/// A small model with `n_head` heads of queries and `n_kv_head` of keys.
fn config(n_head: usize, n_kv_head: usize, head: Head) -> LlamaConfig {
    LlamaConfig {
        n_layer: 3,
        n_head,
        n_kv_head,
        head_dim: 6,
        // Not n_head * head_dim for every case: the two widths must not be mixed up.
        n_embd: 24,
        n_inner: 40,
        n_positions: 19,
        vocab_size: 53,
        rms_norm_epsilon: 1e-5,
        rope_theta: 100.0,
        rope_scaling: Scaling::Llama3 {
            factor: 4.0,
            low_frequency_factor: 1.0,
            high_frequency_factor: 4.0,
            original_positions: 16,
        },
        head,
        special_ids: SpecialIds::default(),
    }
}

/// A layout, its store, inputs and targets.
type Case = (Arc<Layout>, ParameterStore, Vec<u32>, Vec<u32>);

/// A store with weights large enough that every operation matters, and ids and targets (some ignored).
fn case(config: &LlamaConfig, time: usize) -> Result<Case> {
    let layout = Arc::new(Layout::new(config.parameter_specs()));
    let store = ParameterStore::new(Arc::clone(&layout), &Device::Cpu)?;
    let mut random = generator(11, Stream::Init);
    slice_mut(store.weights(), |weights| {
        for parameter in layout.parameters() {
            let numbers = &mut weights[parameter.range()];
            fill_normal(&mut random, 0.3, numbers);
            if parameter.name.contains("norm") {
                numbers.iter_mut().for_each(|x| *x += 1.0);
            }
        }
    })?;
    let mut ids = || (0..ROWS * time).map(|_| below(&mut random, config.vocab_size as u64) as u32).collect::<Vec<_>>();
    let (inputs, mut targets) = (ids(), ids());
    targets.iter_mut().step_by(7).for_each(|target| *target = IGNORE);
    Ok((layout, store, inputs, targets))
}

fn engine(config: &LlamaConfig, layout: &Arc<Layout>, recompute: Recompute) -> Engine {
    Engine::new(&ModelShape::Llama(config.clone()), layout, &Device::Cpu, recompute, Precision::F32)
}

/// The whole model as one graph over variables in f64: the sum of the losses.
fn twin_loss(config: &LlamaConfig, layout: &Layout, variables: &[Var], batch: Batch) -> Result<Tensor> {
    let Batch { inputs, targets, rows, documents } = batch;
    let places = Places::new(documents, batch.extent(), DType::F64, &Device::Cpu)?;
    let parameters = config.parameters(layout);
    let tensor = |index: usize| variables[index].as_tensor().clone();
    let ids = Tensor::from_slice(inputs, (rows, batch.sequence_length()), &Device::Cpu)?;
    let rotation = Rotation::new(config, &places)?;
    let mut x = twin::embed(&tensor(parameters.token_embedding), &ids)?;
    for block in &parameters.blocks {
        x = twin::block(config, &places, &rotation, &block.all().map(tensor).into(), &x)?;
    }
    let logits = twin::logits(config, &tensor(parameters.norm_final), &tensor(parameters.head), &x)?;
    Ok(shared_twin::loss_sum(&logits, targets, IGNORE)?.0)
}

fn variables(store: &ParameterStore) -> Result<Vec<Var>> {
    let count = store.layout().parameters().len();
    let variable = |index| Ok(Var::from_tensor(&store.view(store.weights(), index)?.to_dtype(DType::F64)?)?);
    (0..count).map(variable).collect()
}

/// |a - b| / |b| over one parameter; where b is 0 (queries and keys of a single position), |a - b| over a small number.
fn distance(a: &[f32], b: &[f64]) -> f64 {
    let difference: f64 = a.iter().zip(b).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
    let norm: f64 = b.iter().map(|b| b * b).sum();
    difference.sqrt() / norm.sqrt().max(1e-1)
}

#[test]
fn every_gradient_of_the_fast_path_equals_the_twins_in_f64() -> Result<()> {
    for (n_head, n_kv_head, head, time) in
        [(4, 2, Head::Tied, 19), (3, 3, Head::Untied, 7), (6, 1, Head::Untied, 12), (4, 2, Head::Tied, 1)]
    {
        let config = config(n_head, n_kv_head, head);
        let (layout, mut store, inputs, targets) = case(&config, time)?;
        let batch = Batch { inputs: &inputs, targets: &targets, rows: ROWS, documents: Documents::Whole };
        let variables = variables(&store)?;
        let expected_loss = twin_loss(&config, &layout, &variables, batch)?;
        let expected = expected_loss.backward()?;
        let expected_loss = expected_loss.to_scalar::<f64>()?;

        for recompute in [Recompute::None, Recompute::Block] {
            let mut engine = engine(&config, &layout, recompute);
            store.start_gradients();
            let loss = engine.gradients(&mut store, batch, Labels::Data)?;
            assert!((loss.sum - expected_loss).abs() < 1e-5 * expected_loss.abs(), "{} {expected_loss}", loss.sum);
            assert_eq!(engine.loss(&store, batch)?, loss);
            assert!(store.without_gradient().is_empty());
            for (index, parameter) in layout.parameters().iter().enumerate() {
                let gradient = store.view(store.gradients(), index)?.flatten_all()?.to_vec1::<f32>()?;
                let Some(reference) = expected.get(&variables[index]) else {
                    panic!("no gradient of {}", parameter.name)
                };
                let error = distance(&gradient, &reference.flatten_all()?.to_vec1::<f64>()?);
                assert!(error < 2e-5, "{n_head}/{n_kv_head} {head:?} {time} {recompute:?} {}: {error}", parameter.name);
            }
        }
    }
    Ok(())
}

#[test]
fn the_twins_gradient_equals_finite_differences() -> Result<()> {
    let config = config(4, 2, Head::Untied);
    let (layout, store, inputs, targets) = case(&config, 5)?;
    let batch = Batch { inputs: &inputs, targets: &targets, rows: ROWS, documents: Documents::Whole };
    let base = variables(&store)?;
    let gradients = twin_loss(&config, &layout, &base, batch)?.backward()?;
    let step = 1e-5;
    for (index, parameter) in layout.parameters().iter().enumerate() {
        let analytic = gradients.get(&base[index]).expect("a gradient").flatten_all()?.to_vec1::<f64>()?;
        let largest = (0..parameter.len).max_by(|&a, &b| analytic[a].abs().total_cmp(&analytic[b].abs())).unwrap_or(0);
        let loss_at = |shift: f64| -> Result<f64> {
            let mut numbers = base[index].flatten_all()?.to_vec1::<f64>()?;
            numbers[largest] += shift;
            let original = base[index].as_tensor().copy()?;
            base[index].set(&Tensor::from_vec(numbers, parameter.shape.as_slice(), &Device::Cpu)?)?;
            let loss = twin_loss(&config, &layout, &base, batch)?.to_scalar::<f64>()?;
            base[index].set(&original)?;
            Ok(loss)
        };
        let numeric = (loss_at(step)? - loss_at(-step)?) / (2.0 * step);
        let error = (numeric - analytic[largest]).abs() / analytic[largest].abs().max(1e-3);
        assert!(error < 1e-6, "{}[{largest}]: {numeric} {}", parameter.name, analytic[largest]);
    }
    Ok(())
}

#[test]
fn the_fall_back_gives_the_fast_paths_loss_and_gradients() -> Result<()> {
    let config = config(4, 2, Head::Tied);
    let (layout, mut store, inputs, targets) = case(&config, 9)?;
    let batch = Batch { inputs: &inputs, targets: &targets, rows: ROWS, documents: Documents::Whole };
    let mut engine = engine(&config, &layout, Recompute::None);
    let generic = LlamaGeneric { config: config.clone(), parameters: config.parameters(&layout) };
    let mut generic = Engine::LlamaGeneric(Box::new(generic));
    let mut run = |engine: &mut Engine| -> Result<(f64, Vec<f32>)> {
        store.start_gradients();
        let loss = engine.gradients(&mut store, batch, Labels::Data)?;
        engine.gradients(&mut store, batch, Labels::Data)?;
        assert!(store.without_gradient().is_empty());
        assert!((engine.loss(&store, batch)?.sum - loss.sum).abs() < 1e-6 * loss.sum);
        Ok((loss.sum, slice(store.gradients(), |gradients| gradients.to_vec())?))
    };
    let (loss, gradients) = run(&mut engine)?;
    let (generic_loss, generic_gradients) = run(&mut generic)?;
    assert!((loss - generic_loss).abs() < 1e-5 * loss);
    for parameter in layout.parameters() {
        let reference: Vec<f64> = generic_gradients[parameter.range()].iter().map(|&x| f64::from(x)).collect();
        let error = distance(&gradients[parameter.range()], &reference);
        assert!(error < 2e-5, "{}: {error}", parameter.name);
    }
    Ok(())
}

#[test]
fn labels_drawn_from_the_model_depend_on_the_seed_alone_and_count_the_same_targets() -> Result<()> {
    let config = config(4, 2, Head::Tied);
    let (layout, mut store, inputs, targets) = case(&config, 9)?;
    let mut engine = engine(&config, &layout, Recompute::None);
    let mut gradients = |targets: &[u32], labels: Labels| -> Result<(f64, u64, Vec<f32>)> {
        store.start_gradients();
        let loss = engine.gradients(
            &mut store,
            Batch { inputs: &inputs, targets, rows: ROWS, documents: Documents::Whole },
            labels,
        )?;
        Ok((loss.sum, loss.count, slice(store.gradients(), |gradients| gradients.to_vec())?))
    };
    let mut sampled = |seed| gradients(&targets, Labels::Sampled(&mut generator(seed, Stream::SampledLabels)));
    let (first, again, other) = (sampled(1)?, sampled(1)?, sampled(2)?);
    assert_eq!(first, again);
    assert_ne!(first.2, other.2);
    let counted = targets.iter().filter(|&&target| target != IGNORE).count() as u64;
    assert_eq!(first.1, counted);
    assert_ne!(first.0, gradients(&targets, Labels::Data)?.0);
    Ok(())
}

#[test]
fn decoding_with_the_cache_gives_the_logits_of_the_whole_sequence() -> Result<()> {
    for (n_head, n_kv_head, head) in [(4, 2, Head::Untied), (3, 3, Head::Tied)] {
        let config = config(n_head, n_kv_head, head);
        let (layout, store, inputs, _) = case(&config, 12)?;
        let vocabulary = config.vocab_size;
        let mut model = Decoder::new(&ModelShape::Llama(config), &layout);
        store.read(|weights| -> Result<()> {
            let expected = model.logits(weights, &inputs, ROWS)?;
            let at = |row: usize, time: usize| &expected[(row * 12 + time) * vocabulary..][..vocabulary];
            let prompt_lengths = [4, 1, 6];
            let mut cache = model.cache(ROWS, 12);
            let mut logits = vec![0.0; ROWS * vocabulary];
            let prompts = prompt_lengths
                .iter()
                .enumerate()
                .map(|(sequence, &length)| Prompt { sequence, tokens: &inputs[sequence * 12..][..length] });
            model.prefill(weights, &mut cache, &prompts.collect::<Vec<_>>(), &mut logits)?;
            for step in 0..6 {
                for (row, &length) in prompt_lengths.iter().enumerate() {
                    let got = &logits[row * vocabulary..][..vocabulary];
                    let expected = at(row, length + step - 1);
                    let worst = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(worst < 2e-4, "row {row} step {step}: {worst}");
                }
                let next: Vec<u32> = (0..ROWS).map(|row| inputs[row * 12 + prompt_lengths[row] + step]).collect();
                model.decode(weights, &mut cache, &next, &mut logits)?;
            }
            let error = model.decode(weights, &mut cache, &[0; ROWS], &mut logits).expect_err("the cache is full");
            assert!(error.to_string().contains("end of the context"), "{error}");
            Ok(())
        })??;
    }
    Ok(())
}

#[test]
fn the_memory_that_is_planned_is_the_memory_that_a_step_takes() -> Result<()> {
    let config = config(4, 2, Head::Tied);
    let (layout, mut store, inputs, targets) = case(&config, 19)?;
    let both = [Recompute::None, Recompute::Block];
    for (recompute, precision) in both.into_iter().flat_map(|r| [Precision::F32, Precision::Bf16].map(|p| (r, p))) {
        let mut model = LlamaCpu::new(config.clone(), Arc::clone(&layout), recompute, precision);
        let batch = Batch { inputs: &inputs, targets: &targets, rows: ROWS, documents: Documents::Whole };
        store.start_gradients();
        store.backward(|weights, slots| model.gradients(weights, slots, batch, Labels::Data))??;
        let extent = Extent { rows: ROWS, time: 19 };
        assert_eq!(model.buffers.bytes(), LlamaCpu::working_bytes(&config, extent, recompute, precision));
    }
    Ok(())
}

#[test]
fn any_number_of_threads_gives_the_same_bits() -> Result<()> {
    let config = config(6, 2, Head::Untied);
    let (layout, mut store, inputs, targets) = case(&config, 19)?;
    let mut bits = |threads: usize| -> Result<Vec<u32>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        let mut engine = engine(&config, &layout, Recompute::None);
        let batch = Batch { inputs: &inputs, targets: &targets, rows: ROWS, documents: Documents::Whole };
        store.start_gradients();
        pool.install(|| engine.gradients(&mut store, batch, Labels::Data))?;
        Ok(slice(store.gradients(), |gradients| gradients.iter().map(|x| x.to_bits()).collect())?)
    };
    let one = bits(1)?;
    assert!(one == bits(2)? && one == bits(5)?);
    Ok(())
}

#[test]
fn examples_packed_into_a_row_have_the_loss_and_gradients_of_each_by_itself() -> Result<()> {
    let config = config(4, 2, Head::Untied);
    let (layout, mut store, inputs, targets) = case(&config, 19)?;
    let lengths: [&[usize]; ROWS] = [&[7, 1, 11], &[19], &[2, 10, 3, 4]];
    let places: Vec<u32> = lengths.iter().flat_map(|row| row.iter().flat_map(|&length| 0..length as u32)).collect();
    let generic = LlamaGeneric { config: config.clone(), parameters: config.parameters(&layout) };
    let mut generic = Engine::LlamaGeneric(Box::new(generic));
    let recompute = Recompute::Block;
    let recomputing = engine(&config, &layout, recompute);
    let recompute = Recompute::None;
    let mut one_by_one = engine(&config, &layout, recompute);
    store.start_gradients();
    let (mut sum, mut count, mut first) = (0.0, 0, 0);
    for &length in lengths.into_iter().flatten() {
        let (inputs, targets) = (&inputs[first..first + length], &targets[first..first + length]);
        let batch = Batch { inputs, targets, rows: 1, documents: Documents::Whole };
        let loss = one_by_one.gradients(&mut store, batch, Labels::Data)?;
        (sum, count, first) = (sum + loss.sum, count + loss.count, first + length);
    }
    let expected = slice(store.gradients(), |gradients| gradients.iter().map(|&x| f64::from(x)).collect::<Vec<_>>())?;

    let batch = Batch { inputs: &inputs, targets: &targets, rows: ROWS, documents: Documents::Packed(&places) };
    for (name, engine) in [("kept", &mut one_by_one), ("recomputed", &mut { recomputing }), ("twin", &mut generic)] {
        store.start_gradients();
        let loss = engine.gradients(&mut store, batch, Labels::Data)?;
        assert_eq!(loss.count, count);
        assert!((loss.sum - sum).abs() < 1e-5 * sum, "{name}: {} {sum}", loss.sum);
        assert!((engine.loss(&store, batch)?.sum - sum).abs() < 1e-5 * sum);
        let gradients = slice(store.gradients(), |gradients| gradients.to_vec())?;
        for parameter in layout.parameters() {
            let error = distance(&gradients[parameter.range()], &expected[parameter.range()]);
            assert!(error < 2e-5, "{name} {}: {error}", parameter.name);
        }
    }
    // What other examples of the row say changes nothing: not a bit of the first example's loss.
    let mut other = inputs.clone();
    other[7..19].iter_mut().for_each(|id| *id = (*id + 1) % config.vocab_size as u32);
    let masked: Vec<u32> = targets.iter().enumerate().map(|(i, &t)| if i < 7 { t } else { IGNORE }).collect();
    let mut loss = |inputs: &[u32]| -> Result<LossSum> {
        let batch = Batch { inputs, targets: &masked, rows: ROWS, documents: Documents::Packed(&places) };
        one_by_one.loss(&store, batch)
    };
    assert_eq!(loss(&inputs)?, loss(&other)?);
    Ok(())
}
