//! optim (see the design).
