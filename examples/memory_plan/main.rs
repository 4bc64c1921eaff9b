//! What fine-tuning a model will need of memory: full, LoRA and QLoRA side by side, as a table and as a picture.
//!
//! ```text
//! cargo run --release --example memory_plan -- --shape llama3-8b --out docs/images/memory.png
//! cargo run --release --example memory_plan -- --config path/to/config.json --rank 16 --seq 2048 --segments 1
//! ```

mod args;
mod picture;

use std::error::Error;
use std::process::ExitCode;

use burn_peft::memory::{Budget, Method, Table, table};

use args::Args;
use llama::arguments;

fn main() -> ExitCode {
    arguments::exit(run(&arguments::parse()))
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    args.check()?;
    let shape = args.shape()?;
    let setup = args.setup();
    let plans = table(&shape, &setup)?;
    let qlora = setup.with_method(Method::QLora);
    println!("{shape:?}\n{qlora}\n\n{plans}");
    for (name, plan) in &plans.columns {
        let fits = plan.fits(&Budget::KNOWN);
        let smallest = fits.iter().min_by_key(|device| device.bytes);
        match smallest {
            Some(device) => println!("{name}: the smallest that fits is {}", device.name),
            None => println!("{name}: none of these devices"),
        }
    }
    if let Some(path) = &args.out {
        let Table { columns, .. } = &plans;
        let title = format!("{}, {} x {} tokens", args.name(), args.batch, args.seq);
        picture::draw(columns, &title, path)?;
        println!("drawn: {}", path.display());
    }
    Ok(())
}
