//! Where names do not fit, the error proposes the rules under which they would, and says in few words what does not.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::tensor::Device;
use burn_peft::PeftError;
use burn_peft::format::{BASE_FILE, BaseMismatch, BaseOptions, Dtype, NameMap, Proposal};

use crate::base::files::{self, Dir};
use crate::base::model::tensor;

#[derive(Module, Debug)]
struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
}

#[derive(Module, Debug)]
struct Block {
    attention: Attention,
    norm: RmsNorm,
    up: Linear,
    down: Linear,
}

#[derive(Module, Debug)]
struct Model {
    embedding: Embedding,
    blocks: Vec<Block>,
    final_norm: RmsNorm,
    lm_head: Linear,
}

fn model(layers: usize) -> Model {
    let device = &Device::flex();
    let linear = |from, to| LinearConfig::new(from, to).with_bias(false).init(device);
    let norm = || RmsNormConfig::new(8).init(device);
    let block = |_| Block {
        attention: Attention {
            query: linear(8, 8),
            key: linear(8, 4),
            value: linear(8, 4),
            output: linear(8, 8),
        },
        norm: norm(),
        up: linear(8, 12),
        down: linear(12, 8),
    };
    Model {
        embedding: EmbeddingConfig::new(13, 8).init(device),
        blocks: (0..layers).map(block).collect(),
        final_norm: norm(),
        lm_head: linear(8, 13),
    }
}

