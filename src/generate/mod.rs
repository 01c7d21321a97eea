//! generate (see the design).
