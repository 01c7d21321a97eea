//! quickstart (see the design).
