//! Image classifiers of the paper's CIFAR-10 tasks: ResNet-32 and the authors' CNN, forward and backward.
//!
//! Images are channels last, [B, 32, 32, 3]; weights of convolutions are [O, k, k, I]. Parameters have the names that
//! PyTorch gives them in the networks' usual sources.

mod architecture;
mod loss;
mod network;
mod pictures;
#[cfg(test)]
mod tests;
mod twin;
mod unit;

pub use crate::config::{ImageNetwork as Architecture, ImageObjective as Objective};
pub use architecture::{initialize, parameter_specs};
pub use loss::{draw_labels, loss};
pub use network::Network;
pub use twin::loss as twin_loss;

/// Classes of CIFAR-10.
pub const CLASSES: usize = 10;
/// Rows and columns of an image.
pub const SIDE: usize = 32;
/// Numbers of an image.
pub const PIXELS: usize = SIDE * SIDE * 3;

/// Whether batch norm takes the batch's statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The batch's, and the running ones move.
    Train,
    /// The batch's; the running ones stay: a further pass over the same batch.
    Again,
    /// The running ones.
    Evaluate,
}
