//! A linear layer of a block in use, on the CPU: its product, what its adapter adds, and the gradients of both.

use super::adapter::Adapters;
use super::stored::Stored;
use crate::ops::dropout::{self, Draw, Mask};
use crate::ops::product::Numbers;
use crate::ops::profile::{Part, timed};
use crate::ops::{Gradient, Values, linear};
use crate::params::{GradientSlots, Weights};

/// A linear layer from I to O, for one pass over R rows.
#[derive(Clone, Copy)]
pub struct Projection<'a> {
    pub weights: Weights<'a>,
    /// The weight's place in the model's layout.
    pub index: usize,
    pub weight: linear::Weight<'a>,
    /// The bias' place in the model's layout, and itself.
    pub bias: Option<(usize, &'a [f32])>,
    /// The model's adapters, of which this layer may have one; its own parameters are frozen then.
    pub adapters: Option<&'a Adapters>,
    /// What the adapter's dropout is drawn by; none outside training.
    pub draw: Option<Draw>,
}

impl Projection<'_> {
    /// y [R, O] = x [R, I] W + bias (+ residual), with the adapter's part.
    pub fn forward<'x>(self, x: impl Into<Numbers<'x>>, residual: Option<&[f32]>, y: &mut [f32]) {
        let (x, bias) = (x.into(), self.bias.map(|(_, bias)| bias));
        timed(Part::LinearForward, || linear::forward(x, self.weight, bias, residual, y));
        if let Some(adapters) = self.adapters {
            timed(Part::Adapters, || adapters.forward(self.index, self.weights, self.draw, x, y));
        }
    }

    /// y = the layer's result, as it is stored for the backward pass; `raw` is working memory of its size.
    pub fn forward_stored<'x>(self, x: impl Into<Numbers<'x>>, y: &mut Stored, raw: &mut [f32]) {
        let (x, bias) = (x.into(), self.bias.map(|(_, bias)| bias));
        match y {
            // An adapter adds to the layer's result, in f32.
            Stored::Bf16(y) if self.adapters.is_none() => {
                timed(Part::LinearForward, || linear::forward_rounded(x, self.weight, bias, y, raw));
            }
            y => y.fill(raw, |y| self.forward(x, None, y)),
        }
    }

    /// y = residual + the layer's result under the mask.
    pub fn forward_onto<'x>(self, x: impl Into<Numbers<'x>>, mask: Option<Mask>, residual: &[f32], y: &mut [f32]) {
        match mask {
            None => self.forward(x, Some(residual), y),
            Some(mask) => {
                self.forward(x, None, y);
                timed(Part::Activation, || dropout::add_to(mask, residual, self.weight.dims.outputs, y));
            }
        }
    }

    /// dx (+)= dy W^T, and what passes through the adapter, whose own gradients come with it.
    pub fn input_gradient<'x>(
        self,
        slots: &mut GradientSlots,
        x: impl Into<Numbers<'x>>,
        dy: impl Into<Values<'x>>,
        dx: Gradient,
    ) {
        let (dy, Gradient { data: dx, into }) = (dy.into(), dx);
        timed(Part::LinearInputGradient, || linear::backward_input(dy, self.weight, Gradient { data: dx, into }));
        if let Some(adapters) = self.adapters {
            timed(Part::Adapters, || adapters.backward(self.index, self.weights, slots, self.draw, x, dy, dx));
        }
    }

    /// The gradients of weight and bias, unless they are frozen.
    pub fn weight_gradient<'x>(self, slots: &mut GradientSlots, x: impl Into<Numbers<'x>>, dy: impl Into<Values<'x>>) {
        if self.adapters.is_some() {
            return;
        }
        let (dweight, dbias) = match self.bias {
            None => (slots.slot(self.index), None),
            Some((bias, _)) => {
                let (dweight, dbias) = slots.pair(self.index, bias);
                (dweight, Some(dbias.into()))
            }
        };
        timed(Part::LinearWeightGradient, || {
            linear::backward_weight(x, dy, self.weight.dims, dweight.into(), dbias);
        });
    }
}
