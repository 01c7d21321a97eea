//! A GFlowNet on a grid, trained by flow matching, and the distribution that it has learned, exactly.
//!
//! A walk starts at (0, 0), raises one coordinate a step, and may stop anywhere with reward R. The network gives the
//! logarithm of the flow F(s, a) of every state's actions (raise the first coordinate, raise the second, stop). Flows that
//! match draw a state x with probability R(x) / sum R. The loss is the mean of two kinds of squared terms:
//!
//! ```text
//! inner state s' (not the start):  log(flow into s') - log(flow out of s')
//! stop at s:                       log F(s, stop) - log R(s)
//! ```
//!
//! A batch is walks to end points drawn uniformly, each by a uniformly drawn path. So it does not depend on the weights,
//! and every optimizer sees the same batches. (The paper's version draws walks from the policy and has five actions, two
//! of which go back; with cycles flow matching has no unique solution, so this one has none.)

use crate::model::LossSum;
use crate::ops::Gradient;
use crate::ops::linear::{self, Dims, Orientation, Weight};
use crate::ops::product::Precision;
use crate::params::{GradientSlots, Layout, ParameterSpec};
use crate::random::{Stream, below, generator, uniform};
use candle_core::{Result, Tensor, bail};
use rand_chacha::ChaCha8Rng;

/// Actions: raise the first coordinate, raise the second, stop.
const ACTIONS: usize = 3;

/// Sizes of the grid and of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// H: coordinates run from 0 to H - 1.
    pub side: usize,
    /// Hidden layers and their width.
    pub layers: usize,
    pub width: usize,
}

/// How often each term of the loss counts in a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// [H * H]: visits, of which that of the start counts nothing.
    pub visits: Vec<u32>,
    /// [H * H]: stops.
    pub stops: Vec<u32>,
}

impl Shape {
    pub fn states(self) -> usize {
        self.side * self.side
    }

    /// The state after `action`, if the grid has one.
    fn next(self, state: usize, action: usize) -> Option<usize> {
        let (row, column) = (state / self.side, state % self.side);
        match action {
            0 if row + 1 < self.side => Some(state + self.side),
            1 if column + 1 < self.side => Some(state + 1),
            _ => None,
        }
    }

    /// Reward of a state: 1e-2 everywhere, more near the corners, most on a ring around them (Bengio et al., 2021).
    pub fn reward(self, state: usize) -> f64 {
        let place = |coordinate: usize| (coordinate as f64 / (self.side - 1) as f64 - 0.5).abs();
        let places = [state / self.side, state % self.side].map(place);
        let all = |test: fn(f64) -> bool| if places.iter().all(|&place| test(place)) { 1.0 } else { 0.0 };
        1e-2 + 0.5 * all(|place| place > 0.25) + 2.0 * all(|place| place > 0.3 && place < 0.4)
    }

    /// Inputs and outputs of each linear layer.
    fn linears(self) -> Vec<(usize, usize)> {
        let widths: Vec<usize> = std::iter::once(2 * self.side)
            .chain(std::iter::repeat_n(self.width, self.layers))
            .chain(std::iter::once(ACTIONS))
            .collect();
        widths.windows(2).map(|pair| (pair[0], pair[1])).collect()
    }

    pub fn parameter_specs(self) -> Vec<ParameterSpec> {
        let layers = self.linears().into_iter().enumerate();
        let specs = layers.map(|(index, (inputs, outputs))| {
            let spec =
                |part, shape: Vec<usize>, decays| ParameterSpec { name: format!("{index}.{part}"), shape, decays };
            [spec("weight", vec![outputs, inputs], true), spec("bias", vec![outputs], false)]
        });
        specs.flatten().collect()
    }

    /// PyTorch's initial weights of linear layers: uniform within 1 / sqrt(inputs).
    pub fn initialize(self, layout: &Layout, seed: u64, weights: &mut [f32]) {
        let mut generator = generator(seed, Stream::Init);
        for (index, (inputs, _)) in self.linears().into_iter().enumerate() {
            let bound = 1.0 / (inputs as f32).sqrt();
            for part in ["weight", "bias"] {
                let Some(place) = layout.index_of(&format!("{index}.{part}")) else { continue };
                let numbers = &mut weights[layout.parameters()[place].range()];
                numbers.iter_mut().for_each(|x| *x = bound * (2.0 * uniform(&mut generator) - 1.0));
            }
        }
    }

