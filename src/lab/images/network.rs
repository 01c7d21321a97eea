//! The two networks' forward and backward passes; [`super::architecture`] lists their layers.

use super::architecture::{BLOCKS, HIDDEN, linears, units};
use super::loss::loss;
use super::pictures::{halve, halve_backward, maximum, transpose};
use super::unit::{Parameters, Unit};
use super::{Architecture, CLASSES, Mode, Objective, PIXELS, SIDE};
use crate::model::LossSum;
use crate::ops::Gradient;
use crate::ops::linear::{self, Dims, Orientation, Weight};
use crate::ops::product::Precision;
use crate::params::{GradientSlots, Layout};
use rayon::prelude::*;
use std::sync::Arc;

/// A network with its buffers.
pub struct Network {
    architecture: Architecture,
    layout: Arc<Layout>,
    units: Vec<Unit>,
    /// Shortcuts that a ResNet stage begins with, and the CNN's pictures after each maximum with the places of it.
    pictures: Vec<Vec<f32>>,
    chosen: Vec<Vec<u32>>,
    /// Input of the first linear layer, its result (the CNN's hidden layer after relu), the logits.
    features: Vec<f32>,
    hidden: Vec<f32>,
    logits: Vec<f32>,
    scratch: Vec<f32>,
}

impl Network {
    pub fn new(architecture: Architecture, layout: Arc<Layout>) -> Self {
        let units: Vec<Unit> = units(architecture).into_iter().map(|spec| Unit::new(spec, &layout)).collect();
        let empty = || vec![Vec::new(); 3];
        let chosen = vec![Vec::new(); 3];
        let (features, hidden, logits, scratch) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { architecture, layout, units, pictures: empty(), chosen, features, hidden, logits, scratch }
    }

    /// Named state besides the parameters: each norm's running mean and variance.
    pub fn statistics(&self) -> Vec<(String, &[f32])> {
        let of = |unit: &'_ Unit, part: &str| format!("{}.running_{part}", unit.spec.norm);
        let pairs = self
            .units
            .iter()
            .map(|unit| [(of(unit, "mean"), &unit.running.mean[..]), (of(unit, "var"), &unit.running.variance[..])]);
        pairs.flatten().collect()
    }

    /// The same, to be filled.
    pub fn statistics_mut(&mut self) -> Vec<(String, &mut Vec<f32>)> {
        let pairs = self.units.iter_mut().map(|unit| {
            let name = unit.spec.norm.clone();
            let running = &mut unit.running;
            [
                (format!("{name}.running_mean"), &mut running.mean),
                (format!("{name}.running_var"), &mut running.variance),
            ]
        });
        pairs.flatten().collect()
    }

    /// Logits [B, 10] of images [B, 32, 32, 3].
    pub fn forward(&mut self, weights: &[f32], images: &[f32], mode: Mode) -> &[f32] {
        assert!(images.len().is_multiple_of(PIXELS), "not whole images");
        let batch = images.len() / PIXELS;
        let needed = self.units.iter().map(|unit| unit.scratch_len(batch)).max().unwrap_or(0);
        self.scratch.resize(needed.max(self.scratch.len()), 0.0);
        let layout = Arc::clone(&self.layout);
        let parameters = Parameters { layout: &layout, weights };
        match self.architecture {
            Architecture::ResNet32 => self.forward_resnet(&parameters, mode, batch, images),
            Architecture::Cnn => self.forward_cnn(&parameters, mode, batch, images),
        }
        &self.logits
    }

