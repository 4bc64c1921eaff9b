//! Reading a Hugging Face directory into a Llama.

use std::path::Path;

use burn::tensor::Device;
use burn_peft::format::{BaseCheckpoint, BaseOptions};

use super::config::LlamaConfig;
use super::error::Result;
use super::model::LlamaForCausalLm;

impl LlamaForCausalLm {
    /// [`from_pretrained_with`](Self::from_pretrained_with) in the device's default float type, whatever the file's.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn from_pretrained(dir: impl AsRef<Path>, device: &Device) -> Result<(LlamaConfig, Self)> {
        let options = BaseOptions::new().with_dtype(device.settings().float_dtype);
        Self::from_pretrained_with(dir, device, options)
    }

    /// Reads `config.json` and `model.safetensors` (or its sharded index) of `dir`, as `options` say: in what element type,
    /// and which weights packed. No parameter is made at random before.
    ///
    /// # Errors
    ///
    /// When a file is absent or broken, the configuration is not supported, a tensor is missing, unexpected, or of
    /// another shape or type than the configuration says. As in transformers, `rotary_emb.inv_freq` is ignored, and
    /// so is `lm_head.weight` if the embeddings are tied.
    pub fn from_pretrained_with(
        dir: impl AsRef<Path>,
        device: &Device,
        options: BaseOptions,
    ) -> Result<(LlamaConfig, Self)> {
        let config = LlamaConfig::from_dir(dir.as_ref())?;
        let mut options = options.with_ignored(["rotary_emb.inv_freq"]);
        if config.tie_word_embeddings {
            options = options.with_ignored(["lm_head.weight"]);
        }
        // Nothing is initialised yet, and what is not read is never.
        let mut model = config.init(device);
        BaseCheckpoint::open(dir)?.load_into(&mut model, &options)?;
        Ok((config, model))
    }
}
