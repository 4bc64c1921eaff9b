//! Base models from disk: the files, what of them is refused, and how they come into a model.

mod accounting;
mod families;
mod files;
mod files_of_others;
mod hostile;
mod index;
mod lenient;
mod limits;
mod loading;
mod model;
mod packing;
mod proposal;
mod resize;
mod untouched;
