//! The worker on our side of the comparison with Python's peers; `compare.py` starts it and its counterpart `peers.py`.
//!
//! Reads a case a line and answers each with one line of JSON: the seconds of every timed run, or why it cannot be run.
//! A case stays built until the line `forget`. The first line of output says what this worker is.
//!
//! With `--memory CASE` it runs that case alone and answers with resident bytes.

mod case;
#[path = "../common/mod.rs"]
mod common;
mod memory;
mod subject;

use std::collections::HashMap;
use std::io::{BufRead, stdin};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::{Value, json};

use subject::Run;

/// How the worker runs.
#[derive(Parser)]
struct Args {
    /// Time for the runs of a case at each request.
    #[arg(long, default_value_t = 0.3)]
    seconds: f64,
    /// Runs of a case at each request, however long they take.
    #[arg(long, default_value_t = 2)]
    runs: usize,
    /// Measure the memory of this case instead.
    #[arg(long)]
    memory: Option<String>,
    /// What `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let args = Args::parse();
    if let Some(name) = &args.memory {
        println!("{}", answer(name, || memory::measure(name)));
        return;
    }
    let about = json!({
        "burn-peft": env!("CARGO_PKG_VERSION"),
        "threads": rayon::current_num_threads(),
        "x86-v4": cfg!(feature = "x86-v4"),
    });
    println!("{about}");
    let mut built = HashMap::new();
    for line in stdin().lock().lines() {
        let line = line.expect("the driver writes UTF-8");
        if line == "forget" {
            built.clear();
            continue;
        }
        println!("{}", answer(&line, || time(&line, &mut built, &args)));
    }
}

/// The answer to a request: whatever goes wrong with a case is said in it, and does not end the worker.
fn answer(name: &str, result: impl FnOnce() -> Result<Value, String>) -> Value {
    let result = catch_unwind(AssertUnwindSafe(result)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("panicked: {}", text.unwrap_or("without a message")))
    });
    match result {
        Ok(mut value) => {
            value["case"] = name.into();
            value
        }
        Err(error) => json!({ "case": name, "error": error }),
    }
}

/// One run to warm up, then as many as fit.
fn time(name: &str, built: &mut HashMap<String, Run>, args: &Args) -> Result<Value, String> {
    if !built.contains_key(name) {
        built.insert(name.into(), subject::build(&name.parse()?)?);
    }
    let run = built.get_mut(name).expect("just built");
    run();
    let budget = Duration::from_secs_f64(args.seconds);
    let started = Instant::now();
    let mut seconds = Vec::new();
    while seconds.len() < args.runs || started.elapsed() < budget {
        let started = Instant::now();
        run();
        seconds.push(started.elapsed().as_secs_f64());
    }
    Ok(json!({ "seconds": seconds }))
}
