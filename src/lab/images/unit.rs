//! A convolution, its batch norm, and what follows: the building block of both networks.

use super::Mode;
use crate::ops::Gradient;
use crate::ops::batch_norm::{self, Activation, Saved, Statistics};
use crate::ops::convolution::{self, Shape};
use crate::params::{GradientSlots, Layout, ParameterSpec};

/// Names and sizes of a unit.
pub struct UnitSpec {
    /// Name of the convolution, e.g. `layer1.0.conv1`.
    pub convolution: String,
    pub norm: String,
    /// With a batch of 0.
    pub shape: Shape,
    /// Whether the convolution has a bias (which the norm takes away again).
    pub bias: bool,
    pub activation: Activation,
}

impl UnitSpec {
    pub fn parameters(&self) -> Vec<ParameterSpec> {
        let Shape { inputs, outputs, kernel, .. } = self.shape;
        let spec =
            |name: String, shape: &[usize]| ParameterSpec { name, shape: shape.to_vec(), decays: shape.len() >= 2 };
        let mut specs = vec![spec(format!("{}.weight", self.convolution), &[outputs, kernel, kernel, inputs])];
        if self.bias {
            specs.push(spec(format!("{}.bias", self.convolution), &[outputs]));
        }
        specs.push(spec(format!("{}.weight", self.norm), &[outputs]));
        specs.push(spec(format!("{}.bias", self.norm), &[outputs]));
        specs
    }
}

/// Places of a unit's parameters in the layout.
struct Places {
    weight: usize,
    bias: Option<usize>,
    norm_weight: usize,
    norm_bias: usize,
}

/// A unit with its buffers and running statistics.
pub struct Unit {
    pub spec: UnitSpec,
    pub running: Statistics,
    places: Places,
    /// The convolution's result, [R, O].
    convolved: Vec<f32>,
    /// The unit's result, [R, O].
    pub y: Vec<f32>,
    mean: Vec<f32>,
    rstd: Vec<f32>,
}

impl Unit {
    /// # Panics
    /// When `layout` was not made from the same specs: a defect of the caller.
    pub fn new(spec: UnitSpec, layout: &Layout) -> Self {
        let place = |name: String| layout.index_of(&name).unwrap_or_else(|| panic!("no parameter {name}"));
        let places = Places {
            weight: place(format!("{}.weight", spec.convolution)),
            bias: spec.bias.then(|| place(format!("{}.bias", spec.convolution))),
            norm_weight: place(format!("{}.weight", spec.norm)),
            norm_bias: place(format!("{}.bias", spec.norm)),
        };
        let channels = spec.shape.outputs;
        let (convolved, y) = (Vec::new(), Vec::new());
        let (mean, rstd) = (vec![0.0; channels], vec![0.0; channels]);
        Self { spec, running: Statistics::new(channels), places, convolved, y, mean, rstd }
    }

    fn shape(&self, batch: usize) -> Shape {
        Shape { batch, ..self.spec.shape }
    }

    /// Scratch that both passes need for a batch.
    pub fn scratch_len(&self, batch: usize) -> usize {
        let shape = self.shape(batch);
        convolution::scratch_len(shape).max(batch_norm::scratch_len(shape.y_len() / shape.outputs, shape.outputs))
    }

    /// Fills `y`.
    pub fn forward(
        &mut self,
        parameters: &Parameters,
        mode: Mode,
        batch: usize,
        x: &[f32],
        residual: Option<&[f32]>,
        scratch: &mut [f32],
    ) {
        let shape = self.shape(batch);
        self.convolved.resize(shape.y_len(), 0.0);
        self.y.resize(shape.y_len(), 0.0);
        let bias = self.places.bias.map(|place| parameters.of(place));
        convolution::forward(shape, x, parameters.of(self.places.weight), bias, &mut self.convolved, scratch);
        let (weight, bias) = (parameters.of(self.places.norm_weight), parameters.of(self.places.norm_bias));
        let (x, activation) = (&self.convolved, self.spec.activation);
        let running = match mode {
            Mode::Train => Some(&mut self.running),
            Mode::Again => None,
            Mode::Evaluate => {
                batch_norm::forward_running(x, weight, bias, residual, activation, &self.running, &mut self.y);
                return;
            }
        };
        let (y, mean, rstd) = (&mut self.y, &mut self.mean, &mut self.rstd);
        batch_norm::forward_training(x, weight, bias, residual, activation, y, mean, rstd, running, scratch);
    }

    /// From dy to dx (`None`: not wanted) and the parameters' gradients. `dy` becomes the residual's gradient;
    /// `between` is a buffer for the gradient before the norm.
    #[allow(clippy::too_many_arguments, reason = "a backward pass has this many operands")]
    pub fn backward(
        &self,
        parameters: &Parameters,
        slots: &mut GradientSlots,
        batch: usize,
        x: &[f32],
        dy: &mut [f32],
        dx: Option<&mut Vec<f32>>,
        between: &mut Vec<f32>,
        scratch: &mut [f32],
    ) {
        let (shape, weight) = (self.shape(batch), parameters.of(self.places.weight));
        between.resize(shape.y_len(), 0.0);
        let saved = Saved {
            x: &self.convolved,
            y: &self.y,
            weight: parameters.of(self.places.norm_weight),
            mean: &self.mean,
            rstd: &self.rstd,
            activation: self.spec.activation,
        };
        let (to_weight, to_bias) = slots.pair(self.places.norm_weight, self.places.norm_bias);
        batch_norm::backward(saved, dy, between, to_weight.into(), to_bias.into(), scratch);
        if let Some(dx) = dx {
            dx.resize(shape.x_len(), 0.0);
            convolution::backward_input(shape, between, weight, Gradient::overwrite(dx), scratch);
        }
        match self.places.bias {
            None => {
                let to_weight = slots.slot(self.places.weight).into();
                convolution::backward_weight(shape, x, between, to_weight, None, scratch);
            }
            Some(bias) => {
                let (to_weight, to_bias) = slots.pair(self.places.weight, bias);
                convolution::backward_weight(shape, x, between, to_weight.into(), Some(to_bias.into()), scratch);
            }
        }
    }
}

/// The flat weights and where each parameter lies in them.
pub struct Parameters<'a> {
    pub layout: &'a Layout,
    pub weights: &'a [f32],
}

impl<'a> Parameters<'a> {
    pub fn of(&self, place: usize) -> &'a [f32] {
        &self.weights[self.layout.parameters()[place].range()]
    }
}
