//! The main job: fine-tunes a Llama on instruction triples by QLoRA, shows what that changed, and saves a PEFT adapter.
//!
//! ```text
//! cargo run --release --example finetune                                  the small model and the data of examples/data
//! cargo run --release --example finetune -- --compare                     the same by QLoRA, LoRA and full fine-tuning
//! cargo run --release --example finetune -- --model DIR --data FILE       a real model and your data
//! cargo run --release --example finetune -- --checkpoint FILE             a run that may be stopped, and goes on
//! ```
//!
//! The base is read, packed in NF4 with double quantisation, and gets LoRA on all of its linear layers. AdamW trains the
//! adapter on the responses only. Held-out triples are answered before and after, the adapter is saved, loaded into a fresh
//! base and held to give the same logits, and the loss curve is drawn.

mod args;
mod compare;
mod data;
mod eval;
mod loss;
mod model;
mod plot;
mod prompt;
mod report;
mod rouge;
mod schedule;
mod train;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft::dataset::Example;

use args::Args;
use data::Data;
use llama::arguments;
use llama::config::LlamaConfig;
use llama::model::LlamaForCausalLm;
use llama::tokenizer::Tokenizer;
use model::Method;
use prompt::Prompter;

fn main() -> ExitCode {
    let args = arguments::parse();
    // In Rayon's pool, which Burn's CPU backend and the kernels share: its threads need not be woken for each operation.
    rayon::scope(|_| arguments::exit(run(&args)))
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    args.check()?;
    let device = Device::default().autodiff();
    let prompter = Prompter::new(
        Tokenizer::from_dir(&args.model)?,
        &LlamaConfig::from_dir(&args.model)?,
        args,
    )?;
    let data = Data::load(args, &prompter)?;
    if args.compare {
        model::check_adapter(args, &device)?;
        return compare::compare(args, &data, &prompter, &device);
    }

    let method = Method::of(args);
    model::check_adapter(args, &device)?;
    let mut table = vec![report::table_head()];
    let base = model::base(args, method, &device)?;
    let before = eval::evaluate(&base, &data, &prompter, args)?;
    drop(base);
    let base_name = args.few_shot.map_or("base".into(), |shots| {
        format!("base, {shots} examples in the prompt")
    });
    table.push(report::row(&base_name, &before));
    if args.few_shot.is_some() {
        println!("{}", table.join("\n"));
        return Ok(());
    }

    let model = model::trainable(args, method, args.seed, &device)?;
    println!("{}", model.report());
    let run = train::Run {
        train: &data.train,
        heldout: &data.heldout_examples,
        lr: args.lr,
        seed: args.seed,
    };
    let (model, curve) = train::train(model, &device, &run, args)?;
    println!(
        "{} steps, {} tokens in {:.0} s",
        args.steps,
        curve.tokens,
        curve.time.as_secs_f64()
    );
    println!("{}", report::memory(&model.report()));

    let after = eval::evaluate(&model, &data, &prompter, args)?;
    let name = if args.shuffle_responses {
        "adapter, responses shuffled"
    } else {
        "adapter"
    };
    table.push(report::row(name, &after));
    println!(
        "{}",
        report::answers(&data.heldout, &before.answers, &after.answers, 6)
    );
    println!("{}", table.join("\n"));
    println!(
        "in brackets the 95 % confidence interval over {} held-out triples, by bootstrap",
        after.loss.n
    );

    model::save(&model, args)?;
    let title = format!(
        "{} of {} on {}",
        method.name(),
        name_of(&args.model),
        name_of(&args.data)
    );
    plot::loss_curve(&curve, &title, &args.out.join("loss.png"))?;
    let fresh = model::reload(args, method, &args.out, &device)?;
    for example in data.heldout_examples.iter().take(4) {
        let (trained, loaded) = (
            logits(&model, example, &device),
            logits(&fresh, example, &device),
        );
        let differences = trained.iter().zip(&loaded).map(|(a, b)| (a - b).abs());
        if trained != loaded {
            let largest = differences.fold(0.0, f32::max);
            return Err(format!(
                "saved and loaded again, the adapter gives other logits: they differ by {largest}"
            )
            .into());
        }
    }
    println!(
        "adapter and loss.png are in {}; loaded into a fresh base, it gives the same logits",
        args.out.display()
    );
    Ok(())
}

/// Logits of one example, without gradients.
fn logits(model: &LlamaForCausalLm, example: &Example, device: &Device) -> Vec<f32> {
    let tokens: Vec<i64> = example.tokens().iter().map(|&token| token.into()).collect();
    let shape = [1, tokens.len()];
    let tokens =
        Tensor::<2, Int>::from_data(TensorData::new(tokens, shape), device).without_autodiff();
    model
        .valid()
        .forward(tokens)
        .into_data()
        .iter::<f32>()
        .collect()
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    fn args(more: &[&str]) -> Args {
        let few = "finetune --steps 3 --batch 2 --eval 2 --max-new-tokens 1";
        let few: Vec<&str> = few.split(' ').chain(more.iter().copied()).collect();
        arguments::parse_from(&few).unwrap()
    }

    fn error(more: &[&str]) -> String {
        run(&args(more)).unwrap_err().to_string()
    }

    #[test]
    fn a_run_that_diverges_stops_at_its_step_and_leaves_no_adapter() {
        let scratch = tempfile::tempdir().unwrap();
        let out = scratch.path().join("out");
        let error = error(&["--lr", "1e300", "--out", out.to_str().unwrap()]);
        assert!(error.starts_with("step 2: the loss is NaN"), "{error}");
        assert!(error.contains("smaller learning rate"), "{error}");
        assert!(error.contains("--lr"), "{error}");
        assert!(!out.exists());
    }

    #[test]
    fn an_adapter_that_cannot_be_made_or_saved_is_found_before_any_work() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("file");
        std::fs::write(&file, "").unwrap();
        let below = file.join("out");
        let out = scratch.path().join("out");
        let out = out.to_str().unwrap();
        // Measured against the whole run, which takes some seconds even with three steps.
        let started = Instant::now();
        let message = error(&["--out", below.to_str().unwrap()]);
        assert!(message.starts_with("--out: cannot be written"), "{message}");
        let message = error(&["--out", out, "--targets", "query"]);
        assert!(
            message.contains("`query`") && message.contains("q_proj"),
            "{message}"
        );
        assert!(started.elapsed() < Duration::from_secs(20));
        assert!(!scratch.path().join("out").exists());
    }
}
