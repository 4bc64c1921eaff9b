//! What became of every tensor of a checkpoint and of every parameter of a model.

use std::fmt;
use std::time::Duration;

use crate::format::Mismatch;
use crate::format::report::list;
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
    /// Tensors without a parameter that were to be ignored.
    pub ignored: Vec<String>,
    /// Parameters without a tensor that were left as they are.
    pub left: Vec<String>,
    /// What was packed and why.
    pub targets: Option<TargetReport>,
    /// Weights packed.
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
            list_names(f, kind, names)?;
        }
        Ok(())
    }
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

/// All that keeps a checkpoint from fitting a model. Names are those of the files, sorted; when printed, control
/// characters in them are escaped.
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
}

impl BaseMismatch {
    /// Whether all fits, and something does.
    pub(super) fn is_none(&self) -> bool {
        let Self {
            fitting,
            missing,
            unexpected,
            shapes,
            dtypes,
            unequal,
        } = self;
        *fitting > 0
            && missing.is_empty()
            && unexpected.is_empty()
            && shapes.is_empty()
            && dtypes.is_empty()
            && unequal.is_empty()
    }
}

impl fmt::Display for BaseMismatch {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} tensors fit", self.fitting)?;
        list_names(f, "missing", &self.missing)?;
        list_names(f, "unexpected", &self.unexpected)?;
        list(f, "of another shape", &self.shapes, |f, mismatch| {
            let (tensor, expected, found) = (
                mismatch.tensor.escape_debug(),
                &mismatch.expected,
                &mismatch.found,
            );
            write!(f, "`{tensor}` (expected {expected:?}, found {found:?})")
        })?;
        list(f, "of another dtype", &self.dtypes, |f, mismatch| {
            let (tensor, expected, found) = (
                mismatch.tensor.escape_debug(),
                &mismatch.expected,
                &mismatch.found,
            );
            write!(f, "`{tensor}` (expected {expected}, found {found})")
        })?;
        list_tied(f, "not equal to what they are tied to", &self.unequal)
    }
}

fn list_names(f: &mut fmt::Formatter, kind: &str, names: &[String]) -> fmt::Result {
    list(f, kind, names, |f, name| {
        write!(f, "`{}`", name.escape_debug())
    })
}

fn list_tied(f: &mut fmt::Formatter, kind: &str, tied: &[(String, String)]) -> fmt::Result {
    list(f, kind, tied, |f, (copy, source)| {
        write!(f, "`{}` (`{}`)", copy.escape_debug(), source.escape_debug())
    })
}
