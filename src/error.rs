//! The one error type of this crate.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::dataset::RowFault;
use crate::format::{BaseMismatch, IndexFault, LoadReport};
use crate::model::UnmatchedPattern;

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
    #[error(
        "tensor `{}`: value {value} at flat index {index} is not finite: the file or the training that it comes from is broken",
        Printable(tensor)
    )]
    NotFinite {
        /// Name of the tensor.
        tensor: String,
        /// Row-major index of the first such value, in the `[d_out, d_in]` layout for a weight.
        index: usize,
        /// The value found.
        value: f32,
    },
    /// Training came to a value that is not finite: every step from here on would make the parameters NaN.
    #[error(
        "step {step}: {} is {value}, and training cannot go on from it. At the first step look at the base's weights and at the batch \
         (f16 ends at 65504: take bf16 or f32). Later on take a smaller learning rate, a longer warm-up, or clip the gradients with \
         `optim::clip_grad_norm`",
        Printable(what)
    )]
    Diverged {
        /// The step, as the training loop counts.
        step: u64,
        /// The loss, or the gradient of a named parameter.
        what: String,
        /// The value found.
        value: f32,
    },
    /// A finite value would become infinite in the element type that was asked for.
    #[error(
        "tensor `{}`: value {value} at flat index {index} is infinite in {dtype}: {way_out}",
        Printable(tensor)
    )]
    Overflow {
        /// Name of the tensor.
        tensor: String,
        /// Row-major index of the first such value, in the file's layout.
        index: usize,
        /// The value found.
        value: f64,
        /// The element type asked for.
        dtype: String,
        /// What gets past it, in words.
        way_out: &'static str,
    },
    /// A block size that NF4 does not have.
    #[error(
        "block size {found}: expected 32, 64 (the usual one), 128, 256, 512, 1024, 2048 or 4096"
    )]
    BlockSize {
        /// The block size asked for.
        found: usize,
    },
    /// A tensor has another shape than its place in the model or file demands.
    #[error(
        "tensor `{}`: expected shape {expected:?}, found {found:?}",
        Printable(tensor)
    )]
    Shape {
        /// Name of the tensor.
        tensor: String,
        /// The shape expected.
        expected: Vec<usize>,
        /// The shape found.
        found: Vec<usize>,
    },
    /// A tensor has an element type that is not supported where it stands.
    #[error(
        "tensor `{}`: expected dtype {expected}, found {found}",
        Printable(tensor)
    )]
    DType {
        /// Name of the tensor.
        tensor: String,
        /// The element types expected, in words.
        expected: String,
        /// The element type found.
        found: String,
    },
    /// A configuration value is out of its range.
    #[error("{} = {}: expected {expected}", Printable(name), Printable(value))]
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
    #[error("adapter `{}`: {reason}", name.escape_debug())]
    AdapterName {
        /// The name.
        name: String,
        /// Why it is refused.
        reason: String,
    },
    /// The model has no adapter of this name.
    #[error("the model has no adapter `{}`: {}", name.escape_debug(), known_adapters(adapters))]
    UnknownAdapter {
        /// The name asked for.
        name: String,
        /// The names of the model's adapters.
        adapters: Vec<String>,
    },
    /// The model has no linear module at this path.
    #[error(
        "the model has no linear module `{path}`: expected the full path of one, the names of the model's fields with dots between them, as in `layers.0.q_proj`"
    )]
    UnknownModule {
        /// The path asked for.
        path: String,
    },
    /// A weight carries a reparameterization that is not this crate's, which it can neither replace nor keep apart.
    #[error(
        "`{path}` carries the reparameterization `{name}`, which is not of this crate: merge or remove it before `PeftModel` takes the \
         model, or leave the module out by `TargetConfig::with_exclude_modules`"
    )]
    ForeignReparameterization {
        /// Path of the parameter.
        path: String,
        /// Name of the reparameterization.
        name: String,
    },
    /// The model without adapters was asked for as what training started from, but an adapter changes a weight.
    #[error(
        "`{path}`: the active adapters already change it by up to {change}, so that the model without them is not what training \
         started from. Take a frozen copy of the model with its adapters as the reference, or adapters that begin with no change"
    )]
    NotTheBase {
        /// Path of the parameter.
        path: String,
        /// Largest absolute change of a value.
        change: f32,
    },
    /// A weight to be quantised is packed already.
    #[error(
        "`{path}` is quantised already: leave it out by `TargetConfig::with_exclude_modules`, or quantise once only"
    )]
    AlreadyQuantized {
        /// Path of the parameter.
        path: String,
    },
    /// A regular expression of a configuration does not compile, or would take too much memory.
    #[error("{option} `{}`: {}", Printable(pattern), Printable(reason))]
    Pattern {
        /// The option it stands in, for instance `target_modules`.
        option: &'static str,
        /// The pattern as it was written.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A regular expression with look-around took more than the allowed number of steps.
    #[error(
        "{option} `{}` on module `{}`: {reason}",
        Printable(pattern),
        Printable(path)
    )]
    PatternMatch {
        /// The option it stands in.
        option: &'static str,
        /// The pattern as it was written.
        pattern: String,
        /// The module path it was applied to.
        path: String,
        /// What happened.
        reason: String,
    },
    /// Patterns of a target configuration match no module of the model.
    #[error("{}", patterns.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    UnmatchedPatterns {
        /// Every such pattern, with the nearest names.
        patterns: Vec<UnmatchedPattern>,
    },
    /// A target configuration leaves no module to adapt.
    #[error(
        "none of {candidates} candidate modules is a target, and {excluded} are excluded: see `target_modules`, `exclude_modules` and \
         `layers_to_transform`"
    )]
    NoTargets {
        /// How many modules could have been targets.
        candidates: usize,
        /// How many of them `exclude_modules` names.
        excluded: usize,
    },
    /// A line of a JSON lines file is not a record of the expected form.
    #[error("{path}:{line}: {reason}", path = path.display())]
    JsonLine {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// An error about one row of a file of data.
    #[error("{path}:{row}: {source}", path = path.display())]
    InRow {
        /// The file.
        path: PathBuf,
        /// The line of a JSON lines file, or the row of a table; counted from 1.
        row: usize,
        /// What is wrong with it.
        source: Box<PeftError>,
    },
    /// A row of data cannot be trained on.
    #[error("`{field}` {fault}")]
    UnfitRow {
        /// The field at fault.
        field: String,
        /// What is wrong with it.
        fault: RowFault,
    },
    /// A chat template is none, refuses the messages, or does not end.
    #[error("{}: {}", Printable(name), Printable(reason))]
    ChatTemplate {
        /// The template: a file, or `chat_template`.
        name: String,
        /// What is wrong, with the line.
        reason: String,
    },
    /// A tokenizer failed on a text.
    #[error("the tokenizer failed on {text:?}: {source}")]
    Tokenizer {
        /// The beginning of the text.
        text: String,
        /// The tokenizer's reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An example is longer than the limit, and truncation was not asked for.
    #[error(
        "an example has {tokens} tokens, at most {limit} are allowed: raise `TokenizeConfig::max_tokens`, or cut longer ones by \
         `TokenizeConfig::with_truncation`"
    )]
    TooLong {
        /// The length of the example in tokens.
        tokens: usize,
        /// The most that is allowed.
        limit: usize,
    },
    /// No token of an example or batch is supervised, so there is nothing to learn from it.
    #[error(
        "none of {tokens} predicted tokens is supervised, so there is nothing to learn: is the response empty, or cut off by the limit \
         of tokens?"
    )]
    NoSupervisedTokens {
        /// How many tokens are predicted in all.
        tokens: usize,
    },
    /// A target token lies outside the vocabulary.
    #[error(
        "target token {token} at [{row}, {column}]: expected one of the {vocabulary} tokens of the vocabulary. Does the \
         tokenizer belong to another model? PyTorch's -100 is no target: give a mask"
    )]
    TokenRange {
        /// The token found.
        token: i64,
        /// Its row in the batch.
        row: usize,
        /// Its column in the batch.
        column: usize,
        /// The size of the vocabulary.
        vocabulary: usize,
    },
    /// A prompt cannot be continued.
    #[error("prompt {index}: {reason}")]
    Prompt {
        /// Its index in the call.
        index: usize,
        /// What is wrong with it, and the way out.
        reason: String,
    },
    /// A model gave logits from which no token can be drawn.
    #[error(
        "completion {copy} of prompt {prompt}, token {step}: the logit of token {token} is {value}, and nothing is drawn from such a row. \
         Look at the adapter's weights: training may have diverged (f16 ends at 65504: take bf16 or f32)"
    )]
    Logits {
        /// Index of the prompt in the call.
        prompt: usize,
        /// Which of the prompt's copies.
        copy: usize,
        /// How many tokens the completion had.
        step: usize,
        /// The token whose logit it is; the first one where all are −∞.
        token: usize,
        /// The value found.
        value: f32,
    },
    /// A reward failed, or is not a finite number. Nothing is to be learned from such a row.
    #[error(
        "reward `{}`, completion {row}: {}; leave the row out, or return `None` where the reward does not apply",
        Printable(reward),
        Printable(reason)
    )]
    Reward {
        /// Name of the reward.
        reward: String,
        /// Index of the completion in the batch.
        row: usize,
        /// What went wrong.
        reason: String,
    },
    /// A tensor could not be read back from its device.
    #[error("tensor `{tensor}` could not be read from its device: {reason}")]
    DeviceRead {
        /// Name of the tensor.
        tensor: String,
        /// The backend's reason.
        reason: String,
    },
    /// An error about one module of a model.
    #[error("`{path}`: {source}")]
    InModule {
        /// Path of the module.
        path: String,
        /// What is wrong with it.
        source: Box<PeftError>,
    },
    /// A matrix could not be decomposed.
    #[error("tensor `{tensor}`: {reason}")]
    Decomposition {
        /// Name of the tensor.
        tensor: String,
        /// What went wrong.
        reason: String,
    },
    /// An error about something in a file.
    #[error("{path}: {source}", path = path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        source: Box<PeftError>,
    },
    /// A file is not what its place demands, or larger than what is read.
    #[error("{path}: {}", Printable(reason), path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
    /// A text is not the JSON expected.
    #[error("not the JSON expected: {}", Printable(&source.to_string()))]
    Json {
        /// The parser's reason, with line and column.
        source: serde_json::Error,
    },
    /// A key of an adapter's configuration asks for what this crate does not compute.
    #[error(
        "`{}` = {} is not supported: {reason}",
        Printable(key),
        Printable(value)
    )]
    UnsupportedKey {
        /// The key.
        key: String,
        /// Its value as JSON, shortened.
        value: String,
        /// What the value would do.
        reason: String,
    },
    /// Tensors of an adapter are missing, have no place, or have another shape than their place; or there are none.
    #[error("the adapter does not fit: {report}; with `strict` false, what fits is loaded")]
    Incomplete {
        /// The fate of every tensor.
        report: Box<LoadReport>,
    },
    /// Tensors of a base model and parameters of the model that it is for do not fit; or there are none.
    #[error("{path}: the checkpoint does not fit the model: {report}", path = path.display())]
    BaseMismatch {
        /// The file, or the index where there are several.
        path: PathBuf,
        /// All that does not fit.
        report: Box<BaseMismatch>,
    },
    /// The index of a checkpoint in several files is not true of them.
    #[error("{path}: {}; {}", first(faults), index_way_out(faults), path = path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// All that is wrong.
        faults: Vec<IndexFault>,
    },
    /// An adapter's files are not those that the digest in their metadata was made of, or one was asked for and there is
    /// none.
    #[error(
        "{path}: expected {expected}, found {found}: one of the adapter's two files was damaged, or is another adapter's. \
         `DigestCheck::Ignore` reads them all the same",
        path = path.display()
    )]
    Digest {
        /// The file of tensors, which holds the digest.
        path: PathBuf,
        /// The digest in the file, or in words what should be there.
        expected: String,
        /// The digest of the files, or in words what is there.
        found: String,
    },
    /// Stored log-probabilities are those of another reference, or of other data.
    #[error(
        "{path}: it holds the log-probabilities of another reference model or of other examples (digest {found}, these have \
         {expected}): compute them again with `StoredLogProbs::compute`",
        path = path.display()
    )]
    Stale {
        /// The file.
        path: PathBuf,
        /// The digest of the reference and the examples at hand.
        expected: String,
        /// The digest in the file.
        found: String,
    },
    /// A file is there that saving does not replace unasked, as it may be something else than an older one of its kind.
    #[error("{path}: {}: `overwrite` replaces it", Printable(reason), path = path.display())]
    Occupied {
        /// The file.
        path: PathBuf,
        /// What it is.
        reason: String,
    },
    /// A file is there already, and overwriting it was not asked for.
    #[error("{path}: there is a file already: choose another place, or set `overwrite` to replace it", path = path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A checkpoint is of a run with other adapters or another optimiser.
    #[cfg(feature = "optim")]
    #[error(
        "the checkpoint is of another run: {}. Build the model, its adapters and the optimiser as the saved run did",
        first(differences)
    )]
    OtherRun {
        /// All that differs.
        differences: Vec<crate::resume::Difference>,
    },
    /// An optimiser's state cannot be kept in a checkpoint, or not be taken from it.
    #[cfg(feature = "optim")]
    #[error("the optimiser's state: {reason}")]
    OptimizerState {
        /// What is wrong with it.
        reason: String,
    },
}

