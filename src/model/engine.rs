//! A model that computes: which code runs a batch, on which device.

#[cfg(feature = "cuda")]
use super::card::{CardEngine, Network};
use super::gpt2::{Gpt2Cpu, Gpt2Generic};
use super::llama::{LlamaCpu, LlamaGeneric};
use super::{Batch, Labels, LossSum, ModelShape};
use crate::config::Recompute;
use crate::ops::dropout::Draw;
use crate::ops::product::Precision;
use crate::params::{Layout, ParameterStore};
use anyhow::Result;
use candle_core::Device;
use std::sync::Arc;

/// The code that runs a model's forward and backward passes: our own operations on the CPU, our kernels and cuBLAS on a
/// CUDA device, or the twin from candle primitives where a device has no kernels of ours.
pub enum Engine {
    Gpt2(Box<Gpt2Cpu>),
    Llama(Box<LlamaCpu>),
    Gpt2Generic(Box<Gpt2Generic>),
    LlamaGeneric(Box<LlamaGeneric>),
    #[cfg(feature = "cuda")]
    Card(Box<CardEngine>),
}

impl Engine {
    /// The engine for a model whose parameters lie on `device`, placed by `layout`.
    pub fn new(
        shape: &ModelShape,
        layout: &Arc<Layout>,
        device: &Device,
        recompute: Recompute,
        precision: Precision,
    ) -> Self {
        match (shape, device) {
            (ModelShape::Gpt2(config), Device::Cpu) => {
                Self::Gpt2(Box::new(Gpt2Cpu::new(config.clone(), Arc::clone(layout), recompute, precision)))
            }
            (ModelShape::Llama(config), Device::Cpu) => {
                Self::Llama(Box::new(LlamaCpu::new(config.clone(), Arc::clone(layout), recompute, precision)))
            }
            #[cfg(feature = "cuda")]
            (shape, Device::Cuda(card)) => {
                let network = match shape {
                    ModelShape::Gpt2(config) => Network::Gpt2(config.clone(), config.parameters(layout)),
                    ModelShape::Llama(config) => Network::Llama(config.clone(), config.parameters(layout)),
                };
                Self::Card(Box::new(CardEngine::new(card, network, recompute)))
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

    /// Drops numbers with this probability in training; the fall-back of other devices has no dropout.
    pub fn set_dropout(&mut self, probability: f64) {
        match self {
            Self::Gpt2(model) => model.model.dropout = probability,
            Self::Llama(model) => model.model.dropout = probability,
            Self::Gpt2Generic(_) | Self::LlamaGeneric(_) => {
                assert_eq!(probability, 0.0, "the fall-back has no dropout, as the commands check")
            }
            #[cfg(feature = "cuda")]
            Self::Card(_) => assert_eq!(probability, 0.0, "a card has no dropout, as the commands check"),
        }
    }

    /// What dropout draws in the next calls of [`Self::gradients`]; an evaluation never drops anything.
    pub fn draw(&mut self, draw: Draw) {
        match self {
            Self::Gpt2(model) => model.draw = Some(draw),
            Self::Llama(model) => model.draw = Some(draw),
            // Without dropout.
            Self::Gpt2Generic(_) | Self::LlamaGeneric(_) => {}
            #[cfg(feature = "cuda")]
            Self::Card(_) => {}
        }
    }

    /// The loss of a micro-batch; its gradient is written or added to the store's.
    pub fn gradients(&mut self, store: &mut ParameterStore, batch: Batch, labels: Labels) -> Result<LossSum> {
        // Inside the pool: an operation called from outside would wake it up each time.
        match self {
            Self::Gpt2(model) => {
                rayon::scope(|_| store.backward(|weights, slots| model.gradients(weights, slots, batch, labels))?)
            }
            Self::Llama(model) => {
                rayon::scope(|_| store.backward(|weights, slots| model.gradients(weights, slots, batch, labels))?)
            }
            Self::Gpt2Generic(model) => Ok(model.gradients(store, batch, labels)?),
            Self::LlamaGeneric(model) => Ok(model.gradients(store, batch, labels)?),
            #[cfg(feature = "cuda")]
            Self::Card(model) => Ok(model.gradients(store, batch, labels)?),
        }
    }

    /// The loss of a batch alone.
    pub fn loss(&mut self, store: &ParameterStore, batch: Batch) -> Result<LossSum> {
        match self {
            Self::Gpt2(model) => rayon::scope(|_| store.read(|weights| Ok(model.loss(weights, batch)?.0))?),
            Self::Llama(model) => rayon::scope(|_| store.read(|weights| Ok(model.loss(weights, batch)?.0))?),
            Self::Gpt2Generic(model) => Ok(model.loss(store, batch)?),
            Self::LlamaGeneric(model) => Ok(model.loss(store, batch)?),
            #[cfg(feature = "cuda")]
            Self::Card(model) => Ok(model.loss(store, batch)?),
        }
    }
}
