//! How kernels of kernels/*.cu are started over candle's tensors on a CUDA device, on candle's one stream.

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};
use candle_core::{CudaDevice, Result, Storage, Tensor, bail};

/// The files of kernels, as nvcc compiled them in the build.
#[derive(Clone, Copy, Debug)]
pub enum Module {
    VrAdam,
    Methods,
    Model,
}

impl Module {
    /// The file of a method's own kernels.
    pub fn of(method: &str) -> Self {
        if method == "adam" { Self::VrAdam } else { Self::Methods }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::VrAdam => "vrtrain_vradam",
            Self::Methods => "vrtrain_methods",
            Self::Model => "vrtrain_model",
        }
    }

    pub fn ptx(self) -> &'static str {
        match self {
            Self::VrAdam => include_str!(concat!(env!("OUT_DIR"), "/vradam.ptx")),
            Self::Methods => include_str!(concat!(env!("OUT_DIR"), "/methods.ptx")),
            Self::Model => include_str!(concat!(env!("OUT_DIR"), "/model.ptx")),
        }
    }
}

/// Launches `$name` of `$module` on a one-dimensional grid. Arguments are the kernel's, in its order: numbers, structs
/// of the same layout, and device addresses as u64.
macro_rules! launch {
    ($device:expr, $module:expr, $name:expr, $blocks:expr, $threads:expr, $($argument:expr),+ $(,)?) => {{
        use candle_core::cuda_backend::WrapErr;
        let function = $device.get_or_load_custom_func($name, $module.name(), $module.ptx())?;
        let shape = candle_core::cuda_backend::cudarc::driver::LaunchConfig { grid_dim: ($blocks, 1, 1), block_dim: ($threads, 1, 1), shared_mem_bytes: 0 };
        let mut call = function.builder();
        $(candle_core::cuda_backend::cudarc::driver::PushKernelArg::arg(&mut call, $argument);)+
        // SAFETY: the arguments are those of the kernel in kernels/*.cu, whose structs have their layout; the addresses
        // are of storages as long as its numbers say, which outlive the launch because the stream frees memory in
        // order, and which nobody else uses meanwhile because the caller holds them.
        unsafe { call.launch(shape) }.w()?;
    }};
}
pub(crate) use launch;

/// Device address of a contiguous f32 tensor, at a multiple of 16 bytes as the kernels' loads want it.
pub fn address(device: &CudaDevice, tensor: &Tensor) -> Result<u64> {
    let address = address_of::<f32>(device, tensor)?;
    if address % 16 != 0 {
        bail!("the tensor {tensor:?} does not begin at a multiple of 16 bytes, as the kernels' loads want it");
    }
    Ok(address)
}

/// Device address of a contiguous tensor of ids.
pub fn address_of_ids(device: &CudaDevice, tensor: &Tensor) -> Result<u64> {
    address_of::<u32>(device, tensor)
}

/// Device address of a contiguous tensor of numbers `N`.
pub fn address_of<N: CudaDType>(device: &CudaDevice, tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("expected a tensor on a CUDA device, found {tensor:?}") };
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("the tensor {tensor:?} is not contiguous") };
    let stream = device.cuda_stream();
    let numbers = storage.as_cuda_slice::<N>()?.slice(start..end);
    let (address, _ordered) = numbers.device_ptr(&stream);
    Ok(address)
}

pub fn device_address<T>(device: &CudaDevice, numbers: &CudaSlice<T>) -> u64 {
    let stream = device.cuda_stream();
    let (address, _ordered) = numbers.device_ptr(&stream);
    address
}

#[cfg(test)]
pub mod testing {
    use candle_core::Device;

    /// The device of a test, which skips where there is none; VRTRAIN_REQUIRE_CUDA=1 makes that a failure.
    pub fn device() -> Option<Device> {
        match Device::new_cuda(0) {
            Ok(device) => Some(device),
            Err(error) => {
                assert!(std::env::var_os("VRTRAIN_REQUIRE_CUDA").is_none(), "no CUDA device: {error}");
                eprintln!("skipped: no CUDA device ({error})");
                None
            }
        }
    }
}
