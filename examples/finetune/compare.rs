//! QLoRA, LoRA and full fine-tuning at the same data and steps: what each learns, and what it forgets.

use std::error::Error;

use burn::tensor::Device;

use crate::args::Args;
use crate::data::Data;
use crate::eval::{Scores, evaluate};
use crate::model::{Method, base, trainable};
use crate::prompt::Prompter;
use crate::train::{Run, train};

/// Trains every method with every seed and prints one table. Adapters stay enabled on the base's own text.
pub fn compare(
    args: &Args,
    data: &Data,
    prompter: &Prompter,
    device: &Device,
) -> Result<(), Box<dyn Error>> {
    let seeds: Vec<u64> = (args.seed..args.seed + args.seeds).collect();
    let mut rows = vec![
        "| model | trained parameters | held-out loss | exact match, % | ROUGE-L, % | loss on the base's own text | seconds |".into(),
        "|---|---|---|---|---|---|---|".into(),
    ];
    for (name, method) in [("base", Method::Full), ("base, NF4", Method::QLora)] {
        let model = base(args, method, device)?;
        let scores = evaluate(&model, data, prompter, args)?;
        rows.push(row(name, 0, &[scores], &[]));
    }
    for method in [Method::QLora, Method::Lora, Method::Full] {
        let (mut scores, mut seconds, mut trained) = (Vec::new(), Vec::new(), 0);
        for &seed in &seeds {
            let model = trainable(args, method, seed, device)?;
            let lr = if method == Method::Full {
                args.full_lr
            } else {
                args.lr
            };
            let run = Run {
                train: &data.train,
                heldout: &[],
                lr,
                seed,
            };
            let (model, curve) = train(model, device, &run, args)?;
            // Counted now, as weights are read at their first use.
            trained = model.report().trainable_params;
            scores.push(evaluate(&model, data, prompter, args)?);
            seconds.push(curve.time.as_secs_f64());
            println!(
                "{}, seed {seed}: exact match {:.1} %",
                method.name(),
                100.0 * scores[scores.len() - 1].exact.value
            );
        }
        rows.push(row(method.name(), trained, &scores, &seconds));
    }
    println!(
        "\n{} steps of {}, learning rate {} (full fine-tuning {}), {} held-out triples; mean over seeds {seeds:?}, in brackets lowest to highest\n\n{}",
        args.steps,
        args.batch,
        args.lr,
        args.full_lr,
        data.heldout.len(),
        rows.join("\n")
    );
    Ok(())
}

fn row(name: &str, trained: usize, scores: &[Scores], seconds: &[f64]) -> String {
    let over =
        |value: &dyn Fn(&Scores) -> f64, digits| spread(scores.iter().map(value).collect(), digits);
    [
        name.to_owned(),
        trained.to_string(),
        over(&|scores| scores.loss.value, 3),
        over(&|scores| 100.0 * scores.exact.value, 1),
        over(&|scores| 100.0 * scores.rouge.value, 1),
        over(&|scores| scores.text_loss.unwrap_or(f64::NAN), 3),
        spread(seconds.to_vec(), 0),
    ]
    .iter()
    .fold("|".into(), |row, cell| row + " " + cell + " |")
}

/// Mean, and the range if there is one.
fn spread(values: Vec<f64>, digits: usize) -> String {
    if values.is_empty() {
        return "-".into();
    }
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let (low, high) = values
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
            (low.min(*v), high.max(*v))
        });
    if values.len() == 1 {
        return format!("{mean:.digits$}");
    }
    format!("{mean:.digits$} [{low:.digits$}, {high:.digits$}]")
}
