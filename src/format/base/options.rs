//! How a checkpoint comes into a model.

use std::fmt;
use std::sync::Arc;

use burn::tensor::{DType, FloatDType};

use super::progress::LoadProgress;
use crate::format::NameMap;
use crate::model::TargetConfig;
use crate::nf4::Nf4Config;
use crate::{PeftError, Result};

/// The most memory, in bytes, that loading holds beside the model, all threads together; only the f32 scales of a doubly
/// quantised weight of more than 2³⁰ values, in blocks of 64, take more by themselves.
pub const MAX_BUFFER_BYTES: usize = 64 << 20;
/// The buffer for what is read unless [`BaseOptions::with_buffer`] says otherwise, in bytes.
const BUFFER_BYTES: usize = 32 << 20;
/// The smallest buffer.
const MIN_BUFFER_BYTES: usize = 64 << 10;

/// Is told how far loading is.
pub type OnProgress = Arc<dyn Fn(&LoadProgress) + Send + Sync>;

/// How a checkpoint is put into a model. The default is strict: every tensor of the files has its parameter and every
/// parameter its tensor, of the same name, in the files' element type.
///
/// Names given here are the files' names of tensors, whole or the ends of them after a dot.
#[derive(Clone, Default)]
pub struct BaseOptions {
    pub(super) names: NameMap,
    pub(super) dtype: Option<FloatDType>,
    pub(super) nf4: Option<(TargetConfig, Nf4Config)>,
    pub(super) requantize_fp4: bool,
    pub(super) ignored: Vec<String>,
    pub(super) optional: Vec<String>,
    pub(super) tied: Vec<(String, String)>,
    pub(super) buffer: Option<usize>,
    pub(super) progress: Option<OnProgress>,
}

impl fmt::Debug for BaseOptions {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("BaseOptions")
            .field("names", &self.names)
            .field("dtype", &self.dtype)
            .field("nf4", &self.nf4)
            .field("requantize_fp4", &self.requantize_fp4)
            .field("ignored", &self.ignored)
            .field("optional", &self.optional)
            .field("tied", &self.tied)
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

    /// Casts what is not packed to this element type, f32, bf16 or f16, rounding once; `None`, the default, keeps the
    /// files'. Of a packed weight it is the type of what it composes to.
    pub fn with_dtype(mut self, dtype: impl Into<Option<FloatDType>>) -> Self {
        self.dtype = dtype.into();
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

    /// Leaves parameters of these names as they are if the files do not have them.
    pub fn with_optional<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.optional.extend(names.into_iter().map(Into::into));
        self
    }

    /// Says that the tensor `copy` is `source`, both by their whole names, as `lm_head.weight` is
    /// `model.embed_tokens.weight` in many models. A parameter `copy` that the files do not have gets the values of
    /// `source`; a tensor `copy` that the model has no parameter for must be equal to `source` bit for bit.
    pub fn with_tied(mut self, copy: impl Into<String>, source: impl Into<String>) -> Self {
        self.tied.push((copy.into(), source.into()));
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
