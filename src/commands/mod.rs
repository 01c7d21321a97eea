//! commands (see the design).
