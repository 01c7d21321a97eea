//! The flat storages of weights and gradients, and the record of which gradients a step has written.

use super::frozen::{Frozen, FrozenTensor};
use super::layout::Layout;
use super::{filled, on_cpu, slice, slice_mut, zeros};
use candle_core::{DType, Device, Result, Tensor, bail};
use half::bf16;
use rayon::prelude::*;
use std::sync::Arc;

/// Trainable weights and their gradients, each one flat f32 tensor laid out by [`Layout`].
pub struct ParameterStore {
    layout: Arc<Layout>,
    weights: Tensor,
    /// The weights rounded to bf16, where products read them so. Whoever changes the weights changes it too.
    rounded: Option<Vec<bf16>>,
    gradients: Tensor,
    written: Vec<bool>,
    /// The base beside which the weights are adapters.
    frozen: Option<Arc<Frozen>>,
}

/// A flat f32 tensor of `len` zeros on `device`, in main memory on large pages.
pub fn zeros_on(len: usize, device: &Device) -> Result<Tensor> {
    match device {
        Device::Cpu => Tensor::from_vec(zeros(len), len, device),
        device => Tensor::zeros(len, DType::F32, device),
    }
}

/// The weights as a model reads them.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    /// [layout.len()] f32.
    pub exact: &'a [f32],
    /// The same, each rounded to bf16 (nearest even), where the store keeps it.
    pub rounded: Option<&'a [bf16]>,
    /// The frozen base, where the weights are adapters.
    pub frozen: Option<&'a Frozen>,
}

impl<'a> From<&'a [f32]> for Weights<'a> {
    fn from(exact: &'a [f32]) -> Self {
        Self { exact, rounded: None, frozen: None }
    }
}

impl<'a> From<&'a Vec<f32>> for Weights<'a> {
    fn from(exact: &'a Vec<f32>) -> Self {
        exact[..].into()
    }
}

impl<'a> Weights<'a> {
    /// A vector of the model whose layout `layout` is.
    ///
    /// # Panics
    /// When it is frozen and not in f32, as every frozen vector is.
    pub fn vector(self, layout: &Layout, index: usize) -> &'a [f32] {
        match self.frozen.map(|frozen| frozen.tensor(index)) {
            None => &self.exact[layout.parameters()[index].range()],
            Some(FrozenTensor::F32(numbers)) => numbers,
            Some(_) => panic!("{} is frozen in another type than f32", layout.parameters()[index].name),
        }
    }
}

/// The weights as an optimizer changes them: it writes `rounded` wherever it writes `exact`.
pub struct WeightsMut<'a> {
    pub exact: &'a mut [f32],
    pub rounded: Option<&'a mut [bf16]>,
}

impl ParameterStore {
    /// Storages of zeros on `device`.
    pub fn new(layout: Arc<Layout>, device: &Device) -> Result<Self> {
        let [weights, gradients] = [zeros_on(layout.len(), device)?, zeros_on(layout.len(), device)?];
        let written = vec![false; layout.parameters().len()];
        Ok(Self { layout, weights, rounded: None, gradients, written, frozen: None })
    }

    /// Keeps a bf16 copy of the weights from now on (CPU only).
    pub fn keep_rounded(&mut self) -> Result<()> {
        if !self.device().is_cpu() {
            bail!("the bf16 copy of the weights is kept on the CPU alone, not on {:?}", self.device().location());
        }
        self.rounded.get_or_insert_with(|| filled(bf16::ZERO, self.layout.len()));
        self.round_weights()
    }

    /// Brings the bf16 copy up to date, after something has written to [`Self::weights`].
    pub fn round_weights(&mut self) -> Result<()> {
        let Some(rounded) = &mut self.rounded else { return Ok(()) };
        slice(&self.weights, |weights| {
            let pairs = rounded.par_iter_mut().zip(weights).with_min_len(1 << 16);
            pairs.for_each(|(rounded, &weight)| *rounded = bf16::from_f32(weight));
        })
    }