/// The tensors of the model as a file of Llama's kind calls them, or as `change` makes it.
fn given(layers: usize, change: impl Fn(String) -> String) -> Vec<files::Tensor> {
    let mut names: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), vec![13, 8]),
        ("model.norm.weight".into(), vec![8]),
        ("lm_head.weight".into(), vec![13, 8]),
    ];
    for layer in 0..layers {
        for (name, shape) in [
            ("self_attn.q_proj", vec![8, 8]),
            ("self_attn.k_proj", vec![4, 8]),
            ("self_attn.v_proj", vec![4, 8]),
            ("self_attn.o_proj", vec![8, 8]),
            ("input_layernorm", vec![8]),
            ("up_proj", vec![12, 8]),
            ("down_proj", vec![8, 12]),
        ] {
            names.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let names = names.into_iter();
    names
        .map(|(name, shape)| tensor(&change(name), Dtype::F32, &shape))
        .collect()
}

fn mismatch(
    module: &mut impl Module,
    given: &[files::Tensor],
    options: &BaseOptions,
) -> (BaseMismatch, String) {
    let dir = Dir::new();
    dir.tensors(BASE_FILE, given);
    let error = dir.open().unwrap().load_into(module, options).unwrap_err();
    let text = error.to_string();
    match error {
        PeftError::BaseMismatch { report, .. } => (*report, text),
        other => panic!("{other}"),
    }
}

/// The proposal, which fits everything when it is followed.
fn proposed(module: &mut impl Module, given: &[files::Tensor]) -> Proposal {
    let (report, text) = mismatch(module, given, &BaseOptions::new());
    let proposal = report.proposal.unwrap_or_else(|| panic!("{text}"));
    let expected = format!("would fit with `.with_names({})", proposal.names);
    assert!(text.contains(&expected), "{text}");
    let dir = Dir::new();
    dir.tensors(BASE_FILE, given);
    let options = BaseOptions::new()
        .with_names(proposal.names.clone())
        .with_conv1d(proposal.conv1d.clone());
    let report = dir.open().unwrap().load_into(module, &options);
    let report = report.unwrap_or_else(|error| panic!("{}: {error}", proposal.names));
    assert_eq!(report.loaded.len(), proposal.fitting);
    proposal
}

/// A net whose fields are called as the files call them.
#[derive(Module, Debug)]
struct Flat {
    embed: Embedding,
    layers: Vec<Linear>,
    lm_head: Linear,
}

fn flat() -> Flat {
    let device = &Device::flex();
    let linear = |from, to| LinearConfig::new(from, to).with_bias(false).init(device);
    Flat {
        embed: EmbeddingConfig::new(13, 8).init(device),
        layers: vec![linear(8, 9), linear(8, 9)],
        lm_head: linear(8, 13),
    }
}

#[test]
fn a_prefix_is_proposed_with_what_it_needs_beside_it() {
    let tensors = [
        tensor("model.embed.weight", Dtype::F32, &[13, 8]),
        tensor("model.layers.0.weight", Dtype::F32, &[9, 8]),
        tensor("model.layers.1.weight", Dtype::F32, &[9, 8]),
        tensor("lm_head.weight", Dtype::F32, &[13, 8]),
    ];
    let proposal = proposed(&mut flat(), &tensors);
    assert_eq!(
        proposal.names,
        NameMap::new()
            .with_prefix("model", "")
            .with_prefix("lm_head", "lm_head")
    );
    assert_eq!((proposal.fitting, proposal.parameters), (4, 4));
    // Without the head of its own, the prefix alone.
    let proposal = {
        #[derive(Module, Debug)]
        struct Headless {
            embed: Embedding,
            layers: Vec<Linear>,
        }
        let Flat { embed, layers, .. } = flat();
        proposed(&mut Headless { embed, layers }, &tensors[..3])
    };
    assert_eq!(
        proposal.names.to_string(),
        r#"NameMap::new().with_prefix("model", "")"#
    );
}

#[test]
fn other_names_of_the_same_modules_are_found_by_shape_and_likeness() {
    let proposal = proposed(&mut model(3), &given(3, |name| name));
    assert_eq!((proposal.fitting, proposal.parameters), (24, 24));
    let (names, expected) = (
        &proposal.names,
        [
            (
                "model.layers.2.self_attn.q_proj",
                "blocks.2.attention.query",
            ),
            ("model.layers.0.self_attn.k_proj", "blocks.0.attention.key"),
            (
                "model.layers.1.self_attn.v_proj",
                "blocks.1.attention.value",
            ),
            (
                "model.layers.1.self_attn.o_proj",
                "blocks.1.attention.output",
            ),
            ("model.layers.1.input_layernorm", "blocks.1.norm"),
            ("model.layers.1.up_proj", "blocks.1.up"),
            ("model.embed_tokens", "embedding"),
            ("model.norm", "final_norm"),
            ("lm_head", "lm_head"),
        ],
    );
    for (file, module) in expected {
        assert_eq!(names.to_model(file).unwrap(), module, "{names}");
    }
    // Meta's names.
    let meta = |name: String| {
        [
            ("model.embed_tokens", "tok_embeddings"),
            ("model.norm", "norm"),
            ("model.layers", "layers"),
            ("self_attn.q_proj", "attention.wq"),
            ("self_attn.k_proj", "attention.wk"),
            ("self_attn.v_proj", "attention.wv"),
            ("self_attn.o_proj", "attention.wo"),
            ("input_layernorm", "attention_norm"),
            ("up_proj", "w3"),
            ("down_proj", "w2"),
            ("lm_head", "output"),
        ]
        .iter()
        .fold(name, |name, (from, to)| name.replace(from, to))
    };
    let proposal = proposed(&mut model(2), &given(2, meta));
    assert_eq!(proposal.fitting, 17);
    for (file, module) in [
        ("wq", "query"),
        ("wk", "key"),
        ("wv", "value"),
        ("wo", "output"),
    ] {
        let file = format!("layers.1.attention.{file}");
        let module = format!("blocks.1.attention.{module}");
        assert_eq!(
            proposal.names.to_model(&file).unwrap(),
            module,
            "{}",
            proposal.names
        );
    }
}

#[test]
fn a_conv1d_is_seen_by_its_shape() {
    let mut tensors = given(2, |name| {
        name.replace("self_attn", "attn").replace("up_proj", "c_fc")
    });
    for tensor in tensors
        .iter_mut()
        .filter(|tensor| tensor.name.contains("c_fc"))
    {
        tensor.shape.reverse();
    }
    let proposal = proposed(&mut model(2), &tensors);
    assert_eq!(proposal.conv1d, ["c_fc"]);
    assert_eq!(proposal.fitting, 17);
}

#[test]
fn without_a_rule_that_helps_none_is_proposed() {
    let tensors = [tensor("x", Dtype::F32, &[77])];
    let (report, text) = mismatch(&mut flat(), &tensors, &BaseOptions::new());
    assert_eq!(report.proposal, None);
    assert!(!text.contains("guess"), "{text}");
}

#[test]
fn a_model_of_more_layers_than_the_file_is_told_so() {
    let names = NameMap::new()
        .with_prefix("model", "")
        .with_prefix("lm_head", "lm_head")
        .with_renames([
            ("embed_tokens", "embedding"),
            ("layers", "blocks"),
            ("self_attn", "attention"),
            ("q_proj", "query"),
            ("k_proj", "key"),
            ("v_proj", "value"),
            ("o_proj", "output"),
            ("input_layernorm", "norm"),
            ("up_proj", "up"),
            ("down_proj", "down"),
        ])
        .with_prefix("model.norm", "final_norm");
    let options = BaseOptions::new().with_names(names);
    let (_, text) = mismatch(&mut model(30), &given(2, |name| name), &options);
    let expected = "196 missing: `model.layers.{2..29}.*` (all of layers 2 to 29: was the file made for a smaller model?)";
    assert!(text.contains(expected), "{text}");
    assert!(text.len() < 600, "{text}");
    let (_, text) = mismatch(&mut model(2), &given(4, |name| name), &options);
    assert!(
        text.contains("(all of layers 2 to 3: was the file made for a larger model?)"),
        "{text}"
    );
}
