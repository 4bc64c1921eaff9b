//! The frozen side of an adapted layer: `x -> x·W + b` with `W` dense or packed.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{DType, FloatDType, Tensor};

use crate::adapter::{FrozenMap, by_parts, cast, dora};
use crate::fused::{self, lora_linear};
use crate::nf4::Nf4Weight;
use crate::tensor::{linear, reshape};

/// A linear layer that can be the frozen base of an adapted one.
pub trait FrozenLinear: Module {
    /// The base as a map on rows.
    fn frozen_map(&self) -> impl FrozenMap;

    /// `[d_in, d_out]`.
    fn dims(&self) -> [usize; 2];

    /// The dense weight `[d_in, d_out]` in f32, without its gradient.
    fn dense_weight(&self) -> Tensor<2>;

    /// The bias `[d_out]`.
    fn bias(&self) -> Option<Tensor<1>>;

    /// Dtype that a dense copy of this layer has by default.
    fn dense_dtype(&self) -> FloatDType;
}

/// `x·W + b` with a dense `W [d_in, d_out]`.
pub(crate) struct DenseMap {
    pub weight: Tensor<2>,
    pub bias: Option<Tensor<1>>,
}

impl FrozenMap for DenseMap {
    fn apply<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        fused::linear(x, self.weight.clone(), self.bias.clone())
    }

    fn apply_low_rank<const D: usize>(
        &self,
        x: Tensor<D>,
        a: Tensor<2>,
        b: Tensor<2>,
        scale: f64,
    ) -> Tensor<D> {
        match (lora_linear(&x, &self.weight, [&a, &b], scale), &self.bias) {
            (None, _) => by_parts(self, x, a, b, scale),
            (Some(y), None) => y,
            (Some(y), Some(bias)) => y + bias.clone().unsqueeze(),
        }
    }

    fn apply_scaled<const D: usize>(
        &self,
        x: Tensor<D>,
        a: Tensor<2>,
        b: Tensor<2>,
        scale: f64,
        gain: Tensor<1>,
    ) -> Tensor<D> {
        let product = Self {
            weight: self.weight.clone(),
            bias: None,
        };
        let y = product.apply_low_rank(x, a, b, scale);
        let dtype = y.dtype().into();
        let y = y * cast(gain, dtype).unsqueeze();
        match &self.bias {
            None => y,
            Some(bias) => y + bias.clone().unsqueeze(),
        }
    }

    fn column_norms(&self, a: Tensor<2>, b: Tensor<2>, scale: f64) -> Tensor<1> {
        let weight = self.unpacked();
        let [weight, a, b] = [weight, a, b].map(dora::constant);
        let rows = cast(a.clone().transpose(), weight.dtype().into());
        let norms = dora::column_norms_squared(&weight);
        dora::changed_norms_squared(norms, linear(rows, weight, None), a, b, scale).sqrt()
    }

    fn dense(&self) -> Tensor<2> {
        dora::constant(cast(self.unpacked(), FloatDType::F32))
    }
}

impl DenseMap {
    /// The weight as floats, whatever Burn's own quantisation made of it.
    fn unpacked(&self) -> Tensor<2> {
        match self.weight.dtype() {
            DType::QFloat(_) => self.weight.clone().dequantize(),
            _ => self.weight.clone(),
        }
    }
}

/// `x·Wᵀ + b` with a packed `W [d_out, d_in]`.
pub(crate) struct Nf4Map<'a> {
    pub weight: &'a Nf4Weight,
    pub bias: Option<Tensor<1>>,
}

impl FrozenMap for Nf4Map<'_> {
    fn apply<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.on_rows(x, |x| self.weight.matmul(x))
    }

    fn apply_low_rank<const D: usize>(
        &self,
        x: Tensor<D>,
        a: Tensor<2>,
        b: Tensor<2>,
        scale: f64,
    ) -> Tensor<D> {
        self.on_rows(x, |x| self.weight.matmul_low_rank(x, a, b, scale))
    }

    fn apply_scaled<const D: usize>(
        &self,
        x: Tensor<D>,
        a: Tensor<2>,
        b: Tensor<2>,
        scale: f64,
        gain: Tensor<1>,
    ) -> Tensor<D> {
        self.on_rows(x, |x| {
            let y = self.weight.matmul_low_rank(x, a, b, scale);
            let dtype = y.dtype().into();
            y * cast(gain, dtype).unsqueeze()
        })
    }

    fn column_norms(&self, a: Tensor<2>, b: Tensor<2>, scale: f64) -> Tensor<1> {
        let [a, b] = [a, b].map(|factor| dora::constant(cast(factor, FloatDType::F32)));
        let a_w = self.weight.matmul(a.clone().transpose());
        let norms = self.weight.row_norms_squared();
        dora::changed_norms_squared(norms, a_w, a, b, scale).sqrt()
    }

    fn dense(&self) -> Tensor<2> {
        self.weight.dequantize(FloatDType::F32).transpose()
    }
}

impl Nf4Map<'_> {
    /// Applies a product of rows, `[rows, d_in] -> [rows, d_out]`, to an input of any rank, and adds the bias.
    fn on_rows<const D: usize>(
        &self,
        x: Tensor<D>,
        product: impl FnOnce(Tensor<2>) -> Tensor<2>,
    ) -> Tensor<D> {
        let [d_out, d_in] = self.weight.shape();
        let mut dims = x.dims();
        let rows = dims[..D - 1].iter().product();
        dims[D - 1] = d_out;
        let y = product(reshape(x, [rows, d_in]));
        let y = match &self.bias {
            Some(bias) => {
                let dtype = y.dtype().into();
                y + cast(bias.clone(), dtype).unsqueeze()
            }
            None => y,
        };
        reshape(y, dims)
    }
}

impl FrozenLinear for Linear {
    fn frozen_map(&self) -> impl FrozenMap {
        DenseMap {
            weight: self.weight.val(),
            bias: FrozenLinear::bias(self),
        }
    }

    fn dims(&self) -> [usize; 2] {
        weight_dims(&self.weight)
    }

    fn dense_weight(&self) -> Tensor<2> {
        cast(self.weight.val().detach(), FloatDType::F32)
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(|bias| bias.val())
    }

    fn dense_dtype(&self) -> FloatDType {
        match self.weight.val().dtype() {
            DType::QFloat(_) => FloatDType::F32,
            dtype => dtype.into(),
        }
    }
}

/// `[d_in, d_out]` of a linear weight, without initialising it.
///
/// While a weight of Burn's column layout is uninitialised, its lazy shape is the one it is stored with, `[d_out, d_in]`;
/// what its loader does to a shape tells the two layouts apart.
pub(crate) fn weight_dims(weight: &Param<Tensor<2>>) -> [usize; 2] {
    let [rows, columns] = weight.lazy_shape().dims();
    if weight.is_initialized() {
        return [rows, columns];
    }
    match loader_transposes(weight) {
        true => [columns, rows],
        false => [rows, columns],
    }
}

/// Whether the loader of a linear weight transposes what it loads, as that of Burn's column layout does.
pub(crate) fn loader_transposes(weight: &Param<Tensor<2>>) -> bool {
    let probe = Tensor::zeros([1, 2], &weight.lazy_device());
    let loaded = weight.clone().transform_for_load(probe, weight.id);
    loaded.base().dims() == [2, 1]
}