    fn forward_resnet(&mut self, parameters: &Parameters, mode: Mode, batch: usize, images: &[f32]) {
        let Self { units, pictures, scratch, .. } = self;
        units[0].forward(parameters, mode, batch, images, None, scratch);
        for first in (1..units.len()).step_by(2) {
            let (before, rest) = units.split_at_mut(first);
            let [one, two, ..] = rest else { break };
            let x = &before[first - 1].y;
            one.forward(parameters, mode, batch, x, None, scratch);
            let shape = one.spec.shape;
            if shape.stride == 1 {
                two.forward(parameters, mode, batch, &one.y, Some(x), scratch);
            } else {
                let shortcut = &mut pictures[first / (2 * BLOCKS)];
                halve(x, shape.width, shape.inputs, shape.outputs, shortcut);
                two.forward(parameters, mode, batch, &one.y, Some(shortcut), scratch);
            }
        }
        let y = &units[units.len() - 1].y;
        let (channels, pixels) = (64, (SIDE / 4) * (SIDE / 4));
        self.features.resize(batch * channels, 0.0);
        for (feature, picture) in self.features.chunks_exact_mut(channels).zip(y.chunks_exact(pixels * channels)) {
            feature.fill(0.0);
            for pixel in picture.chunks_exact(channels) {
                feature.iter_mut().zip(pixel).for_each(|(sum, x)| *sum += x);
            }
            feature.iter_mut().for_each(|sum| *sum /= pixels as f32);
        }
        self.logits.resize(batch * CLASSES, 0.0);
        let (weight, bias) = self.linear(parameters, 0);
        linear::forward(&self.features, weight, Some(bias), None, &mut self.logits);
    }

    fn forward_cnn(&mut self, parameters: &Parameters, mode: Mode, batch: usize, images: &[f32]) {
        let Self { units, pictures, chosen, scratch, .. } = self;
        for block in 0..3 {
            let [one, two] = &mut units[2 * block..2 * block + 2] else { break };
            let (before, after) = pictures.split_at_mut(block);
            let x = before.last().map_or(images, |picture| picture);
            one.forward(parameters, mode, batch, x, None, scratch);
            two.forward(parameters, mode, batch, &one.y, None, scratch);
            let shape = two.spec.shape;
            maximum(&two.y, shape.width, shape.outputs, &mut after[0], &mut chosen[block]);
        }
        // PyTorch flattens channels first: [B, 4, 4, 256] -> [B, 256, 4, 4].
        self.features.resize(self.pictures[2].len(), 0.0);
        transpose(&self.pictures[2], 16, 256, &mut self.features);
        self.hidden.resize(batch * HIDDEN, 0.0);
        self.logits.resize(batch * CLASSES, 0.0);
        let (weight, bias) = self.linear(parameters, 0);
        linear::forward(&self.features, weight, Some(bias), None, &mut self.hidden);
        self.hidden.iter_mut().for_each(|x| *x = if *x < 0.0 { 0.0 } else { *x });
        let (weight, bias) = self.linear(parameters, 1);
        linear::forward(&self.hidden, weight, Some(bias), None, &mut self.logits);
    }

    /// Place of a linear layer's weight and bias in the layout, and its sizes.
    fn linear_places(&self, index: usize) -> (usize, usize, Dims) {
        let (name, inputs, outputs) = linears(self.architecture)[index];
        let place = |part: &str| self.layout.index_of(&format!("{name}.{part}")).unwrap_or(usize::MAX);
        let dims = Dims { inputs, outputs, orientation: Orientation::OutIn, precision: Precision::F32 };
        (place("weight"), place("bias"), dims)
    }

