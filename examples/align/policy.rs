//! The model as a policy: an adapter on a packed base, its log-probabilities, and completions sampled from it.

use std::error::Error;

use burn::module::Module;
use burn::tensor::Device;
use burn_peft::adapter::LoraConfig;
use burn_peft::dataset::{Example, PaddedBatcher};
use burn_peft::format::BaseOptions;
use burn_peft::model::{DEFAULT_ADAPTER, PeftConfig, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;
use burn_peft::objective::{Labels, LogProbs, LogProbsConfig};
use burn_peft::rollout::{Completion, Draws, Sampler, Stop, generate};
use llama::attention::Layout;
use llama::model::LlamaForCausalLm;

use crate::answers::Data;
use crate::args::Args;

/// A Llama under an adapter.
pub type Policy = PeftModel<LlamaForCausalLm>;

/// The most new tokens of an answer.
const MOST_TOKENS: usize = 16;

/// Rows in memory at a time where nothing is trained.
const ROWS: usize = 128;

/// The base packed in NF4, with a fresh adapter of this seed on its linear layers.
pub fn fresh(args: &Args, device: &Device, seed: u64) -> Result<Policy, Box<dyn Error>> {
    let nf4 = Nf4Config::new().with_double_quant(true);
    let options = BaseOptions::new()
        .with_dtype(device.settings().float_dtype)
        .with_nf4(TargetConfig::all_linear(), nf4);
    let (_, llama) = LlamaForCausalLm::from_pretrained_with(&args.model, device, options)?;
    let mut model = llama.into_peft();
    device.seed(seed);
    let lora = LoraConfig::new(args.rank).with_alpha(2.0 * args.rank as f64);
    let config = PeftConfig::new(lora, TargetConfig::all_linear());
    model.add_adapter(DEFAULT_ADAPTER, &config)?;
    Ok(model)
}

/// A prompt and a completion, of which the completion is what counts.
pub fn example(prompt: &[u32], completion: &[u32]) -> burn_peft::Result<Example> {
    let tokens = [prompt, completion].concat();
    let supervised = (0..tokens.len()).map(|at| at >= prompt.len()).collect();
    Example::new(tokens, supervised)
}

/// Log-probabilities of what counts of the examples, one sequence each, without the logits in memory.
pub fn log_probs(
    model: &LlamaForCausalLm,
    examples: &[Example],
    config: &LogProbsConfig,
) -> burn_peft::Result<LogProbs> {
    let device = model.devices()[0].clone();
    // Any token pads: padding is told by its place.
    let batch = PaddedBatcher::new(0).collate(examples);
    let labels = Labels::of(&batch.labels())?;
    let layout = Layout::causal(batch.columns, 0, &device);
    let tokens = batch.to_device(&device).tokens;
    let hidden = model.model.forward(tokens, &layout, None);
    model.log_probs(hidden, &labels, config)
}

/// The same without gradients and in parts, as numbers by sequence.
pub fn scored(model: &Policy, examples: &[Example]) -> burn_peft::Result<Vec<Vec<f32>>> {
    let model = model.valid();
    let mut rows = Vec::with_capacity(examples.len());
    for part in examples.chunks(ROWS) {
        let values = log_probs(&model, part, &LogProbsConfig::new())?.to_ragged()?;
        rows.extend(values.rows().map(<[f32]>::to_vec));
    }
    Ok(rows)
}

/// Completions of every prompt, sampled from the model as it is.
pub fn sample(
    model: &Policy,
    prompts: &[Vec<u32>],
    copies: usize,
    sampler: &Sampler,
    data: &Data,
    draws: Draws,
) -> burn_peft::Result<Vec<Completion>> {
    let model = model.valid();
    let stop = Stop::new(MOST_TOKENS).with_tokens([data.end]);
    let mut completions = Vec::with_capacity(prompts.len() * copies);
    let at_once = (ROWS / copies).max(1);
    for (part, prompts) in prompts.chunks(at_once).enumerate() {
        let first = part * at_once;
        let draws = draws.with_first_prompt(first as u64);
        let sampled = generate(&mut model.decoder(), prompts, copies, sampler, &stop, draws)?;
        completions.extend(sampled.into_iter().map(|own| Completion {
            prompt: first + own.prompt,
            ..own
        }));
    }
    Ok(completions)
}
