//! The laboratory: what it takes to believe or refute a claim about an optimizer on one's own machine.

pub mod plot;
pub mod stability;
pub mod statistics;
