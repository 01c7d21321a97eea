//! Trainable parameters in flat storages: one tensor each for weights and gradients, with an ordered table. Frozen
//! weights in read-only storages of their own.
//!
//! The optimizer is one pass over one buffer, the norm and the gate one reduction in a fixed order, a checkpoint a
//! handful of tensors. Offsets are multiples of [`ALIGNMENT`] elements; the gaps hold zeros in every storage and stay
//! zero under every optimizer, so that a pass may run over the whole buffer without knowing the table.

mod flat;
mod frozen;
mod layout;
mod pages;
mod store;

pub use flat::{on_cpu, slice, slice_mut};
pub use frozen::{Adaptation, Frozen, FrozenTensor, NF4_BLOCK, NF4_SCALES, Nf4};
pub use layout::{ALIGNMENT, Layout, Parameter, ParameterSpec};
pub use pages::{filled, zeros};
pub use store::{GradientSlots, ParameterStore, Weights, WeightsMut, zeros_on};
