//! config (see the design).
