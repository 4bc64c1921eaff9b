//! AdamW with moments in eight bits.
//!
//! ```text
//! w ← (1 - η·λ)·w - η·m̂/(√v̂ + ε),   m̂ = m/(1 - β₁ᵗ),   v̂ = v/(1 - β₂ᵗ)
//! m ← β₁·Q⁻¹(m₈) + (1 - β₁)·g,   v ← β₂·Q⁻¹(v₈) + (1 - β₂)·g²,   m₈ ← Q(m),   v₈ ← Q(v)
//! ```
//!
//! `w` the parameter, `g` its gradient, `t` the number of the step from 1, `η` the learning rate, `λ` the weight decay, `Q` the
//! [block-wise quantisation](super::block_wise) to eight bits: signed for `m`, unsigned for `v`, 256 consecutive values a block, in
//! the order of Burn's tensor. A step restores the moments, computes in f32, and stores them again.
//!
//! Sources: T. Dettmers et al., "8-bit Optimizers via Block-wise Quantization", <https://arxiv.org/abs/2110.02861>; AdamW,
//! <https://arxiv.org/abs/1711.05101>. The step is that of bitsandbytes 0.50.2 (`AdamW8bit`), to f32 rounding.

mod blocks;
#[cfg(feature = "flex")]
mod flex;
mod portable;
#[cfg(test)]
mod tests;
mod update;

use burn::config::Config;
use burn::grad_clipping::GradientClippingConfig;
use burn::optim::{LearningRate, ModuleOptimizer, Optimizer, RecordState, StateSink, StateSource};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use burn_pack::Scalar;

use blocks::Codes;
use update::Update;

use crate::adapter::cast;

/// Configuration of [`AdamW8bit`], with the defaults of bitsandbytes and torch; those of Burn's
/// [`AdamWConfig`](burn::optim::AdamWConfig) are `ε = 1e-5` and a decay of `1e-4`.
#[derive(Config, Debug)]
pub struct AdamW8bitConfig {
    /// Decay `β₁` of the first moment, in `[0, 1)`. Default: 0.9.
    #[config(default = 0.9)]
    pub beta_1: f64,
    /// Decay `β₂` of the second moment, in `[0, 1)`. Default: 0.999.
    #[config(default = 0.999)]
    pub beta_2: f64,
    /// What is added to the root of the second moment, positive. Default: 1e-8.
    #[config(default = 1e-8)]
    pub epsilon: f64,
    /// Decoupled weight decay `λ`; a step takes `η·λ` off each value. Default: 0.01.
    #[config(default = 0.01)]
    pub weight_decay: f64,
    /// Parameters of fewer values have their moments in f32. Default: 4096.
    #[config(default = 4096)]
    pub min_8bit_size: usize,
    /// Burn's clipping of each gradient by itself, which [`init`](Self::init) applies. For that by the norm of all gradients, see
    /// [`clip_grad_norm`](super::clip_grad_norm). Default: none.
    pub grad_clipping: Option<GradientClippingConfig>,
}

impl AdamW8bitConfig {
    /// The bare optimiser, for [`ModuleOptimizer::with_group`] and [`F32State`](super::F32State), without clipping.
    ///
    /// # Panics
    ///
    /// If `β₁` or `β₂` is not in `[0, 1)`, `ε` not positive, or the decay not finite.
    pub fn build(&self) -> AdamW8bit {
        for (name, beta) in [("beta_1", self.beta_1), ("beta_2", self.beta_2)] {
            assert!(
                (0.0..1.0).contains(&beta),
                "{name}: {beta} is not in [0, 1)"
            );
        }
        let (epsilon, decay) = (self.epsilon, self.weight_decay);
        assert!(epsilon > 0.0, "epsilon: {epsilon} is not positive");
        assert!(decay.is_finite(), "weight_decay: {decay} is not finite");
        AdamW8bit {
            config: self.clone(),
        }
    }

