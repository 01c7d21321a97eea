//! CIFAR-10 as a problem: shuffled epochs, seeded shifts and mirrors, accuracy.

use super::images::{self, Architecture, Mode, Network, Objective, PIXELS, SIDE};
use super::problem::{Pass, Problem, Scores};
use crate::data::Images;
use crate::model::LossSum;
use crate::params::{Layout, ParameterStore, slice};
use crate::random::{Stream, below, generator, shuffle};
use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use rand_chacha::rand_core::Rng;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::sync::Arc;

/// Mean and standard deviation of CIFAR-10's colours (of 0..1), by which pictures are normalised.
const MEAN: [f32; 3] = [0.4914, 0.4822, 0.4465];
const DEVIATION: [f32; 3] = [0.2470, 0.2435, 0.2616];
/// Pixels that a picture may be shifted.
const SHIFT: usize = 4;
/// Images of one evaluation batch.
const EVALUATED: usize = 250;

/// Where a picture is moved to, and whether it is mirrored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Change {
    /// Row and column of the crop in the picture with `SHIFT` black pixels around it.
    row: usize,
    column: usize,
    mirror: bool,
}

const UNCHANGED: Change = Change { row: SHIFT, column: SHIFT, mirror: false };

/// The networks on CIFAR-10.
pub struct ImageProblem {
    layout: Arc<Layout>,
    architecture: Architecture,
    objective: Objective,
    network: Network,
    training: Images,
    validation: Images,
    augment: bool,
    batch: usize,
    seed: u64,
    data_hash: String,
    /// The current epoch's permutation.
    order: (u64, Vec<u32>),
    /// The current batch.
    inputs: Vec<f32>,
    labels: Vec<u32>,
}

impl ImageProblem {
    /// # Errors
    /// When a set has no image.
    pub fn new(
        architecture: Architecture,
        objective: Objective,
        augment: bool,
        batch: usize,
        seed: u64,
        [training, validation]: [Images; 2],
    ) -> Result<Self> {
        ensure!(!training.is_empty(), "there is no training image");
        ensure!(!validation.is_empty(), "there is no validation image");
        ensure!(batch <= training.len(), "`task.batch` = {batch} is more than the {} training images", training.len());
        let mut hasher = Sha256::new();
        [&training, &validation].iter().for_each(|set| {
            hasher.update(&set.pixels);
            hasher.update(&set.labels);
        });
        let layout = Arc::new(Layout::new(images::parameter_specs(architecture)));
        let network = Network::new(architecture, Arc::clone(&layout));
        let order = (u64::MAX, Vec::new());
        Ok(Self {
            layout,
            architecture,
            objective,
            network,
            training,
            validation,
            augment,
            batch,
            seed,
            data_hash: hex(&hasher.finalize()),
            order,
            inputs: Vec::new(),
            labels: Vec::new(),
        })
    }

    /// Training images of an epoch.
    pub fn epoch_len(&self) -> usize {
        self.training.len()
    }

    /// The image that stands at place `index` of all epochs one after another.
    fn image_at(&mut self, index: u64) -> usize {
        let count = self.training.len() as u64;
        let epoch = index / count;
        if self.order.0 != epoch {
            let mut generator = generator(self.seed, Stream::Shuffle);
            generator.set_word_pos(u128::from(epoch) << 40);
            let mut order: Vec<u32> = (0..count as u32).collect();
            shuffle(&mut generator, &mut order);
            self.order = (epoch, order);
        }
        self.order.1[(index % count) as usize] as usize
    }

