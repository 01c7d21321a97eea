//! Adapters in use: which of a model's matrices has one, and the passes through it.

use super::ModelShape;
use crate::ops::dropout::{Draw, Mask};
use crate::ops::product::Numbers;
use crate::ops::{Gradient, Values, lora};
use crate::params::{GradientSlots, Layout, Weights};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Which matrices of a frozen model have an adapter.
pub struct Adapters {
    /// The trainable layout.
    layout: Arc<Layout>,
    /// By the parameter's place in the model's layout.
    places: Vec<Option<Place>>,
    /// Working memory; passes run one after the other.
    scratch: Mutex<Vec<f32>>,
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
    /// The model's own layout, and its adapters where `trainable` is a layout of adapters.
    pub fn of(shape: &ModelShape, trainable: &Arc<Layout>) -> (Arc<Layout>, Option<Self>) {
        let specs = shape.parameter_specs();
        if specs.first().is_none_or(|spec| trainable.index_of(&spec.name).is_some()) {
            return (Arc::clone(trainable), None);
        }
        let own = Arc::new(Layout::new(specs));
        let mut places = vec![None; own.parameters().len()];
        for module in shape.modules(&own) {
            let [a, b] = module.names(shape).map(|name| trainable.index_of(&name));
            let (Some(a), Some(b)) = (a, b) else { continue };
            let rank = trainable.parameters()[a].shape[0];
            places[module.index] = Some(Place { a, b, rank, inputs: module.inputs, outputs: module.outputs });
        }
        (own, Some(Self { layout: Arc::clone(trainable), places, scratch: Mutex::default() }))
    }

    /// Whether a row of a pass forward through every adapter has the same bits among `many` rows as among `few`.
    pub fn rows_keep_their_bits(&self, few: usize, many: usize) -> bool {
        let keep = |place: &Place| lora::rows_keep_their_bits(few, many, place.inputs, place.rank, place.outputs);
        self.places.iter().flatten().all(keep)
    }

    /// Elements of scratch that a pass over `rows` rows needs, with or without dropout.
    pub fn scratch_len(&self, rows: usize, dropout: bool) -> usize {
        let of = |place: &Place| lora::scratch_len(rows, place.inputs, place.rank, dropout);
        self.places.iter().flatten().map(of).max().unwrap_or(0)
    }

    fn adapter<'a>(&self, place: Place, index: usize, weights: Weights<'a>, draw: Option<Draw>) -> lora::Adapter<'a> {
        let Place { a, b, rank, inputs, outputs } = place;
        let numbers = |index: usize| &weights.exact[self.layout.parameters()[index].range()];
        let Some(frozen) = weights.frozen else { panic!("adapters without their frozen base") };
        let adaptation = frozen.adaptation();
        let dropout =
            draw.filter(|_| adaptation.dropout > 0.0).map(|draw| Mask::new(draw.key(index as u64), adaptation.dropout));
        lora::Adapter { a: numbers(a), b: numbers(b), rank, inputs, outputs, scaling: adaptation.scaling, dropout }
    }

    fn scratch(&self) -> MutexGuard<'_, Vec<f32>> {
        // What a panicking pass left in it is overwritten like everything else.
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the part of the adapter beside parameter `index`, if there is one, to `y`.
    pub fn forward<'a>(
        &self,
        index: usize,
        weights: Weights,
        draw: Option<Draw>,
        x: impl Into<Numbers<'a>>,
        y: &mut [f32],
    ) {
        let Some(place) = self.places[index] else { return };
        let adapter = self.adapter(place, index, weights, draw);
        let mut scratch = self.scratch();
        lora::forward(x, adapter, y, fit(&mut scratch, adapter, y.len()));
    }

    /// The gradients of the adapter beside parameter `index`, if there is one; its part of dx is added to `dx`.
    #[allow(clippy::too_many_arguments, reason = "an adapter's inputs and gradients")]
    pub fn backward<'a>(
        &self,
        index: usize,
        weights: Weights,
        slots: &mut GradientSlots,
        draw: Option<Draw>,
        x: impl Into<Numbers<'a>>,
        dy: Values<'a>,
        dx: &mut [f32],
    ) {
        let Some(place) = self.places[index] else { return };
        let adapter = self.adapter(place, index, weights, draw);
        let (da, db) = slots.pair(place.a, place.b);
        let (da, db): (Gradient, Gradient) = (da.into(), db.into());
        let mut scratch = self.scratch();
        lora::backward(x, dy, adapter, da, db, dx, fit(&mut scratch, adapter, dy.len()));
    }
}

/// Makes the scratch long enough for `results` numbers of the layer's result.
fn fit<'a>(scratch: &'a mut Vec<f32>, adapter: lora::Adapter, results: usize) -> &'a mut [f32] {
    let rows = results / adapter.outputs;
    let len = lora::scratch_len(rows, adapter.inputs, adapter.rank, adapter.dropout.is_some());
    if scratch.len() < len {
        scratch.resize(len, 0.0);
    }
    scratch
}