    /// An optimiser of whole modules.
    ///
    /// # Panics
    ///
    /// As [`build`](Self::build).
    pub fn init(&self) -> ModuleOptimizer {
        let optimizer = ModuleOptimizer::from(self.build());
        match &self.grad_clipping {
            Some(clipping) => optimizer.with_grad_clipping(clipping.init()),
            None => optimizer,
        }
    }
}

/// AdamW with block-wise 8-bit moments: an ordinary optimiser of Burn, made by [`AdamW8bitConfig`].
///
/// ```
/// # fn step<M: burn::module::Module>(
/// #     model: burn_peft::model::PeftModel<M>, loss: burn::tensor::Tensor<1>,
/// # ) -> burn_peft::model::PeftModel<M> {
/// use burn::optim::GradientsParams;
/// use burn_peft::optim::AdamW8bitConfig;
///
/// let mut optimizer = AdamW8bitConfig::new().with_weight_decay(0.0).init();
/// let grads = GradientsParams::from_grads(loss.backward(), &model);
/// let model = optimizer.step(1e-4, model, grads);
/// # model
/// # }
/// ```
///
/// # Memory
///
/// The state of a parameter takes `2 + 8/256` bytes a value, where that of Burn's AdamW takes 8; a last block counts as a whole
/// one. Below [`min_8bit_size`](AdamW8bitConfig::min_8bit_size) values it is two f32 tensors.
///
/// On Burn's CPU backend a step on a parameter in f32 or bf16 works in place, with less than 8 KiB a thread. On others it takes
/// the parameter once more, in its dtype, and about ten tensors of 2¹⁸ f32.
///
/// # What eight bits cost
///
/// A moment keeps about two digits where it is large among the 256 consecutive values of its block, and less where it is small. A
/// second moment below 1.6e-7 of its block's largest is stored as 0, so that a value whose gradients are far below those of its
/// neighbours, by a factor of 2500 or more, may step further than in 32 bits; `ε` bounds how far. A tensor of such gradients is
/// better kept in 32 bits, by a [parameter group](burn::optim::ModuleOptimizer::with_group).
///
/// # Dtypes
///
/// Parameters and gradients may be of any float dtype, also of two: all is computed in f32, and the parameter is rounded once.
/// In bf16 that may lose a whole update, see [`F32State`](super::F32State), which wraps this optimiser too.
///
/// # What is not finite
///
/// A NaN or an infinity in a gradient makes the moments of its block NaN, and then the values; in 32 bits it is one value.
/// [`clip_grad_norm`](super::clip_grad_norm) refuses such gradients.
#[derive(Clone, Debug)]
pub struct AdamW8bit {
    config: AdamW8bitConfig,
}

/// What [`AdamW8bit`] keeps for a parameter. Its records hold `time`, and `codes_1`, `absmax_1`, `codes_2`, `absmax_2` (codes four
/// to an I32 word, the first in the lowest bits), or `moment_1`, `moment_2`, each in its dtype.
#[derive(Clone, Debug)]
pub struct AdamW8bitState<const D: usize> {
    time: usize,
    moments: Moments<D>,
}

#[derive(Clone, Debug)]
enum Moments<const D: usize> {
    Full([Tensor<D>; 2]),
    Blocks([Codes; 2]),
}

impl<const D: usize> AdamW8bitState<D> {
    /// Of a parameter that no step was taken on.
    fn new(tensor: &Tensor<D>, min_8bit_size: usize) -> Self {
        let (dims, device) = (tensor.dims(), tensor.device());
        let n = dims.iter().product::<usize>();
        let moments = match n < min_8bit_size {
            true => Moments::Full([0; 2].map(|_| Tensor::zeros(dims, (&device, DType::F32)))),
            false => Moments::Blocks([0; 2].map(|_| Codes::zeros(n, &device))),
        };
        Self { time: 0, moments }
    }

    fn fits(&self, tensor: &Tensor<D>) -> bool {
        let dims = tensor.dims();
        match &self.moments {
            Moments::Full(moments) => moments.iter().all(|moment| moment.dims() == dims),
            Moments::Blocks(moments) => {
                let blocks = dims
                    .iter()
                    .product::<usize>()
                    .div_ceil(super::block_wise::BLOCK);
                moments.iter().all(|moment| moment.blocks() == blocks)
            }
        }
    }
}

