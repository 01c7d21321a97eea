//! The optimizers on a CUDA device against the CPU's: on a card, or on the emulated device of tests/cuda, which says
//! nothing about a card's speed. Where neither is there, the tests say that they skip; VRTRAIN_REQUIRE_CUDA=1 makes
//! that a failure.

use super::*;
use crate::cuda::testing::device;
use crate::optim::{OptimError, Optimizer, OptimizerState, StepReport};

/// The numbers of a tensor on any device.
fn host(tensor: &Tensor) -> Vec<f32> {
    numbers(&tensor.to_device(&Device::Cpu).unwrap())
}

fn write(target: &Tensor, numbers: &[f32]) {
    if !numbers.is_empty() {
        let source = Tensor::from_slice(numbers, numbers.len(), target.device()).unwrap();
        target.slice_set(&source, 0, 0).unwrap();
    }
}

/// As [`Noise`], on any device.
struct AnyNoise {
    fixed: Vec<f32>,
}

impl GradientSource for AnyNoise {
    fn recompute(&mut self, store: &mut ParameterStore, labels: Labels) -> anyhow::Result<()> {
        let factor = if labels == Labels::Data { 1.0 } else { 0.5 };
        let weights = host(store.weights());
        let gradients: Vec<f32> = self.fixed.iter().zip(&weights).map(|(g, w)| factor * (g + 0.5 * w)).collect();
        write(store.gradients(), &gradients);
        Ok(())
    }
}

struct Run {
    store: ParameterStore,
    optimizer: Box<dyn Optimizer>,
    lr: f64,
}

impl Run {
    fn new(config: &OptimizerConfig, layout: &Arc<Layout>, device: &Device) -> Self {
        let store = ParameterStore::new(layout.clone(), device).unwrap();
        write(store.weights(), &random_flat(layout, 1, 0.5));
        Self { store, optimizer: config.build(layout, device).unwrap(), lr: config.lr() }
    }

    fn step(&mut self, step: u64) -> Result<StepReport, OptimError> {
        let mut source = AnyNoise { fixed: random_flat(self.store.layout(), 100 + step, 0.3) };
        source.recompute(&mut self.store, Labels::Data).unwrap();
        self.optimizer.step(&mut self.store, &input(self.lr), &mut source)
    }

    fn steps(&mut self, steps: std::ops::Range<u64>) {
        for step in steps {
            self.step(step).unwrap();
        }
    }

    /// Weights, then every state tensor.
    fn tensors(&self) -> Vec<Vec<f32>> {
        let state = self.optimizer.state();
        [self.store.weights()].into_iter().chain(state.tensors.iter().map(|(_, tensor)| tensor)).map(host).collect()
    }

    fn bits(&self) -> (Vec<Vec<u32>>, Vec<u64>) {
        let tensors = self.tensors().iter().map(|tensor| tensor.iter().map(|x| x.to_bits()).collect()).collect();
        (tensors, self.optimizer.state().scalars.iter().map(|(_, value)| value.to_bits()).collect())
    }
}

/// Whether `a` is `b` within `tolerance` of the largest of `b`; NaN is not.
fn near(a: &[f32], b: &[f32], tolerance: f32) -> bool {
    let largest = b.iter().fold(1e-30f32, |largest, x| largest.max(x.abs()));
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= tolerance * largest)
}

fn close(a: f64, b: f64, tolerance: f64) -> bool {
    (a - b).abs() <= tolerance * b.abs()
}

/// Runs both and compares weights, every state, the norm, the clip, eta and ||v||^2 after each step.
fn compare(config: &OptimizerConfig, layout: &Arc<Layout>, device: &Device, steps: u64) {
    // Muon's five iterations in another order of sums.
    let tolerance = if config.name() == "muon" { 2e-5 } else { 1e-6 };
    let mut here = Run::new(config, layout, &Device::Cpu);
    let mut there = Run::new(config, layout, device);
    for step in 0..steps {
        let (expected, got) = (here.step(step).unwrap(), there.step(step).unwrap());
        let pairs = [
            (got.grad_norm, expected.grad_norm),
            (got.clip_factor, expected.clip_factor),
            (got.eta, expected.eta),
            (got.gate, expected.gate),
            (got.velocity_sq, expected.velocity_sq),
        ];
        assert!(pairs.iter().all(|&(a, b)| close(a, b, tolerance)), "{config:?}, step {step}: {got:?} {expected:?}");
        for (place, (got, expected)) in there.tensors().iter().zip(&here.tensors()).enumerate() {
            assert!(near(got, expected, tolerance as f32), "{config:?}, step {step}: tensor {place} differs");
        }
    }
    let (here, there) = (here.optimizer.state(), there.optimizer.state());
    for ((name, expected), (other, got)) in here.scalars.iter().zip(&there.scalars) {
        assert!(name == other && (got == expected || close(*got, *expected, tolerance)), "{name}");
    }
}