    /// The terms of `walks` random walks.
    pub fn draw(self, walks: usize, generator: &mut ChaCha8Rng) -> Batch {
        let mut batch = Batch { visits: vec![0; self.states()], stops: vec![0; self.states()] };
        for _ in 0..walks {
            let end = below(generator, self.states() as u64) as usize;
            let (mut down, mut right) = (end / self.side, end % self.side);
            let mut state = 0;
            while down + right > 0 {
                // Uniform among all paths: each remaining step is as likely as any other to come now.
                if below(generator, (down + right) as u64) < down as u64 {
                    (state, down) = (state + self.side, down - 1);
                } else {
                    (state, right) = (state + 1, right - 1);
                }
                batch.visits[state] += 1;
            }
            batch.stops[end] += 1;
        }
        batch
    }

    /// Every term once: the exact loss.
    pub fn every_term(self) -> Batch {
        let mut visits = vec![1; self.states()];
        visits[0] = 0;
        Batch { visits, stops: vec![1; self.states()] }
    }

    /// One-hot coordinates of all states, [H * H, 2 H].
    fn inputs(self) -> Vec<f32> {
        let mut inputs = vec![0.0; self.states() * 2 * self.side];
        for (state, row) in inputs.chunks_exact_mut(2 * self.side).enumerate() {
            row[state / self.side] = 1.0;
            row[self.side + state % self.side] = 1.0;
        }
        inputs
    }

    /// The states before `state`, with the action that leads here.
    fn parents(self, state: usize) -> impl Iterator<Item = (usize, usize)> {
        let before = [(state.checked_sub(self.side), 0), (state.checked_sub(1), 1)];
        before.into_iter().filter_map(move |(parent, action)| {
            let parent = parent?;
            (self.next(parent, action) == Some(state)).then_some((parent, action))
        })
    }

    /// Flows that leave `state`: its places in the table [states, actions].
    fn leaving(self, state: usize) -> impl Iterator<Item = usize> {
        let legal = move |action: &usize| *action == 2 || self.next(state, *action).is_some();
        (0..ACTIONS).filter(legal).map(move |action| state * ACTIONS + action)
    }

    /// The loss of log flows [states, 3] on a batch; its gradient is written to `slope`.
    pub fn loss(self, flows: &[f32], batch: &Batch, slope: &mut [f32]) -> LossSum {
        let mut gradient = vec![0.0f64; slope.len()];
        let flow = |place: usize| f64::from(flows[place]);
        // (log of the sum of the flows, each flow's share)
        let sum = |places: &[usize]| {
            let greatest = places.iter().map(|&place| flow(place)).fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = places.iter().map(|&place| (flow(place) - greatest).exp()).sum();
            greatest + total.ln()
        };
        let mut loss = LossSum::default();
        for state in 0..self.states() {
            let (visits, stops) = (batch.visits[state], batch.stops[state]);
            if visits > 0 && state > 0 {
                let into: Vec<usize> = self.parents(state).map(|(parent, action)| parent * ACTIONS + action).collect();
                let out: Vec<usize> = self.leaving(state).collect();
                let (log_in, log_out) = (sum(&into), sum(&out));
                let error = log_in - log_out;
                loss += LossSum { sum: f64::from(visits) * error * error, count: u64::from(visits) };
                let slope = 2.0 * error * f64::from(visits);
                into.iter().for_each(|&place| gradient[place] += slope * (flow(place) - log_in).exp());
                out.iter().for_each(|&place| gradient[place] -= slope * (flow(place) - log_out).exp());
            }
            if stops > 0 {
                let place = state * ACTIONS + 2;
                let error = flow(place) - self.reward(state).ln();
                loss += LossSum { sum: f64::from(stops) * error * error, count: u64::from(stops) };
                gradient[place] += 2.0 * error * f64::from(stops);
            }
        }
        slope.iter_mut().zip(gradient).for_each(|(slope, gradient)| *slope = gradient as f32);
        loss
    }

    /// The L1 distance between the distribution of end points that the flows draw and R / sum R, exactly.
    pub fn distance(self, flows: &[f32]) -> f64 {
        let states = self.states();
        let total: f64 = (0..states).map(|state| self.reward(state)).sum();
        let mut reached = vec![0.0; states];
        reached[0] = 1.0;
        let mut distance = 0.0;
        // States in the order of their numbers: every parent comes first.
        for state in 0..states {
            let places: Vec<usize> = self.leaving(state).collect();
            let flow = |place: usize| f64::from(flows[place]);
            let greatest = places.iter().map(|&place| flow(place)).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = places.iter().map(|&place| (flow(place) - greatest).exp()).sum();
            for &place in &places {
                let probability = reached[state] * (flow(place) - greatest).exp() / sum;
                match self.next(state, place % ACTIONS) {
                    Some(next) => reached[next] += probability,
                    None => distance += (probability - self.reward(state) / total).abs(),
                }
            }
        }
        distance
    }
}

/// The network with its buffers.
pub struct Network {
    pub shape: Shape,
    inputs: Vec<f32>,
    /// Results of the layers, after relu; the last are the log flows.
    layers: Vec<Vec<f32>>,
}

