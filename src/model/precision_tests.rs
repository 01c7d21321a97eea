//! Both models in bf16: what reads the copy of the weights, and how far the results are from those in f32.

use super::{Batch, Documents, Engine, IGNORE, Labels, ModelShape};
use crate::config::Recompute;
use crate::ops::product::Precision;
use crate::params::{Layout, ParameterStore, slice};
use crate::random::{Stream, below, generator};
use anyhow::Result;
use candle_core::Device;
use serde_json::json;
use std::sync::Arc;

const ROWS: usize = 3;
const TIME: usize = 37;
const VOCABULARY: u64 = 211;

/// A small model of each architecture; no size is a multiple of a register's.
fn shapes() -> [ModelShape; 2] {
    let gpt2 =
        json!({"n_embd": 60, "n_head": 3, "n_layer": 3, "n_inner": 130, "n_positions": 40, "vocab_size": VOCABULARY});
    let llama = json!({
        "model_type": "llama", "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2,
        "num_hidden_layers": 3, "intermediate_size": 130, "vocab_size": VOCABULARY, "max_position_embeddings": 40
    });
    [gpt2, llama].map(|config| ModelShape::from_hugging_face(&config).expect("a model's config"))
}

/// The loss and the gradients of a batch.
fn run(shape: &ModelShape, recompute: Recompute, precision: Precision, with_copy: bool) -> Result<(f64, Vec<f32>)> {
    let layout = Arc::new(Layout::new(shape.parameter_specs()));
    let mut store = ParameterStore::new(Arc::clone(&layout), &Device::Cpu)?;
    let mut weights = vec![0.0; layout.len()];
    shape.initialize(&layout, 3, &mut weights);
    store.set_weights(weights)?;
    if with_copy {
        store.keep_rounded()?;
    }
    let mut random = generator(11, Stream::Init);
    let mut ids = || (0..ROWS * TIME).map(|_| below(&mut random, VOCABULARY) as u32).collect::<Vec<_>>();
    let (inputs, mut targets) = (ids(), ids());
    targets.iter_mut().step_by(7).for_each(|target| *target = IGNORE);
    let batch = Batch { inputs: &inputs, targets: &targets, rows: ROWS, documents: Documents::Whole };
    let mut engine = Engine::new(shape, &layout, &Device::Cpu, recompute, precision);
    store.start_gradients();
    let loss = engine.gradients(&mut store, batch, Labels::Data)?;
    assert_eq!(engine.loss(&store, batch)?, loss, "the loss alone is that of the gradient's pass");
    Ok((loss.mean(), slice(store.gradients(), <[f32]>::to_vec)?))
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn products_on_the_bf16_copy_of_the_weights_give_the_bits_of_weights_rounded_on_the_way() -> Result<()> {
    for shape in shapes() {
        let (on_the_way, gradients) = run(&shape, Recompute::None, Precision::Bf16, false)?;
        let (from_copy, from_copys) = run(&shape, Recompute::None, Precision::Bf16, true)?;
        assert_eq!(on_the_way.to_bits(), from_copy.to_bits());
        assert!(bits(&gradients) == bits(&from_copys));
        // And the copy changes nothing in f32.
        let exact = run(&shape, Recompute::None, Precision::F32, false)?.1;
        assert!(bits(&exact) == bits(&run(&shape, Recompute::None, Precision::F32, true)?.1));
        assert!(exact != gradients);
    }
    Ok(())
}

#[test]
fn recomputed_blocks_give_the_same_bits_in_bf16_and_any_number_of_threads_does() -> Result<()> {
    for shape in shapes() {
        let results =
            [(1, Recompute::None), (2, Recompute::Block), (7, Recompute::None)].map(|(threads, recompute)| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
                let (loss, gradients) = pool.install(|| run(&shape, recompute, Precision::Bf16, true))?;
                anyhow::Ok((loss.to_bits(), bits(&gradients)))
            });
        let [first, second, third] = results;
        let first = first?;
        assert!(first == second? && first == third?);
    }
    Ok(())
}

/// |a - b| / |b|
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x).powi(2);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (difference / b.iter().map(|&b| square(b)).sum::<f64>()).sqrt()
}

#[test]
fn in_bf16_the_loss_and_every_gradient_stay_near_those_in_f32() -> Result<()> {
    for shape in shapes() {
        let (exact_loss, exact) = run(&shape, Recompute::None, Precision::F32, false)?;
        let (loss, gradients) = run(&shape, Recompute::None, Precision::Bf16, true)?;
        assert!((loss - exact_loss).abs() < 2e-3 * exact_loss, "{loss} {exact_loss}");
        for parameter in Layout::new(shape.parameter_specs()).parameters() {
            // Keys move all scores of a row alike but for the differences between positions: their bias has no gradient.
            let error = distance(&gradients[parameter.range()], &exact[parameter.range()]);
            // bf16 has 8 bits, so an operand is off by up to 2^-9 of itself; errors of several layers add up.
            assert!(error < 0.02, "{}: {error}", parameter.name);
        }
    }
    Ok(())
}
