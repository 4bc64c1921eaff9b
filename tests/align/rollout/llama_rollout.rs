//! The Llama of the examples as what text is sampled from: dense, packed, under adapters; against full forward passes.

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use burn_peft::adapter::{LoraConfig, LoraInit};
use burn_peft::format::BaseOptions;
use burn_peft::model::{PeftConfig, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;
use burn_peft::rollout::{Completion, Draws, Sampler, Stop, generate};
use llama::model::LlamaForCausalLm;

fn load(name: &str, nf4: bool) -> LlamaForCausalLm {
    load_on(&Device::default(), name, nf4)
}

fn load_on(device: &Device, name: &str, nf4: bool) -> LlamaForCausalLm {
    let mut options = BaseOptions::new().with_dtype(FloatDType::F32);
    if nf4 {
        options = options.with_nf4(TargetConfig::all_linear(), Nf4Config::new());
    }
    let dir = super::golden("llama").join(name);
    LlamaForCausalLm::from_pretrained_with(dir, device, options)
        .unwrap()
        .1
}

/// Adapters that change the model, named `a` and `b`; `a` is active.
fn adapted(model: LlamaForCausalLm) -> PeftModel<LlamaForCausalLm> {
    let mut model = model.into_peft();
    for name in ["a", "b"] {
        let lora = LoraConfig::new(4)
            .with_alpha(16.0)
            .with_init(LoraInit::Random);
        let lora = lora.with_dropout(0.3);
        model
            .add_adapter(name, &PeftConfig::new(lora, TargetConfig::all_linear()))
            .unwrap();
    }
    model.set_adapter("a").unwrap();
    model
}

fn prompts() -> Vec<Vec<u32>> {
    vec![
        vec![3, 14, 15, 92, 65],
        vec![35],
        vec![8, 9, 7, 9, 3, 23, 84, 62, 6, 43, 38],
        vec![35],
    ]
}

fn stop() -> Stop<'static> {
    Stop::new(90).with_tokens([1, 90])
}

fn sampler() -> Sampler {
    Sampler::new().with_temperature(2.0)
}

fn run(
    model: &LlamaForCausalLm,
    prompts: &[Vec<u32>],
    copies: usize,
    sampler: &Sampler,
    draws: Draws,
) -> Vec<Completion> {
    generate(
        &mut model.decoder(),
        prompts,
        copies,
        sampler,
        &stop(),
        draws,
    )
    .unwrap()
}

/// `ln p` of the tokens of a completion by one forward pass over prompt and completion.
fn scored(model: &LlamaForCausalLm, prompt: &[u32], own: &Completion) -> Vec<f32> {
    let all: Vec<i64> = prompt
        .iter()
        .chain(&own.tokens)
        .map(|token| i64::from(*token))
        .collect();
    let seq = all.len();
    let tokens = Tensor::<2, Int>::from_data(TensorData::new(all, [1, seq]), &Device::default());
    let logits = model.forward(tokens);
    let vocabulary = logits.dims()[2];
    let logits: Vec<f32> = logits.into_data().iter().collect();
    let at = |at: usize| &logits[at * vocabulary..][..vocabulary];
    let log_prob = |(index, token): (usize, &u32)| {
        let row = at(prompt.len() - 1 + index);
        let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
        (f64::from(row[*token as usize]) - sum.ln()) as f32
    };
    own.tokens.iter().enumerate().map(log_prob).collect()
}

fn check_scores(model: &LlamaForCausalLm, prompts: &[Vec<u32>], completions: &[Completion]) {
    for own in completions {
        let expected = scored(model, &prompts[own.prompt], own);
        assert_eq!(own.log_probs.len(), expected.len());
        for (found, expected) in own.log_probs.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-4, "{found}, {expected}");
        }
    }
}

/// Rows that end early, rows that outgrow the first room of the cache, ragged prompts, copies.
#[test]
fn log_probs_are_those_of_a_full_forward_pass() {
    for name in ["untied", "tied"] {
        let model = load(name, false);
        let completions = run(&model, &prompts(), 3, &sampler(), Draws::new(1));
        check_scores(&model, &prompts(), &completions);
        let lens: Vec<usize> = completions.iter().map(|own| own.tokens.len()).collect();
        // The longest prompt has 11 tokens, and the cache room for 64 at first.
        assert!(lens.iter().any(|len| *len > 53), "{lens:?}");
        assert!(lens.iter().filter(|len| **len < 40).count() > 2, "{lens:?}");
    }
}

