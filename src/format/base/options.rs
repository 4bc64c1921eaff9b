//! How a checkpoint comes into a model.

use std::fmt;
use std::sync::Arc;

use burn::tensor::{DType, FloatDType};

use super::index::IndexFaultKind;
use super::progress::LoadProgress;
use crate::format::{FileLimits, NameMap};
use crate::model::{NewRows, TargetConfig};
use crate::nf4::Nf4Config;
use crate::{PeftError, Result};

/// The most memory, in bytes, that loading holds beside the model, all threads together; only the f32 scales of a doubly
/// quantised weight of more than 2³⁰ values, in blocks of 64, take more by themselves, and tensors whose rows are
/// [resized](BaseOptions::with_resized_vocabulary).
pub const MAX_BUFFER_BYTES: usize = 64 << 20;
/// The buffer for what is read unless [`BaseOptions::with_buffer`] says otherwise, in bytes.
const BUFFER_BYTES: usize = 32 << 20;
/// The smallest buffer.
const MIN_BUFFER_BYTES: usize = 64 << 10;

/// Is told how far loading is.
pub type OnProgress = Arc<dyn Fn(&LoadProgress) + Send + Sync>;

/// Ends of names of tensors that are no parameters, in files of PyTorch's models: what
/// [`with_ignored_buffers`](BaseOptions::with_ignored_buffers) ignores.
pub const COMMON_BUFFERS: [&str; 9] = [
    "attn.bias",
    "attn.masked_bias",
    "attention.bias",
    "attention.masked_bias",
    "crossattention.bias",
    "inv_freq",
    "num_batches_tracked",
    "position_ids",
    "token_type_ids",
];

/// How a checkpoint is put into a model.
///
/// The default is strict: every tensor of the files has its parameter and every parameter its tensor, of the same name, in
/// the files' element type. Every refusal has an option that gets past it; `docs/loading.md` in the repository lists them.
/// [`Family`](crate::format::Family) has the options of families of models.
///
/// Names given here are the files' names of tensors: whole, or the ends of them after a dot, or with `.*` at the end the
/// beginnings of them, as in `vision_tower.*`.
#[derive(Clone, Default)]
pub struct BaseOptions {
    pub(super) names: NameMap,
    pub(super) aliases: Vec<(String, String)>,
    pub(super) prefixes: Vec<(String, String)>,
    pub(super) conv1d: Vec<String>,
    pub(super) dtype: Option<FloatDType>,
    pub(super) allow_overflow: bool,
    pub(super) nf4: Option<(TargetConfig, Nf4Config)>,
    pub(super) requantize_fp4: bool,
    pub(super) ignored: Vec<String>,
    pub(super) optional: Vec<String>,
    pub(super) skipped: Vec<String>,
    pub(super) allow_unexpected: bool,
    pub(super) allow_missing: bool,
    pub(super) allow_nothing: bool,
    pub(super) ignore_mismatched_sizes: bool,
    pub(super) ignore_quantization_config: bool,
    pub(super) tied: Vec<Tie>,
    pub(super) resize: Option<NewRows>,
    pub(super) resized: Vec<String>,
    pub(super) index_faults: Vec<IndexFaultKind>,
    pub(super) limits: FileLimits,
    pub(super) buffer: Option<usize>,
    pub(super) progress: Option<OnProgress>,
}

/// Two tensors that are the same one.
#[derive(Clone, Debug)]
pub(super) struct Tie {
    pub copy: String,
    pub source: String,
    /// Whether the `tie_word_embeddings` of a `config.json` decides, and what it is where that does not say.
    pub by_config: Option<bool>,
}

impl fmt::Debug for BaseOptions {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("BaseOptions")
            .field("names", &self.names)
            .field("aliases", &self.aliases)
            .field("prefixes", &self.prefixes)
            .field("conv1d", &self.conv1d)
            .field("dtype", &self.dtype)
            .field("allow_overflow", &self.allow_overflow)
            .field("nf4", &self.nf4)
            .field("requantize_fp4", &self.requantize_fp4)
            .field("ignored", &self.ignored)
            .field("optional", &self.optional)
            .field("skipped", &self.skipped)
            .field("allow_unexpected", &self.allow_unexpected)
            .field("allow_missing", &self.allow_missing)
            .field("allow_nothing", &self.allow_nothing)
            .field("ignore_mismatched_sizes", &self.ignore_mismatched_sizes)
            .field(
                "ignore_quantization_config",
                &self.ignore_quantization_config,
            )
            .field("tied", &self.tied)
            .field("resize", &self.resize)
            .field("resized", &self.resized)
            .field("index_faults", &self.index_faults)
            .field("limits", &self.limits)
            .field("buffer", &self.buffer)
            .field("progress", &self.progress.is_some())
            .finish()
    }
}

impl BaseOptions {
    /// The strict default.
    pub fn new() -> Self {
        Self::default()
    }

