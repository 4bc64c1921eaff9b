//! The loss of a Llama on batches of examples.

use burn::module::Module;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use burn_peft::dataset::{Example, PaddedBatcher};
use burn_peft::objective::{HeadChunks, SftLoss};
use burn_peft::{PeftError, Result};

use llama::attention::Layout;
use llama::model::LlamaForCausalLm;

/// Any token pads: padding is told by its place.
const PADDING: u32 = 0;

/// Cross entropy on the supervised tokens of `examples`.
///
/// The head sees only the positions that are supervised, and its logits, the largest values of a step by far, are there a chunk
/// at a time.
pub fn loss(model: &LlamaForCausalLm, examples: &[Example], device: &Device) -> Result<SftLoss> {
    let mut losses = losses(model, examples, device, |positions| vec![positions])?;
    Ok(losses.remove(0))
}

/// The loss of each example by itself.
pub fn loss_by_example(
    model: &LlamaForCausalLm,
    examples: &[Example],
    device: &Device,
) -> Result<Vec<SftLoss>> {
    let columns = PaddedBatcher::new(PADDING).collate(examples).columns;
    losses(model, examples, device, |positions| {
        (0..examples.len())
            .map(|row| {
                positions
                    .iter()
                    .copied()
                    .filter(|position| position / columns == row)
                    .collect()
            })
            .collect()
    })
}

/// One forward pass, then the loss of each group of supervised positions that `groups` makes.
fn losses(
    model: &LlamaForCausalLm,
    examples: &[Example],
    device: &Device,
    groups: impl Fn(Vec<usize>) -> Vec<Vec<usize>>,
) -> Result<Vec<SftLoss>> {
    let batch = PaddedBatcher::new(PADDING).collate(examples);
    let (rows, columns) = (batch.rows, batch.columns);
    let tokens = Tensor::<2, Int>::from_data(
        TensorData::new(batch.tokens.clone(), [rows, columns]),
        device,
    );
    let hidden = model
        .model
        .forward(tokens, &Layout::causal(columns, 0, device), None);
    let [_, _, width] = hidden.dims();
    let hidden: Tensor<2> = hidden.reshape([rows * columns, width]);
    let supervised = (0..rows * columns)
        .filter(|&position| batch.mask[position])
        .collect();
    groups(supervised)
        .into_iter()
        .map(|positions| {
            let count = positions.len();
            let targets: Vec<i64> = positions
                .iter()
                .map(|&position| batch.targets[position])
                .collect();
            let positions: Vec<i64> = positions
                .into_iter()
                .map(|position| position as i64)
                .collect();
            let positions =
                Tensor::<1, Int>::from_data(TensorData::new(positions, [count]), device);
            model.head_loss(
                hidden.clone().select(0, positions).unsqueeze(),
                Tensor::from_data(TensorData::new(targets, [1, count]), device),
                Tensor::<2, Bool>::full([1, count], true, device),
                &HeadChunks::default(),
            )
        })
        .collect()
}

/// The mean loss per supervised token of `examples`, `batch` at a time, without gradients.
pub fn mean_loss(model: &LlamaForCausalLm, examples: &[Example], batch: usize) -> Result<f64> {
    let model = model.valid();
    let device = model.devices()[0].clone();
    let (mut sum, mut count) = (0.0, 0);
    for examples in examples.chunks(batch) {
        for loss in loss_by_example(&model, examples, &device)? {
            sum += scalar(loss.sum)?;
            count += loss.count;
        }
    }
    Ok(sum / count as f64)
}

/// The value of a tensor of one element.
pub fn scalar(tensor: Tensor<1>) -> Result<f64> {
    let values = tensor
        .try_into_vec_as::<f32>()
        .map_err(|error| PeftError::DeviceRead {
            tensor: "loss".into(),
            reason: error.to_string(),
        })?;
    Ok(values[0].into())
}
