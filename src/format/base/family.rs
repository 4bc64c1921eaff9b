//! How the files of well-known families of models call things, and what they hold beside parameters.
//!
//! Source: the modelling code of transformers 5.24 (`base_model_prefix`, `_tied_weights_keys`,
//! `_keys_to_ignore_on_load_unexpected`, `Conv1D`), and the files on its hub.

use super::options::BaseOptions;
use super::save::SaveBaseOptions;
use crate::format::NameMap;

/// A family of models: how its files on the Hugging Face hub call modules, what they hold beside parameters, which tensors are
/// one, and which layers are `Conv1D`.
///
/// By default the modules of the Burn model are called as in Python, but for the prefix of the base model: `layers.0.self_attn.q_proj`
/// for `model.layers.0.self_attn.q_proj`, and `lm_head`. A model with other fields says how they are called, a rule for each name:
///
/// ```no_run
/// # use burn::module::Module;
/// # fn load<M: Module>(model: M) -> burn_peft::Result<()> {
/// use burn_peft::format::{BaseOptions, Family};
/// use burn_peft::model::PeftModel;
///
/// let llama = Family::llama().with_renames([
///     ("embed_tokens", "embedding"),
///     ("layers", "blocks"),
///     ("self_attn", "attention"),
///     ("q_proj", "query"),
///     ("k_proj", "key"),
///     ("v_proj", "value"),
///     ("o_proj", "output"),
/// ]);
/// let mut model = PeftModel::new(model);
/// model.load_base("Llama-3-8B", &llama.load_options())?;
/// // Adapters of Python's PEFT call modules in the same way.
/// let names = llama.names();
/// # Ok(())
/// # }
/// ```
///
/// Values are taken as they are. Where a family's code changes them, the model must: Gemma's norms multiply by `weight + 1`, T5
/// scales the output of its decoder before a tied head.
#[derive(Clone, Debug)]
pub struct Family {
    /// The prefix of the base model in files of a model with a head.
    prefix: &'static str,
    /// Modules beside the base model.
    outside: &'static [&'static str],
    /// Whether the Burn model has the prefix too.
    nested: bool,
    names: NameMap,
    /// Other prefixes that files may have: `(prefix, other)`.
    prefixes: &'static [(&'static str, &'static str)],
    aliases: &'static [(&'static str, &'static str)],
    ignored: &'static [&'static str],
    conv1d: &'static [&'static str],
    /// Tensors that are one, by their whole names: `(copy, source)`.
    tied: &'static [(&'static str, &'static str)],
    /// What `tie_word_embeddings` is where a configuration does not say.
    tied_by_default: bool,
}

/// What most decoders have in common.
const DECODER: Family = Family {
    prefix: "model",
    outside: &["lm_head", "score", "classifier", "qa_outputs"],
    nested: false,
    names: NameMap::EMPTY,
    prefixes: &[("model", "")],
    aliases: &[],
    ignored: &["rotary_emb.inv_freq"],
    conv1d: &[],
    tied: &[("lm_head.weight", "model.embed_tokens.weight")],
    tied_by_default: false,
};

impl Family {
    /// Llama 1 to 3, and what has its form.
    pub fn llama() -> Self {
        DECODER
    }

    /// Mistral.
    pub fn mistral() -> Self {
        DECODER
    }

    /// Qwen2 and Qwen2.5.
    pub fn qwen2() -> Self {
        DECODER
    }

    /// Qwen3.
    pub fn qwen3() -> Self {
        DECODER
    }

    /// Gemma 2. Its norms multiply by `weight + 1`.
    pub fn gemma2() -> Self {
        Self {
            tied_by_default: true,
            ..DECODER
        }
    }

    /// The text model of Gemma 3, also from files that have a vision model beside it, which is ignored. Its norms multiply by
    /// `weight + 1`.
    pub fn gemma3() -> Self {
        Self {
            tied_by_default: true,
            prefixes: &[
                ("model", ""),
                ("model", "language_model.model"),
                ("model", "model.language_model"),
                ("lm_head", "language_model.lm_head"),
            ],
            ignored: &[
                "rotary_emb.inv_freq",
                "vision_tower.*",
                "multi_modal_projector.*",
                "model.vision_tower.*",
                "model.multi_modal_projector.*",
            ],
            ..DECODER
        }
    }

    /// Phi-3 and Phi-4, with fused `qkv_proj` and `gate_up_proj`.
    pub fn phi3() -> Self {
        DECODER
    }

    /// GPT-2. Its linear layers are `Conv1D`, but for the head.
    pub fn gpt2() -> Self {
        Self {
            prefix: "transformer",
            outside: &["lm_head", "score", "classifier", "multiple_choice_head"],
            prefixes: &[("transformer", "")],
            ignored: &[
                "attn.bias",
                "attn.masked_bias",
                "crossattention.bias",
                "crossattention.masked_bias",
            ],
            conv1d: &[
                "attn.c_attn",
                "attn.c_proj",
                "mlp.c_fc",
                "mlp.c_proj",
                "crossattention.c_attn",
                "crossattention.q_attn",
                "crossattention.c_proj",
            ],
            tied: &[("lm_head.weight", "transformer.wte.weight")],
            tied_by_default: true,
            ..DECODER
        }
    }

