//! `vrtrain bench`: what this machine reaches, for users.

mod optimizer;
mod train;

pub use optimizer::run as optimizer;
pub use train::{Options as TrainOptions, Shape as TrainShape, run as train};
