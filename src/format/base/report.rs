//! What became of every tensor of a checkpoint and of every parameter of a model.

use std::fmt;
use std::time::Duration;

use super::index::IndexFault;
use super::proposal::Proposal;
use crate::format::Mismatch;
use crate::format::report::list;
use crate::format::summary::{Kind, write_names};
use crate::model::TargetReport;

/// What loading a base did.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct BaseReport {
    /// Tensors that were read into their parameters, by their names in the files, sorted.
    pub loaded: Vec<String>,
    /// Parameters that got the values of another tensor, with its name: `(copy, source)`.
    pub tied: Vec<(String, String)>,
    /// Tensors without a parameter that are equal to the tensor they are tied to.
    pub equal: Vec<String>,
    /// Tensors without a parameter that were ignored, as the options say.
    pub ignored: Vec<String>,
    /// Parameters without a tensor that were left as they are.
    pub left: Vec<String>,
    /// Parameters that were left as they are because their tensors have another shape.
    pub mismatched: Vec<Mismatch>,
    /// Tables of tokens that have another number of rows in the files, with their names and shapes there.
    pub resized: Vec<Resized>,
    /// Faults of the index that were passed over.
    pub index_faults: Vec<IndexFault>,
    /// What was packed and why.
    pub targets: Option<TargetReport>,
    /// Weights that the files have in four bits, by their names: those in NF4 were taken as they are.
    pub four_bit: Vec<String>,
    /// Weights that are packed now.
    pub packed: usize,
    /// Bytes read from the files.
    pub read_bytes: u64,
    /// Bytes of the parameters that stayed dense.
    pub dense_bytes: u64,
    /// Bytes of the packed weights.
    pub packed_bytes: u64,
    /// How long reading took.
    pub elapsed: Duration,
}

impl fmt::Display for BaseReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        let (read, seconds) = (gigabytes(self.read_bytes), self.elapsed.as_secs_f64());
        write!(
            f,
            "{} tensors, {read:.3} GB in {seconds:.2} s ({:.2} GB/s); {} packed in {:.3} GB, the others in {:.3} GB",
            self.loaded.len() + self.tied.len(),
            read / seconds.max(1e-9),
            self.packed,
            gigabytes(self.packed_bytes),
            gigabytes(self.dense_bytes)
        )?;
        list_tied(f, "tied", &self.tied)?;
        for (kind, names) in [
            ("equal to what they are tied to", &self.equal),
            ("ignored", &self.ignored),
            ("left as they were", &self.left),
        ] {
            write_names(f, Kind::Other, kind, names, [])?;
        }
        list(
            f,
            "left as they were, of another shape",
            &self.mismatched,
            show_shapes,
        )?;
        list(f, "resized", &self.resized, |f, resized| {
            let Resized { tensor, from, to } = resized;
            write!(f, "`{}` ({from} to {to} rows)", tensor.escape_debug())
        })?;
        list(f, "faults of the index", &self.index_faults, |f, fault| {
            write!(f, "{fault}")
        })
    }
}

/// A table of tokens that has another number of rows in the model than in the files.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Resized {
    /// The tensor's name in the files.
    pub tensor: String,
    /// Its rows there.
    pub from: usize,
    /// Its rows in the model.
    pub to: usize,
}

/// A tensor of an element type that its place does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DTypeMismatch {
    /// The tensor's name in the file.
    pub tensor: String,
    /// The element types expected, in words.
    pub expected: String,
    /// The element type found.
    pub found: String,
}

/// All that keeps a checkpoint from fitting a model. Names are those of the files, sorted.
///
/// When printed, long lists are counted and shown as patterns, and control characters in names are escaped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BaseMismatch {
    /// How many tensors fit.
    pub fitting: usize,
    /// Tensors that the model has parameters for and that no file has.
    pub missing: Vec<String>,
    /// Tensors of the files that the model has no parameter for.
    pub unexpected: Vec<String>,
    /// Tensors whose shape is not the one of their parameter, in PyTorch's layout.
    pub shapes: Vec<Mismatch>,
    /// Tensors of an element type that cannot be read, or that the device does not have.
    pub dtypes: Vec<DTypeMismatch>,
    /// Tensors that are not equal to the one they are tied to: `(copy, source)`.
    pub unequal: Vec<(String, String)>,
    /// Rules under which more names would fit, if some were found.
    pub proposal: Option<Proposal>,
    /// The names of the tensors that fit, by which messages tell whether whole layers are missing.
    pub(super) fitted: Vec<String>,
}

