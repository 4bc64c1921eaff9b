//! Tensors that are views of a larger parent: offset, narrowed, stepped, flipped, transposed, expanded.

use burn::tensor::{DType, Device, Slice, Tensor, TensorData};
use half::bf16;
use proptest::prelude::*;

/// How one axis of a tensor lies in its parent.
#[derive(Clone, Copy, Debug)]
struct Axis {
    /// Values of the parent before the first and behind the last.
    before: usize,
    after: usize,
    /// From one value to the next.
    step: usize,
    flipped: bool,
    /// All values along the axis are one.
    expanded: bool,
}

/// How a tensor lies in memory.
#[derive(Clone, Debug)]
pub struct View {
    axes: Vec<Axis>,
    /// The axes, the slowest in memory first.
    order: Vec<usize>,
}

/// Ways to lie in memory for tensors of so many axes, some of them contiguous.
pub fn view(axes: usize) -> impl Strategy<Value = View> {
    let one_in = |n: u32| prop::bool::weighted(1.0 / f64::from(n));
    let axis = (0_usize..3, 0_usize..3, 1_usize..3, one_in(3), one_in(5)).prop_map(
        |(before, after, step, flipped, expanded)| Axis {
            before,
            after,
            step,
            flipped,
            expanded,
        },
    );
    let order = Just((0..axes).collect::<Vec<_>>()).prop_shuffle();
    let any =
        (prop::collection::vec(axis, axes), order).prop_map(|(axes, order)| View { axes, order });
    prop_oneof![1 => Just(View::plain(axes)), 5 => any]
}

/// A tensor as it lies, and its values.
#[derive(Clone, Debug)]
pub struct Operand<const D: usize> {
    /// Of the dtype asked for, with NaN around it in its parent. A leaf that requires a gradient.
    pub view: Tensor<D>,
    /// The same values in f64, contiguous. A leaf that requires a gradient.
    pub wide: Tensor<D>,
}

impl View {
    /// Contiguous, with nothing around it.
    pub fn plain(axes: usize) -> Self {
        let axis = Axis {
            before: 0,
            after: 0,
            step: 1,
            flipped: false,
            expanded: false,
        };
        Self {
            axes: vec![axis; axes],
            order: (0..axes).collect(),
        }
    }

    /// A tensor of this shape, whose values depend on the seed.
    pub fn operand<const D: usize>(
        &self,
        shape: [usize; D],
        dtype: DType,
        seed: u64,
    ) -> Operand<D> {
        assert_eq!(self.axes.len(), D);
        let is_empty = shape.contains(&0);
        // Burn expands to no side of zero, and its own operations panic on an empty tensor that is narrowed or flipped.
        let plain = Self::plain(D);
        let axes = if is_empty { &plain.axes } else { &self.axes };
        let axis = |axis: usize| axes[axis];
        let core: [usize; D] = std::array::from_fn(|i| if axis(i).expanded { 1 } else { shape[i] });
        let parent: [usize; D] = std::array::from_fn(|i| {
            let (axis, n) = (axis(self.order[i]), core[self.order[i]]);
            axis.before + n.saturating_sub(1) * axis.step + n.min(1) + axis.after
        });
        let mut held = vec![f32::NAN; parent.iter().product()];
        let mut values = vec![0.0; shape.iter().product()];
        let mut noise = Noise::new(seed);
        for index in indices(core) {
            let value = match dtype {
                DType::BF16 => bf16::from_f32(noise.next()).to_f32(),
                _ => noise.next(),
            };
            let at = (0..D).fold(0, |at, i| {
                let of = self.order[i];
                let axis = axis(of);
                let place = match axis.flipped {
                    true => core[of] - 1 - index[of],
                    false => index[of],
                };
                at * parent[i] + axis.before + place * axis.step
            });
            held[at] = value;
            // Wherever it is expanded to.
            let spread: [usize; D] =
                std::array::from_fn(|i| if axis(i).expanded { shape[i] } else { 1 });
            for more in indices(spread) {
                let at = (0..D).fold(0, |at, i| at * shape[i] + index[i] + more[i]);
                values[at] = f64::from(value);
            }
        }
        let device = Device::default().autodiff();
        let held = TensorData::new(held, parent).convert_dtype(dtype);
        let held = Tensor::<D>::from_data(held, (&device, dtype));
        let slices: Vec<_> = (0..D)
            .map(|i| {
                let (axis, n) = (axis(self.order[i]), core[self.order[i]]);
                let start = axis.before as isize;
                let end = start + (n.saturating_sub(1) * axis.step + n.min(1)) as isize;
                Slice::new(start, Some(end), axis.step as isize)
            })
            .collect();
        let flipped: Vec<_> = (0..D).filter(|&i| axis(self.order[i]).flipped).collect();
        let place = |axis: usize| self.order.iter().position(|&of| of == axis).unwrap() as isize;
        let view = held.slice(slices.as_slice());
        let view = flipped
            .iter()
            .fold(view, |view, &axis| view.flip([axis as isize]));
        let view = view.permute(std::array::from_fn::<isize, D, _>(place));
        let view = match is_empty {
            true => view,
            false => view.expand(shape),
        };
        assert_eq!(view.dims(), shape);
        let wide = TensorData::new(values, shape);
        Operand {
            view: view.require_grad(),
            wide: Tensor::from_data(wide, (&device, DType::F64)).require_grad(),
        }
    }
}

/// All indices of a shape.
fn indices<const D: usize>(shape: [usize; D]) -> impl Iterator<Item = [usize; D]> {
    (0..shape.iter().product()).map(move |mut at: usize| {
        let mut index = [0; D];
        for axis in (0..D).rev() {
            index[axis] = at % shape[axis];
            at /= shape[axis];
        }
        index
    })
}

/// Values in `[-1, 1)` of no structure.
struct Noise(u64);

impl Noise {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_view_has_the_values_that_it_says(
        view in view(3),
        shape in [0_usize..4, 0..4, 0..4],
        seed in any::<u64>(),
    ) {
        for dtype in [DType::F32, DType::BF16] {
            let operand = view.operand(shape, dtype, seed);
            prop_assert_eq!(operand.view.dtype(), dtype);
            let found = operand.view.cast(DType::F64).into_data();
            found.assert_eq(&operand.wide.into_data(), true);
        }
    }
}
