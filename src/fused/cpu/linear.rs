//! Products with a frozen dense weight `W [d_in, d_out]`, row-major or as the transpose of such a one.

use std::mem::MaybeUninit;

use burn::backend::{Flex, ops::FloatTensorOps};
use burn::tensor::{DType, Shape, TensorData};

use crate::cpu::flex::{
    Float, contiguous, is_empty, last, lines, of_dtype, rows, shape, slice, with_whole_lines,
};
use crate::cpu::matmul::dense::Dense;
use crate::cpu::matmul::element::{Element, F32, Pairs};
use crate::cpu::matmul::few_rows::{self, Loaded};
use crate::cpu::matmul::low_rank::LowRank;
use crate::cpu::matmul::{Source, many_rows, transposed};
use crate::cpu::output::written;
use crate::cpu::simd::Isa;

/// Rows from which on the kernels pay: with fewer, Burn's own product of f32 is as fast.
const ROWS: usize = 16;

/// Factors `u [rows, r]` and `v [r, columns]`, f32 and contiguous.
pub(super) type Term = Option<(Float, Float)>;

/// `x · W + u · v`: `[…, d_in] -> […, d_out]`, in the dtype of both.
pub(super) fn forward(x: &Float, w: &Float, term: Term) -> Float {
    times(x, w, false, term)
}

/// `dy · Wᵀ + u · v`: `[…, d_out] -> […, d_in]`.
pub(super) fn backward(dy: &Float, w: &Float, term: Term) -> Float {
    times(dy, w, true, term)
}

/// `x · W` of a few rows: `[…, d_in] -> […, d_out]`, in the dtype of both.
pub(super) fn of_few_rows(x: &Float, w: &Float) -> Float {
    fn of<V: Loaded>(x: &Float, w: &Float) -> Float {
        let [d_in, d_out] = shape(w);
        let along = w.layout().strides()[1] != 1;
        let held = if along { [d_out, d_in] } else { [d_in, d_out] };
        let len = rows(x) * d_out;
        let y = few_rows::product::<V>(Isa::best(), slice(x), lines(w), held, along, len);
        let mut dims = x.layout().shape().to_vec();
        *dims.last_mut().expect("one dimension or more") = d_out;
        Float::from_data(TensorData::new(y, dims))
    }
    let (x, w) = (contiguous(x), with_whole_lines(w));
    of_dtype!(x, of(&x, &w))
}

/// Whether [`of_few_rows`] is for a product with a weight of the same dtype, f32 or bf16.
pub(super) fn is_of_few_rows(x: &Float, w: &Float) -> bool {
    !is_empty(x) && !is_empty(w) && rows(x) <= few_rows::MOST
}

fn times(x: &Float, w: &Float, turned: bool, term: Term) -> Float {
    let [d_in, d_out] = shape(w);
    let columns = if turned { d_in } else { d_out };
    let rows = rows(x);
    let (x, w) = (contiguous(x), with_whole_lines(w));
    let low = match &term {
        None => LowRank::NONE,
        Some((u, v)) => LowRank {
            rank: last(u),
            u: slice(u),
            v: slice(v),
        },
    };
    // As rows `[d_out, d_in]`, or `[d_in, d_out]`.
    let by_rows = w.layout().strides()[1] == 1;
    let held = if by_rows {
        [d_in, d_out]
    } else {
        [d_out, d_in]
    };
    // Along the rows of what is held, or across them.
    let along = by_rows == turned;
    let values = match x.dtype() {
        DType::BF16 => {
            let values = product::<Pairs>(slice(&x), lines(&w), held, along, low, rows * columns);
            TensorData::new(values, [rows * columns])
        }
        _ => {
            let values = product::<F32>(slice(&x), lines(&w), held, along, low, rows * columns);
            TensorData::new(values, [rows * columns])
        }
    };
    let mut dims = x.layout().shape().to_vec();
    *dims.last_mut().expect("one dimension or more") = columns;
    Flex::float_reshape(Float::from_data(values), Shape::from(dims))
}

fn product<E: Element>(
    x: &[E::Value],
    w: &[E::Value],
    held: [usize; 2],
    along: bool,
    low: LowRank,
    len: usize,
) -> Vec<E::Value>
where
    for<'a> Dense<'a, E::Value>: Source<E>,
{
    let w = Dense::new(w, held);
    let write = |[y]: [&mut [MaybeUninit<E::Value>]; 1]| match along {
        true => many_rows::product::<E, _>(Isa::best(), w, x, low, y),
        false => transposed::product::<E, _>(Isa::best(), w, x, low, y),
    };
    // SAFETY: a product writes every value.
    let [y] = unsafe { written([len], write) };
    y
}

/// Whether the kernels are for a product of `x`, or of a gradient, with a weight of the same dtype, f32 or bf16.
pub(super) fn serves(x: &Float, w: &Float) -> bool {
    let [d_in, d_out] = shape(w);
    match x.dtype() {
        DType::BF16 => d_in.is_multiple_of(2) && d_out.is_multiple_of(2),
        _ => rows(x) >= ROWS,
    }
}
