//! TODO
mod target;
pub use target::*;