#[test]
fn every_optimizer_takes_the_cpus_steps_on_the_device() {
    let Some(device) = device() else { return };
    for config in variants() {
        compare(&config, &odd_layout(), &device, 6);
    }
}

#[test]
fn many_chunks_on_the_device_are_summed_as_on_the_cpu() {
    let Some(device) = device() else { return };
    let layout = layout(&[("wte", &[501, 199], true), ("h.mlp.weight", &[61, 83], true), ("ln", &[70_003], false)]);
    for config in [config("vradam", &[("beta3", 20.0.into())]), config("adabelief", &[]), config("muon", &[])] {
        compare(&config, &layout, &device, 2);
    }
}

fn through_the_host(state: &OptimizerState) -> OptimizerState {
    let tensors = state
        .tensors
        .iter()
        .map(|(name, tensor)| (name.clone(), Tensor::from_vec(host(tensor), tensor.dims(), &Device::Cpu).unwrap()));
    OptimizerState { tensors: tensors.collect(), scalars: state.scalars.clone() }
}

#[test]
fn a_resumed_run_on_the_device_equals_the_uninterrupted_one_bit_for_bit() {
    let Some(device) = device() else { return };
    let layout = odd_layout();
    for config in variants() {
        let mut whole = Run::new(&config, &layout, &device);
        let mut first = Run::new(&config, &layout, &device);
        whole.steps(0..7);
        first.steps(0..4);
        let mut second = Run::new(&config, &layout, &device);
        write(second.store.weights(), &host(first.store.weights()));
        second.optimizer.load_state(&through_the_host(&first.optimizer.state())).unwrap();
        second.steps(4..7);
        assert_eq!(second.bits(), whole.bits(), "{config:?}");
    }
}

#[test]
fn a_run_begun_on_the_cpu_goes_on_on_the_device() {
    let Some(device) = device() else { return };
    let layout = odd_layout();
    let config = config("vradam", &[("beta3", 20.0.into())]);
    let mut here = Run::new(&config, &layout, &Device::Cpu);
    here.steps(0..3);
    let mut there = Run::new(&config, &layout, &device);
    write(there.store.weights(), &host(here.store.weights()));
    there.optimizer.load_state(&here.optimizer.state()).unwrap();
    (3..6).for_each(|step| assert!(close(there.step(step).unwrap().eta, here.step(step).unwrap().eta, 1e-6)));
    assert!(there.tensors().iter().zip(&here.tensors()).all(|(got, expected)| near(got, expected, 1e-6)));
}

#[test]
fn a_gradient_that_is_not_finite_is_refused_by_name_on_the_device_and_nothing_changes() {
    let Some(device) = device() else { return };
    let layout = odd_layout();
    for config in variants() {
        let mut run = Run::new(&config, &layout, &device);
        run.step(0).unwrap();
        let before = run.bits();
        let mut gradients = random_flat(&layout, 5, 0.3);
        gradients[layout.parameters()[1].offset + 7] = f32::NAN;
        write(run.store.gradients(), &gradients);
        let mut source = AnyNoise { fixed: gradients };
        let error = run.optimizer.step(&mut run.store, &input(run.lr), &mut source).unwrap_err();
        let OptimError::NonFinite { parameter, index, .. } = &error else { panic!("{config:?}: {error}") };
        assert_eq!((parameter.as_str(), *index), (layout.parameters()[1].name.as_str(), 7));
        assert_eq!(run.bits(), before, "{config:?}");
        assert!(run.step(1).is_ok());
    }
}

#[test]
fn the_gaps_stay_zero_on_the_device() {
    let Some(device) = device() else { return };
    let layout = odd_layout();
    let inside: Vec<bool> =
        (0..layout.len()).map(|i| layout.parameters().iter().any(|p| p.range().contains(&i))).collect();
    for config in variants() {
        let mut run = Run::new(&config, &layout, &device);
        run.steps(0..2);
        for tensor in run.tensors() {
            assert!(tensor.iter().zip(&inside).all(|(x, inside)| *inside || *x == 0.0), "{config:?}");
        }
    }
}

#[test]
fn a_store_without_parameters_takes_a_step_on_the_device() {
    let Some(device) = device() else { return };
    for config in variants() {
        let mut run = Run::new(&config, &layout(&[]), &device);
        let report = run.step(0).unwrap();
        assert_eq!((report.grad_norm, report.gate, report.velocity_sq), (0.0, 1.0, 0.0), "{config:?}");
    }
}
