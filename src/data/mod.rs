//! data (see the design).
