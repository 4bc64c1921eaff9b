//! The command line.

use std::path::PathBuf;

use clap::Parser;
use llama::arguments::{self, Outputs};

/// Loads a synthetic bf16 checkpoint in several ways and shows rates and memory.
#[derive(Parser, Debug)]
pub struct Args {
    /// Size of the checkpoint in GiB.
    #[arg(long, default_value_t = 1.0, value_parser = gib)]
    pub gib: f64,
    /// Inputs of each layer.
    #[arg(long, default_value_t = 4096, value_parser = arguments::whole::<1, 1_048_576>)]
    pub d_in: usize,
    /// Outputs of each layer.
    #[arg(long, default_value_t = 14336, value_parser = arguments::whole::<1, 1_048_576>)]
    pub d_out: usize,
    /// How often each way is taken.
    #[arg(long, default_value_t = 3, value_parser = arguments::whole::<1, 1000>)]
    pub repeat: usize,
    /// Existing directory to write the checkpoint to; the system's temporary directory by default.
    #[arg(long, value_parser = arguments::directory())]
    pub dir: Option<PathBuf>,
}

/// A size that a disk may have.
fn gib(text: &str) -> Result<f64, String> {
    match arguments::positive(text)? {
        size if size <= 1024.0 => Ok(size),
        _ => Err("expected at most 1024 GiB".into()),
    }
}

impl Args {
    /// Checks, before the work, that the checkpoint can be written.
    ///
    /// Error: the argument at fault, and why.
    pub fn check(&self) -> Result<(), String> {
        let layers = self.layers();
        if layers.saturating_mul(self.layer_bytes()) > 1 << 40 {
            return Err(format!(
                "--d-in {} and --d-out {}: expected layers that make a checkpoint of at most 1024 GiB",
                self.d_in, self.d_out
            ));
        }
        if layers > 10_000 {
            return Err(format!(
                "--gib {} of layers {} -> {} are {layers} layers: expected at most 10000; choose a smaller --gib or larger layers",
                self.gib, self.d_in, self.d_out
            ));
        }
        match &self.dir {
            Some(dir) => Outputs::new().directory("--dir", dir),
            None => Ok(()),
        }
    }

    /// Bytes of a layer's weight in bf16.
    pub fn layer_bytes(&self) -> usize {
        2 * self.d_in * self.d_out
    }

    /// How many layers make the size.
    pub fn layers(&self) -> usize {
        ((self.gib * (1_u64 << 30) as f64) / self.layer_bytes() as f64).ceil() as usize
    }
}
