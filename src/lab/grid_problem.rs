//! The GFlowNet on a grid as a problem.

use super::gridworld::{Batch, Network, Shape, twin_loss};
use super::image_problem::hex;
use super::problem::{Pass, Problem, Scores};
use crate::model::LossSum;
use crate::params::{Layout, ParameterStore, slice};
use crate::random::{Stream, generator};
use anyhow::{Result, bail};
use candle_core::Tensor;
use sha2::{Digest, Sha256};
use std::sync::Arc;

/// Walks a loss may be taken of at most; they are drawn, so that there is no other end to them.
const MOST_WALKS: usize = 10_000_000;

/// The network and its walks.
pub struct GridProblem {
    layout: Arc<Layout>,
    network: Network,
    walks: usize,
    seed: u64,
    batch: Batch,
}

impl GridProblem {
    pub fn new(shape: Shape, walks: usize, seed: u64) -> Self {
        let layout = Arc::new(Layout::new(shape.parameter_specs()));
        Self { layout, network: Network::new(shape), walks, seed, batch: shape.every_term() }
    }

    /// The walks of a step, or of place 0: the ones that sharpness is measured on.
    fn walks_of(&self, place: u64, count: usize) -> Batch {
        let mut generator = generator(self.seed, Stream::Walks);
        generator.set_word_pos(u128::from(place) << 40);
        self.network.shape.draw(count, &mut generator)
    }
}

impl Problem for GridProblem {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn initialize(&self, seed: u64, weights: &mut [f32]) {
        self.network.shape.initialize(&self.layout, seed, weights);
    }

    fn batch(&self) -> usize {
        self.walks
    }

    fn examples(&self) -> (usize, &'static str) {
        (MOST_WALKS, "walks are drawn at most")
    }

    fn data_hash(&self) -> &str {
        "walks"
    }

    fn draw(&mut self, step: u64) -> String {
        self.batch = self.walks_of(step, self.walks);
        let mut hasher = Sha256::new();
        self.batch.visits.iter().chain(&self.batch.stops).for_each(|count| hasher.update(count.to_le_bytes()));
        hex(&hasher.finalize()[..8])
    }

    fn gradients(&mut self, store: &mut ParameterStore, pass: Pass) -> Result<LossSum> {
        if matches!(pass, Pass::Sampled(_)) {
            bail!("this task has no labels that could be drawn from the model, which sophiag needs");
        }
        let Self { network, batch, layout, .. } = self;
        Ok(store.backward(|weights, slots| network.gradients(layout, weights.exact, slots, batch))?)
    }

    fn evaluate(&mut self, store: &ParameterStore) -> Result<Scores> {
        let Self { network, layout, .. } = self;
        Ok(slice(store.weights(), |weights| {
            let shape = network.shape;
            let flows = network.forward(layout, weights);
            let loss = shape.loss(flows, &shape.every_term(), &mut vec![0.0; flows.len()]);
            Scores { loss: loss.mean(), accuracy: None, distance: Some(shape.distance(flows)) }
        })?)
    }

    fn state(&self) -> Vec<(String, Vec<f32>)> {
        Vec::new()
    }

    fn load_state(&mut self, _: &[(String, Vec<f32>)]) -> Result<()> {
        Ok(())
    }

    fn twin(&self, tensors: &[Tensor], examples: usize) -> Result<Tensor> {
        let batch = self.walks_of(0, examples);
        let terms: u32 = batch.visits.iter().chain(&batch.stops).sum();
        Ok((twin_loss(self.network.shape, &self.layout, tensors, &batch)? / f64::from(terms.max(1)))?)
    }
}
