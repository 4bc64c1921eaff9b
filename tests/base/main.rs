//! Base models from disk: the files, what of them is refused, and how they come into a model.

mod files;
mod hostile;
