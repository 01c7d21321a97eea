//! What stands in for `cuda` in a build without the feature: the same names, and no device but the CPU.

use super::elementwise::{At, Blend, Done};
use super::gate::GateSettings;
use super::kernel::Measure;
use super::{OptimError, StepInput};
use crate::params::{Layout, Parameter, ParameterStore};
use candle_core::{Device, Result, Tensor, bail};
use std::ops::Range;

fn refuse(device: &Device) -> std::result::Result<(), OptimError> {
    if device.is_cpu() { Ok(()) } else { Err(OptimError::Device(format!("{:?}", device.location()))) }
}

pub(crate) struct KernelRule;

pub(crate) trait OnDevice {
    fn kernel_rule(&self, _: &At) -> KernelRule {
        KernelRule
    }
}

impl<M> OnDevice for M {}

#[expect(dead_code, reason = "written for the device's passes, which this build does not have")]
pub(super) struct Task<'a> {
    pub rule: KernelRule,
    pub input: &'a StepInput,
    pub gate: Option<GateSettings>,
    pub blend: Option<Blend>,
    pub needs_velocity_sq: bool,
    pub grows_from_zero: bool,
}

/// There is none.
pub(super) enum Passes {}

impl Passes {
    pub fn new(_: &Layout, device: &Device) -> std::result::Result<Option<Self>, OptimError> {
        refuse(device).map(|()| None)
    }

    pub fn set_velocity_sq(&mut self, _: [f64; 2]) -> Result<()> {
        match *self {}
    }

    pub fn step(&mut self, _: &ParameterStore, _: &[Tensor], _: &Task) -> Result<Option<Done>> {
        match *self {}
    }
}

#[expect(dead_code, reason = "written for the device's passes, which this build does not have")]
pub(super) struct Part {
    pub range: Range<usize>,
    pub decays: bool,
    pub rule: KernelRule,
    pub eta: f64,
}

#[expect(dead_code, reason = "written for the device's passes, which this build does not have")]
pub(super) struct MatrixStep {
    pub momentum: f64,
    pub factor: f32,
    pub rate: f64,
    pub decay: f64,
    pub quintic: [f64; 3],
    pub iterations: usize,
}

/// There is none.
pub(super) enum MuonPasses {}

impl MuonPasses {
    pub fn new(device: &Device) -> std::result::Result<Option<Self>, OptimError> {
        refuse(device).map(|()| None)
    }

    pub fn predict(&self, _: &ParameterStore, _: [&Tensor; 2], _: &Part, _: f32, _: Measure) -> Result<f64> {
        match *self {}
    }

    pub fn update(&self, _: &ParameterStore, _: [&Tensor; 2], _: &Part, _: f32) -> Result<f64> {
        match *self {}
    }

    pub fn move_matrix(&self, _: &ParameterStore, _: &Tensor, _: &Parameter, _: &MatrixStep) -> Result<f64> {
        match *self {}
    }
}

pub(super) fn squares(numbers: &Tensor, _: &[Range<usize>; 2]) -> Result<[f64; 2]> {
    bail!("this build has no passes for {numbers:?}: only for the CPU")
}

pub(super) fn add_scaled(target: &Tensor, _: f32, _: &Tensor) -> Result<()> {
    bail!("this build has no passes for {target:?}: only for the CPU")
}

pub(super) fn blend_square(target: &Tensor, _: f32, _: f32, _: f32, _: &Tensor) -> Result<()> {
    bail!("this build has no passes for {target:?}: only for the CPU")
}

/// There is none.
pub(crate) enum CardCopy {}

impl CardCopy {
    pub fn new(_: usize, device: &Device) -> Result<Self> {
        bail!("this build has no copy for {:?}", device.location())
    }

    pub fn run(&mut self, _: usize) -> Result<()> {
        match *self {}
    }
}
