//! The one error type of this crate.

use std::path::PathBuf;

/// The result of a fallible operation of this crate.
pub type Result<T, E = PeftError> = std::result::Result<T, E>;

/// What can go wrong with data, files, names and models given to this crate.
///
/// Every variant names the file, tensor, path or value at fault, what was expected and what was found. An operation
/// that returns an error has changed nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeftError {
    /// A weight to be quantised holds a NaN or an infinity.
    #[error("tensor `{tensor}`: value {value} at flat index {index} is not finite")]
    NotFinite {
        /// Name of the tensor.
        tensor: String,
        /// Row-major index of the first such value, in the `[d_out, d_in]` layout for a weight.
        index: usize,
        /// The value found.
        value: f32,
    },
    /// A block size that NF4 does not have.
    #[error("block size {found} is not one of 32, 64, 128, 256, 512, 1024, 2048, 4096")]
    BlockSize {
        /// The block size asked for.
        found: usize,
    },
    /// A tensor has another shape than its place in the model or file demands.
    #[error("tensor `{tensor}`: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// Name of the tensor.
        tensor: String,
        /// The shape expected.
        expected: Vec<usize>,
        /// The shape found.
        found: Vec<usize>,
    },
    /// A tensor has an element type that is not supported where it stands.
    #[error("tensor `{tensor}`: expected dtype {expected}, found {found}")]
    DType {
        /// Name of the tensor.
        tensor: String,
        /// The element types expected, in words.
        expected: String,
        /// The element type found.
        found: String,
    },
    /// A configuration value is out of its range.
    #[error("{name} = {value}: expected {expected}")]
    Config {
        /// Name of the option.
        name: String,
        /// The value given.
        value: String,
        /// What is allowed, in words.
        expected: String,
    },
    /// An operation on a file or directory failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// An adapter's name is not allowed or taken.
    #[error("adapter `{name}`: {reason}")]
    AdapterName {
        /// The name.
        name: String,
        /// Why it is refused.
        reason: String,
    },
    /// The model has no adapter of this name.
    #[error("no adapter `{name}`; the model has {adapters:?}")]
    UnknownAdapter {
        /// The name asked for.
        name: String,
        /// The names of the model's adapters.
        adapters: Vec<String>,
    },
    /// The model has no linear module at this path.
    #[error("the model has no linear module `{path}`")]
    UnknownModule {
        /// The path asked for.
        path: String,
    },
    /// A weight carries a reparameterization that is not this crate's, which it can neither replace nor keep apart.
    #[error("`{path}` carries the reparameterization `{name}`, which is not of this crate")]
    ForeignReparameterization {
        /// Path of the parameter.
        path: String,
        /// Name of the reparameterization.
        name: String,
    },
    /// A weight to be quantised is packed already.
    #[error("`{path}` is quantised already")]
    AlreadyQuantized {
        /// Path of the parameter.
        path: String,
    },
}