/// A text, perhaps of a file, with control characters escaped, which a terminal that shows an error would obey.
struct Printable<'a>(&'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for c in self.0.chars() {
            match c.is_control() {
                false => write!(f, "{c}")?,
                true => write!(f, "{}", c.escape_default())?,
            }
        }
        Ok(())
    }
}

/// The names of a model's adapters, or how to get one.
fn known_adapters(names: &[String]) -> String {
    match names.is_empty() {
        true => "it has none. `add_adapter` makes one, `load_adapter` reads one".into(),
        false => {
            let names: Vec<_> = names
                .iter()
                .map(|name| format!("`{}`", name.escape_debug()))
                .collect();
            format!("it has {}", names.join(", "))
        }
    }
}

/// As many items as one can read, and how many more there are.
fn first(differences: &[impl fmt::Display]) -> String {
    const SHOWN: usize = 4;
    let shown = differences.iter().take(SHOWN).map(ToString::to_string);
    let mut text = shown.collect::<Vec<_>>().join("; ");
    if let Some(more) = differences
        .len()
        .checked_sub(SHOWN)
        .filter(|more| *more > 0)
    {
        text += &format!("; and {more} more");
    }
    text
}

/// The option that gets past these faults.
fn index_way_out(faults: &[IndexFault]) -> String {
    let mut kinds: Vec<_> = faults.iter().map(IndexFault::kind).collect();
    kinds.sort();
    kinds.dedup();
    let kinds = kinds
        .iter()
        .map(|kind| format!("IndexFaultKind::{kind:?}"))
        .collect::<Vec<_>>();
    format!(
        "to take the files' word: `BaseOptions::with_allowed_index_faults([{}])`",
        kinds.join(", ")
    )
}

