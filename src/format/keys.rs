//! PEFT's tensor keys, and the paths in them.
//!
//! PEFT writes what belongs to the module at `PATH` as
//!
//! ```text
//! base_model.model.PATH.lora_A.weight                          the factor A
//! base_model.model.PATH.lora_B.weight                          the factor B
//! base_model.model.PATH.lora_B.bias                            the bias of B, of `lora_bias`
//! base_model.model.PATH.lora_embedding_A, .lora_embedding_B    the factors of an embedding
//! base_model.model.PATH.lora_magnitude_vector                  DoRA's magnitude
//! base_model.model.PATH.token_adapter.trainable_tokens_delta   rows of an embedding
//! base_model.model.PATH.NAME                                   a parameter of `modules_to_save`, or a bias
//! base_model.model.PATH.base_layer.NAME                        a base value of a module that has factors, or its bias
//! base_model.model.PATH.token_adapter.base_layer.NAME          a base value of a module that has rows of its own
//! base_model.model.PATH.original_module.NAME                   a base value of a module that is saved whole
//! ```
//!
//! where `PATH` is the module's path in the Hugging Face model, for instance `model.layers.0.self_attn.q_proj`. The
//! adapter's name is not in the key. A Burn model may name its modules otherwise: a [`NameMap`](super::NameMap) says how.

/// What PEFT puts before every module path.
pub const PREFIX: &str = "base_model.model.";
/// What PEFT puts between the path of an adapted module and its own parameters.
const BASE_LAYER: &str = "base_layer";
const TOKEN_ADAPTER: &str = "token_adapter";
const TOKENS: &str = "trainable_tokens_delta";
/// Where PEFT keeps the base's own module beside a saved one.
const ORIGINAL: &str = "original_module";
/// Where PEFT keeps the saved modules of all adapters, by the adapters' names.
const SAVED: &str = "modules_to_save";

/// Modules that others wrap around a module of the model, without changing what it is: `torch.compile`, activation checkpointing,
/// FSDP, and Lightning over DeepSpeed.
const WRAPPERS: [&str; 4] = [
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_forward_module",
];

/// One of the tensors that a module with a low-rank change has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Factor {
    /// The factor `A` of a linear layer or a convolution.
    A,
    /// The factor `B` of a linear layer or a convolution.
    B,
    /// The factor `A` of an embedding.
    EmbeddingA,
    /// The factor `B` of an embedding.
    EmbeddingB,
    /// The bias of `B`.
    Bias,
    /// DoRA's magnitude.
    Magnitude,
}

impl Factor {
    const ALL: [(Self, &str); 6] = [
        (Self::A, ".lora_A.weight"),
        (Self::B, ".lora_B.weight"),
        (Self::EmbeddingA, ".lora_embedding_A"),
        (Self::EmbeddingB, ".lora_embedding_B"),
        (Self::Bias, ".lora_B.bias"),
        (Self::Magnitude, ".lora_magnitude_vector"),
    ];

    /// What follows the module's path in a key.
    fn suffix(self) -> &'static str {
        Self::ALL[self as usize].1
    }

    /// Those that a module has.
    pub(super) fn of(embedding: bool, bias: bool, dora: bool) -> Vec<Self> {
        let mut factors = match embedding {
            false => vec![Self::A, Self::B],
            true => vec![Self::EmbeddingA, Self::EmbeddingB],
        };
        // PEFT gives an embedding none.
        factors.extend((bias && !embedding).then_some(Self::Bias));
        factors.extend(dora.then_some(Self::Magnitude));
        factors
    }
}

/// The key of a factor of the module at `path`.
pub fn tensor_key(path: &str, factor: Factor) -> String {
    format!("{PREFIX}{path}{}", factor.suffix())
}

/// The module path and the factor in `key`, or `None` for a key that is no factor.
pub fn parse_key(key: &str) -> Option<(&str, Factor)> {
    let key = key.strip_prefix(PREFIX)?;
    let (path, factor) = Factor::ALL
        .into_iter()
        .find_map(|(factor, suffix)| Some((key.strip_suffix(suffix)?, factor)))?;
    is_path(path).then_some((path, factor))
}

/// The key of the parameter at `path`, whose module has factors or not.
pub(super) fn parameter_key(path: &str, has_factors: bool) -> String {
    match has_factors {
        true => key_within(path, BASE_LAYER),
        false => format!("{PREFIX}{path}"),
    }
}

/// What an adapter has of the module whose base value is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Around {
    Nothing,
    Factors,
    Rows,
    Copy,
}

