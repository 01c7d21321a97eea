//! Text generation: choosing the next token, turning tokens into text as they come, and the loop over prompts.

mod complete;
pub mod sampling;
pub mod stop;
pub mod text;

pub use complete::{Completion, End, Flow, Limits, complete, complete_in_turn};
pub use sampling::{Sampler, SamplingError, SamplingOptions};
pub use stop::{Scanned, StopScanner};
pub use text::{SpecialTokens, TextStream};