    /// What is done to the image at place `index` of all epochs.
    fn change_at(&self, index: u64) -> Change {
        if !self.augment {
            return UNCHANGED;
        }
        let mut generator = generator(self.seed, Stream::Augmentation);
        generator.set_word_pos(u128::from(index) << 6);
        let mut place = || below(&mut generator, 2 * SHIFT as u64 + 1) as usize;
        let (row, column) = (place(), place());
        Change { row, column, mirror: generator.next_u32() & 1 == 1 }
    }
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The picture [32, 32, 3], changed and normalised.
fn prepare(pixels: &[u8], change: Change, target: &mut [f32]) {
    for (index, pixel) in target.chunks_exact_mut(3).enumerate() {
        let (row, mut column) = (index / SIDE, index % SIDE);
        if change.mirror {
            column = SIDE - 1 - column;
        }
        let inside = |place: usize, shift: usize| (place + shift).checked_sub(SHIFT).filter(|place| *place < SIDE);
        let source = inside(row, change.row).zip(inside(column, change.column));
        for colour in 0..3 {
            let value = source.map_or(0, |(row, column)| pixels[(row * SIDE + column) * 3 + colour]);
            pixel[colour] = (f32::from(value) / 255.0 - MEAN[colour]) / DEVIATION[colour];
        }
    }
}

/// The first `range` pictures of a set, unchanged.
fn plain(set: &Images, range: std::ops::Range<usize>) -> (Vec<f32>, Vec<u32>) {
    let mut inputs = vec![0.0; range.len() * PIXELS];
    let pixels = &set.pixels[range.start * PIXELS..range.end * PIXELS];
    inputs.par_chunks_mut(PIXELS).zip(pixels.par_chunks(PIXELS)).for_each(|(input, pixels)| {
        prepare(pixels, UNCHANGED, input);
    });
    (inputs, set.labels[range].iter().map(|&label| u32::from(label)).collect())
}

impl Problem for ImageProblem {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn initialize(&self, seed: u64, weights: &mut [f32]) {
        images::initialize(self.architecture, &self.layout, seed, weights);
    }

    fn batch(&self) -> usize {
        self.batch
    }

    fn examples(&self) -> (usize, &'static str) {
        (self.training.len(), "images are there to train on")
    }

    fn data_hash(&self) -> &str {
        &self.data_hash
    }

    fn draw(&mut self, step: u64) -> String {
        let first = (step - 1) * self.batch as u64;
        let places: Vec<u64> = (first..first + self.batch as u64).collect();
        let chosen: Vec<(usize, Change)> =
            places.into_iter().map(|place| (self.image_at(place), self.change_at(place))).collect();
        self.inputs.resize(self.batch * PIXELS, 0.0);
        self.inputs.par_chunks_mut(PIXELS).zip(&chosen).for_each(|(input, &(image, change))| {
            prepare(&self.training.pixels[image * PIXELS..][..PIXELS], change, input);
        });
        self.labels = chosen.iter().map(|&(image, _)| u32::from(self.training.labels[image])).collect();
        let mut hasher = Sha256::new();
        hasher.update(self.data_hash.as_bytes());
        for (image, Change { row, column, mirror }) in chosen {
            hasher.update((image as u64).to_le_bytes());
            hasher.update([row as u8, column as u8, u8::from(mirror)]);
        }
        hex(&hasher.finalize()[..8])
    }

    fn gradients(&mut self, store: &mut ParameterStore, pass: Pass) -> Result<LossSum> {
        let mode = if matches!(pass, Pass::First) { Mode::Train } else { Mode::Again };
        let Self { network, inputs, labels, objective, .. } = self;
        let drawn;
        let labels: &[u32] = match pass {
            Pass::Sampled(generator) => {
                let draw =
                    |weights: &[f32]| images::draw_labels(network.forward(weights, inputs, Mode::Again), generator);
                drawn = slice(store.weights(), draw)?;
                &drawn
            }
            Pass::First | Pass::Again => labels,
        };
        Ok(store.backward(|weights, slots| {
            rayon::scope(|_| network.gradients(weights.exact, slots, inputs, labels, *objective, mode))
        })?)
    }

