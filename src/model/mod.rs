//! model (see the design).
