//! How well a model answers held-out questions.

use std::error::Error;

use burn::module::Module;
use burn_peft::dataset::Example;
use burn_peft::rollout::{Sampler, Stop, generate};

use crate::args::Args;
use crate::data::Data;
use crate::loss;
use crate::prompt::{Prompter, question};
use crate::rouge::rouge_l;
use llama::estimate::Estimate;
use llama::model::LlamaForCausalLm;

/// Questions answered at a time.
const BATCH: usize = 32;

/// What the held-out triples say of a model.
pub struct Scores {
    /// Cross entropy per token of the right responses, in nats.
    pub loss: Estimate,
    /// Share of answers equal to the response but for white space around them.
    pub exact: Estimate,
    /// ROUGE-L of the answers.
    pub rouge: Estimate,
    /// Cross entropy per token of the base's own text, if there is one.
    pub text_loss: Option<f64>,
    /// The answers, one to each held-out triple.
    pub answers: Vec<String>,
}

/// Measures a model, adapters as they are. Answers are greedy.
pub fn evaluate(
    model: &LlamaForCausalLm,
    data: &Data,
    prompter: &Prompter,
    args: &Args,
) -> Result<Scores, Box<dyn Error>> {
    let model = model.valid();
    let device = model.devices()[0].clone();
    let mut losses = vec![(0.0, 0.0); data.heldout.len()];
    let mut answers = vec![String::new(); data.heldout.len()];

    let stop = Stop::new(args.max_new_tokens).with_tokens(prompter.eos.iter().copied());
    let mut decoder = model.decoder();
    // Rows of like length need the least padding.
    let mut order: Vec<usize> = (0..data.heldout.len()).collect();
    order.sort_by_key(|&index| data.heldout_examples[index].tokens().len());
    for indices in order.chunks(BATCH) {
        let examples: Vec<Example> = indices
            .iter()
            .map(|&index| data.heldout_examples[index].clone())
            .collect();
        let questions: Vec<Vec<u32>> = examples.iter().map(question).collect();
        let generated = generate(&mut decoder, &questions, 1, &Sampler::greedy(), &stop, 0)?;
        let by_example = loss::loss_by_example(&model, &examples, &device)?;
        for ((&index, tokens), loss) in indices.iter().zip(generated).zip(by_example) {
            answers[index] = prompter.text(tokens.without_stop_token(&stop))?;
            losses[index] = (loss::scalar(loss.sum)?, loss.count as f64);
        }
    }

    let answered = || {
        data.heldout
            .iter()
            .map(|triple| triple.response.trim())
            .zip(&answers)
    };
    Ok(Scores {
        loss: Estimate::ratio(&losses),
        exact: Estimate::mean(
            answered().map(|(right, answer)| f64::from(u8::from(right == answer))),
        ),
        rouge: Estimate::mean(answered().map(|(right, answer)| rouge_l(right, answer))),
        text_loss: if data.text.is_empty() {
            None
        } else {
            Some(loss::mean_loss(&model, &data.text, BATCH)?)
        },
        answers,
    })
}