    fn linear<'a>(&self, parameters: &Parameters<'a>, index: usize) -> (Weight<'a>, &'a [f32]) {
        let (weight, bias, dims) = self.linear_places(index);
        (Weight { data: parameters.of(weight).into(), dims }, parameters.of(bias))
    }

    /// Loss of a batch and its gradients. `mode` is [`Mode::Train`] or [`Mode::Again`].
    pub fn gradients(
        &mut self,
        weights: &[f32],
        slots: &mut GradientSlots,
        images: &[f32],
        labels: &[u32],
        objective: Objective,
        mode: Mode,
    ) -> LossSum {
        self.forward(weights, images, mode);
        let mut slope = vec![0.0; self.logits.len()];
        let loss = loss(objective, &self.logits, labels, Some(&mut slope));
        let layout = Arc::clone(&self.layout);
        let parameters = Parameters { layout: &layout, weights };
        match self.architecture {
            Architecture::ResNet32 => self.backward_resnet(&parameters, slots, images, &slope),
            Architecture::Cnn => self.backward_cnn(&parameters, slots, images, &slope),
        }
        loss
    }

    /// Gradients of a linear layer; gives dx.
    fn backward_linear(
        &self,
        parameters: &Parameters,
        slots: &mut GradientSlots,
        index: usize,
        x: &[f32],
        dy: &[f32],
    ) -> Vec<f32> {
        let (weight, bias, dims) = self.linear_places(index);
        let mut dx = vec![0.0; x.len()];
        let data = Weight { data: parameters.of(weight).into(), dims };
        linear::backward_input(dy, data, Gradient::overwrite(&mut dx));
        let (to_weight, to_bias) = slots.pair(weight, bias);
        linear::backward_weight(x, dy, dims, to_weight.into(), Some(to_bias.into()));
        dx
    }

    fn backward_resnet(&mut self, parameters: &Parameters, slots: &mut GradientSlots, images: &[f32], slope: &[f32]) {
        let batch = images.len() / PIXELS;
        let features = self.backward_linear(parameters, slots, 0, &self.features, slope);
        let (channels, pixels) = (64, (SIDE / 4) * (SIDE / 4));
        let mut dy = vec![0.0; batch * pixels * channels];
        for (picture, feature) in dy.chunks_exact_mut(pixels * channels).zip(features.chunks_exact(channels)) {
            for pixel in picture.chunks_exact_mut(channels) {
                pixel.iter_mut().zip(feature).for_each(|(dy, d)| *dy = d / pixels as f32);
            }
        }
        let (mut inner, mut dx, mut between) = (Vec::new(), Vec::new(), Vec::new());
        let Self { units, scratch, .. } = self;
        for first in (1..units.len()).step_by(2).rev() {
            let (x, one, two) = (&units[first - 1].y, &units[first], &units[first + 1]);
            two.backward(parameters, slots, batch, &one.y, &mut dy, Some(&mut inner), &mut between, scratch);
            one.backward(parameters, slots, batch, x, &mut inner, Some(&mut dx), &mut between, scratch);
            let shape = one.spec.shape;
            if shape.stride == 1 {
                dx.par_chunks_mut(1 << 14).zip(dy.par_chunks(1 << 14)).for_each(|(dx, dy)| {
                    dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx += dy);
                });
            } else {
                halve_backward(&dy, shape.width, shape.inputs, shape.outputs, &mut dx);
            }
            std::mem::swap(&mut dx, &mut dy);
        }
        units[0].backward(parameters, slots, batch, images, &mut dy, None, &mut between, scratch);
    }

    fn backward_cnn(&mut self, parameters: &Parameters, slots: &mut GradientSlots, images: &[f32], slope: &[f32]) {
        let batch = images.len() / PIXELS;
        let mut hidden = self.backward_linear(parameters, slots, 1, &self.hidden, slope);
        hidden.iter_mut().zip(&self.hidden).for_each(|(d, y)| *d = if *y > 0.0 { *d } else { 0.0 });
        let features = self.backward_linear(parameters, slots, 0, &self.features, &hidden);
        let mut dy = vec![0.0; features.len()];
        transpose(&features, 256, 16, &mut dy);
        let (mut full, mut inner, mut between) = (Vec::new(), Vec::new(), Vec::new());
        let Self { units, pictures, chosen, scratch, .. } = self;
        for block in (0..3).rev() {
            let (one, two) = (&units[2 * block], &units[2 * block + 1]);
            full.clear();
            full.resize(two.y.len(), 0.0);
            dy.iter().zip(&chosen[block]).for_each(|(dy, &place)| full[place as usize] = *dy);
            two.backward(parameters, slots, batch, &one.y, &mut full, Some(&mut inner), &mut between, scratch);
            let x = if block == 0 { images } else { &pictures[block - 1] };
            let dx = if block == 0 { None } else { Some(&mut dy) };
            one.backward(parameters, slots, batch, x, &mut inner, dx, &mut between, scratch);
        }
    }
}