    /// BERT, also from files that call the parameters of norms `gamma` and `beta`.
    pub fn bert() -> Self {
        Self {
            prefix: "bert",
            outside: &["cls", "classifier", "qa_outputs"],
            prefixes: &[("bert", "")],
            aliases: &[
                ("LayerNorm.weight", "LayerNorm.gamma"),
                ("LayerNorm.bias", "LayerNorm.beta"),
            ],
            ignored: &["embeddings.position_ids", "embeddings.token_type_ids"],
            tied: &[
                (
                    "cls.predictions.decoder.weight",
                    "bert.embeddings.word_embeddings.weight",
                ),
                ("cls.predictions.decoder.bias", "cls.predictions.bias"),
            ],
            tied_by_default: true,
            ..DECODER
        }
    }

    /// T5 and Flan-T5. Its norms have no mean and no bias; before a tied head the output of the decoder is multiplied by
    /// `d_model^-½`.
    pub fn t5() -> Self {
        Self {
            prefix: "",
            outside: &[],
            prefixes: &[("", "transformer")],
            ignored: &["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"],
            tied: &[
                ("encoder.embed_tokens.weight", "shared.weight"),
                ("decoder.embed_tokens.weight", "shared.weight"),
                ("lm_head.weight", "shared.weight"),
            ],
            tied_by_default: true,
            ..DECODER
        }
    }

    /// Whisper.
    pub fn whisper() -> Self {
        Self {
            outside: &["proj_out", "projector", "classifier"],
            ignored: &[],
            tied: &[("proj_out.weight", "model.decoder.embed_tokens.weight")],
            tied_by_default: true,
            ..DECODER
        }
    }

    /// ViT.
    pub fn vit() -> Self {
        Self {
            prefix: "vit",
            outside: &["classifier", "decoder"],
            prefixes: &[("vit", "")],
            ignored: &[],
            tied: &[],
            ..DECODER
        }
    }

    /// The family of this `model_type`, as a `config.json` has it.
    pub fn of_model_type(model_type: &str) -> Option<Self> {
        Some(match model_type {
            "llama" => Self::llama(),
            "mistral" => Self::mistral(),
            "qwen2" => Self::qwen2(),
            "qwen3" => Self::qwen3(),
            "gemma2" => Self::gemma2(),
            "gemma3" | "gemma3_text" => Self::gemma3(),
            "phi3" => Self::phi3(),
            "gpt2" => Self::gpt2(),
            "bert" => Self::bert(),
            "t5" => Self::t5(),
            "whisper" => Self::whisper(),
            "vit" => Self::vit(),
            _ => return None,
        })
    }

    /// Says that the Burn model has the base model in a field of the prefix's name, as in Python: `model.layers` beside
    /// `lm_head`.
    pub fn nested(mut self) -> Self {
        self.nested = true;
        self
    }

    /// Says how the Burn model calls modules: for each pair `(file, model)` a rule of
    /// [`NameMap::with_segments`]. Paths of the file are without the prefix.
    pub fn with_renames<F: AsRef<str>, N: AsRef<str>>(
        mut self,
        renames: impl IntoIterator<Item = (F, N)>,
    ) -> Self {
        self.names = self.names.with_renames(renames);
        self
    }

    /// Says how the Burn model calls a parameter that is in no layer of Burn's: a rule of [`NameMap::with_parameter`], with the
    /// whole name of the file.
    pub fn with_parameter(mut self, file: &str, model: &str) -> Self {
        self.names = self.names.with_parameter(file, model);
        self
    }

    /// The map from the files' names to the Burn model's, for bases and for adapters.
    pub fn names(&self) -> NameMap {
        let mut names = self.names.clone();
        if self.prefix.is_empty() || self.nested {
            return names;
        }
        names = names.with_prefix(self.prefix, "");
        for outside in self.outside {
            names = names.with_prefix(outside, outside);
        }
        names
    }

    /// The options of loading a base of this family.
    pub fn load_options(&self) -> BaseOptions {
        let mut options = BaseOptions::new()
            .with_names(self.names())
            .with_conv1d(self.conv1d.iter().copied())
            .with_ignored(self.ignored.iter().copied());
        for (name, alias) in self.aliases {
            options = options.with_alias(*name, *alias);
        }
        for (prefix, other) in self.prefixes {
            options = options.with_other_prefix(*prefix, *other);
        }
        for (copy, source) in self.tied {
            options = options.with_tied_by_config(copy, source, self.tied_by_default);
        }
        options
    }

    /// The options of saving a base of this family, for [`save_base`](crate::model::PeftModel::save_base).
    pub fn save_options(&self) -> SaveBaseOptions {
        SaveBaseOptions::new()
            .with_names(self.names())
            .with_conv1d(self.conv1d.iter().copied())
    }
}

impl From<&Family> for BaseOptions {
    fn from(family: &Family) -> Self {
        family.load_options()
    }
}
