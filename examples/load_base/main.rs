//! How fast a base model comes from disk, and with how much memory: a synthetic checkpoint in bf16, kept, cast, and packed;
//! and packed ones that were saved, in bitsandbytes' format.
//!
//! ```text
//! cargo run --release --example load_base -- --gib 2
//! ```
//!
//! Every way is loaded a few times and the fastest is shown. The file is in the system's cache after the first: the rates
//! are those of this crate, not of a disk. Memory is the process's resident one, which Linux tells; what the allocator kept from a
//! way before is in use again and not seen. `tests/alone/load_memory.rs` counts exactly.

mod args;

use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, FloatDType};
use burn_peft::format::{
    BASE_FILE, BaseCheckpoint, BaseOptions, BaseReport, NameMap, SaveBaseOptions,
};
use burn_peft::model::{PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Map, json};
use tempfile::TempDir;

use args::Args;
use llama::arguments;

fn main() -> ExitCode {
    arguments::exit(run(&arguments::parse()))
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    args.check()?;
    let (bytes, layers) = (args.layer_bytes(), args.layers());
    let dir = match &args.dir {
        Some(dir) => TempDir::new_in(dir)?,
        None => TempDir::new()?,
    };
    write(&dir.path().join(BASE_FILE), args, layers)?;
    println!(
        "{layers} layers {} -> {}, {:.2} GB in bf16, {} threads",
        args.d_in,
        args.d_out,
        (layers * bytes) as f64 / 1e9,
        rayon::current_num_threads()
    );
    let plain = BaseOptions::new().with_names(NameMap::new().with_prefix("layers", ""));
    let nf4 = |double| {
        let config = Nf4Config::new().with_double_quant(double);
        let plain = plain.clone();
        plain.with_nf4(TargetConfig::regex(".*"), config)
    };
    let saved = [false, true].map(|double| -> Result<TempDir, Box<dyn Error>> {
        let saved = TempDir::new_in(dir.path())?;
        let mut model = PeftModel::new(new_model(args, layers));
        model.load_base(dir.path(), &nf4(double))?;
        let options = SaveBaseOptions {
            names: NameMap::new().with_prefix("layers", ""),
            ..SaveBaseOptions::default()
        };
        let start = Instant::now();
        let report = model.save_base(saved.path(), &options)?;
        let (time, size) = (start.elapsed().as_secs_f64(), report.bytes as f64 / 1e9);
        println!("saved: {size:.3} GB in {time:.2} s, to the disk");
        Ok(saved)
    });
    let [plainly, doubly] = saved;
    let (plainly, doubly) = (plainly?, doubly?);
    for (name, dir, options) in [
        ("bf16 -> NF4", dir.path(), nf4(false)),
        ("bf16 -> NF4, doubly", dir.path(), nf4(true)),
        ("NF4 -> NF4", plainly.path(), plain.clone()),
        ("NF4 -> NF4, doubly", doubly.path(), plain.clone()),
        ("bf16 -> bf16", dir.path(), plain.clone()),
        (
            "bf16 -> f32",
            dir.path(),
            plain.clone().with_dtype(FloatDType::F32),
        ),
    ] {
        let cpu = cpu_seconds();
        let mut best: Option<(Duration, BaseReport)> = None;
        let mut beside = 0;
        for _ in 0..args.repeat {
            let (time, report, memory) = load(dir, args, layers, &options)?;
            beside = beside.max(memory);
            if best.as_ref().is_none_or(|(best, _)| time < *best) {
                best = Some((time, report));
            }
        }
        let (time, report) = best.expect("each way is taken at least once");
        let [user, system] = [0, 1].map(|i| (cpu_seconds()[i] - cpu[i]) / args.repeat as f64);
        println!(
            "{name:20} {:6.2} s {:6.2} GB/s (of CPUs {user:5.2} s, system {system:5.2} s)   model {:5.2} GB, peak beside it {:5.1} MiB",
            time.as_secs_f64(),
            report.read_bytes as f64 / time.as_secs_f64() / 1e9,
            (report.dense_bytes + report.packed_bytes) as f64 / 1e9,
            beside as f64 / f64::from(1 << 20)
        );
    }
    Ok(())
}

/// Loads a model that was never initialised; how long it took, and the most resident bytes beside it.
fn load(
    dir: &Path,
    args: &Args,
    layers: usize,
    options: &BaseOptions,
) -> Result<(Duration, BaseReport, u64), Box<dyn Error>> {
    let mut model = new_model(args, layers);
    // Makes the peak the present; where that is not allowed, it stays the highest so far.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    let before = resident("VmRSS:");
    let start = Instant::now();
    let report = BaseCheckpoint::open(dir)?.load_into(&mut model, options)?;
    let time = start.elapsed();
    let model_bytes = report.dense_bytes + report.packed_bytes;
    let beside = resident("VmHWM:").saturating_sub(before + model_bytes);
    drop(model);
    Ok((time, report, beside))
}

/// A model of which nothing is initialised.
fn new_model(args: &Args, layers: usize) -> Vec<Linear> {
    let config = LinearConfig::new(args.d_in, args.d_out).with_bias(false);
    let device = Device::default();
    (0..layers).map(|_| config.init(&device)).collect()
}

/// What Linux says of the memory of this process, in bytes; 0 elsewhere.
fn resident(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.parse().ok())
        .map_or(0, |kib: u64| kib * 1024)
}

/// Seconds of all CPUs that Linux counts for this process, its own and the system's; 0 elsewhere.
fn cpu_seconds() -> [f64; 2] {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The fields after the name in parentheses, in hundredths.
    let fields = stat.rsplit(')').next().unwrap_or("").split_whitespace();
    let times: Vec<f64> = fields
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse().ok())
        .collect();
    [0, 1].map(|i| times.get(i).copied().unwrap_or(0.0) / 100.0)
}

/// Writes random values of a weight's size, the same 8 MiB over and over.
fn write(path: &Path, args: &Args, layers: usize) -> Result<(), Box<dyn Error>> {
    let bytes = args.layer_bytes();
    let mut header = Map::new();
    for layer in 0..layers {
        let info = json!({
            "dtype": "BF16",
            "shape": [args.d_out, args.d_in],
            "data_offsets": [layer * bytes, (layer + 1) * bytes],
        });
        header.insert(format!("layers.{layer}.weight"), info);
    }
    let header = serde_json::to_vec(&header)?;
    let mut random = StdRng::seed_from_u64(0);
    let values = (0..4 << 20).flat_map(|_| {
        let value: f32 = random.random_range(-0.05..0.05);
        half::bf16::from_f32(value).to_le_bytes()
    });
    let values: Vec<u8> = values.collect();
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut left = layers * bytes;
    while left > 0 {
        let part = left.min(values.len());
        file.write_all(&values[..part])?;
        left -= part;
    }
    file.into_inner()?.sync_all()?;
    Ok(())
}
