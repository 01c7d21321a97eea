//! `vrtrain bench`: what this machine reaches, for users.

mod generate;
mod optimizer;
mod train;

pub use generate::{Options as GenerateOptions, run as generate};
pub use optimizer::run as optimizer;
pub use train::{Options as TrainOptions, Shape as TrainShape, run as train};
