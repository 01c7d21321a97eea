//! Passes over a whole flat buffer on a CUDA device that single methods need.

use super::abi::Extent;
use super::{CHUNK, Module, PASS_THREADS, address, blocks, device_address, launch};
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Device, Result, Tensor, bail};
use std::ops::Range;

fn cuda_device(tensor: &Tensor) -> Result<CudaDevice> {
    let Device::Cuda(device) = tensor.device() else { bail!("expected a tensor on a CUDA device, found {tensor:?}") };
    Ok(device.clone())
}

/// Sum of the squares of each of two adjoining ranges that begin the buffer and end it.
pub(crate) fn squares(numbers: &Tensor, ranges: &[Range<usize>; 2]) -> Result<[f64; 2]> {
    let device = cuda_device(numbers)?;
    let extent = Extent { decayed: ranges[0].end as u64, total: ranges[1].end as u64, chunk: CHUNK };
    let blocks = blocks(&extent)?;
    if blocks == 0 {
        return Ok([0.0; 2]);
    }
    let partials: CudaSlice<f64> = device.alloc_zeros(2 * blocks as usize)?;
    let (at, sums, no_velocity) = (address(&device, numbers)?, device_address(&device, &partials), 0u64);
    launch!(device, Module::VrAdam, "reduce", blocks, PASS_THREADS, &extent, &at, &no_velocity, &sums);
    let partials = device.clone_dtoh(&partials)?;
    let decayed_chunks = extent.decayed.div_ceil(extent.chunk) as usize;
    let mut sums = [0.0; 2];
    for (chunk, pair) in partials.chunks_exact(2).enumerate() {
        sums[usize::from(chunk >= decayed_chunks)] += pair[0];
    }
    Ok(sums)
}

/// Blocks with a thread for each element.
fn thread_each(count: usize) -> Result<u32> {
    let blocks = count.div_ceil(PASS_THREADS as usize);
    u32::try_from(blocks).map_err(|_| candle_core::Error::Msg(format!("{count} elements are more than a grid has")))
}

/// target += scale * source
pub(crate) fn add_scaled(target: &Tensor, scale: f32, source: &Tensor) -> Result<()> {
    let (device, count) = (cuda_device(target)?, target.elem_count());
    if count != source.elem_count() {
        bail!("{count} numbers and {} to be added", source.elem_count());
    }
    if count == 0 {
        return Ok(());
    }
    let (to, from, n) = (address(&device, target)?, address(&device, source)?, count as u64);
    launch!(device, Module::Methods, "add_scaled", thread_each(count)?, PASS_THREADS, &n, &scale, &from, &to);
    Ok(())
}

/// target = keep * target + take * (scale * source)^2
pub(crate) fn blend_square(target: &Tensor, keep: f32, take: f32, scale: f32, source: &Tensor) -> Result<()> {
    let (device, count) = (cuda_device(target)?, target.elem_count());
    if count != source.elem_count() {
        bail!("{count} numbers and {} to be taken in", source.elem_count());
    }
    if count == 0 {
        return Ok(());
    }
    let (to, from, n) = (address(&device, target)?, address(&device, source)?, count as u64);
    let blocks = thread_each(count)?;
    launch!(device, Module::Methods, "blend_square", blocks, PASS_THREADS, &n, &scale, &keep, &take, &from, &to);
    Ok(())
}

/// Two buffers of a card, one of which is copied over the other: what its memory reaches.
pub(crate) struct CardCopy {
    device: CudaDevice,
    source: CudaSlice<f32>,
    target: CudaSlice<f32>,
}

impl CardCopy {
    /// Buffers of `count` numbers that are not zero (zeros can be moved faster than data).
    pub fn new(count: usize, device: &Device) -> Result<Self> {
        let Device::Cuda(device) = device else { bail!("{:?} is no CUDA device", device.location()) };
        let numbers: Vec<f32> = (0..count).map(|i| (i & 0xffff) as f32).collect();
        Ok(Self { source: device.clone_htod(&numbers)?, target: device.alloc_zeros(count)?, device: device.clone() })
    }

    /// Copies `times` times and waits until the card is done.
    pub fn run(&mut self, times: usize) -> Result<()> {
        for _ in 0..times {
            self.device.memcpy_dtod(&self.source, &mut self.target)?;
        }
        Device::Cuda(self.device.clone()).synchronize()
    }
}
