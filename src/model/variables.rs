//! Parameters as tensors for a twin: plain views for a forward pass, temporary variables for a backward one.

use crate::params::ParameterStore;
use candle_core::{Result, Tensor, Var};

/// Views of parameters as plain tensors: nothing of the forward pass is tracked.
pub fn views<const N: usize>(store: &ParameterStore, indices: [usize; N]) -> Result<[Tensor; N]> {
    let views: Vec<Tensor> = indices.iter().map(|&index| store.view(store.weights(), index)).collect::<Result<_>>()?;
    Ok(std::array::from_fn(|place| views[place].clone()))
}

/// Token ids as a tensor [rows, time] on the store's device.
pub fn ids_on(store: &ParameterStore, ids: &[u32], rows: usize) -> Result<Tensor> {
    Tensor::from_slice(ids, (rows, ids.len() / rows.max(1)), store.device())
}

/// Temporary variables made of some parameters, and where their gradients go.
pub struct Variables<const N: usize> {
    indices: [usize; N],
    variables: Vec<Var>,
}

impl<const N: usize> Variables<N> {
    pub fn new(store: &ParameterStore, indices: [usize; N]) -> Result<Self> {
        let variables = views(store, indices)?.iter().map(Var::from_tensor).collect::<Result<_>>()?;
        Ok(Self { indices, variables })
    }

    pub fn tensors(&self) -> [Tensor; N] {
        std::array::from_fn(|place| self.variables[place].as_tensor().clone())
    }

    /// Adds the gradients of `loss` to the store's; gives the gradient of `input`.
    pub fn backward(&self, store: &mut ParameterStore, loss: &Tensor, input: Option<&Var>) -> Result<Option<Tensor>> {
        let gradients = loss.backward()?;
        for (index, variable) in self.indices.iter().zip(&self.variables) {
            // A variable without a gradient stays unmarked, so the step's audit names it.
            if let Some(gradient) = gradients.get(variable) {
                add_gradient(store, *index, gradient)?;
            }
        }
        Ok(input.and_then(|input| gradients.get(input).cloned()))
    }
}

/// Writes or adds `gradient` into the flat gradients at parameter `index`.
fn add_gradient(store: &mut ParameterStore, index: usize, gradient: &Tensor) -> Result<()> {
    let accumulate = store.mark_written(index);
    let parameter = store.layout().parameters()[index].clone();
    let gradient = gradient.contiguous()?.flatten_all()?;
    let slot = store.gradients().narrow(0, parameter.offset, parameter.len)?;
    let sum = if accumulate { (slot + gradient)? } else { gradient };
    store.gradients().slice_set(&sum, 0, parameter.offset)
}
