//! A small task as the trainer sees it: batches that are a function of the seed and the step, loss, gradients, scores.

use crate::model::LossSum;
use crate::params::{Layout, ParameterStore};
use anyhow::Result;
use candle_core::Tensor;
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// Which pass over the step's batch.
pub enum Pass<'a> {
    First,
    /// Once more, at other weights: nothing but gradients may change.
    Again,
    /// Once more, with labels drawn from the model.
    Sampled(&'a mut ChaCha8Rng),
}

/// What an evaluation found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scores {
    /// Mean loss on what is held out.
    pub loss: f64,
    /// Share of images that are classified rightly.
    pub accuracy: Option<f64>,
    /// L1 distance of the learned distribution from the true one.
    pub distance: Option<f64>,
}

/// A network with its data.
pub trait Problem {
    fn layout(&self) -> &Arc<Layout>;

    /// Fills `weights` (a flat storage of the layout) as `seed` says.
    fn initialize(&self, seed: u64, weights: &mut [f32]);

    /// Examples of a step.
    fn batch(&self) -> usize;

    /// How many training examples [`Self::twin`] can take, and what they are.
    fn examples(&self) -> (usize, &'static str);

    /// SHA-256 of the data that batches are made of, in hexadecimal.
    fn data_hash(&self) -> &str;

    /// Makes the batch of a step (counted from 1) the current one and gives its hash.
    fn draw(&mut self, step: u64) -> String;

    /// Loss of the current batch; its gradient is written or added to the store's.
    fn gradients(&mut self, store: &mut ParameterStore, pass: Pass) -> Result<LossSum>;

    fn evaluate(&mut self, store: &ParameterStore) -> Result<Scores>;

    /// State besides the parameters, by name.
    fn state(&self) -> Vec<(String, Vec<f32>)>;

    /// Takes back what [`Self::state`] gave.
    fn load_state(&mut self, state: &[(String, Vec<f32>)]) -> Result<()>;

    /// The mean loss of the first `examples` training examples from candle primitives, a function of the parameters in
    /// the layout's order.
    fn twin(&self, tensors: &[Tensor], examples: usize) -> Result<Tensor>;
}
