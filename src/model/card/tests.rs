//! The card's engine beside the CPU's, which is held to the twins and to PyTorch: on a card, or on the emulated device of
//! tests/cuda. Where neither is there, the tests say that they skip; VRTRAIN_REQUIRE_CUDA=1 makes that a failure.

use crate::config::Recompute;
use crate::cuda::testing::device;
use crate::model::{Batch, Documents, Engine, Head, IGNORE, Labels, LossSum, ModelShape};
use crate::ops::product::Precision;
use crate::params::{Layout, ParameterStore};
use crate::random::{Stream, below, fill_normal, generator};
use anyhow::Result;
use candle_core::Device;
use serde_json::json;
use std::sync::Arc;

/// Sizes that no warp, block or chunk of the kernels divides.
fn shapes(head: Head) -> [ModelShape; 3] {
    let tied = head == Head::Tied;
    let gpt2 = json!({
        "n_embd": 42, "n_head": 3, "n_layer": 2, "n_inner": 70, "n_positions": 90, "vocab_size": 307,
        "tie_word_embeddings": tied
    });
    let llama = |key_heads: usize| {
        json!({
            "model_type": "llama", "hidden_size": 42, "num_attention_heads": 4, "num_key_value_heads": key_heads,
            "head_dim": 10, "num_hidden_layers": 2, "intermediate_size": 70, "vocab_size": 307,
            "max_position_embeddings": 90, "tie_word_embeddings": tied
        })
    };
    [gpt2, llama(4), llama(2)].map(|config| ModelShape::from_hugging_face(&config).expect("a model's config"))
}

/// Weights large enough that every operation matters.
fn weights(layout: &Layout) -> Vec<f32> {
    let (mut random, mut weights) = (generator(11, Stream::Init), vec![0.0; layout.len()]);
    for parameter in layout.parameters() {
        let numbers = &mut weights[parameter.range()];
        fill_normal(&mut random, 0.3, numbers);
        if parameter.name.contains("norm") || parameter.name.contains("ln_") && parameter.name.ends_with("weight") {
            numbers.iter_mut().for_each(|x| *x += 1.0);
        }
    }
    weights
}

/// Ids and targets (some ignored) of two micro-batches, and places of documents in their rows.
struct Data {
    rows: usize,
    ids: Vec<u32>,
    targets: Vec<u32>,
    places: Vec<u32>,
}

impl Data {
    fn new(rows: usize, time: usize) -> Self {
        let mut random = generator(12, Stream::Init);
        let mut ids = || (0..2 * rows * time).map(|_| below(&mut random, 307) as u32).collect::<Vec<_>>();
        let (ids, mut targets) = (ids(), ids());
        targets.iter_mut().step_by(7).for_each(|target| *target = IGNORE);
        // Documents of 5 tokens, but for the row's last.
        let places = (0..rows * time).map(|token| (token % time % 5) as u32).collect();
        Self { rows, ids, targets, places }
    }

    fn batch(&self, micro_batch: usize, packed: bool) -> Batch<'_> {
        let tokens = self.places.len();
        let range = micro_batch * tokens..(micro_batch + 1) * tokens;
        let documents = if packed { Documents::Packed(&self.places) } else { Documents::Whole };
        Batch { inputs: &self.ids[range.clone()], targets: &self.targets[range], rows: self.rows, documents }
    }
}

/// The losses of both micro-batches and the gradients of every parameter.
fn both(
    engine: &mut Engine,
    store: &mut ParameterStore,
    data: &Data,
    packed: bool,
) -> Result<([LossSum; 2], Vec<Vec<f32>>)> {
    store.start_gradients();
    let mut losses = [LossSum::default(); 2];
    for (micro_batch, loss) in losses.iter_mut().enumerate() {
        *loss = engine.gradients(store, data.batch(micro_batch, packed), Labels::Data)?;
        assert_eq!(engine.loss(store, data.batch(micro_batch, packed))?, *loss);
    }
    assert!(store.without_gradient().is_empty());
    Ok((losses, gradients(store)?))
}

fn gradients(store: &ParameterStore) -> Result<Vec<Vec<f32>>> {
    let parameters = 0..store.layout().parameters().len();
    parameters.map(|index| Ok(store.view(store.gradients(), index)?.flatten_all()?.to_vec1()?)).collect()
}

fn same(name: &str, expected: &[f32], got: &[f32]) {
    let norm = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|x| x * x).sum::<f64>().sqrt();
    let all = norm(&mut expected.iter().map(|&x| f64::from(x)));
    let off = norm(&mut expected.iter().zip(got).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    assert!(off <= 2e-5 * all && all > 0.0, "{name}: off by {off} of {all}");
}

/// The keys' bias of GPT-2 moves no output: its gradient is rounding alone.
fn without_keys_bias<'a>(name: &str, gradient: &'a [f32]) -> Vec<&'a [f32]> {
    let third = gradient.len() / 3;
    if name.ends_with("attn.c_attn.bias") { vec![&gradient[..third], &gradient[2 * third..]] } else { vec![gradient] }
}