impl Network {
    pub fn new(shape: Shape) -> Self {
        let layers = shape.linears().iter().map(|(_, outputs)| vec![0.0; shape.states() * outputs]).collect();
        Self { shape, inputs: shape.inputs(), layers }
    }

    /// Places of a layer's weight and bias, and its sizes.
    fn layer(&self, layout: &Layout, index: usize) -> (usize, usize, Dims) {
        let (inputs, outputs) = self.shape.linears()[index];
        let place = |part: &str| layout.index_of(&format!("{index}.{part}")).unwrap_or(usize::MAX);
        let dims = Dims { inputs, outputs, orientation: Orientation::OutIn, precision: Precision::F32 };
        (place("weight"), place("bias"), dims)
    }

    /// Log flows of all states, [states, 3].
    pub fn forward(&mut self, layout: &Layout, weights: &[f32]) -> &[f32] {
        let count = self.layers.len();
        for index in 0..count {
            let (weight, bias, dims) = self.layer(layout, index);
            let of = |place: usize| &weights[layout.parameters()[place].range()];
            let (before, after) = self.layers.split_at_mut(index);
            let x = before.last().unwrap_or(&self.inputs);
            let weight = Weight { data: of(weight).into(), dims };
            linear::forward(x, weight, Some(of(bias)), None, &mut after[0]);
            if index + 1 < count {
                after[0].iter_mut().for_each(|x| *x = if *x < 0.0 { 0.0 } else { *x });
            }
        }
        &self.layers[count - 1]
    }

    /// The loss of a batch and its gradients.
    pub fn gradients(&mut self, layout: &Layout, weights: &[f32], slots: &mut GradientSlots, batch: &Batch) -> LossSum {
        self.forward(layout, weights);
        let count = self.layers.len();
        let mut dy = vec![0.0; self.layers[count - 1].len()];
        let loss = self.shape.loss(&self.layers[count - 1], batch, &mut dy);
        for index in (0..count).rev() {
            let (weight, bias, dims) = self.layer(layout, index);
            let x = if index == 0 { &self.inputs } else { &self.layers[index - 1] };
            let (to_weight, to_bias) = slots.pair(weight, bias);
            linear::backward_weight(x, &dy, dims, to_weight.into(), Some(to_bias.into()));
            if index > 0 {
                let mut dx = vec![0.0; x.len()];
                let data = Weight { data: (&weights[layout.parameters()[weight].range()]).into(), dims };
                linear::backward_input(&dy, data, Gradient::overwrite(&mut dx));
                dx.iter_mut().zip(x).for_each(|(dx, y)| *dx = if *y > 0.0 { *dx } else { 0.0 });
                dy = dx;
            }
        }
        loss
    }
}