/// The key of the base value of the parameter at `path`.
pub(super) fn base_key(path: &str, around: Around) -> String {
    match around {
        Around::Nothing => format!("{PREFIX}{path}"),
        Around::Factors => key_within(path, BASE_LAYER),
        Around::Rows => key_within(path, &format!("{TOKEN_ADAPTER}.{BASE_LAYER}")),
        Around::Copy => key_within(path, ORIGINAL),
    }
}

/// The key of the parameter at `path`, with modules in between that PEFT puts around it.
fn key_within(path: &str, inside: &str) -> String {
    match path.rsplit_once('.') {
        Some((module, name)) => format!("{PREFIX}{module}.{inside}.{name}"),
        None => format!("{PREFIX}{path}"),
    }
}

/// The key of rows of the embedding at `path`.
pub(super) fn rows_key(path: &str) -> String {
    format!("{PREFIX}{path}.{TOKEN_ADAPTER}.{TOKENS}")
}

/// What the tensor of a key is of the module, or parameter, at the key's path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// A tensor of a low-rank change.
    Factor(Factor),
    /// The module's parameter of this name, or DoRA's magnitude as torchtune and mlx-lm call it.
    Magnitude(String),
    /// Rows of an embedding.
    Rows,
    /// A whole parameter.
    Parameter,
    /// A whole parameter of a module that has factors: a base value, or a bias that trains.
    Wrapped,
    /// A base value of a module that is saved whole, or that has rows of its own.
    Original,
    /// What follows the path of a module that is saved whole, in the state of a model: the adapter's name, if it is there, and
    /// the parameter's path inside of the module.
    Saved(Vec<String>),
}

/// What a key of a file means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ReadKey {
    /// The path of the module, or of the parameter.
    pub path: String,
    pub role: Role,
    /// Whether the tensor is stored `[d_in, r]` or `[r, d_out]`, in place of PyTorch's layout.
    pub transposed: bool,
    /// The adapter's name, where the key has it.
    pub adapter: Option<String>,
}

/// The meaning of a key as one of the writers has it whose files are read; `None` for what is no path.
///
/// Besides PEFT's own form these are: without the prefix `base_model.model.`; with a wrapper's name somewhere, as `torch.compile`,
/// FSDP and activation checkpointing leave it, or `module.` before PEFT's prefix, as DeepSpeed and DDP do; with the adapter's name
/// behind the factor's, `PATH.lora_A.NAME.weight`, as in a state of the model itself; without `.weight`, as loralib's; `lora_down`
/// and `lora_up` in place of `lora_A` and `lora_B`; torchtune's `lora_a.weight`, `lora_b.weight` and `magnitude`; and mlx-lm's
/// `lora_a`, `lora_b` and `m`, whose factors are transposed.
pub(super) fn read_key(key: &str) -> Option<ReadKey> {
    use Factor::{A, B, Bias, EmbeddingA, EmbeddingB, Magnitude};

    let segments = key.split('.').filter(|segment| !WRAPPERS.contains(segment));
    let segments: Vec<&str> = segments.collect();
    let segments = match &segments[..] {
        ["base_model", "model", rest @ ..] | ["module", "base_model", "model", rest @ ..] => rest,
        all => all,
    };
    let (path, factor, transposed, adapter) = match segments {
        [path @ .., "lora_A" | "lora_down", "weight"] => (path, A, false, None),
        [path @ .., "lora_B" | "lora_up", "weight"] => (path, B, false, None),
        [path @ .., "lora_B", "bias"] => (path, Bias, false, None),
        [path @ .., "lora_a", "weight"] => (path, A, false, None),
        [path @ .., "lora_b", "weight"] => (path, B, false, None),
        [path @ .., "lora_A", adapter, "weight"] => (path, A, false, Some(adapter)),
        [path @ .., "lora_B", adapter, "weight"] => (path, B, false, Some(adapter)),
        [path @ .., "lora_B", adapter, "bias"] => (path, Bias, false, Some(adapter)),
        [path @ .., "lora_magnitude_vector", "weight"] => (path, Magnitude, false, None),
        [path @ .., "lora_magnitude_vector", adapter, "weight"] => {
            (path, Magnitude, false, Some(adapter))
        }
        [path @ .., "lora_embedding_A"] => (path, EmbeddingA, false, None),
        [path @ .., "lora_embedding_B"] => (path, EmbeddingB, false, None),
        [path @ .., "lora_embedding_A", adapter] => (path, EmbeddingA, false, Some(adapter)),
        [path @ .., "lora_embedding_B", adapter] => (path, EmbeddingB, false, Some(adapter)),
        [path @ .., "lora_A"] => (path, A, false, None),
        [path @ .., "lora_B"] => (path, B, false, None),
        [path @ .., "lora_magnitude_vector"] => (path, Magnitude, false, None),
        // PEFT before 0.12 kept magnitudes by the adapter's name alone.
        [path @ .., "lora_magnitude_vector", adapter] => (path, Magnitude, false, Some(adapter)),
        [path @ .., "lora_a"] => (path, A, true, None),
        [path @ .., "lora_b"] => (path, B, true, None),
        [path @ .., name @ ("magnitude" | "m")] => {
            return of_path(path, Role::Magnitude((*name).to_owned()));
        }
        other => return read_other(other),
    };
    // The adapter's name, too, ends in messages.
    if !segments.iter().all(|segment| is_path(segment)) {
        return None;
    }
    let key = of_path(path, Role::Factor(factor))?;
    Some(ReadKey {
        transposed,
        adapter: adapter.map(|name| (*name).to_owned()),
        ..key
    })
}

