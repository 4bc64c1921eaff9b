//! Supervised fine-tuning without logits: [`sft_loss`](super::sft_loss) of a head's hidden states.

use burn::tensor::{Bool, Int, Tensor};

use super::SftLoss;
use super::sft::labelled;
use crate::head::HeadChunks;
use crate::model::HeadLoss;
use crate::{PeftError, Result};

/// Cross entropy on the supervised tokens of a batch, of the hidden states that the head would turn into logits.
///
/// `sft_head_loss(hidden, &head, targets, mask, &HeadChunks::default())` in place of `sft_loss(head.forward_peft(hidden), targets,
/// mask)`; with an `Embedding` for a tied head. Both give the same value and gradients, to rounding; this one has the logits of a
/// chunk in memory at a time, in the forward pass as in the backward, which computes them again.
///
/// On Burn's CPU backend, f32 and bf16 hidden states over a dense weight (f32, bf16) or a packed one are multiplied as they are:
/// bf16 by bf16 where the processor does so (and features and vocabulary are even), else in f32, the hidden states widened by chunks
/// of rows and the weight by strips of some KiB; logits and sums are f32. Elsewhere the same is composed of Burn's operations, a
/// chunk of the weight at a time, with the gradients computed in the forward pass.
///
/// # Memory
///
/// [`HeadChunks::largest_temporary`] at most at any time; kept for the backward pass are the supervised hidden states (with a LoRA
/// also in the dtype of its `A`, and `[count, r]` values), and three numbers a row. A dense weight that is trained has one gradient of its size, and
/// no second one: in bf16 it is rounded once for each chunk of rows. [`HeadLoss`] says what an adapter changes of this.
///
/// # Shapes
///
/// - `hidden`: `[batch, seq, features]`
/// - `targets`, `mask`: as for [`sft_loss`](super::sft_loss)
///
/// # Errors
///
/// As [`sft_loss`](super::sft_loss), and [`PeftError::Shape`] where the hidden states are not of the head's features.
pub fn sft_head_loss(
    hidden: Tensor<3>,
    head: &impl HeadLoss,
    targets: Tensor<2, Int>,
    mask: Tensor<2, Bool>,
    chunks: &HeadChunks,
) -> Result<SftLoss> {
    let [batch, seq, width] = hidden.dims();
    let [features, vocabulary] = head.head_dims();
    if width != features {
        return Err(PeftError::Shape {
            tensor: "hidden".into(),
            expected: vec![batch, seq, features],
            found: vec![batch, seq, width],
        });
    }
    let labels = labelled(targets, mask, [batch, seq], vocabulary)?;
    let count = labels.len();
    let sum = head.head_cross_entropy(hidden, labels, chunks);
    Ok(SftLoss { sum, count })
}
