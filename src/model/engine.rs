//! A model that computes: which code runs a batch, on which device.

use super::gpt2::{Gpt2Config, Gpt2Cpu, Gpt2Generic};
use super::{Batch, Labels, LossSum};
use crate::config::Recompute;
use crate::ops::product::Precision;
use crate::params::{Layout, ParameterStore, slice};
use anyhow::Result;
use candle_core::Device;
use std::sync::Arc;

/// The code that runs a model's forward and backward passes.
pub enum Engine {
    /// Our own operations on the CPU.
    Cpu(Box<Gpt2Cpu>),
    /// The twin from candle primitives, where a device has no kernels of ours.
    Generic(Box<Gpt2Generic>),
}

impl Engine {
    /// The engine for a GPT-2 whose parameters lie on `device`.
    pub fn gpt2(
        config: &Gpt2Config,
        layout: &Arc<Layout>,
        device: &Device,
        recompute: Recompute,
        precision: Precision,
    ) -> Self {
        match device {
            Device::Cpu => Self::Cpu(Box::new(Gpt2Cpu::new(config.clone(), Arc::clone(layout), recompute, precision))),
            _ => Self::Generic(Box::new(Gpt2Generic { config: config.clone(), parameters: config.parameters(layout) })),
        }
    }

    /// The loss of a micro-batch; its gradient is written or added to the store's.
    pub fn gradients(&mut self, store: &mut ParameterStore, batch: Batch, labels: Labels) -> Result<LossSum> {
        match self {
            // Inside the pool: an operation called from outside would wake it up each time.
            Self::Cpu(model) => {
                rayon::scope(|_| store.backward(|weights, slots| model.gradients(weights, slots, batch, labels))?)
            }
            Self::Generic(model) => Ok(model.gradients(store, batch, labels)?),
        }
    }

    /// The loss of a batch alone.
    pub fn loss(&mut self, store: &ParameterStore, batch: Batch) -> Result<LossSum> {
        match self {
            Self::Cpu(model) => rayon::scope(|_| slice(store.weights(), |weights| Ok(model.loss(weights, batch)?.0))?),
            Self::Generic(model) => Ok(model.loss(store, batch)?),
        }
    }
}
