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
mod estimate;
mod eval;
mod loss;
mod model;
mod plot;
mod prompt;
mod report;
mod rouge;
mod schedule;
mod text;
mod train;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft::dataset::Example;
use clap::Parser;

use args::Args;
use data::Data;
use llama::config::LlamaConfig;
use llama::model::LlamaForCausalLm;
use llama::tokenizer::Tokenizer;
use model::Method;
use prompt::Prompter;

fn main() -> ExitCode {
    let args = Args::parse();
    // In Rayon's pool, which Burn's CPU backend and the kernels share: its threads need not be woken for each operation.
    rayon::scope(|_| match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    })
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let device = Device::default().autodiff();
    let prompter = Prompter::new(
        Tokenizer::from_dir(&args.model)?,
        &LlamaConfig::from_dir(&args.model)?,
        args,
    )?;
    let data = Data::load(args, &prompter)?;
    if args.compare {
        return compare::compare(args, &data, &prompter, &device);
    }

    let method = Method::of(args);
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