impl PeftError {
    /// The option `name` has a `value` that is not `expected`.
    pub(crate) fn config(
        name: impl Into<String>,
        value: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::Config {
            name: name.into(),
            value: value.to_string(),
            expected: expected.into(),
        }
    }

    /// Names the step of training at which a value was not finite: turns [`NotFinite`](Self::NotFinite) into
    /// [`Diverged`](Self::Diverged), and leaves every other error as it is.
    ///
    /// ```
    /// # fn step<M: burn::module::Module>(
    /// #     model: &M, mut grads: burn::optim::GradientsParams, step: u64,
    /// # ) -> burn_peft::Result<()> {
    /// burn_peft::optim::clip_grad_norm(model, &mut grads, 1.0).map_err(|error| error.at_step(step))?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn at_step(self, step: u64) -> Self {
        match self {
            Self::NotFinite {
                tensor,
                index,
                value,
            } => Self::Diverged {
                step,
                what: match tensor.strip_prefix("gradient of ") {
                    Some(path) => format!("the gradient of `{path}` at flat index {index}"),
                    None => format!("the {tensor}"),
                },
                value,
            },
            other => other,
        }
    }

    /// For `map_err`: an error of the operating system at `path`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn json(source: serde_json::Error) -> Self {
        Self::Json { source }
    }

    /// Names the file that this error is about, unless it names one already.
    pub(crate) fn in_file(self, path: &Path) -> Self {
        match self {
            Self::InFile { .. }
            | Self::Malformed { .. }
            | Self::Io { .. }
            | Self::Index { .. }
            | Self::BaseMismatch { .. }
            | Self::Digest { .. } => self,
            other => Self::InFile {
                path: path.to_owned(),
                source: Box::new(other),
            },
        }
    }
}

#[cfg(test)]
#[path = "error_texts.rs"]
mod texts;