/// Alone, in a batch, and with other copies: the rows of these models differ by rounding at most, which moves no draw here.
#[test]
fn a_text_is_the_same_alone_and_in_a_batch() {
    for name in ["untied", "tied"] {
        let model = load(name, false);
        let prompts = prompts();
        for sampler in [Sampler::greedy(), sampler(), sampler().with_top_p(0.9)] {
            let draws = Draws::new(5).with_step(2);
            let together = run(&model, &prompts, 2, &sampler, draws);
            for own in &together {
                let draws = draws
                    .with_first_prompt(own.prompt as u64)
                    .with_first_copy(own.copy as u64);
                let alone = run(&model, &prompts[own.prompt..][..1], 1, &sampler, draws);
                assert_eq!(alone[0].tokens, own.tokens, "{name}, {sampler:?}");
                assert_eq!(alone[0].finish, own.finish);
                for (a, b) in alone[0].log_probs.iter().zip(&own.log_probs) {
                    assert!((a - b).abs() < 1e-4, "{a}, {b}");
                }
            }
        }
    }
}

#[test]
fn copies_of_a_prompt_are_as_separate_prompts() {
    let model = load("tied", false);
    let prompt = prompts().swap_remove(2);
    let together = run(
        &model,
        std::slice::from_ref(&prompt),
        5,
        &sampler(),
        Draws::new(8),
    );
    for (copy, own) in together.iter().enumerate() {
        let draws = Draws::new(8).with_first_copy(copy as u64);
        let separate = run(&model, &vec![prompt.clone(); 3], 1, &sampler(), draws);
        assert_eq!(separate[0].tokens, own.tokens);
    }
    let texts: std::collections::HashSet<_> = together.iter().map(|own| &own.tokens).collect();
    assert_eq!(texts.len(), 5);
}

/// A base in NF4, an adapter that is not merged, and another one between two calls. Dropout is off, whatever the model was in.
#[test]
fn packed_bases_and_adapters_are_sampled_as_they_are() {
    for name in ["untied", "tied"] {
        for nf4 in [false, true] {
            let mut model = adapted(load(name, nf4));
            let base = load(name, nf4);
            let run =
                |model: &LlamaForCausalLm| run(model, &prompts(), 2, &sampler(), Draws::new(4));
            let first = run(model.module());
            check_scores(model.module(), &prompts(), &first);
            model.set_adapter("b").unwrap();
            let second = run(model.module());
            check_scores(model.module(), &prompts(), &second);
            assert_ne!(first, second);
            model.set_adapter("a").unwrap();
            assert_eq!(run(model.module()), first);
            model.disable_adapters();
            assert_eq!(run(model.module()), run(&base));
        }
    }
}

/// A model in training has dropout and a graph; sampling has neither.
#[test]
fn a_model_in_training_is_sampled_without_dropout() {
    let device = Device::default().autodiff();
    let model = adapted(load_on(&device, "tied", true)).into_module();
    let completions = run(&model, &prompts(), 2, &sampler(), Draws::new(4));
    check_scores(
        &burn::module::Module::valid(&model),
        &prompts(),
        &completions,
    );
}

/// Positions count a row's own tokens, and a row's cache may grow several times.
#[test]
fn greedy_text_beyond_the_first_room_of_the_cache_is_that_of_full_passes() {
    let model = load("untied", false);
    let stop = Stop::new(150);
    let prompts = prompts();
    let completions = generate(
        &mut model.decoder(),
        &prompts,
        1,
        &Sampler::greedy(),
        &stop,
        0,
    );
    let completions = completions.unwrap();
    check_scores(&model, &prompts, &completions);
    assert!(completions.iter().all(|own| own.tokens.len() == 150));
    // Every token was the best of its place, up to rounding.
    assert!(
        completions
            .iter()
            .all(|own| own.sampled_log_probs.iter().all(|log| *log == 0.0))
    );
}
