//! What can go wrong while reading or writing a Hugging Face directory.

use std::path::PathBuf;

use burn_peft::PeftError;

/// The result of a fallible operation on a Hugging Face directory.
pub type Result<T, E = LlamaError> = std::result::Result<T, E>;

/// What can go wrong while reading or writing a Hugging Face directory, with the file and the name at fault.
#[derive(Debug, thiserror::Error)]
pub enum LlamaError {
    /// An operation on a file failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file is not what its name says: broken JSON, a broken tokenizer.
    #[error("{path}: {reason}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A field of `config.json` asks for something this model does not do, or contradicts another field.
    #[error("{path}: `{field}` = {value}: expected {expected}", path = path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// The value found.
        value: String,
        /// What is supported, in words.
        expected: String,
    },
    /// The model to be saved is not the plain one of its configuration.
    #[error(
        "{path}: missing tensors {missing:?}, unexpected tensors {unexpected:?}",
        path = path.display()
    )]
    Names {
        /// The file to be written.
        path: PathBuf,
        /// Tensors of the configuration that the model does not have, sorted.
        missing: Vec<String>,
        /// Tensors that the configuration has no place for, sorted.
        unexpected: Vec<String>,
    },
    /// The checkpoint is broken, or does not fit the model.
    #[error(transparent)]
    Base(#[from] PeftError),
}

impl LlamaError {
    /// Wraps the operating system's error, for `map_err`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// Wraps any error about a file's content, for `map_err`.
    pub fn file<E: std::fmt::Display>(path: impl Into<PathBuf>) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |error| Self::File {
            path,
            reason: error.to_string(),
        }
    }
}
