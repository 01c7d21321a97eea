//! eval (see the design).