    /// Says how the files call the model's modules. The names of parameters in their modules are PyTorch's already:
    /// `weight` and `bias`, also of norms, which Burn calls `gamma` and `beta`.
    pub fn with_names(mut self, names: NameMap) -> Self {
        self.names = names;
        self
    }

    /// Also looks for tensors whose names end in `name` under names that end in `alias` instead, where the files do not have
    /// them: `LayerNorm.weight` is `LayerNorm.gamma` in files of early BERT models.
    pub fn with_alias(mut self, name: impl Into<String>, alias: impl Into<String>) -> Self {
        self.aliases.push((name.into(), alias.into()));
        self
    }

    /// Also looks for tensors whose names begin with the segments `prefix` under names that begin with `other` instead, where
    /// the files do not have them. Either may be empty: the files of a base model alone have no `model.`.
    pub fn with_other_prefix(
        mut self,
        prefix: impl Into<String>,
        other: impl Into<String>,
    ) -> Self {
        self.prefixes.push((prefix.into(), other.into()));
        self
    }

    /// Says that the linear layers of these names are `Conv1D` in the files, as GPT-2's are: their weights are `[d_in, d_out]`
    /// there, as in Burn, where a `Linear` of PyTorch has `[d_out, d_in]`. The names are those of the modules in the files,
    /// whole or the ends of them.
    ///
    /// In NF4 the files have such a weight as `[d_out, d_in]`, and [`with_nf4`](Self::with_nf4) packs it so, as transformers and
    /// bitsandbytes do.
    pub fn with_conv1d<S: Into<String>>(mut self, modules: impl IntoIterator<Item = S>) -> Self {
        self.conv1d.extend(modules.into_iter().map(Into::into));
        self
    }

    /// Casts what is not packed to this element type, f32, bf16 or f16, rounding once; `None`, the default, keeps the
    /// files'. F64 is read with this option only; to bf16 and f16 it is rounded twice, as by PyTorch. Of a packed weight it is the type of what it composes to.
    pub fn with_dtype(mut self, dtype: impl Into<Option<FloatDType>>) -> Self {
        self.dtype = dtype.into();
        self
    }

    /// Lets a finite value become infinite when it is cast, as PyTorch does: 70,000 in f16. By default that is an error.
    pub fn with_allow_overflow(mut self, allow: bool) -> Self {
        self.allow_overflow = allow;
        self
    }

    /// Packs the linear weights that `targets` choose, by the model's paths, in NF4 on the way: bit for bit what
    /// [`quantize_nf4`](crate::model::PeftModel::quantize_nf4) makes of the values in the files, without a dense weight at
    /// any time. Weights that the files have in NF4 are taken as they are, chosen or not, in blocks of their own size.
    pub fn with_nf4(mut self, targets: TargetConfig, config: Nf4Config) -> Self {
        self.nf4 = Some((targets, config));
        self
    }

    /// Lets [`with_nf4`](Self::with_nf4) also pack weights that the files have in bitsandbytes' FP4, which rounds them a second
    /// time. By default they are restored and stay dense: the products of this crate know packed weights in NF4 only.
    pub fn with_requantized_fp4(mut self) -> Self {
        self.requantize_fp4 = true;
        self
    }

