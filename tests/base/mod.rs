//! Base models from disk: the files, what of them is refused, and how they come into a model.

mod accounting;
mod files;
mod hostile;
mod loading;
mod model;
mod packing;
mod untouched;
