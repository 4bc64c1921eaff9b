#![doc = include_str!("../README.md")]
#![deny(missing_docs)]
#![deny(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod adapter;
pub mod dataset;
mod error;
pub mod format;
pub mod layer;
pub mod model;
pub mod nf4;
pub mod objective;

pub use error::{PeftError, Result};