    fn evaluate(&mut self, store: &ParameterStore) -> Result<Scores> {
        let (mut loss, mut right) = (LossSum::default(), 0usize);
        for start in (0..self.validation.len()).step_by(EVALUATED) {
            let (inputs, labels) = plain(&self.validation, start..(start + EVALUATED).min(self.validation.len()));
            let network = &mut self.network;
            let objective = self.objective;
            slice(store.weights(), |weights| {
                let logits = rayon::scope(|_| network.forward(weights, &inputs, Mode::Evaluate));
                loss += images::loss(objective, logits, &labels, None);
                let best = |logits: &[f32]| (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
                let answers = logits.chunks_exact(images::CLASSES).map(best);
                right += answers.zip(&labels).filter(|(answer, label)| *answer == Some(**label as usize)).count();
            })?;
        }
        let accuracy = right as f64 / self.validation.len() as f64;
        Ok(Scores { loss: loss.mean(), accuracy: Some(accuracy), distance: None })
    }

    fn state(&self) -> Vec<(String, Vec<f32>)> {
        self.network.statistics().into_iter().map(|(name, numbers)| (name, numbers.to_vec())).collect()
    }

    fn load_state(&mut self, state: &[(String, Vec<f32>)]) -> Result<()> {
        for (name, numbers) in self.network.statistics_mut() {
            let (_, saved) = state
                .iter()
                .find(|(other, _)| *other == name)
                .with_context(|| format!("the checkpoint has no {name}"))?;
            ensure!(saved.len() == numbers.len(), "the checkpoint's {name} has {} numbers", saved.len());
            numbers.copy_from_slice(saved);
        }
        Ok(())
    }

    fn twin(&self, tensors: &[Tensor], examples: usize) -> Result<Tensor> {
        ensure!(examples <= self.training.len(), "{examples} images are more than the {}", self.training.len());
        let (inputs, labels) = plain(&self.training, 0..examples);
        let sum = images::twin_loss(self.architecture, self.objective, &self.layout, tensors, &inputs, &labels)?;
        Ok((sum / examples as f64)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images(count: usize) -> Images {
        let pixels = (0..count * PIXELS).map(|i| (i * 7 % 251) as u8).collect();
        Images { pixels, labels: (0..count).map(|i| (i % 10) as u8).collect() }
    }

    fn problem(augment: bool) -> Result<ImageProblem> {
        let sets = [images(12), images(5)];
        ImageProblem::new(Architecture::ResNet32, Objective::CrossEntropy, augment, 8, 1, sets)
    }

    #[test]
    fn every_epoch_shows_every_image_once_and_batches_depend_on_seed_and_step_alone() -> Result<()> {
        let mut one = problem(true)?;
        let mut epoch: Vec<usize> = (12..24).map(|place| one.image_at(place)).collect();
        assert_ne!(epoch, (0..12).collect::<Vec<_>>());
        epoch.sort_unstable();
        assert_eq!(epoch, (0..12).collect::<Vec<_>>());
        let hashes: Vec<String> = (1..=4).map(|step| one.draw(step)).collect();
        let third = one.draw(3);
        let mut other = problem(true)?;
        assert_eq!(other.draw(3), third);
        assert_eq!(hashes[2], third);
        assert_ne!(hashes[0], hashes[1]);
        assert_ne!(problem(false)?.draw(3), third);
        Ok(())
    }

    #[test]
    fn a_change_moves_mirrors_and_fills_with_black() {
        let mut pixels = vec![0u8; PIXELS];
        pixels[(2 * SIDE + 5) * 3] = 255;
        let at = |change, row: usize, column: usize| {
            let mut target = vec![0.0; PIXELS];
            prepare(&pixels, change, &mut target);
            target[(row * SIDE + column) * 3] * DEVIATION[0] + MEAN[0]
        };
        let near = |value: f32, expected: f32| assert!((value - expected).abs() < 1e-6, "{value}");
        near(at(UNCHANGED, 2, 5), 1.0);
        near(at(UNCHANGED, 2, 6), 0.0);
        near(at(Change { row: 5, column: 2, mirror: false }, 1, 7), 1.0);
        near(at(Change { row: 4, column: 4, mirror: true }, 2, 26), 1.0);
        near(at(Change { row: 0, column: 0, mirror: false }, 0, 0), 0.0);
    }
}
