//! Every operation that training needs, forward and backward, one folder an operation: contract, reference, fast paths.

pub mod product;
