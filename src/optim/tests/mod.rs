//! The shared suite: every optimizer through the same checks, against recorded numbers and the f64 references.

#[cfg(feature = "cuda")]
mod device;
mod golden;
mod suite;
mod theory;

use super::{GradientSource, Labels, OptimizerConfig, StepInput, Value};
use crate::params::{Layout, ParameterSpec, ParameterStore, slice, slice_mut};
use crate::random::{Stream, fill_normal, generator};
use candle_core::{Device, Tensor};
use std::sync::Arc;

/// A config from `name` and TOML-like `key=value` words.
fn config(name: &str, keys: &[(&str, Value)]) -> OptimizerConfig {
    let keys: Vec<_> = keys.iter().map(|(key, value)| (key.to_string(), value.clone())).collect();
    OptimizerConfig::from_keys(name, &keys).unwrap()
}

fn layout(specs: &[(&str, &[usize], bool)]) -> Arc<Layout> {
    let spec = |(name, shape, decays): &(&str, &[usize], bool)| ParameterSpec {
        name: name.to_string(),
        shape: shape.to_vec(),
        decays: *decays,
    };
    Arc::new(Layout::new(specs.iter().map(spec).collect()))
}

/// Odd sizes, gaps after every parameter, both kinds of decay, and names that Muon tells apart.
fn odd_layout() -> Arc<Layout> {
    layout(&[
        ("wte.weight", &[37, 5], true),
        ("h.0.attn.c_attn.weight", &[5, 15], true),
        ("h.0.attn.c_attn.bias", &[15], false),
        ("h.0.mlp.c_proj.weight", &[23, 5], true),
        ("ln_f.weight", &[5], false),
    ])
}

fn store(layout: &Arc<Layout>, weights: &[f32]) -> ParameterStore {
    let store = ParameterStore::new(layout.clone(), &Device::Cpu).unwrap();
    slice_mut(store.weights(), |numbers| numbers.copy_from_slice(weights)).unwrap();
    store
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    slice(tensor, <[f32]>::to_vec).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    numbers(tensor).iter().map(|x| x.to_bits()).collect()
}

/// Normal numbers where the parameters are, zeros in the gaps.
fn random_flat(layout: &Layout, seed: u64, standard_deviation: f64) -> Vec<f32> {
    let mut generator = generator(seed, Stream::Init);
    let mut flat = vec![0.0; layout.len()];
    for parameter in layout.parameters() {
        fill_normal(&mut generator, standard_deviation, &mut flat[parameter.range()]);
    }
    flat
}

fn set_gradients(store: &ParameterStore, gradients: &[f32]) {
    slice_mut(store.gradients(), |numbers| numbers.copy_from_slice(gradients)).unwrap();
}

/// A gradient that depends on the weights and the step: g = fixed + weights / 2; sampled labels give half of it.
struct Noise {
    fixed: Vec<f32>,
}

impl GradientSource for Noise {
    fn recompute(&mut self, store: &mut ParameterStore, labels: Labels) -> anyhow::Result<()> {
        let factor = if labels == Labels::Data { 1.0 } else { 0.5 };
        let weights = numbers(store.weights());
        let gradients: Vec<f32> = self.fixed.iter().zip(&weights).map(|(g, w)| factor * (g + 0.5 * w)).collect();
        set_gradients(store, &gradients);
        Ok(())
    }
}

fn input(lr: f64) -> StepInput {
    StepInput { scheduled_lr: lr, gradient_scale: 1.0, grad_clip: Some(1.0) }
}

/// Every optimizer with its defaults, and the variants that take another path through the code.
fn variants() -> Vec<OptimizerConfig> {
    let mut variants: Vec<_> = OptimizerConfig::names().iter().map(|name| config(name, &[])).collect();
    let gate = |more: &[(&'static str, Value)]| [&[("gate", true.into()), ("beta3", 20.0.into())], more].concat();
    for name in OptimizerConfig::names().iter().filter(|&&name| name != "vradam") {
        variants.push(config(name, &gate(&[("weight_decay", 0.1.into())])));
        variants.push(config(name, &gate(&[("gate_scope", "group".into()), ("gate_source", "gradient".into())])));
        variants.push(config(name, &gate(&[("gate_power", 3.0.into()), ("alpha1", 5.0.into())])));
    }
    for name in ["vradam", "adamw", "lion", "sophiag", "muon"] {
        variants.push(config(name, &[("sam", true.into())]));
    }
    for name in ["radam", "nadam"] {
        variants.push(config(name, &[("decoupled_weight_decay", true.into()), ("weight_decay", 0.1.into())]));
    }
    variants.push(config("sgd", &[("nesterov", false.into()), ("weight_decay", 0.1.into())]));
    variants.push(config("rmsprop", &[("momentum", 0.9.into())]));
    variants.push(config("vradam", &[("beta3", 20.0.into()), ("weight_decay", 0.1.into())]));
    variants.push(config("vradam", &[("gate_scope", "group".into()), ("beta3", 20.0.into())]));
    variants.push(config("vradam", &[("gate_source", "gradient".into())]));
    variants.push(config("vradam", &[("gate_power", 1.0.into())]));
    variants.push(config("vradam", &[("gate_power", 1.5.into()), ("gate_source", "gradient".into())]));
    variants
}
