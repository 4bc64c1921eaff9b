//! PEFT's tensor keys, and the module paths in them.
//!
//! PEFT writes the two factors of the linear module at `PATH`, and DoRA's magnitude, as
//!
//! ```text
//! base_model.model.PATH.lora_A.weight   [r, d_in]
//! base_model.model.PATH.lora_B.weight   [d_out, r]
//! base_model.model.PATH.lora_magnitude_vector   [d_out]
//! ```
//!
//! where `PATH` is the module's path in the Hugging Face model, for instance `model.layers.0.self_attn.q_proj`. The
//! adapter's name is not in the key. A Burn model may name its modules otherwise: a [`NameMap`](super::NameMap) says how.

/// What PEFT puts before every module path.
pub const PREFIX: &str = "base_model.model.";
const SUFFIX_A: &str = ".lora_A.weight";
const SUFFIX_B: &str = ".lora_B.weight";
const SUFFIX_MAGNITUDE: &str = ".lora_magnitude_vector";

/// One of the two factors of `ΔW = s·B·A`, or DoRA's magnitude.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Factor {
    /// `[r, d_in]` in the file.
    A,
    /// `[d_out, r]` in the file.
    B,
    /// `[d_out]`, of DoRA only.
    Magnitude,
}

impl Factor {
    /// Those that a module of an adapter has.
    pub(super) fn of(dora: bool) -> &'static [Self] {
        const ALL: [Factor; 3] = [Factor::A, Factor::B, Factor::Magnitude];
        match dora {
            false => &ALL[..2],
            true => &ALL,
        }
    }

    /// The shape in the file.
    pub(super) fn shape(self, rank: usize, [d_in, d_out]: [usize; 2]) -> Vec<usize> {
        match self {
            Self::A => vec![rank, d_in],
            Self::B => vec![d_out, rank],
            Self::Magnitude => vec![d_out],
        }
    }
}

/// The key of a factor of the module at `path`.
pub fn tensor_key(path: &str, factor: Factor) -> String {
    let suffix = match factor {
        Factor::A => SUFFIX_A,
        Factor::B => SUFFIX_B,
        Factor::Magnitude => SUFFIX_MAGNITUDE,
    };
    format!("{PREFIX}{path}{suffix}")
}

/// The module path and the factor in `key`, or `None` for a key that is no factor of a linear module.
pub fn parse_key(key: &str) -> Option<(&str, Factor)> {
    let key = key.strip_prefix(PREFIX)?;
    let (path, factor) = [
        (SUFFIX_A, Factor::A),
        (SUFFIX_B, Factor::B),
        (SUFFIX_MAGNITUDE, Factor::Magnitude),
    ]
    .into_iter()
    .find_map(|(suffix, factor)| Some((key.strip_suffix(suffix)?, factor)))?;
    is_path(path).then_some((path, factor))
}

/// What a key of a file means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ReadKey {
    /// The module's path.
    pub path: String,
    pub factor: Factor,
    /// Whether the tensor is stored `[d_in, r]` or `[r, d_out]`, in place of PyTorch's layout.
    pub transposed: bool,
}

/// The meaning of a key as one of the writers has it whose files are read; `None` for any other.
///
/// Besides PEFT's own form these are: without the prefix `base_model.model.`; with `_orig_mod` somewhere, of a model that
/// `torch.compile` has wrapped; with the adapter's name behind the factor's, `PATH.lora_A.NAME.weight`, as in a state of the model
/// itself; without `.weight`, as loralib's; torchtune's `lora_a.weight`, `lora_b.weight` and `magnitude`; and mlx-lm's `lora_a`,
/// `lora_b` and `m`, whose factors are transposed.
pub(super) fn read_key(key: &str) -> Option<ReadKey> {
    let factor = |name: &str| match name {
        "lora_A" => Some(Factor::A),
        "lora_B" => Some(Factor::B),
        "lora_magnitude_vector" => Some(Factor::Magnitude),
        _ => None,
    };
    let torchtune = |name: &str| match name {
        "lora_a" => Some(Factor::A),
        "lora_b" => Some(Factor::B),
        _ => None,
    };
    let segments = key.split('.').filter(|segment| *segment != "_orig_mod");
    let segments: Vec<&str> = segments.collect();
    let segments = match &segments[..] {
        ["base_model", "model", rest @ ..] => rest,
        all => all,
    };
    let (path, factor, transposed) = match segments {
        [path @ .., name, "weight"] if factor(name).is_some() => (path, factor(name)?, false),
        [path @ .., name, "weight"] if torchtune(name).is_some() => (path, torchtune(name)?, false),
        [path @ .., name, adapter, "weight"] if is_path(adapter) => (path, factor(name)?, false),
        [path @ .., name] if factor(name).is_some() => (path, factor(name)?, false),
        [path @ .., name] if torchtune(name).is_some() => (path, torchtune(name)?, true),
        [path @ .., "magnitude" | "m"] => (path, Factor::Magnitude, false),
        _ => return None,
    };
    let path = path.join(".");
    is_path(&path).then_some(ReadKey {
        path,
        factor,
        transposed,
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
            let expected = ReadKey {
                path: path.into(),
                factor,
                transposed: false,
            };
            assert_eq!(read_key(key), Some(expected), "{key}");
        }
        for (key, factor, transposed) in [
            ("a.q.lora_a.weight", Factor::A, false),
            ("a.q.lora_b.weight", Factor::B, false),
            ("a.q.magnitude", Factor::Magnitude, false),
            ("a.q.lora_a", Factor::A, true),
            ("a.q.lora_b", Factor::B, true),
            ("a.q.m", Factor::Magnitude, false),
        ] {
            let expected = ReadKey {
                path: "a.q".into(),
                factor,
                transposed,
            };
            assert_eq!(read_key(key), Some(expected), "{key}");
        }
        for key in [
            "",
            "lora_A.weight",
            "base_model.model.lora_A.weight",
            "base_model.model.q.weight",
            "base_model.model.q.lora_A.bias",
            "base_model.model.q.lora_A.a.b.weight",
            "base_model.model.q.lora_A..weight",
            "base_model.model..q.lora_A.weight",
            "base_model.model.q.lora_embedding_A",
            "base_model.model.q\u{1b}.lora_A.weight",
            "base_model.model.q.lora_A.\u{1b}.weight",
            "m",
            "magnitude",
            "q.lora_a.bias",
            "q.magnitude.weight",
        ] {
            assert_eq!(read_key(key), None, "{key}");
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
            "base_model.model.q_proj.lora_B.bias",
            "base_model.model.q_proj.lora_magnitude_vector.weight",
            "base_model.model.embed_tokens.lora_embedding_A",
            "base_model.model.q_proj.xlora_A.weight",
        ] {
            assert_eq!(parse_key(key), None, "{key}");
        }
    }
}
