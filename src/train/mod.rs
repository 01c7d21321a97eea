//! train (see the design).
