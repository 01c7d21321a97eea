//! The structs that the kernels take, as kernels/flat.cuh declares them.

use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, ValidAsZeroBits};

/// Elements: [0, decayed) take weight decay, [decayed, total) do not; a chunk is one block's work.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    pub decayed: u64,
    pub total: u64,
    pub chunk: u64,
}

/// What a step decides on the device; pairs are (decayed, plain).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Scalars {
    pub gradient_sq: [f64; 2],
    pub gradient_norm: f64,
    pub clip_factor: f64,
    pub velocity_sq: [f64; 2],
    pub velocity_sq_ahead: [f64; 2],
    pub gate_sum: [f64; 2],
    pub gate: [f64; 2],
    pub eta: [f64; 2],
    pub factor: f32,
    pub finite: u32,
}

/// The part of a rule that moves with eta: a rate is eta * numerator / divisor.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rates {
    pub numerator: [f64; 2],
    pub divisor: [f64; 2],
    pub weight_decay: f64,
    pub l2: f32,
}

/// The part of a rule that does not move with eta; a method's kernel reads the fields that it names.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Constants {
    pub beta1: f32,
    pub beta2: f32,
    pub take1: f32,
    pub take2: f32,
    pub root_scale: f32,
    pub eps: f32,
    pub momentum: f32,
    pub curvature_scale: f32,
    pub rest_energy: f64,
    pub adaptive: u32,
}

/// Where the gate's sum comes from.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    Off = 0,
    Velocity = 1,
    Gradient = 2,
    Predicted = 3,
}

/// What a fold of one number a chunk is for.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Into {
    VelocitySq = 0,
    VelocitySqAhead = 1,
    GateSum = 2,
}

/// The host's numbers for the clip and the gate.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Decision {
    pub gradient_scale: f64,
    pub grad_clip: f64,
    pub scheduled_lr: f64,
    pub keep: f64,
    pub take: f64,
    pub beta3: f64,
    pub alpha1: f64,
    pub blends: u32,
    pub gate: Gate,
    pub by_group: u32,
}

/// Device addresses of the flat storages of one step; 0 where there is none.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Storages {
    pub gradient: u64,
    pub weight: u64,
    pub velocity: u64,
    pub second: u64,
    /// bf16 copy of the weights, written in the same pass.
    pub rounded: u64,
}

// SAFETY: plain numbers in C's layout, the same as in kernels/flat.cuh; the sizes are compared below.
unsafe impl DeviceRepr for Extent {}
// SAFETY: as above.
unsafe impl DeviceRepr for Scalars {}
// SAFETY: as above.
unsafe impl DeviceRepr for Rates {}
// SAFETY: as above.
unsafe impl DeviceRepr for Constants {}
// SAFETY: as above.
unsafe impl DeviceRepr for Decision {}
// SAFETY: as above.
unsafe impl DeviceRepr for Storages {}
// SAFETY: a 4-byte integer.
unsafe impl DeviceRepr for Into {}
// SAFETY: all of its fields are numbers, for which zero bits are zero.
unsafe impl ValidAsZeroBits for Scalars {}

const _: () = assert!(
    size_of::<Extent>() == 24
        && size_of::<Scalars>() == 120
        && size_of::<Rates>() == 48
        && size_of::<Constants>() == 48
        && size_of::<Decision>() == 72
        && size_of::<Storages>() == 40
);
