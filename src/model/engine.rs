//! A model that computes: which code runs a batch, on which device.

use super::gpt2::{Gpt2Cpu, Gpt2Generic};
use super::llama::{LlamaCpu, LlamaGeneric};
use super::{Batch, Labels, LossSum, ModelShape};
use crate::config::Recompute;
use crate::params::{Layout, ParameterStore, slice};
use anyhow::{Result, bail};
use candle_core::Device;
use std::sync::Arc;

/// The code that runs a model's forward and backward passes: our own operations on the CPU, or the twin from candle
/// primitives where a device has no kernels of ours.
pub enum Engine {
    Gpt2(Box<Gpt2Cpu>),
    Llama(Box<LlamaCpu>),
    Gpt2Generic(Box<Gpt2Generic>),
    LlamaGeneric(Box<LlamaGeneric>),
}

impl Engine {
    /// The engine for a model whose parameters lie on `device`, placed by `layout`.
    pub fn new(shape: &ModelShape, layout: &Arc<Layout>, device: &Device, recompute: Recompute) -> Self {
        match (shape, device) {
            (ModelShape::Gpt2(config), Device::Cpu) => {
                Self::Gpt2(Box::new(Gpt2Cpu::new(config.clone(), Arc::clone(layout), recompute)))
            }
            (ModelShape::Llama(config), Device::Cpu) => {
                Self::Llama(Box::new(LlamaCpu::new(config.clone(), Arc::clone(layout), recompute)))
            }
            (ModelShape::Gpt2(config), _) => {
                let parameters = config.parameters(layout);
                Self::Gpt2Generic(Box::new(Gpt2Generic { config: config.clone(), parameters }))
            }
            (ModelShape::Llama(config), _) => {
                let parameters = config.parameters(layout);
                Self::LlamaGeneric(Box::new(LlamaGeneric { config: config.clone(), parameters }))
            }
        }
    }

    /// The loss of a micro-batch; its gradient is written or added to the store's.
    pub fn gradients(&mut self, store: &mut ParameterStore, batch: Batch, labels: Labels) -> Result<LossSum> {
        if let (Self::Gpt2Generic(_) | Self::LlamaGeneric(_), Labels::Sampled(_)) = (&self, &labels) {
            bail!("labels sampled from the model are not available on {:?}", store.device());
        }
        match self {
            Self::Gpt2(model) => store.backward(|weights, slots| model.gradients(weights, slots, batch, labels))?,
            Self::Llama(model) => store.backward(|weights, slots| model.gradients(weights, slots, batch, labels))?,
            Self::Gpt2Generic(model) => Ok(model.gradients(store, batch)?),
            Self::LlamaGeneric(model) => Ok(model.gradients(store, batch)?),
        }
    }

    /// The loss of a batch alone.
    pub fn loss(&mut self, store: &ParameterStore, batch: Batch) -> Result<LossSum> {
        match self {
            Self::Gpt2(model) => slice(store.weights(), |weights| Ok(model.loss(weights, batch)?.0))?,
            Self::Llama(model) => slice(store.weights(), |weights| Ok(model.loss(weights, batch)?.0))?,
            Self::Gpt2Generic(model) => Ok(model.loss(store, batch)?),
            Self::LlamaGeneric(model) => Ok(model.loss(store, batch)?),
        }
    }
}
