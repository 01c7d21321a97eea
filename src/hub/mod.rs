//! hub (see the design).