    /// The same store with a frozen base beside its weights, which are adapters.
    pub fn beside(self, frozen: Option<Arc<Frozen>>) -> Self {
        Self { frozen, ..self }
    }

    /// The frozen base, where the weights are adapters.
    pub fn frozen(&self) -> Option<&Arc<Frozen>> {
        self.frozen.as_ref()
    }

    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    pub fn device(&self) -> &Device {
        self.weights.device()
    }

    /// All weights, [layout.len()] f32.
    pub fn weights(&self) -> &Tensor {
        &self.weights
    }

    /// Replaces all weights; `numbers` are laid out by the layout, with zeros in its gaps.
    pub fn set_weights(&mut self, numbers: Vec<f32>) -> Result<()> {
        if self.device().is_cpu() {
            // Into the store's own pages.
            slice_mut(&self.weights, |weights| weights.copy_from_slice(&numbers))?;
        } else {
            self.weights = Tensor::from_vec(numbers, self.layout.len(), self.weights.device())?;
        }
        self.round_weights()
    }

    /// All gradients, [layout.len()] f32: sums over the step's tokens until the optimizer scales them.
    pub fn gradients(&self) -> &Tensor {
        &self.gradients
    }

    /// A detached view of one parameter in `flat` (this store's weights or gradients, or an optimizer's state).
    pub fn view(&self, flat: &Tensor, index: usize) -> Result<Tensor> {
        let parameter = &self.layout.parameters()[index];
        flat.narrow(0, parameter.offset, parameter.len)?.detach().reshape(parameter.shape.as_slice())
    }

    /// Begins a new step: the next write of each gradient overwrites what the last step left.
    pub fn start_gradients(&mut self) {
        self.written.fill(false);
    }

    /// Which parameters have got a gradient since [`Self::start_gradients`].
    pub fn written(&self) -> &[bool] {
        &self.written
    }

    /// Marks a gradient as written by a path that does not go through [`GradientSlots`] and tells whether it was before.
    pub fn mark_written(&mut self, index: usize) -> bool {
        std::mem::replace(&mut self.written[index], true)
    }

    /// Names of the parameters that no backward pass has reached in this step.
    pub fn without_gradient(&self) -> Vec<&str> {
        let missing = self.layout.parameters().iter().zip(&self.written).filter(|(_, written)| !**written);
        missing.map(|(parameter, _)| parameter.name.as_str()).collect()
    }

    /// Runs `f` on the weights (CPU only).
    pub fn read<R>(&self, f: impl FnOnce(Weights) -> R) -> Result<R> {
        slice(&self.weights, |exact| {
            f(Weights { exact, rounded: self.rounded.as_deref(), frozen: self.frozen.as_deref() })
        })
    }

    /// As [`Self::read`], from any device: weights that lie elsewhere are copied to the CPU first.
    pub fn read_on_cpu<R>(&self, f: impl FnOnce(Weights) -> R) -> Result<R> {
        on_cpu(&self.weights, |exact| {
            f(Weights { exact, rounded: self.rounded.as_deref(), frozen: self.frozen.as_deref() })
        })
    }

    /// Runs `f` on the weights and on slots for the gradients (CPU only).
    pub fn backward<R>(&mut self, f: impl FnOnce(Weights, &mut GradientSlots) -> R) -> Result<R> {
        let (layout, written) = (&self.layout, &mut self.written);
        slice(&self.weights, |exact| {
            let weights = Weights { exact, rounded: self.rounded.as_deref(), frozen: self.frozen.as_deref() };
            slice_mut(&self.gradients, |gradients| f(weights, &mut GradientSlots { layout, gradients, written }))
        })?
    }

    /// Runs `f`, which moves the weights, on the gradients and the weights (CPU only).
    pub fn update<R>(&mut self, f: impl FnOnce(&[f32], WeightsMut) -> R) -> Result<R> {
        slice(&self.gradients, |gradients| {
            slice_mut(&self.weights, |exact| f(gradients, WeightsMut { exact, rounded: self.rounded.as_deref_mut() }))
        })?
    }
}

