//! A small model of stock Burn layers, its data, and how it takes adapters: what a user of `burn-peft` writes.

mod learner;
mod plain_loop;

use std::path::Path;

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderBuilder};
use burn::data::dataset::InMemDataset;
use burn::module::Module;
use burn::nn::{Gelu, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::store::RecordError;
use burn::tensor::{Device, Tensor};
use burn::train::{InferenceStep, RegressionOutput, TrainOutput, TrainStep};
use burn_peft::adapter::LoraConfig;
use burn_peft::model::{AdaptersOnly, PeftConfig, PeftForward, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;

const INPUTS: usize = 4;
const WIDTH: usize = 256;

/// A regressor; the only trace of adapters is the word `forward_peft`.
#[derive(Module, Debug)]
pub struct Net {
    embed: Linear,
    norm: LayerNorm,
    hidden: Vec<Linear>,
    head: Linear,
}

impl Net {
    pub fn new(device: &Device) -> Self {
        Self {
            embed: LinearConfig::new(INPUTS, WIDTH).init(device),
            norm: LayerNormConfig::new(WIDTH).init(device),
            hidden: (0..2)
                .map(|_| LinearConfig::new(WIDTH, WIDTH).init(device))
                .collect(),
            head: LinearConfig::new(WIDTH, 1).init(device),
        }
    }

    /// A model of the weights in a record that [`Module::save_file`] wrote.
    pub fn load(path: &Path, device: &Device) -> Result<Self, RecordError> {
        Self::new(device).try_load_file(path)
    }

    /// `[batch, 4] -> [batch, 1]`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let mut x = self.norm.forward(self.embed.forward_peft(x));
        for linear in &self.hidden {
            x = x.clone() + Gelu::new().forward(linear.forward_peft(x));
        }
        self.head.forward_peft(x)
    }

    /// The mean squared error of a batch, with what it was computed from.
    pub fn regress(&self, batch: Batch) -> RegressionOutput {
        let output = self.forward(batch.x);
        let loss = (output.clone() - batch.y.clone()).square().mean();
        RegressionOutput {
            loss,
            output,
            targets: batch.y,
        }
    }
}

/// The base model with its hidden layers packed in NF4, and a fresh adapter on every linear layer but the head.
pub fn load_with_adapter(
    base: &Path,
    device: &Device,
) -> Result<PeftModel<Net>, Box<dyn std::error::Error>> {
    let mut model = load_quantized(base, device)?;
    let lora = LoraConfig::new(4).with_alpha(8.0);
    model.add_adapter(
        "default",
        &PeftConfig::new(lora, TargetConfig::all_linear()),
    )?;
    Ok(model)
}

/// The base model with its hidden layers packed in NF4.
pub fn load_quantized(
    base: &Path,
    device: &Device,
) -> Result<PeftModel<Net>, Box<dyn std::error::Error>> {
    let mut model = PeftModel::new(Net::load(base, device)?).with_head("head");
    model.quantize_nf4(&TargetConfig::regex(r"hidden\.\d+"), &Nf4Config::new())?;
    Ok(model)
}

/// What Burn's `Learner` trains and checkpoints: a module of this crate, so that it can implement the steps, whose
/// parameters are the adapter's.
#[derive(Module, Debug)]
pub struct Trainee {
    pub model: AdaptersOnly<Net>,
}

impl TrainStep for Trainee {
    type Input = Batch;
    type Output = RegressionOutput;

    fn step(&self, batch: Batch) -> TrainOutput<RegressionOutput> {
        let output = self.model.regress(batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for Trainee {
    type Input = Batch;
    type Output = RegressionOutput;

    fn step(&self, batch: Batch) -> RegressionOutput {
        self.model.regress(batch)
    }
}

/// One point of the function to learn.
#[derive(Clone, Debug)]
pub struct Sample {
    pub x: [f32; INPUTS],
    pub y: f32,
}

/// Points number `range` of an endless, fixed sequence in `[-1, 1]⁴`.
pub fn samples(range: std::ops::Range<usize>) -> Vec<Sample> {
    // Multiples of independent irrational numbers fill the cube evenly.
    let steps = [2f32, 3.0, 5.0, 7.0].map(f32::sqrt);
    range
        .map(|i| {
            let x = steps.map(|step| 2.0 * (i as f32 * step).fract() - 1.0);
            Sample {
                x,
                y: (2.0 * x[0] + x[1]).sin() + x[2] * x[3],
            }
        })
        .collect()
}

/// Samples on a device.
#[derive(Clone, Debug)]
pub struct Batch {
    /// `[batch, 4]`
    pub x: Tensor<2>,
    /// `[batch, 1]`
    pub y: Tensor<2>,
}

impl Batch {
    pub fn new(samples: &[Sample], device: &Device) -> Self {
        let x: Vec<f32> = samples.iter().flat_map(|sample| sample.x).collect();
        let y: Vec<f32> = samples.iter().map(|sample| sample.y).collect();
        Self {
            x: Tensor::<1>::from_floats(x.as_slice(), device).reshape([-1, INPUTS as i32]),
            y: Tensor::<1>::from_floats(y.as_slice(), device).reshape([-1, 1]),
        }
    }
}

struct Batches;

impl Batcher<Sample, Batch> for Batches {
    fn batch(&self, items: Vec<Sample>, device: &Device) -> Batch {
        Batch::new(&items, device)
    }
}

/// Batches of 32 for the `Learner`, in order.
pub fn loader(samples: Vec<Sample>) -> std::sync::Arc<dyn DataLoader<Batch>> {
    DataLoaderBuilder::new(Batches)
        .batch_size(32)
        .build(InMemDataset::new(samples))
}
