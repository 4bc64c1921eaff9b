//! QLoRA training steps of a large model, with what they took beside what was planned.
//!
//! ```text
//! cargo run --release --example large -- --shape llama3-8b --rank 16 --seq 128          synthetic weights
//! cargo run --release --example large -- --shape llama3-70b --layers 8                  whole width, some layers
//! cargo run --release --example large -- --model DIR                                    a real checkpoint
//! ```
//!
//! The weights of linear layers are packed in NF4 with double quantisation, one at a time; embedding, head and norms stay bf16, and
//! so are activations. Blocks are checkpointed, and the logits are never all in memory. It ends with an error if the peak of
//! the training steps differs by more than 5 % from the plan, or if a factor that should move did not.

mod args;
mod build;
mod factors;
mod meter;
mod report;
mod synthetic;
mod train;

use std::error::Error;
use std::process::ExitCode;

use burn::tensor::Device;
use peak_alloc::PeakAlloc;

use args::Args;
use llama::arguments;
use meter::Meter;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

fn main() -> ExitCode {
    let args = arguments::parse();
    // In Rayon's pool, which Burn's CPU backend and the kernels share: its threads need not be woken for each operation.
    rayon::scope(|_| match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    })
}

/// Whether all was as it should be.
fn run(args: &Args) -> Result<bool, Box<dyn Error>> {
    let device = Device::default().autodiff();
    let mut meter = Meter::new();
    let config = args.config()?;
    // Before anything is built: what cannot be is known in time.
    let plan = burn_peft::memory::plan(&args::shape(&config), &args.setup())?;
    println!("{plan}\n");
    let model = build::build(args, &config, &device, &mut meter)?;
    let (model, before) = build::adapt(args, model, &mut meter)?;
    let (model, steps) = train::train(args, &config, model, &device, &mut meter)?;
    let moved = factors::moved(&before, &factors::of(&model));
    report::print(args, &plan, &meter, &steps, &moved)
}
