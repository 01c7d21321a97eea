//! Muon on a CUDA device: AdamW's kernels for each segment that it does not orthogonalize, candle's products for the
//! hidden matrices. Its Newton-Schulz iterations outweigh the numbers that it reads back between the segments.

use super::abi::{Extent, Scalars, Storages};
use super::{CHUNK, KernelRule, Module, PASS_THREADS, address, blocks, device_address, launch};
use crate::optim::OptimError;
use crate::optim::kernel::Measure;
use crate::params::{Parameter, ParameterStore};
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Device, Result, Tensor};
use std::ops::Range;

/// A run of parameters of one rule.
pub(crate) struct Part {
    pub range: Range<usize>,
    pub decays: bool,
    pub rule: KernelRule,
    pub eta: f64,
}

/// What a hidden matrix moves by.
pub(crate) struct MatrixStep {
    pub momentum: f64,
    /// Multiplies the summed gradients: scale and clip.
    pub factor: f32,
    /// Rate of the orthogonal update, and eta lambda.
    pub rate: f64,
    pub decay: f64,
    pub quintic: [f64; 3],
    pub iterations: usize,
}

/// The device side of Muon.
pub(crate) struct MuonPasses {
    device: CudaDevice,
}

impl MuonPasses {
    /// Nothing for the CPU, which has its own passes.
    pub fn new(device: &Device) -> std::result::Result<Option<Self>, OptimError> {
        match device {
            Device::Cpu => Ok(None),
            Device::Cuda(device) => Ok(Some(Self { device: device.clone() })),
            other => Err(OptimError::Device(format!("{:?}", other.location()))),
        }
    }

    /// The sum that `measure` asks for over `part`; changes nothing. `states` are velocity and second moment.
    pub fn predict(
        &self,
        store: &ParameterStore,
        states: [&Tensor; 2],
        part: &Part,
        factor: f32,
        measure: Measure,
    ) -> Result<f64> {
        self.with_part(store, states, part, factor, |extent, blocks, at, scalars, partials| {
            let (device, module) = (&self.device, Module::VrAdam);
            match measure {
                Measure::Velocity { power } => {
                    let (rates, constants) = (&part.rule.rates, &part.rule.constants);
                    let name = "predict_adam";
                    launch!(
                        device,
                        module,
                        name,
                        blocks,
                        PASS_THREADS,
                        extent,
                        at,
                        rates,
                        constants,
                        &scalars,
                        &power,
                        &partials,
                    );
                }
                Measure::Gradient { power, .. } => {
                    let (name, gradient) = ("predict_gradient", &at.gradient);
                    launch!(device, module, name, blocks, PASS_THREADS, extent, gradient, &scalars, &power, &partials);
                }
            }
            Ok(())
        })
    }

    /// AdamW's step on `part`; gives ||new velocity||^2 of it.
    pub fn update(&self, store: &ParameterStore, states: [&Tensor; 2], part: &Part, factor: f32) -> Result<f64> {
        self.with_part(store, states, part, factor, |extent, blocks, at, scalars, partials| {
            let (rates, constants) = (&part.rule.rates, &part.rule.constants);
            let (device, module, name) = (&self.device, Module::VrAdam, "update_adam");
            launch!(device, module, name, blocks, PASS_THREADS, extent, at, rates, constants, &scalars, &partials);
            Ok(())
        })
    }

    /// Calls `launch` with the part's extent, blocks, storages, scalars and partials; sums what it leaves.
    fn with_part(
        &self,
        store: &ParameterStore,
        states: [&Tensor; 2],
        part: &Part,
        factor: f32,
        launch: impl FnOnce(&Extent, u32, &Storages, u64, u64) -> Result<()>,
    ) -> Result<f64> {
        let total = part.range.len() as u64;
        let extent = Extent { decayed: if part.decays { total } else { 0 }, total, chunk: CHUNK };
        let blocks = blocks(&extent)?;
        if blocks == 0 {
            return Ok(0.0);
        }
        let at = |tensor: &Tensor| address(&self.device, &tensor.narrow(0, part.range.start, part.range.len())?);
        let storages = Storages {
            gradient: at(store.gradients())?,
            weight: at(store.weights())?,
            velocity: at(states[0])?,
            second: at(states[1])?,
            rounded: 0,
        };
        let scalars = Scalars { eta: [part.eta; 2], factor, finite: 1, ..Scalars::default() };
        let scalars = self.device.clone_htod(&[scalars])?;
        let partials: CudaSlice<f64> = self.device.alloc_zeros(blocks as usize)?;
        let addresses = (device_address(&self.device, &scalars), device_address(&self.device, &partials));
        launch(&extent, blocks, &storages, addresses.0, addresses.1)?;
        Ok(self.device.clone_dtoh(&partials)?.iter().sum())
    }

    /// Moves one hidden matrix and its velocity, and gives ||new velocity||^2.
    pub fn move_matrix(
        &self,
        store: &ParameterStore,
        velocity: &Tensor,
        parameter: &Parameter,
        step: &MatrixStep,
    ) -> Result<f64> {
        let part = |flat: &Tensor| flat.narrow(0, parameter.offset, parameter.len);
        let (keep, take) = (step.momentum, 1.0 - step.momentum);
        let gradient = (part(store.gradients())? * f64::from(step.factor))?;
        let new_velocity = ((part(velocity)? * keep)? + (&gradient * take)?)?;
        velocity.slice_set(&new_velocity, 0, parameter.offset)?;
        let update = ((gradient * take)? + (&new_velocity * keep)?)?.reshape(parameter.shape.as_slice())?;
        let update = orthogonalize(&update, step)?.flatten_all()?;
        let weight = part(store.weights())?;
        let change = ((&weight * step.decay)? + (update * step.rate)?)?;
        store.weights().slice_set(&(weight - change)?, 0, parameter.offset)?;
        Ok(super::squares(&new_velocity, &[0..0, 0..parameter.len])?[1])
    }
}

/// Nearly the nearest matrix with orthonormal rows or columns, as on the CPU.
fn orthogonalize(x: &Tensor, step: &MatrixStep) -> Result<Tensor> {
    let (rows, columns) = x.dims2()?;
    let norm = super::squares(x, &[0..0, 0..rows * columns])?[1].sqrt();
    let [a, b, c] = step.quintic;
    let mut x = (x * (1.0 / (norm + 1e-7)))?;
    for _ in 0..step.iterations {
        // The Gram matrix of the short side: XX' of a wide matrix, X'X of a tall one.
        let transposed = x.t()?.contiguous()?;
        let gram = if rows <= columns { x.matmul(&transposed)? } else { transposed.matmul(&x)? };
        let polynomial = ((&gram * b)? + (gram.matmul(&gram)? * c)?)?;
        let moved = if rows <= columns { polynomial.matmul(&x)? } else { x.matmul(&polynomial)? };
        x = ((x * a)? + moved)?;
    }
    Ok(x)
}