impl Optimizer for AdamW8bit {
    type State<const D: usize> = AdamW8bitState<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let config = &self.config;
        // As Burn does with a state that it cannot rebuild, one of another parameter counts as none.
        let state = state.filter(|state| state.fits(&tensor));
        let AdamW8bitState { time, moments } =
            state.unwrap_or_else(|| AdamW8bitState::new(&tensor, config.min_8bit_size));
        let time = time.saturating_add(1);
        let betas = [config.beta_1, config.beta_2];
        let update = Update::new(betas, config.epsilon, config.weight_decay, lr, time);
        let (tensor, moments) = match moments {
            Moments::Full([m, v]) => {
                let dtype = FloatDType::from(tensor.dtype());
                let [tensor, grad] = [tensor, grad].map(|x| cast(x, FloatDType::F32));
                let [tensor, m, v] = update.of_tensor(tensor, grad, m, v);
                (cast(tensor, dtype), Moments::Full([m, v]))
            }
            Moments::Blocks(moments) => {
                let (tensor, moments) = step_blocks(tensor, grad, moments, &update);
                (tensor, Moments::Blocks(moments))
            }
        };
        (tensor, Some(AdamW8bitState { time, moments }))
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        let moments = match state.moments {
            Moments::Full(moments) => Moments::Full(moments.map(|moment| moment.to_device(device))),
            Moments::Blocks(moments) => {
                Moments::Blocks(moments.map(|moment| moment.to_device(device)))
            }
        };
        let time = state.time;
        AdamW8bitState { time, moments }
    }
}

fn step_blocks<const D: usize>(
    tensor: Tensor<D>,
    grad: Tensor<D>,
    moments: [Codes; 2],
    update: &Update,
) -> (Tensor<D>, [Codes; 2]) {
    #[cfg(feature = "flex")]
    if flex::serves(&tensor) {
        return flex::step(tensor, grad, moments, update);
    }
    portable::step(tensor, grad, moments, update)
}

const TIME: &str = "time";
const MOMENTS: [&str; 2] = ["moment_1", "moment_2"];
const CODES: [[&str; 2]; 2] = [["codes_1", "absmax_1"], ["codes_2", "absmax_2"]];

/// By hand: what Burn derives restores every tensor in a default dtype.
impl<const D: usize> RecordState for AdamW8bitState<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        out.push_scalar(prefix, TIME, Scalar::from(self.time));
        match &self.moments {
            Moments::Full(moments) => {
                for (name, moment) in MOMENTS.into_iter().zip(moments) {
                    out.push_tensor(prefix, name, moment.clone().into_data());
                }
            }
            Moments::Blocks(moments) => {
                for ([words, absmax], codes) in CODES.into_iter().zip(moments) {
                    out.push_tensor(prefix, words, codes.words.clone().into_data());
                    out.push_tensor(prefix, absmax, codes.absmax.clone().into_data());
                }
            }
        }
    }

    fn state_unflatten(prefix: &str, src: &mut StateSource, device: &Device) -> Option<Self> {
        let time = usize::try_from(src.take_scalar(prefix, TIME)?).ok()?;
        let mut take = |name: &str| src.take_tensor(prefix, name);
        let full = MOMENTS.map(&mut take);
        let moments = match full {
            [Some(m), Some(v)] => {
                let moment = |data: TensorData| {
                    let fits = data.dtype() == DType::F32 && data.shape().as_slice().len() == D;
                    fits.then(|| Tensor::from_data(data, (device, DType::F32)))
                };
                Moments::Full([moment(m)?, moment(v)?])
            }
            _ => {
                let mut codes = |names: [&str; 2]| {
                    let [words, absmax] = names.map(&mut take);
                    Codes::from_data(words?, absmax?, device)
                };
                Moments::Blocks([codes(CODES[0])?, codes(CODES[1])?])
            }
        };
        Some(Self { time, moments })
    }
}
