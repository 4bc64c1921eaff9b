//! Which layers of a model have a row for each token of a vocabulary: the input embedding and the output head.
//!
//! Models call them as they like (`embed_tokens`, `wte`, `word_embeddings`, `shared`; `lm_head`, `embed_out`, `proj_out`), so
//! they are told by the kind and the shape of a layer, and by a name only where these leave a choice.

use super::parameters::is_named;
use crate::layer::LayerKind;

/// Name of the output head in most models.
pub(crate) const DEFAULT_HEAD: &str = "lm_head";

/// What input embeddings are called, in the order in which a name counts where a model has several embeddings.
const EMBEDDINGS: [&str; 15] = [
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "token_embedding",
    "token_embeddings",
    "embed_in",
    "shared",
    "word_embedding",
    "token_emb",
    "tokens",
    "token",
    "words",
    "embedding",
    "embeddings",
];

/// Parts of names of embeddings that are of something else than tokens.
const OF_OTHERS: [&str; 7] = [
    "pos", "wpe", "type", "segment", "distance", "relative", "bias",
];

/// What output heads are called beside [`DEFAULT_HEAD`]. Other layers have these names too, so that a head's shape is asked for.
const HEADS: [&str; 9] = [
    "embed_out",
    "proj_out",
    "output_projection",
    "output",
    "unembed",
    "unembedding",
    "vocab_proj",
    "head",
    "lm_projection",
];

/// What is known of a layer that may have a row for each token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TokenLayer<'a> {
    /// Path of its module.
    pub module: &'a str,
    pub kind: LayerKind,
    /// `[tokens, features]` of an embedding, `[features, tokens]` of a linear layer.
    pub dims: [usize; 2],
}

/// The embeddings of a model, as an error says them.
pub(crate) fn found(embeddings: &[&str]) -> String {
    let named: Vec<_> = embeddings.iter().map(|path| format!("`{path}`")).collect();
    match named.is_empty() {
        true => "no embedding".into(),
        false => format!("the embeddings {}", named.join(", ")),
    }
}

/// The embedding of the input: the only one; or else the only one of the first usual name that the model has; or else the
/// one with the most rows whose name does not say that it is of positions or types.
///
/// # Errors
///
/// The paths of all embeddings if there is none or the input's is not clear.
pub(crate) fn input_embedding<'a>(
    layers: &[TokenLayer<'a>],
) -> Result<TokenLayer<'a>, Vec<&'a str>> {
    let embeddings = layers
        .iter()
        .filter(|layer| layer.kind == LayerKind::Embedding);
    let embeddings: Vec<TokenLayer> = embeddings.copied().collect();
    if let [only] = embeddings[..] {
        return Ok(only);
    }
    for name in EMBEDDINGS {
        let named = embeddings
            .iter()
            .filter(|layer| is_named(layer.module, name));
        match named.collect::<Vec<_>>()[..] {
            [] => {}
            [only] => return Ok(*only),
            _ => break,
        }
    }
    let of_tokens = || {
        embeddings.iter().filter(|layer| {
            let name = layer.module.rsplit('.').next().unwrap_or_default();
            let name = name.to_ascii_lowercase();
            !OF_OTHERS.iter().any(|other| name.contains(other))
        })
    };
    let rows = of_tokens().map(|layer| layer.dims[0]).max();
    let largest = of_tokens().filter(|layer| Some(layer.dims[0]) == rows);
    match largest.collect::<Vec<_>>()[..] {
        [only] => Ok(*only),
        _ => Err(embeddings.iter().map(|layer| layer.module).collect()),
    }
}

/// The output head: the first linear layer that `name` means; without a name the first that is called [`DEFAULT_HEAD`], or else
/// the only one of another usual name whose outputs are as many as the input embedding has tokens.
pub(crate) fn output_head<'a>(layers: &[TokenLayer<'a>], name: Option<&str>) -> Option<&'a str> {
    let linear = || {
        layers
            .iter()
            .filter(|layer| layer.kind == LayerKind::Linear)
    };
    let called = |name: &str| linear().find(|layer| is_named(layer.module, name));
    if let Some(head) = called(name.unwrap_or(DEFAULT_HEAD)) {
        return Some(head.module);
    }
    if name.is_some() {
        return None;
    }
    let [tokens, features] = input_embedding(layers).ok()?.dims;
    let mut heads = linear().filter(|layer| {
        layer.dims == [features, tokens] && HEADS.iter().any(|name| is_named(layer.module, name))
    });
    match (heads.next(), heads.next()) {
        (Some(only), None) => Some(only.module),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn embedding(module: &str, tokens: usize) -> TokenLayer<'_> {
        TokenLayer {
            module,
            kind: LayerKind::Embedding,
            dims: [tokens, 8],
        }
    }

    fn linear(module: &str, dims: [usize; 2]) -> TokenLayer<'_> {
        TokenLayer {
            module,
            kind: LayerKind::Linear,
            dims,
        }
    }

    fn input<'a>(layers: &[TokenLayer<'a>]) -> Result<&'a str, Vec<&'a str>> {
        input_embedding(layers).map(|layer| layer.module)
    }

    #[test]
    fn the_input_embedding_is_the_only_one_or_the_usual_one_or_the_largest() {
        assert_eq!(input(&[embedding("anything", 3)]), Ok("anything"));
        let gpt2 = [embedding("wpe", 16), embedding("wte", 13)];
        assert_eq!(input(&gpt2), Ok("wte"));
        let unusual = [embedding("places", 16), embedding("vocabulary", 100)];
        assert_eq!(input(&unusual), Ok("vocabulary"));
        let few = [embedding("positions", 512), embedding("amino_acids", 33)];
        assert_eq!(input(&few), Ok("amino_acids"));
        assert!(input(&[embedding("a", 9), embedding("b", 9)]).is_err());
        let two = [
            embedding("encoder.embed_tokens", 9),
            embedding("decoder.embed_tokens", 9),
        ];
        assert_eq!(
            input(&two),
            Err(vec!["encoder.embed_tokens", "decoder.embed_tokens"])
        );
        assert_eq!(input(&[linear("embed_tokens", [8, 8])]), Err(vec![]));
    }

    #[test]
    fn the_head_is_what_is_called_so_or_has_its_name_and_shape() {
        let words = embedding("words", 100);
        let head = |layers: &[TokenLayer<'static>], name| output_head(layers, name);
        let lm_head = linear("lm_head", [4, 4]);
        assert_eq!(head(&[lm_head], None), Some("lm_head"));
        let out = linear("embed_out", [8, 100]);
        assert_eq!(head(&[words, out], None), Some("embed_out"));
        assert_eq!(head(&[words, out, lm_head], None), Some("lm_head"));
        assert_eq!(head(&[words, out], Some("lm_head")), None);
        assert_eq!(head(&[words, linear("x", [2, 3])], Some("x")), Some("x"));
        // A name alone, or a shape alone, or two of them, are no head.
        assert_eq!(head(&[words, linear("output", [8, 99])], None), None);
        assert_eq!(head(&[words, linear("up", [8, 100])], None), None);
        let two = [
            words,
            linear("a.output", [8, 100]),
            linear("b.output", [8, 100]),
        ];
        assert_eq!(head(&two, None), None);
    }
}
