//! Convolution, batch norm and both image networks against PyTorch's numbers (scripts/lab_numbers.py makes them).

use super::images::{self, Architecture, Mode, Network, Objective, PIXELS};
use crate::ops::batch_norm::{self, Activation, Statistics};
use crate::ops::{Gradient, convolution};
use crate::params::{Layout, ParameterStore, slice};
use candle_core::{Device, Result};
use serde_json::Value;
use std::sync::Arc;

fn numbers() -> Value {
    serde_json::from_str(include_str!("../../tests/fixtures/lab/pytorch.json")).expect("pytorch.json is JSON")
}

/// The script's sines.
fn sines(count: usize, phase: f64, scale: f64, offset: f64) -> Vec<f32> {
    (0..count).map(|i| (offset + scale * (1.7 * i as f64 + phase).sin()) as f32).collect()
}

#[track_caller]
fn near(what: &str, actual: &[f32], expected: &Value) {
    let expected: Vec<f64> = serde_json::from_value(expected.clone()).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(actual.len(), expected.len(), "{what}");
    let size = expected.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
    for (i, (a, e)) in actual.iter().zip(&expected).enumerate() {
        assert!((f64::from(*a) - e).abs() <= 5e-6 * size, "{what}[{i}] is {a}, PyTorch says {e}");
    }
}

#[test]
fn convolution_gives_pytorchs_numbers() {
    let all = numbers();
    let expected = &all["convolution"];
    let shape =
        convolution::Shape { batch: 2, height: 6, width: 5, inputs: 3, outputs: 4, kernel: 3, stride: 2, padding: 1 };
    let (x, weight) = (sines(shape.x_len(), 0.1, 1.0, 0.0), sines(shape.weight_len(), 0.2, 1.0, 0.0));
    let (bias, dy) = (sines(4, 0.3, 1.0, 0.0), sines(shape.y_len(), 0.4, 1.0, 0.0));
    let mut scratch = vec![0.0; convolution::scratch_len(shape)];
    let mut y = vec![0.0; shape.y_len()];
    convolution::forward(shape, &x, &weight, Some(&bias), &mut y, &mut scratch);
    let (mut dx, mut dweight, mut dbias) = (vec![0.0; x.len()], vec![0.0; weight.len()], vec![0.0; 4]);
    convolution::backward_input(shape, &dy, &weight, Gradient::overwrite(&mut dx), &mut scratch);
    let to_bias = Some(Gradient::overwrite(&mut dbias));
    convolution::backward_weight(shape, &x, &dy, Gradient::overwrite(&mut dweight), to_bias, &mut scratch);
    for (name, actual) in [("y", y), ("dx", dx), ("dweight", dweight), ("dbias", dbias)] {
        near(name, &actual, &expected[name]);
    }
}

#[test]
fn batch_norm_gives_pytorchs_numbers() {
    let all = numbers();
    let expected = &all["batch_norm"];
    let (x, residual) = (sines(96, 0.1, 2.0, 1.0), sines(96, 0.5, 1.0, 0.0));
    let (weight, bias) = (sines(3, 0.2, 1.0, 0.0), sines(3, 0.3, 1.0, 0.0));
    let (mut y, mut mean, mut rstd, mut running) = (vec![0.0; 96], [0.0; 3], [0.0; 3], Statistics::new(3));
    let mut scratch = vec![0.0; batch_norm::scratch_len(32, 3)];
    let (activation, to) = (Activation::Relu, Some(&mut running));
    batch_norm::forward_training(
        &x,
        &weight,
        &bias,
        Some(&residual),
        activation,
        &mut y,
        &mut mean,
        &mut rstd,
        to,
        &mut scratch,
    );
    let mut dy = sines(96, 0.4, 1.0, 0.0);
    let (mut dx, mut dweight, mut dbias) = (vec![0.0; 96], vec![0.0; 3], vec![0.0; 3]);
    let saved = batch_norm::Saved { x: &x, y: &y, weight: &weight, mean: &mean, rstd: &rstd, activation };
    let [to_weight, to_bias] = [&mut dweight, &mut dbias].map(|data| Gradient::overwrite(data));
    batch_norm::backward(saved, &mut dy, &mut dx, to_weight, to_bias, &mut scratch);
    for (name, actual) in [("y", y), ("dx", dx), ("dweight", dweight), ("dbias", dbias), ("dresidual", dy)] {
        near(name, &actual, &expected[name]);
    }
    near("mean", &running.mean, &expected["mean"]);
    near("variance", &running.variance, &expected["variance"]);
}

/// The script's weights: sines by the place of the parameter's name in the alphabet.
fn store(architecture: Architecture) -> Result<ParameterStore> {
    let layout = Arc::new(Layout::new(images::parameter_specs(architecture)));
    let mut weights = vec![0.0; layout.len()];
    let mut order: Vec<_> = layout.parameters().iter().collect();
    order.sort_by(|a, b| a.name.cmp(&b.name));
    for (index, parameter) in order.into_iter().enumerate() {
        let fan_in: usize = parameter.shape[1..].iter().product();
        let (scale, offset) = match parameter.shape.len() {
            1 => (0.1, if parameter.name.ends_with("weight") { 1.0 } else { 0.0 }),
            _ => (2.0 / (fan_in as f64).sqrt(), 0.0),
        };
        weights[parameter.range()].copy_from_slice(&sines(parameter.len, 0.1 * index as f64, scale, offset));
    }
    let mut store = ParameterStore::new(layout, &Device::Cpu)?;
    store.set_weights(weights)?;
    Ok(store)
}

#[test]
fn the_first_step_of_both_networks_is_pytorchs() -> Result<()> {
    let all = numbers();
    for (name, architecture) in [("resnet32", Architecture::ResNet32), ("cnn", Architecture::Cnn)] {
        let expected = &all[name];
        let mut store = store(architecture)?;
        let layout = Arc::clone(store.layout());
        assert_eq!(expected["parameters"], layout.count());
        let images = sines(4 * PIXELS, 0.7, 1.0, 0.0);
        let mut network = Network::new(architecture, Arc::clone(&layout));
        store.start_gradients();
        let loss = store.backward(|weights, slots| {
            let labels = [3, 8, 0, 5];
            network.gradients(weights.exact, slots, &images, &labels, Objective::CrossEntropy, Mode::Train)
        })?;
        let theirs = expected["loss"].as_f64().unwrap_or(f64::NAN);
        assert!((loss.mean() / theirs - 1.0).abs() < 1e-4, "{name}: {} {theirs}", loss.mean());
        slice(store.gradients(), |gradients| {
            for parameter in layout.parameters() {
                // Sums over the batch here, means there.
                let gradient: Vec<f64> = gradients[parameter.range()].iter().map(|&g| f64::from(g) / 4.0).collect();
                let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
                let probe = sines(gradient.len(), 0.9, 1.0, 0.0);
                let dot: f64 = gradient.iter().zip(&probe).map(|(g, p)| g * f64::from(*p)).sum();
                let [their_norm, their_dot] =
                    [0, 1].map(|i| expected["gradients"][&parameter.name][i].as_f64().unwrap_or(f64::NAN));
                // Thirty layers of f32 with batch norm on four images; a bias before a norm has rounding alone.
                let tolerance = 2e-3 * their_norm + 1e-6;
                let close = (norm - their_norm).abs() < tolerance && (dot - their_dot).abs() < 3.0 * tolerance;
                assert!(close, "{name} {}: {norm} {their_norm}, {dot} {their_dot}", parameter.name);
            }
        })?;
    }
    Ok(())
}