/// One gradient, and whether to add to it (true) or to overwrite it (false).
pub type Slot<'a> = (&'a mut [f32], bool);

/// Gradients on the CPU, handed out one parameter at a time.
///
/// A slot knows whether this step has written it already. So the first write overwrites and later ones add: no pass
/// fills the buffer with zeros, and a parameter that nothing reached is known by name.
pub struct GradientSlots<'a> {
    layout: &'a Layout,
    gradients: &'a mut [f32],
    written: &'a mut [bool],
}

impl<'a> GradientSlots<'a> {
    pub fn new(layout: &'a Layout, gradients: &'a mut [f32], written: &'a mut [bool]) -> Self {
        assert_eq!((layout.len(), layout.parameters().len()), (gradients.len(), written.len()));
        Self { layout, gradients, written }
    }

    /// The gradient of parameter `index` and whether to add to it (true) or to overwrite it (false).
    pub fn slot(&mut self, index: usize) -> Slot<'_> {
        let accumulate = std::mem::replace(&mut self.written[index], true);
        (&mut self.gradients[self.layout.parameters()[index].range()], accumulate)
    }

    /// Two different gradients at once (a weight and its bias), each with its `accumulate`.
    pub fn pair(&mut self, first: usize, second: usize) -> (Slot<'_>, Slot<'_>) {
        let accumulate = [first, second].map(|index| std::mem::replace(&mut self.written[index], true));
        let ranges = [first, second].map(|index| self.layout.parameters()[index].range());
        // Distinct parameters never overlap, so the only way to fail is `first == second`, a defect of the caller.
        let [a, b] = self.gradients.get_disjoint_mut(ranges).expect("two different parameters");
        ((a, accumulate[0]), (b, accumulate[1]))
    }
}

#[cfg(test)]
mod tests {
    use super::super::ParameterSpec;
    use super::*;

    #[test]
    fn the_first_write_of_a_step_overwrites_and_a_parameter_without_gradient_is_named() -> Result<()> {
        let spec = |name: &str| ParameterSpec { name: name.into(), shape: vec![2], decays: false };
        let layout = Arc::new(Layout::new(vec![spec("a"), spec("b")]));
        let mut store = ParameterStore::new(layout, &Device::Cpu)?;
        store.start_gradients();
        let flags = store.backward(|_, slots| [slots.slot(0).1, slots.slot(0).1])?;
        assert_eq!(flags, [false, true]);
        assert_eq!(store.without_gradient(), ["b"]);
        store.start_gradients();
        assert_eq!(store.without_gradient(), ["a", "b"]);
        Ok(())
    }

    #[test]
    fn the_bf16_copy_follows_the_weights_and_is_there_only_where_it_was_asked_for() -> Result<()> {
        let layout = Layout::new(vec![ParameterSpec { name: "a".into(), shape: vec![4], decays: false }]);
        let mut store = ParameterStore::new(Arc::new(layout), &Device::Cpu)?;
        assert!(store.read(|weights| weights.rounded.is_none())?);
        store.keep_rounded()?;
        let mut numbers = vec![0.0f32; 64];
        // A tie to even below, a tie to even above, a number that rounds to infinity, NaN.
        numbers[..4].copy_from_slice(&[1.003_906_3, 1.011_718_8, 3.4e38, f32::NAN]);
        store.set_weights(numbers)?;
        let rounded = store.read(|weights| weights.rounded.map(<[bf16]>::to_vec))?.unwrap_or_default();
        assert_eq!(rounded[..3], [1.0, 1.015_625, f32::INFINITY].map(bf16::from_f32));
        assert!(rounded[3].is_nan());
        slice_mut(store.weights(), |numbers| numbers[0] = 2.0)?;
        store.round_weights()?;
        assert!(store.read(|weights| weights.rounded.is_some_and(|rounded| rounded[0] == bf16::from_f32(2.0)))?);
        Ok(())
    }
}