/// The sum of the terms of a batch from candle primitives, in any dtype; `tensors` in the layout's order.
pub fn twin_loss(shape: Shape, layout: &Layout, tensors: &[Tensor], batch: &Batch) -> Result<Tensor> {
    let Some(first) = tensors.first() else { bail!("a network without parameters") };
    let (states, device, dtype) = (shape.states(), first.device(), first.dtype());
    let mut x = Tensor::from_vec(shape.inputs(), (states, 2 * shape.side), device)?.to_dtype(dtype)?;
    for index in 0..=shape.layers {
        let of = |part: &str| match layout.index_of(&format!("{index}.{part}")) {
            Some(place) => Ok(&tensors[place]),
            None => bail!("the network has no layer {index}"),
        };
        x = x.matmul(&of("weight")?.t()?)?.broadcast_add(of("bias")?)?;
        if index < shape.layers {
            x = x.relu()?;
        }
    }
    // Sums of flows are products with 0/1 matrices over the table's places.
    let places = states * ACTIONS;
    let (mut into, mut out) = (vec![0f32; states * places], vec![0f32; states * places]);
    for state in 1..states {
        shape.parents(state).for_each(|(parent, action)| into[state * places + parent * ACTIONS + action] = 1.0);
        shape.leaving(state).for_each(|place| out[state * places + place] = 1.0);
    }
    // The start has no inflow: 1 on both sides keeps its term at 0.
    (into[0], out[0]) = (1.0, 1.0);
    let matrix = |numbers| Tensor::from_vec(numbers, (states, places), device)?.to_dtype(dtype);
    let column = |numbers: Vec<f64>| Tensor::from_vec(numbers, (states, 1), device)?.to_dtype(dtype);
    let counts = |counts: &[u32]| column(counts.iter().map(|&count| f64::from(count)).collect());
    let flows = x.exp()?.reshape((places, 1))?;
    let inner = (matrix(into)?.matmul(&flows)?.log()? - matrix(out)?.matmul(&flows)?.log()?)?;
    let rewards = column((0..states).map(|state| shape.reward(state).ln()).collect())?;
    let stop = (x.narrow(1, ACTIONS - 1, 1)? - rewards)?;
    let inner = (inner.sqr()? * counts(&batch.visits)?)?.sum_all()?;
    inner + (stop.sqr()? * counts(&batch.stops)?)?.sum_all()?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{ParameterStore, slice};
    use candle_core::{DType, Device, Var};
    use std::sync::Arc;

    const SHAPE: Shape = Shape { side: 8, layers: 3, width: 128 };

    fn store(shape: Shape) -> Result<ParameterStore> {
        let layout = Arc::new(Layout::new(shape.parameter_specs()));
        let mut weights = vec![0.0; layout.len()];
        shape.initialize(&layout, 3, &mut weights);
        let mut store = ParameterStore::new(layout, &Device::Cpu)?;
        store.set_weights(weights)?;
        Ok(store)
    }

    #[test]
    fn flows_that_match_exactly_have_no_loss_and_the_true_distribution() {
        // Push each state's reward, and what its children need, back along its parents in equal shares.
        let mut flows = vec![f32::NAN; SHAPE.states() * ACTIONS];
        let mut needed: Vec<f64> = (0..SHAPE.states()).map(|state| SHAPE.reward(state)).collect();
        for state in (0..SHAPE.states()).rev() {
            flows[state * ACTIONS + 2] = SHAPE.reward(state).ln() as f32;
            let parents: Vec<_> = SHAPE.parents(state).collect();
            for &(parent, action) in &parents {
                let share = needed[state] / parents.len() as f64;
                flows[parent * ACTIONS + action] = share.ln() as f32;
                needed[parent] += share;
            }
        }
        let loss = SHAPE.loss(&flows, &SHAPE.every_term(), &mut vec![0.0; flows.len()]);
        assert_eq!(loss.count, 63 + 64);
        assert!(loss.mean() < 1e-10 && SHAPE.distance(&flows) < 1e-5, "{loss:?} {}", SHAPE.distance(&flows));
        // A policy that always stops at the start is as far as can be.
        let mut stops = flows.clone();
        stops[2] = 50.0;
        let total: f64 = (0..SHAPE.states()).map(|state| SHAPE.reward(state)).sum();
        assert!((SHAPE.distance(&stops) - 2.0 * (1.0 - SHAPE.reward(0) / total)).abs() < 1e-6);
    }

    #[test]
    fn loss_and_gradients_are_the_twins_in_f64() -> Result<()> {
        let mut store = store(SHAPE)?;
        let layout = Arc::clone(store.layout());
        let batch = SHAPE.draw(64, &mut generator(5, Stream::Shuffle));
        assert_eq!(batch.stops.iter().sum::<u32>(), 64);
        let mut network = Network::new(SHAPE);
        store.start_gradients();
        let loss = store.backward(|weights, slots| network.gradients(&layout, weights.exact, slots, &batch))?;
        assert!(store.without_gradient().is_empty());
        let variable = |index| Var::from_tensor(&store.view(store.weights(), index)?.to_dtype(DType::F64)?);
        let variables: Vec<Var> = (0..layout.parameters().len()).map(variable).collect::<Result<_>>()?;
        let tensors: Vec<Tensor> = variables.iter().map(|variable| variable.as_tensor().clone()).collect();
        let twin = twin_loss(SHAPE, &layout, &tensors, &batch)?;
        let gradients = twin.backward()?;
        let twin = twin.to_scalar::<f64>()?;
        assert!((loss.sum / twin - 1.0).abs() < 1e-5, "{loss:?} {twin}");
        for (parameter, variable) in layout.parameters().iter().zip(&variables) {
            let Some(expected) = gradients.get(variable) else { panic!("no gradient of {}", parameter.name) };
            let expected = expected.flatten_all()?.to_vec1::<f64>()?;
            let error = slice(store.gradients(), |all| {
                let pairs = all[parameter.range()].iter().zip(&expected);
                let difference: f64 = pairs.map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
                (difference / expected.iter().map(|b| b * b).sum::<f64>()).sqrt()
            })?;
            assert!(error < 2e-5, "{}: {error}", parameter.name);
        }
        Ok(())
    }

    #[test]
    fn the_reward_has_its_modes_around_the_corners() {
        let best = (0..SHAPE.states()).filter(|&state| SHAPE.reward(state) > 2.0).collect::<Vec<_>>();
        assert_eq!(best, [9, 14, 49, 54]);
        assert!((SHAPE.reward(0) - 0.51).abs() < 1e-12 && (SHAPE.reward(27) - 0.01).abs() < 1e-12);
    }
}