impl BaseMismatch {
    /// Whether all fits, and something does.
    pub(super) fn is_none(&self) -> bool {
        self.fitting > 0 && self.lists_nothing()
    }

    /// Whether all fits, or there is nothing.
    pub(super) fn lists_nothing(&self) -> bool {
        let Self {
            fitting: _,
            missing,
            unexpected,
            shapes,
            dtypes,
            unequal,
            proposal: _,
            fitted: _,
        } = self;
        missing.is_empty()
            && unexpected.is_empty()
            && shapes.is_empty()
            && dtypes.is_empty()
            && unequal.is_empty()
    }
}

impl fmt::Display for BaseMismatch {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} tensors fit", self.fitting)?;
        let shapes = self.shapes.iter().map(|mismatch| &mismatch.tensor);
        let others = self.fitted.iter().chain(shapes);
        let others = || others.clone().map(String::as_str);
        write_names(f, Kind::Missing, "missing", &self.missing, others())?;
        let unexpected = &self.unexpected;
        write_names(f, Kind::Unexpected, "unexpected", unexpected, others())?;
        list(f, "of another shape", &self.shapes, show_shapes)?;
        list(f, "of another dtype", &self.dtypes, |f, mismatch| {
            let (tensor, expected, found) = (
                mismatch.tensor.escape_debug(),
                &mismatch.expected,
                &mismatch.found,
            );
            write!(f, "`{tensor}` (expected {expected}, found {found})")
        })?;
        list_tied(f, "not equal to what they are tied to", &self.unequal)?;
        if let Some(proposal) = &self.proposal {
            write!(f, "; {proposal}")?;
        }
        self.show_options(f)
    }
}

impl BaseMismatch {
    /// Names the options that get past what does not fit.
    fn show_options(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self {
            missing,
            unexpected,
            shapes,
            dtypes,
            unequal,
            ..
        } = self;
        let allowing = [
            (
                !missing.is_empty(),
                "`with_optional` or `with_allow_missing`",
            ),
            (
                !unexpected.is_empty(),
                "`with_ignored` or `with_allow_unexpected`",
            ),
            (
                !unequal.is_empty(),
                "`with_ignored`, or a head of its own in the model",
            ),
            (
                !shapes.is_empty(),
                "`with_conv1d`, `with_resized_vocabulary` or `with_ignore_mismatched_sizes`",
            ),
            (!dtypes.is_empty(), "`with_dtype` or `with_skipped`"),
        ];
        let mut options = allowing.iter().filter(|(applies, _)| *applies);
        let Some((_, first)) = options.next() else {
            return match self.fitting {
                0 => f.write_str("; nothing fits, which only `with_allow_nothing_loaded` allows"),
                _ => Ok(()),
            };
        };
        write!(f, "; options of `BaseOptions` that get past this: {first}")?;
        options.try_for_each(|(_, option)| write!(f, "; {option}"))
    }
}

fn show_shapes(f: &mut fmt::Formatter, mismatch: &Mismatch) -> fmt::Result {
    let Mismatch {
        tensor,
        expected,
        found,
    } = mismatch;
    let tensor = tensor.escape_debug();
    write!(f, "`{tensor}` (expected {expected:?}, found {found:?})")
}

fn list_tied(f: &mut fmt::Formatter, kind: &str, tied: &[(String, String)]) -> fmt::Result {
    list(f, kind, tied, |f, (copy, source)| {
        write!(f, "`{}` (`{}`)", copy.escape_debug(), source.escape_debug())
    })
}