/// The meaning of a key that is no factor's, without its prefix.
fn read_other(segments: &[&str]) -> Option<ReadKey> {
    let parameter = |module: &[&str], name: &str, role| of_path(&[module, &[name]].concat(), role);
    match segments {
        [path @ .., TOKEN_ADAPTER, TOKENS] | [path @ .., TOKEN_ADAPTER, TOKENS, _] => {
            of_path(path, Role::Rows)
        }
        [module @ .., TOKEN_ADAPTER, BASE_LAYER, name] => parameter(module, name, Role::Original),
        _ => {
            let inside = |name: &str| segments.iter().position(|segment| *segment == name);
            if let Some(place) = inside(ORIGINAL).filter(|place| place + 1 < segments.len()) {
                let path = [&segments[..place], &segments[place + 1..]].concat();
                return of_path(&path, Role::Original);
            }
            if let Some(place) = inside(SAVED).filter(|place| place + 1 < segments.len()) {
                let rest: Vec<_> = segments[place + 1..]
                    .iter()
                    .map(|s| (*s).to_owned())
                    .collect();
                return match rest.iter().all(|segment| is_path(segment)) {
                    true => of_path(&segments[..place], Role::Saved(rest)),
                    false => None,
                };
            }
            match segments {
                [module @ .., BASE_LAYER, name] => parameter(module, name, Role::Wrapped),
                [module @ .., name] => parameter(module, name, Role::Parameter),
                [] => None,
            }
        }
    }
}

fn of_path(path: &[&str], role: Role) -> Option<ReadKey> {
    let path = path.join(".");
    is_path(&path).then_some(ReadKey {
        path,
        role,
        transposed: false,
        adapter: None,
    })
}

