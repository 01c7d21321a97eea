//! The networks against their twins in f64, PyTorch's numbers, and published sizes.

use super::*;
use crate::params::{Layout, ParameterStore, slice};
use crate::random::{Stream, below, fill_normal, generator};
use candle_core::{DType, Device, Result, Tensor, Var};
use std::sync::Arc;

fn store(architecture: Architecture) -> Result<ParameterStore> {
    let layout = Arc::new(Layout::new(parameter_specs(architecture)));
    let mut weights = vec![0.0; layout.len()];
    initialize(architecture, &layout, 11, &mut weights);
    let mut store = ParameterStore::new(layout, &Device::Cpu)?;
    store.set_weights(weights)?;
    Ok(store)
}

fn batch(count: usize) -> (Vec<f32>, Vec<u32>) {
    let mut generator = generator(12, Stream::Init);
    let mut images = vec![0.0; count * PIXELS];
    fill_normal(&mut generator, 1.0, &mut images);
    (images, (0..count).map(|_| below(&mut generator, 10) as u32).collect())
}

#[test]
fn the_networks_have_their_published_numbers_of_parameters() {
    let count = |architecture| Layout::new(parameter_specs(architecture)).count();
    assert_eq!(count(Architecture::ResNet32), 464_154);
    // Six convolutions with biases and norms, and two linear layers.
    assert_eq!(count(Architecture::Cnn), 3_249_994);
}

#[test]
fn loss_and_every_gradient_are_the_twins_in_f64() -> Result<()> {
    for (architecture, objective) in
        [(Architecture::ResNet32, Objective::CrossEntropy), (Architecture::Cnn, Objective::SquaredError)]
    {
        let mut store = store(architecture)?;
        let layout = Arc::clone(store.layout());
        let (images, labels) = batch(3);
        let mut network = Network::new(architecture, Arc::clone(&layout));
        store.start_gradients();
        let loss = store.backward(|weights, slots| {
            network.gradients(weights.exact, slots, &images, &labels, objective, Mode::Train)
        })?;
        assert!(store.without_gradient().is_empty());
        let variable = |index| Var::from_tensor(&store.view(store.weights(), index)?.to_dtype(DType::F64)?);
        let variables: Vec<Var> = (0..layout.parameters().len()).map(variable).collect::<Result<_>>()?;
        let tensors: Vec<Tensor> = variables.iter().map(|variable| variable.as_tensor().clone()).collect();
        let twin = twin_loss(architecture, objective, &layout, &tensors, &images, &labels)?;
        let gradients = twin.backward()?;
        let twin = twin.to_scalar::<f64>()?;
        assert!((loss.sum / twin - 1.0).abs() < 1e-5, "{loss:?} {twin}");
        for (parameter, variable) in layout.parameters().iter().zip(&variables) {
            let Some(expected) = gradients.get(variable) else { panic!("no gradient of {}", parameter.name) };
            let expected = expected.flatten_all()?.to_vec1::<f64>()?;
            let (difference, size) = slice(store.gradients(), |all| {
                let pairs = || all[parameter.range()].iter().zip(&expected);
                let difference: f64 = pairs().map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
                (difference.sqrt(), expected.iter().map(|b| b * b).sum::<f64>().sqrt())
            })?;
            // A convolution's bias is taken away by the norm after it: its gradient is 0 but for rounding.
            assert!(difference < 2e-4 * size + 1e-5, "{}: {difference} of {size}", parameter.name);
        }
    }
    Ok(())
}

#[test]
fn evaluation_uses_running_statistics_and_a_second_pass_leaves_them_alone() -> Result<()> {
    let mut store = store(Architecture::ResNet32)?;
    let layout = Arc::clone(store.layout());
    let (images, labels) = batch(4);
    let mut network = Network::new(Architecture::ResNet32, layout);
    let statistics = |network: &Network| network.statistics().iter().flat_map(|(_, s)| s.to_vec()).collect::<Vec<_>>();
    let fresh = statistics(&network);
    let objective = Objective::CrossEntropy;
    let mut run = |network: &mut Network, mode| {
        store.backward(|weights, slots| network.gradients(weights.exact, slots, &images, &labels, objective, mode))
    };
    let first = run(&mut network, Mode::Again)?;
    assert_eq!(statistics(&network), fresh);
    assert_eq!(run(&mut network, Mode::Train)?, first);
    let moved = statistics(&network);
    assert_ne!(moved, fresh);
    slice(store.weights(), |weights| {
        let together = network.forward(weights, &images, Mode::Evaluate).to_vec();
        let alone = network.forward(weights, &images[..PIXELS], Mode::Evaluate).to_vec();
        // Products of other sizes round otherwise.
        let near = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-5 * (1.0 + b.abs());
        assert!(together.iter().zip(&alone).all(near), "{together:?} {alone:?}");
    })?;
    assert_eq!(statistics(&network), moved);
    Ok(())
}
