//! The laboratory: what it takes to believe or refute a claim about an optimizer on one's own machine.

pub mod comparison;
pub mod grid_problem;
pub mod gridworld;
pub mod image_problem;
pub mod images;
pub mod plot;
pub mod problem;
#[cfg(test)]
mod pytorch;
pub mod sharpness;
pub mod space;
pub mod stability;
pub mod statistics;
pub mod study;
pub mod tpe;
pub mod tracking;
pub mod trainer;
