//! Borrowing the numbers of a contiguous f32 CPU tensor as a slice.

use candle_core::{CpuStorage, InplaceOp1, Result, Storage, Tensor, bail};
use candle_core::{Layout as TensorLayout, Shape};
use std::sync::Mutex;

/// Calls `f` with the numbers of `tensor`.
///
/// # Errors
/// When `tensor` is not a contiguous f32 tensor on the CPU.
pub fn slice<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("the tensor is not contiguous") };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(numbers)) => Ok(f(&numbers[start..end])),
        _ => bail!("expected an f32 tensor on the CPU, found {:?} on {:?}", tensor.dtype(), tensor.device()),
    }
}

/// As [`slice`], for a tensor on any device: one that lies elsewhere is copied to the CPU first.
pub fn on_cpu<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    slice(&tensor.to_device(&candle_core::Device::Cpu)?, f)
}

/// Calls `f` with the numbers of `tensor`, to be changed in place. Every view of the same storage sees the change.
///
/// Calls may be nested over tensors of different storages; nesting over one storage would wait for itself for ever.
///
/// # Errors
/// As [`slice`].
pub fn slice_mut<R>(tensor: &Tensor, f: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
    let op = InPlace(Mutex::new((Some(f), None)));
    tensor.inplace_op1(&op)?;
    let (_, result) = op.0.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    result.ok_or_else(|| candle_core::Error::Msg("the in-place operation did not run".into()))
}

/// candle's only public way to a mutable storage is an in-place operation; this one calls a closure.
struct InPlace<F, R>(Mutex<(Option<F>, Option<R>)>);

impl<R, F: FnOnce(&mut [f32]) -> R> InplaceOp1 for InPlace<F, R> {
    fn name(&self) -> &'static str {
        "slice_mut"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &TensorLayout) -> Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("the tensor is not contiguous") };
        let CpuStorage::F32(numbers) = storage else {
            bail!("expected an f32 tensor, found another type of shape {:?}", Shape::from(layout.shape().dims()))
        };
        let mut cell = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let Some(f) = cell.0.take() else { bail!("the in-place operation ran twice") };
        cell.1 = Some(f(&mut numbers[start..end]));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn a_change_through_the_slice_is_seen_by_every_view() -> Result<()> {
        let flat = Tensor::zeros(8, DType::F32, &Device::Cpu)?;
        let view = flat.narrow(0, 2, 4)?.detach().reshape((2, 2))?;
        slice_mut(&flat, |numbers| numbers[3] = 5.0)?;
        assert_eq!(view.to_vec2::<f32>()?, [[0.0, 5.0], [0.0, 0.0]]);
        assert_eq!(slice(&view, |numbers| numbers.to_vec())?, [0.0, 5.0, 0.0, 0.0]);
        assert!(slice(&flat.to_dtype(DType::F64)?, |_| ()).is_err());
        Ok(())
    }
}
