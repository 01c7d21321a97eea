//! Text generation: choosing the next token, and turning tokens into text as they come.

pub mod sampling;
pub mod stop;
pub mod text;