#[test]
fn losses_and_gradients_on_the_device_are_those_of_the_cpu() -> Result<()> {
    let Some(device) = device() else { return Ok(()) };
    for (head, rows, time) in [(Head::Tied, 3, 47), (Head::Untied, 2, 7), (Head::Tied, 2, 1)] {
        for (shape, packed) in shapes(head).iter().flat_map(|shape| [(shape, false), (shape, true)]) {
            let layout = Arc::new(Layout::new(shape.parameter_specs()));
            let data = Data::new(rows, time);
            let run = |device: &Device, recompute| {
                let mut store = ParameterStore::new(Arc::clone(&layout), device)?;
                store.set_weights(weights(&layout))?;
                let mut engine = Engine::new(shape, &layout, device, recompute, Precision::F32);
                both(&mut engine, &mut store, &data, packed)
            };
            let (expected_losses, expected) = run(&Device::Cpu, Recompute::None)?;
            let (losses, got) = run(&device, Recompute::None)?;
            for (expected, got) in expected_losses.iter().zip(&losses) {
                assert_eq!(expected.count, got.count);
                assert!((expected.sum / got.sum - 1.0).abs() <= 1e-6, "{} {}", expected.sum, got.sum);
            }
            for (parameter, (expected, got)) in layout.parameters().iter().zip(expected.iter().zip(&got)) {
                let parts = without_keys_bias(&parameter.name, expected).into_iter();
                for (expected, got) in parts.zip(without_keys_bias(&parameter.name, got)) {
                    // With one token a row the softmax is 1 whatever the query and the key: no gradient but rounding.
                    let of_scores = ["q_proj", "k_proj", "c_attn"].iter().any(|name| parameter.name.contains(name));
                    if time > 1 || !of_scores {
                        same(&format!("{} of {}", parameter.name, shape.describe()), expected, got);
                    }
                }
            }
            assert_eq!(run(&device, Recompute::Block)?, (losses, got), "blocks computed again give other bits");
        }
    }
    Ok(())
}

#[test]
fn the_devices_head_in_parts_and_with_drawn_labels_is_the_cpus() -> Result<()> {
    let Some(device) = device() else { return Ok(()) };
    let [shape, ..] = shapes(Head::Untied);
    let layout = Arc::new(Layout::new(shape.parameter_specs()));
    let data = Data::new(3, 20);
    let run = |device: &Device, logits: usize| -> Result<_> {
        let mut store = ParameterStore::new(Arc::clone(&layout), device)?;
        store.set_weights(weights(&layout))?;
        let mut engine = Engine::new(&shape, &layout, device, Recompute::None, Precision::F32);
        if let Engine::Card(engine) = &mut engine {
            engine.logits_at_once = logits;
        }
        store.start_gradients();
        let mut random = generator(3, Stream::SampledLabels);
        let loss = engine.gradients(&mut store, data.batch(0, false), Labels::Sampled(&mut random))?;
        Ok((loss, gradients(&store)?))
    };
    let (expected_loss, expected) = run(&Device::Cpu, 0)?;
    // All rows at once, 7 rows at a time, and less than a row.
    for logits in [usize::MAX, 7 * 307, 1] {
        let (loss, got) = run(&device, logits)?;
        assert_eq!(expected_loss.count, loss.count);
        assert!((expected_loss.sum / loss.sum - 1.0).abs() <= 1e-6, "{} {}", expected_loss.sum, loss.sum);
        for (parameter, (expected, got)) in layout.parameters().iter().zip(expected.iter().zip(&got)) {
            let parts = without_keys_bias(&parameter.name, expected).into_iter();
            parts.zip(without_keys_bias(&parameter.name, got)).for_each(|(a, b)| same(&parameter.name, a, b));
        }
    }
    Ok(())
}

#[test]
fn a_token_beyond_the_vocabulary_is_refused_before_the_device_reads_it() -> Result<()> {
    let Some(device) = device() else { return Ok(()) };
    let [shape, ..] = shapes(Head::Tied);
    let layout = Arc::new(Layout::new(shape.parameter_specs()));
    let mut store = ParameterStore::new(Arc::clone(&layout), &device)?;
    let mut engine = Engine::new(&shape, &layout, &device, Recompute::None, Precision::F32);
    for (inputs, targets) in [([1, 307], [1, 2]), ([1, IGNORE], [1, 2]), ([1, 2], [1, 307])] {
        let batch = Batch { inputs: &inputs, targets: &targets, rows: 1, documents: Documents::Whole };
        let error = engine.gradients(&mut store, batch, Labels::Data).expect_err("a wrong id");
        assert!(error.to_string().contains("vocabulary has 307"), "{error}");
    }
    Ok(())
}
