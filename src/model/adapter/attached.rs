//! Adapters in use: which of a model's matrices has one, and the passes through it.

use super::ModelShape;
use crate::ops::dropout::{Draw, Mask};
use crate::ops::product::Numbers;
use crate::ops::{Gradient, lora};
use crate::params::{Frozen, GradientSlots, Layout};
use std::sync::Arc;

/// A frozen model's adapters.
#[derive(Clone)]
pub struct Adapters {
    frozen: Arc<Frozen>,
    /// The trainable layout.
    layout: Arc<Layout>,
    /// By the parameter's place in the model's layout.
    places: Vec<Option<Place>>,
    /// The longest scratch for a row.
    scratch_a_row: usize,
}

/// Where an adapter lies.
#[derive(Clone, Copy)]
struct Place {
    a: usize,
    b: usize,
    rank: usize,
    inputs: usize,
    outputs: usize,
}

impl Adapters {
    /// The adapters of `shape` on `frozen` that `layout` holds.
    pub fn new(shape: &ModelShape, frozen: &Arc<Frozen>, layout: &Arc<Layout>) -> Self {
        let mut places = vec![None; frozen.layout().parameters().len()];
        let dropout = frozen.adaptation().dropout > 0.0;
        let mut scratch_a_row = 0;
        for module in shape.modules(frozen.layout()) {
            let [a, b] = module.names(shape).map(|name| layout.index_of(&name));
            let (Some(a), Some(b)) = (a, b) else { continue };
            let rank = layout.parameters()[a].shape[0];
            places[module.index] = Some(Place { a, b, rank, inputs: module.inputs, outputs: module.outputs });
            scratch_a_row = scratch_a_row.max(lora::scratch_len(1, module.inputs, rank, dropout));
        }
        Self { frozen: Arc::clone(frozen), layout: Arc::clone(layout), places, scratch_a_row }
    }

    pub fn frozen(&self) -> &Frozen {
        &self.frozen
    }

    /// Elements of scratch that a pass over `rows` rows needs.
    pub fn scratch_len(&self, rows: usize) -> usize {
        rows * self.scratch_a_row
    }

    fn adapter<'a>(&self, place: Place, index: usize, weights: &'a [f32], draw: Option<Draw>) -> lora::Adapter<'a> {
        let Place { a, b, rank, inputs, outputs } = place;
        let numbers = |index: usize| &weights[self.layout.parameters()[index].range()];
        let adaptation = self.frozen.adaptation();
        let dropout = draw
            .filter(|_| adaptation.dropout > 0.0)
            .map(|draw| Mask::new(draw.key(index as u64), adaptation.dropout));
        lora::Adapter { a: numbers(a), b: numbers(b), rank, inputs, outputs, scaling: adaptation.scaling, dropout }
    }

    /// Adds the part of the adapter beside parameter `index`, if there is one, to `y`.
    pub fn forward<'a>(
        &self,
        index: usize,
        weights: &[f32],
        draw: Option<Draw>,
        x: impl Into<Numbers<'a>>,
        y: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let Some(place) = self.places[index] else { return };
        let adapter = self.adapter(place, index, weights, draw);
        lora::forward(x, adapter, y, self.fit(scratch, y.len() / place.outputs));
    }

    /// The gradients of the adapter beside parameter `index`, if there is one; its part of dx is added to `dx`.
    #[allow(clippy::too_many_arguments, reason = "an adapter's inputs, gradients and scratch")]
    pub fn backward<'a>(
        &self,
        index: usize,
        weights: &[f32],
        slots: &mut GradientSlots,
        draw: Option<Draw>,
        x: impl Into<Numbers<'a>>,
        dy: &[f32],
        dx: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let Some(place) = self.places[index] else { return };
        let adapter = self.adapter(place, index, weights, draw);
        let (da, db) = slots.pair(place.a, place.b);
        let (da, db): (Gradient, Gradient) = (da.into(), db.into());
        lora::backward(x, dy, adapter, da, db, dx, self.fit(scratch, dy.len() / place.outputs));
    }

    fn fit<'a>(&self, scratch: &'a mut Vec<f32>, rows: usize) -> &'a mut [f32] {
        let len = self.scratch_len(rows);
        if scratch.len() < len {
            scratch.resize(len, 0.0);
        }
        scratch
    }
}
