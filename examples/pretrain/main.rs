//! Trains the small base model of the default fine-tune from nothing: `cargo run --release --example pretrain`.
//!
//! It reads the declarative sentences of `examples/data/pretrain.txt` (made by the example `make_data`), trains a tokenizer and
//! a Llama on them, and writes both as a Hugging Face directory. It never sees an instruction with its answer.

mod args;
#[path = "../finetune/loss.rs"]
mod loss;
#[path = "../finetune/schedule.rs"]
mod schedule;
mod tokenizer;

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use burn::grad_clipping::GradientClippingConfig;
use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::Device;
use burn_peft::dataset::{Instruction, chatml_prompt, read_json_lines};
use burn_peft::optim::{check_gradients, check_loss};
use indicatif::{ProgressBar, ProgressStyle};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use args::Args;
use llama::arguments;
use llama::config::LlamaConfig;
use llama::save::SavedType;
use llama::text;
use llama::tokenizer::Tokenizer;

fn main() -> ExitCode {
    arguments::exit(run(&arguments::parse()).map_err(|error| -> Box<dyn Error> { error }))
}

fn run(args: &Args) -> Result<(), Box<dyn Error + Send + Sync>> {
    args.check()?;
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("data");
    let pretrain = fs::read_to_string(data.join("pretrain.txt"))?;
    let heldout = fs::read_to_string(data.join("pretrain_heldout.txt"))?;

    // The tokenizer also knows how prompts are worded, so that they are short; the model does not.
    let mut texts: Vec<String> = pretrain.lines().map(str::to_owned).collect();
    for triple in read_json_lines::<Instruction>(data.join("train.jsonl"))? {
        texts.push(chatml_prompt(&triple.messages()[..1]));
    }
    fs::create_dir_all(&args.out)?;
    tokenizer::train(&texts, 1024, &args.out)?;
    let tokenizer = Tokenizer::from_dir(&args.out)?;
    let end = tokenizer
        .token("<|im_end|>")
        .ok_or("the tokenizer has no end token")?;

    let device = Device::default();
    device.seed(args.seed);
    let device = device.autodiff();
    let mut config = LlamaConfig::new(1024, 128, 384, 4, 4, 2);
    config.eos_token_ids = vec![end];
    let mut model = config.init(&device);
    let mut optimizer = AdamWConfig::new()
        .with_beta_2(0.98)
        .with_weight_decay(0.1)
        .with_grad_clipping(Some(GradientClippingConfig::Norm(1.0)))
        .init();

    let heldout = text::windows(heldout.lines(), &tokenizer, end, args.seq_len)?;
    let mut rng = StdRng::seed_from_u64(args.seed);
    let mut sentences: Vec<&str> = pretrain.lines().collect();
    let mut waiting = Vec::new();
    let bar = ProgressBar::new(args.steps as u64).with_style(ProgressStyle::with_template(
        "{bar:30} {pos}/{len} loss {msg}, {eta} left",
    )?);
    for step in 1..=args.steps {
        // Every pass sees the sentences in another order, hence in other windows.
        while waiting.len() < args.batch {
            sentences.shuffle(&mut rng);
            waiting.extend(text::windows(
                sentences.iter().copied(),
                &tokenizer,
                end,
                args.seq_len,
            )?);
        }
        let loss = loss::loss(
            &model,
            &waiting.split_off(waiting.len() - args.batch),
            &device,
        )?
        .mean();
        let lr = schedule::learning_rate(args.lr, step, args.steps, 50);
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        let loss = check_loss(&loss, step as u64)?;
        check_gradients(&model, &gradients, step as u64)?;
        model = optimizer.step(lr, model, gradients);
        bar.set_message(format!("{loss:.3}"));
        bar.inc(1);
        if step % 200 == 0 || step == args.steps {
            let loss = loss::mean_loss(&model, &heldout, args.batch)?;
            // Asked for inside `suspend`, the bar would wait for itself.
            let seconds = bar.elapsed().as_secs_f64();
            bar.suspend(|| println!("step {step}: held-out loss {loss:.4}, {:.0} s", seconds));
        }
    }
    bar.finish();
    model
        .valid()
        .save_pretrained(&args.out, &config, SavedType::BF16)?;
    println!(
        "{} parameters in {}",
        model.num_params(),
        args.out.display()
    );
    Ok(())
}