    /// Passes over tensors of these names that the model has no place for, such as `rotary_emb.inv_freq`.
    pub fn with_ignored<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.ignored.extend(names.into_iter().map(Into::into));
        self
    }

    /// Passes over the tensors that PyTorch's models often have beside parameters ([`COMMON_BUFFERS`]): masks, positions,
    /// frequencies, counters.
    pub fn with_ignored_buffers(self) -> Self {
        self.with_ignored(COMMON_BUFFERS)
    }

    /// Leaves parameters of these names as they are if the files do not have them.
    pub fn with_optional<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.optional.extend(names.into_iter().map(Into::into));
        self
    }

    /// Does as if the files did not have tensors of these names, and leaves their parameters as they are.
    pub fn with_skipped<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.skipped.extend(names.into_iter().map(Into::into));
        self
    }

    /// `false` loads what fits, as `from_pretrained` of transformers does: tensors without a parameter are ignored, and
    /// parameters without a tensor keep their initial values. The report names both. Short for
    /// [`with_allow_unexpected`](Self::with_allow_unexpected) and [`with_allow_missing`](Self::with_allow_missing).
    ///
    /// What fits in name but not in shape stays an error, as there: see
    /// [`with_ignore_mismatched_sizes`](Self::with_ignore_mismatched_sizes) and
    /// [`with_resized_vocabulary`](Self::with_resized_vocabulary).
    pub fn with_strict(self, strict: bool) -> Self {
        self.with_allow_unexpected(!strict)
            .with_allow_missing(!strict)
    }

    /// Whether tensors that the model has no parameter for are ignored. The report lists them. Default: false.
    pub fn with_allow_unexpected(mut self, allow: bool) -> Self {
        self.allow_unexpected = allow;
        self
    }

    /// Whether parameters that the files have no tensor for keep their initial values. The report lists them. Default: false.
    pub fn with_allow_missing(mut self, allow: bool) -> Self {
        self.allow_missing = allow;
        self
    }

    /// Whether a checkpoint of which nothing fits is no error, where missing parameters are none. Default: false.
    pub fn with_allow_nothing_loaded(mut self, allow: bool) -> Self {
        self.allow_nothing = allow;
        self
    }

    /// Whether a parameter whose tensor has another shape keeps its initial value, as with `ignore_mismatched_sizes` of
    /// transformers: a classifier of other classes, for instance. The report lists them. Default: false.
    pub fn with_ignore_mismatched_sizes(mut self, ignore: bool) -> Self {
        self.ignore_mismatched_sizes = ignore;
        self
    }

    /// Whether what the `quantization_config` of a `config.json` beside the files says is passed over where the tensors say
    /// otherwise: a model that transformers is to pack on loading, for instance. Default: false.
    pub fn with_ignore_quantization_config(mut self, ignore: bool) -> Self {
        self.ignore_quantization_config = ignore;
        self
    }

    /// Says that the tensor `copy` is `source`, both by their whole names, as `lm_head.weight` is
    /// `model.embed_tokens.weight` in many models. A parameter whose tensor the files do not have gets the values of the other
    /// of the two; a tensor `copy` that the model has no parameter for must be equal to `source` bit for bit.
    ///
    /// Without this, a tensor that the model has no parameter for is accepted if it is equal, bit for bit, to that of an
    /// embedding.
    pub fn with_tied(mut self, copy: impl Into<String>, source: impl Into<String>) -> Self {
        self.tied.push(Tie {
            copy: copy.into(),
            source: source.into(),
            by_config: None,
        });
        self
    }

    /// As [`with_tied`](Self::with_tied), if the `tie_word_embeddings` of a `config.json` beside the files says so, or `default`
    /// does, where it says nothing. Without a `config.json` they are tied.
    pub(crate) fn with_tied_by_config(mut self, copy: &str, source: &str, default: bool) -> Self {
        self.tied.push(Tie {
            copy: copy.to_owned(),
            source: source.to_owned(),
            by_config: Some(default),
        });
        self
    }

    /// Lets the files and the model have different numbers of tokens: of the input embedding, of the output head, and of
    /// what is tied to either. Where the model has fewer, the last rows of the file are left out; where it has more, the new
    /// rows are made by `new_rows`. The report lists them.
    ///
    /// As `resize_token_embeddings` of transformers does. A resized tensor is held once more on the host while it is made.
    pub fn with_resized_vocabulary(mut self, new_rows: NewRows) -> Self {
        self.resize = Some(new_rows);
        self
    }

    /// Adds tensors, by the files' names of them, that [`with_resized_vocabulary`](Self::with_resized_vocabulary) is for, beside
    /// those that it finds by itself: another embedding or head, and biases of one number for each token.
    pub fn with_resized<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.resized.extend(names.into_iter().map(Into::into));
        self
    }

    /// Passes over faults of these kinds in an index, and takes the files' word: see
    /// [`BaseCheckpoint::open_with`](super::BaseCheckpoint::open_with). The report lists what was passed over.
    pub fn with_allowed_index_faults(
        mut self,
        kinds: impl IntoIterator<Item = IndexFaultKind>,
    ) -> Self {
        self.index_faults.extend(kinds);
        self
    }

    /// Sets the limits on files.
    pub fn with_limits(mut self, limits: FileLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Sets the size of the buffer for what is read, in bytes, all threads together: at least 64 KiB, at most
    /// [`MAX_BUFFER_BYTES`]. Default: 32 MiB. A row of a weight may be longer.
    pub fn with_buffer(mut self, bytes: usize) -> Self {
        self.buffer = Some(bytes);
        self
    }

    /// Calls `on_progress` after every part that was read, of at most a mebibyte, and every tensor; from any thread.
    pub fn with_progress(
        mut self,
        on_progress: impl Fn(&LoadProgress) + Send + Sync + 'static,
    ) -> Self {
        self.progress = Some(Arc::new(on_progress));
        self
    }

    /// Bytes of the buffer, beside so many of scales.
    pub(super) fn buffer_bytes(&self, scales: usize) -> usize {
        let bytes = self.buffer.unwrap_or(BUFFER_BYTES);
        let most = MAX_BUFFER_BYTES.saturating_sub(scales);
        bytes.min(most).max(MIN_BUFFER_BYTES)
    }

    /// # Errors
    ///
    /// [`PeftError::Config`] for an element type that is none of the three.
    pub(super) fn check(&self) -> Result<()> {
        match self.dtype {
            None | Some(FloatDType::F32 | FloatDType::BF16 | FloatDType::F16) => Ok(()),
            Some(other) => Err(PeftError::config(
                "dtype",
                format!("{:?}", DType::from(other)),
                "F32, BF16 or F16",
            )),
        }
    }
}