/// Whether `path` is one or more dotted names, none of them empty or with control characters, which a terminal that
/// shows an error would obey.
pub(super) fn is_path(path: &str) -> bool {
    !path.split('.').any(str::is_empty) && !path.contains(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    const Q: &str = "model.layers.0.self_attn.q_proj";

    #[test]
    fn keys_are_peft_s() {
        let key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
        assert_eq!(tensor_key(Q, Factor::A), key);
        assert_eq!(parse_key(key), Some((Q, Factor::A)));
        let key = "base_model.model.lm_head.lora_B.weight";
        assert_eq!(tensor_key("lm_head", Factor::B), key);
        assert_eq!(parse_key(key), Some(("lm_head", Factor::B)));
        let key = "base_model.model.lm_head.lora_magnitude_vector";
        assert_eq!(tensor_key("lm_head", Factor::Magnitude), key);
        assert_eq!(parse_key(key), Some(("lm_head", Factor::Magnitude)));
    }

    #[test]
    fn keys_of_other_writers_are_read() {
        for (key, path, factor) in [
            ("base_model.model.a.q.lora_A.weight", "a.q", Factor::A),
            ("a.q.lora_A.weight", "a.q", Factor::A),
            (
                "base_model.model._orig_mod.a.q.lora_B.weight",
                "a.q",
                Factor::B,
            ),
            (
                "_orig_mod.base_model.model.a._orig_mod.q.lora_B.weight",
                "a.q",
                Factor::B,
            ),
            (
                "base_model.model.a.q.lora_A.default.weight",
                "a.q",
                Factor::A,
            ),
            (
                "base_model.model.a.q.lora_B.my adapter.weight",
                "a.q",
                Factor::B,
            ),
            ("a.q.lora_A", "a.q", Factor::A),
            (
                "base_model.model.a.q.lora_magnitude_vector",
                "a.q",
                Factor::Magnitude,
            ),
            (
                "base_model.model.a.q.lora_magnitude_vector.default.weight",
                "a.q",
                Factor::Magnitude,
            ),
            // The prefix is PEFT's once.
            (
                "base_model.model.base_model.model.q.lora_A.weight",
                "base_model.model.q",
                Factor::A,
            ),
        ] {
            let found = read_key(key).unwrap();
            assert_eq!(
                (&found.path[..], found.role),
                (path, Role::Factor(factor)),
                "{key}"
            );
            assert!(!found.transposed, "{key}");
        }
        for (key, factor, transposed) in [
            ("a.q.lora_a.weight", Factor::A, false),
            ("a.q.lora_b.weight", Factor::B, false),
            ("a.q.lora_down.weight", Factor::A, false),
            ("a.q.lora_up.weight", Factor::B, false),
            ("a.q.lora_a", Factor::A, true),
            ("a.q.lora_b", Factor::B, true),
        ] {
            let found = read_key(key).unwrap();
            assert_eq!(
                (&found.path[..], found.role),
                ("a.q", Role::Factor(factor)),
                "{key}"
            );
            assert_eq!(found.transposed, transposed, "{key}");
        }
        for name in ["magnitude", "m"] {
            let found = read_key(&format!("a.q.{name}")).unwrap();
            assert_eq!(
                (&found.path[..], found.role),
                ("a.q", Role::Magnitude(name.into()))
            );
        }
        for key in [
            "base_model.model.a.q.lora_A.other.weight",
            "base_model.model.a.q.lora_magnitude_vector.other",
            "base_model.model.a.q.lora_embedding_B.other",
        ] {
            assert_eq!(
                read_key(key).unwrap().adapter.as_deref(),
                Some("other"),
                "{key}"
            );
        }
        for key in [
            "module.base_model.model.a.q.lora_A.weight",
            "base_model.model.a._checkpoint_wrapped_module.q.lora_A.weight",
            "_fsdp_wrapped_module.base_model.model.a._fsdp_wrapped_module.q.lora_A.default.weight",
            "_forward_module.base_model.model.a.q.lora_A.weight",
        ] {
            assert_eq!(read_key(key).unwrap().path, "a.q", "{key}");
        }
        for key in [
            "",
            "lora_A.weight",
            "base_model.model.lora_A.weight",
            "base_model.model.q.lora_A..weight",
            "base_model.model..q.lora_A.weight",
            "base_model.model.q\u{1b}.lora_A.weight",
            "base_model.model.q.lora_A.\u{1b}.weight",
            "m",
            "magnitude",
            "base_model.model..weight",
            "base_model.model.q.\u{1b}.weight",
        ] {
            assert_eq!(read_key(key), None, "{key}");
        }
        let saved = |rest: &[&str]| Role::Saved(rest.iter().map(|s| (*s).to_owned()).collect());
        for (key, path, role) in [
            ("base_model.model.q.weight", "q.weight", Role::Parameter),
            (
                "base_model.model.q.base_layer.bias",
                "q.bias",
                Role::Wrapped,
            ),
            (
                "base_model.model.q.original_module.weight",
                "q.weight",
                Role::Original,
            ),
            (
                "base_model.model.q.original_module.a.weight",
                "q.a.weight",
                Role::Original,
            ),
            (
                "base_model.model.q.token_adapter.base_layer.weight",
                "q.weight",
                Role::Original,
            ),
            (
                "base_model.model.q.modules_to_save.default.bias",
                "q",
                saved(&["default", "bias"]),
            ),
            (
                "base_model.model.q.modules_to_save.default.dense.weight",
                "q",
                saved(&["default", "dense", "weight"]),
            ),
            (
                "base_model.model.q.lora_A.bias",
                "q.lora_A.bias",
                Role::Parameter,
            ),
            (
                "q.lora_A.a.b.weight",
                "q.lora_A.a.b.weight",
                Role::Parameter,
            ),
            ("q.magnitude.weight", "q.magnitude.weight", Role::Parameter),
        ] {
            let found = read_key(key).unwrap();
            assert_eq!((&found.path[..], found.role), (path, role), "{key}");
        }
        for key in [
            "base_model.model.a.embed.token_adapter.trainable_tokens_delta",
            "a.embed.token_adapter.trainable_tokens_delta.default",
        ] {
            let found = read_key(key).unwrap();
            assert_eq!(
                (&found.path[..], found.role),
                ("a.embed", Role::Rows),
                "{key}"
            );
        }
    }

    #[test]
    fn other_keys_are_no_factors() {
        for key in [
            "",
            "base_model.model.lora_A.weight",
            "base_model.model..lora_A.weight",
            "base_model.model.a..b.lora_A.weight",
            "base_model.model.a\x1bb.lora_A.weight",
            "model.q_proj.lora_A.weight",
            "base_model.model.q_proj.lora_A.default.weight",
            "base_model.model.q_proj.lora_A",
            "base_model.model.q_proj.lora_A.bias",
            "base_model.model.q_proj.lora_magnitude_vector.weight",
            "base_model.model.embed_tokens.weight",
            "base_model.model.q_proj.xlora_A.weight",
        ] {
            assert_eq!(parse_key(key), None, "{key}");
        }
    }
}
