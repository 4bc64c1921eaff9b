//! An optimiser of f32 around parameters of a narrower dtype.
//!
//! ```text
//! w₃₂ = w + ρ        (w₃₂', s') = O(w₃₂, g, s)        w' = round(w₃₂')        ρ' = round(w₃₂' - w')
//! ```
//!
//! `w` is the parameter and `g` its gradient, in bf16 for instance, `O` any optimiser, and `s` its state, which is f32. The residual
//! `ρ`, in the parameter's dtype, is what rounding took off; without compensation it is 0.
//!
//! Why there is a residual: bf16 has eight bits, so that rounding `w` to it undoes every update smaller than `2⁻⁹·|w|`, all of them
//! alike, for as long as a run lasts. With it such updates add up until they count (Kahan's summation; for weights in bf16: P. Zamirai
//! et al., "Revisiting BFloat16 Training", <https://arxiv.org/abs/2010.06192>).

use burn::optim::{LearningRate, ModuleOptimizer, Optimizer, RecordState, StateSink, StateSource};
use burn::tensor::{Device, FloatDType, Tensor};

use crate::adapter::cast;

/// Any optimiser of Burn, computing in f32 on parameters of any float dtype: the parameter is widened, and rounded once, to nearest.
///
/// Burn's own optimisers compute in the dtype of what they are given: of factors in bf16 they keep moments in bf16, where
/// 0.999 of a value is rounded to the value, so that a second moment never falls.
///
/// ```
/// use burn::optim::AdamWConfig;
/// use burn_peft::optim::F32State;
///
/// // Plain: an update below 1/512 of a value is lost.
/// let plain = F32State::new(AdamWConfig::new().build()).init();
/// // With the residual nothing above 2⁻¹⁷ of a value is.
/// let compensated = F32State::new(AdamWConfig::new().build()).with_compensation(true).init();
/// ```
///
/// Gradients may be of another dtype than the parameter: of f32, for instance, when they were accumulated in it
/// ([`grads_to_f32`](super::grads_to_f32)). On f32 parameters it is the optimiser that it is around, bit for bit, and without
/// compensation so are its records.
///
/// # Memory
///
/// The state of the optimiser in f32, and with compensation the parameter's size once more: a value in bf16 then takes with its
/// residual what it takes in f32, but half in every product and as a gradient. A step holds the parameter and its gradient in f32.
/// For fewer bytes of state it goes around [`AdamW8bit`](super::AdamW8bit), which alone does the same as without compensation.
///
/// A parameter that is changed between two steps by something else keeps its residual, half of a unit in its last place at most.
#[derive(Clone, Debug)]
pub struct F32State<O> {
    optimizer: O,
    compensation: bool,
}

impl<O: Optimizer> F32State<O> {
    /// Around `optimizer`, without compensation.
    pub fn new(optimizer: O) -> Self {
        Self {
            optimizer,
            compensation: false,
        }
    }

    /// Whether parameters that are not f32 get a residual.
    pub fn with_compensation(mut self, compensation: bool) -> Self {
        self.compensation = compensation;
        self
    }

    /// An optimiser of whole modules.
    pub fn init(self) -> ModuleOptimizer {
        ModuleOptimizer::from(self)
    }
}

/// What [`F32State`] keeps for a parameter: the state of the optimiser it is around, and `residual`. Its records are that state's
/// with one tensor more.
#[derive(Clone, Debug)]
pub struct F32StateOf<S, const D: usize> {
    state: Option<S>,
    residual: Option<Tensor<D>>,
}

impl<O: Optimizer> Optimizer for F32State<O> {
    type State<const D: usize> = F32StateOf<O::State<D>, D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let dtype = FloatDType::from(tensor.dtype());
        let (state, residual) = match state {
            Some(F32StateOf { state, residual }) => (state, residual),
            None => (None, None),
        };
        let compensated = self.compensation && dtype != FloatDType::F32;
        // A residual of another parameter counts as none, and so does one that is no longer asked for.
        let residual = residual.filter(|residual| compensated && residual.dims() == tensor.dims());
        let wide = cast(tensor, FloatDType::F32);
        let wide = match residual {
            Some(residual) => wide + cast(residual, FloatDType::F32),
            None => wide,
        };
        let grad = cast(grad, FloatDType::F32);
        let (wide, state) = self.optimizer.step(lr, wide, grad, state);
        if !compensated {
            let state = state.map(|state| F32StateOf {
                state: Some(state),
                residual: None,
            });
            return (cast(wide, dtype), state);
        }
        let rounded = cast(wide.clone(), dtype);
        let residual = cast(wide - cast(rounded.clone(), FloatDType::F32), dtype);
        let state = F32StateOf {
            state,
            residual: Some(residual),
        };
        (rounded, Some(state))
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        F32StateOf {
            state: state.state.map(|state| O::to_device(state, device)),
            residual: state.residual.map(|residual| residual.to_device(device)),
        }
    }
}

const RESIDUAL: &str = "residual";

impl<S: RecordState, const D: usize> RecordState for F32StateOf<S, D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        if let Some(state) = &self.state {
            state.state_flatten(prefix, out);
        }
        if let Some(residual) = &self.residual {
            out.push_tensor(prefix, RESIDUAL, residual.clone().into_data());
        }
    }

    fn state_unflatten(prefix: &str, src: &mut StateSource, device: &Device) -> Option<Self> {
        let residual = match src.take_tensor(prefix, RESIDUAL) {
            None => None,
            Some(data) => {
                let dtype = data.dtype();
                let fits = dtype.is_float() && data.shape().as_slice().len() == D;
                // In the dtype it was written in; Burn would take a default one.
                Some(fits.then(|| Tensor::from_data(data, (device, dtype)))?)
            }
        };
        let state = S::state_unflatten(prefix, src, device);
        // An optimiser without a state leaves only a residual.
        let some = state.is_some() || residual.is_some();
        some.then_some(Self { state, residual })
    }
}
