//! Products with a dense weight and with low-rank factors, on every instruction set of this machine, against f64.

use std::mem::MaybeUninit;

use half::bf16;
use proptest::prelude::*;

use super::dense::{Dense, Widened};
use super::element::{Element, F32, Pairs};
use super::factor::Factor;
use super::few_rows::{self, Loaded};
use super::low_rank::LowRank;
use super::skinny;
use super::target::Target;
use super::window::Window;
use super::{Source, many_rows, transposed};
use crate::cpu::output::over;
use crate::cpu::parallel::assert_same_in_pools;
use crate::cpu::simd::Isa;
use crate::cpu::value::{Value, noise};

fn wide<V: Value>(values: &[V]) -> Vec<f64> {
    values
        .iter()
        .map(|&value| f64::from(value.into()))
        .collect()
}

/// A sum, and the sum of the magnitudes of its terms.
#[derive(Clone, Copy, Debug)]
struct Sum {
    value: f64,
    size: f64,
}

impl Sum {
    fn of(terms: impl Iterator<Item = f64>) -> Self {
        let nothing = Self {
            value: 0.0,
            size: 0.0,
        };
        terms.fold(nothing, |sum, term| Self {
            value: sum.value + term,
            size: sum.size + term.abs(),
        })
    }

    fn plus(self, term: f64) -> Self {
        Self {
            value: self.value + term,
            size: self.size + term.abs(),
        }
    }
}

/// `a [m, k] · b [k, n]`, given as functions of their indices.
fn reference(
    [m, k, n]: [usize; 3],
    a: impl Fn(usize, usize) -> f64,
    b: impl Fn(usize, usize) -> f64,
) -> Vec<Sum> {
    let at = |i: usize| Sum::of((0..k).map(|p| a(i / n, p) * b(p, i % n)));
    (0..m * n).map(at).collect()
}

/// What `write` writes over NaN.
fn over_nan<V: Value>(len: usize, write: impl FnOnce(&mut [MaybeUninit<V>])) -> Vec<V> {
    over(V::round(f32::NAN), len, write)
}

/// `|y - exact| ≤ γ·Σ|terms| + ε·|y|`, `γ = (terms + 4)·2^-24`: what any order of summing in f32 keeps (Higham, "Accuracy and
/// Stability of Numerical Algorithms", section 4.2); then the result is rounded to its dtype, by `ε` of it.
fn check<V: Value>(name: &str, isa: Isa, found: &[V], expected: &[Sum], terms: usize) {
    let epsilon = match size_of::<V>() {
        2 => 2f64.powi(-8),
        _ => 0.0,
    };
    let gamma = (terms + 4) as f64 * f64::from(f32::EPSILON) / 2.0;
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in wide(found).into_iter().zip(expected).enumerate() {
        let Sum { value, size } = *expected;
        let sum = gamma * size;
        assert!(
            (found - value).abs() <= sum + epsilon * (value.abs() + sum),
            "{name} on {isa}: element {i} is {found}, not {value}"
        );
    }
}

fn check_dense<E: Element>(isa: Isa, [rows, d_out, d_in, rank]: [usize; 4], seed: u64)
where
    for<'a> Dense<'a, E::Value>: Source<E>,
{
    let w = noise::<E::Value>(d_out * d_in, seed);
    let x = noise::<E::Value>(rows * d_in, seed + 1);
    let dy = noise::<E::Value>(rows * d_out, seed + 2);
    let u = noise::<f32>(rows * rank, seed + 3);
    let [v_out, v_in] = [d_out, d_in].map(|columns| noise::<f32>(rank * columns, seed + 4));
    let dense = Dense::new(&w, [d_out, d_in]);
    let [w, xs, dys, us] = [wide(&w), wide(&x), wide(&dy), wide(&u)];
    // The inner dimension goes on with the rank.
    let product =
        |[from, to]: [usize; 2], x: &[f64], v: &[f32], at: &dyn Fn(usize, usize) -> f64| {
            let v = wide(v);
            reference(
                [rows, from + rank, to],
                |i, p| match p.checked_sub(from) {
                    None => x[i * from + p],
                    Some(p) => us[i * rank + p],
                },
                |p, j| match p.checked_sub(from) {
                    None => at(p, j),
                    Some(p) => v[p * to + j],
                },
            )
        };

    let low = LowRank {
        rank,
        u: &u,
        v: &v_out,
    };
    let y = over_nan(rows * d_out, |y| {
        many_rows::product::<E, _>(isa, dense, &x, low, y)
    });
    let expected = product([d_in, d_out], &xs, &v_out, &|p, j| w[j * d_in + p]);
    check("many rows", isa, &y, &expected, d_in + rank);

    let low = LowRank {
        rank,
        u: &u,
        v: &v_in,
    };
    let dx = over_nan(rows * d_in, |dx| {
        transposed::product::<E, _>(isa, dense, &dy, low, dx)
    });
    let expected = product([d_out, d_in], &dys, &v_in, &|p, j| w[p * d_in + j]);
    check("transposed", isa, &dx, &expected, d_out + rank);
}

/// Products with a window of a weight of values `V`, to some columns of rows that hold something already.
fn check_window<E: Element, V: Value, W: Source<E>>(
    isa: Isa,
    [rows, d_out, d_in, margin]: [usize; 4],
    source: impl Fn(&'static [V], [usize; 2]) -> W,
    add: bool,
    seed: u64,
) {
    let whole = [d_out + 2 * margin, d_in + 3 * margin];
    // The source may hold on to it: a test's memory.
    let w: &'static [V] = noise::<V>(whole[0] * whole[1], seed).leak();
    let at = |o: usize, i: usize| f64::from(w[(margin + o) * whole[1] + 2 * margin + i].into());
    let window = Window::new(
        source(w, whole),
        whole,
        margin..margin + d_out,
        2 * margin..2 * margin + d_in,
    );
    for turned in [false, true] {
        let [from, to] = if turned { [d_out, d_in] } else { [d_in, d_out] };
        let x = noise::<E::Value>(rows * from, seed + 1);
        let xs = wide(&x);
        let stride = to + margin;
        let old = noise::<f32>(rows * stride, seed + 2);
        let mut found = old.clone();
        let target = Target::window(&mut found, stride, margin..stride, add);
        match turned {
            false => many_rows::product_to::<E, _, _>(isa, window, &x, LowRank::NONE, target),
            true => transposed::product_to::<E, _, _>(isa, window, &x, LowRank::NONE, target),
        }
        let weight = |p: usize, j: usize| if turned { at(p, j) } else { at(j, p) };
        let product = reference([rows, from, to], |i, p| xs[i * from + p], weight);
        let expected: Vec<_> = (0..rows * stride)
            .map(|i| {
                let (row, column) = (i / stride, i % stride);
                let old = f64::from(old[i]);
                match column.checked_sub(margin) {
                    None => Sum::of([old].into_iter()),
                    Some(j) if add => product[row * to + j].plus(old),
                    Some(j) => product[row * to + j],
                }
            })
            .collect();
        check("a window", isa, &found, &expected, from + 1);
    }
}

/// How a factor `[d, rank]` lies in memory: its strides, and how much is before it.
fn layouts() -> impl Strategy<Value = Layout> {
    prop_oneof![
        (any::<bool>(), 0_usize..9, 0_usize..40).prop_map(|(turned, beside, offset)| Layout {
            turned,
            beside,
            step: 1,
            offset
        }),
        (any::<bool>(), 0_usize..3, 0_usize..5).prop_map(|(turned, step, offset)| Layout {
            turned,
            beside: 0,
            step,
            offset
        }),
        // A part of a wider factor, whose rows are as far apart as those of one that is filled up would be.
        (0_usize..17).prop_map(|offset| Layout {
            turned: false,
            beside: usize::MAX,
            step: 1,
            offset
        }),
    ]
}

#[derive(Clone, Copy, Debug)]
struct Layout {
    turned: bool,
    /// Values beside each line, or what fills it up to a multiple of sixteen.
    beside: usize,
    /// Between the values of a line; 0: one value is all of them, and all lines are one.
    step: usize,
    offset: usize,
}

impl Layout {
    fn strides(&self, [d, rank]: [usize; 2]) -> [usize; 2] {
        let line = if self.turned { d } else { rank };
        let between = match self.beside {
            usize::MAX => line.next_multiple_of(16),
            beside => self.step * line + beside,
        };
        match self.turned {
            false => [between, self.step],
            true => [self.step, between],
        }
    }
}

fn check_skinny<V: Value>(isa: Isa, [rows, d, rank]: [usize; 3], layout: Layout, seed: u64) {
    let turned = layout.turned;
    let x = noise::<V>(rows * d, seed);
    let strides @ [by_row, by_column] = layout.strides([d, rank]);
    let last = (d - 1) * by_row + (rank - 1) * by_column;
    // Nothing behind the last value.
    let parent = noise::<f32>(layout.offset + last + 1, seed + 1);
    let u = noise::<f32>(rows * rank, seed + 2);
    let [xs, us] = [wide(&x), wide(&u)];

    let a_factor = Factor::new(&parent[layout.offset..], [d, rank], strides);
    let at = |i: usize, j: usize| f64::from(parent[layout.offset + i * by_row + j * by_column]);
    let found = over_nan(rows * rank, |out| {
        skinny::to_rank(isa, &x, a_factor, 0.5, out)
    });
    let expected = reference([rows, d, rank], |i, p| 0.5 * xs[i * d + p], at);
    check("to rank", isa, &found, &expected, d);

    let found = over_nan(rank * d, |out| {
        skinny::over_rows(isa, &u, &x, rank, turned, out)
    });
    let expected = match turned {
        false => reference(
            [rank, rows, d],
            |i, p| us[p * rank + i],
            |p, j| xs[p * d + j],
        ),
        true => reference(
            [d, rows, rank],
            |i, p| xs[p * d + i],
            |p, j| us[p * rank + j],
        ),
    };
    check("over rows", isa, &found, &expected, rows);

    let a = noise::<f32>(rank * d, seed + 3);
    let factor = wide(&a);
    let mut found = x.clone();
    skinny::add(isa, &u, &a, rank, &mut found);
    let product = reference(
        [rows, rank, d],
        |i, p| us[i * rank + p],
        |p, j| factor[p * d + j],
    );
    let expected: Vec<_> = product
        .iter()
        .zip(&xs)
        .map(|(sum, x)| sum.plus(*x))
        .collect();
    check("add", isa, &found, &expected, rank + 1);
}

/// Large enough for the pool.
#[test]
fn the_number_of_threads_changes_no_bit() {
    fn check<E: Element>()
    where
        for<'a> Dense<'a, E::Value>: Source<E>,
    {
        let [rows, d_out, d_in, rank] = [130, 202, 154, 17];
        let isa = Isa::best();
        let [w, x, dy] = [d_out * d_in, rows * d_in, rows * d_out].map(|n| noise::<E::Value>(n, 5));
        let [u, v_out, v_in] = [rows * rank, rank * d_out, rank * d_in].map(|n| noise::<f32>(n, 6));
        let low = |v| LowRank { rank, u: &u, v };
        let dense = Dense::new(&w, [d_out, d_in]);
        assert_same_in_pools("many rows", || {
            wide(&over_nan(rows * d_out, |y| {
                many_rows::product::<E, _>(isa, dense, &x, low(&v_out), y)
            }))
        });
        assert_same_in_pools("transposed", || {
            wide(&over_nan(rows * d_in, |dx| {
                transposed::product::<E, _>(isa, dense, &dy, low(&v_in), dx)
            }))
        });
        let factor = Factor::row_major(&v_in, [rank, d_in]).transposed();
        assert_same_in_pools("to rank", || {
            over_nan(rows * rank, |out| {
                skinny::to_rank(isa, &x, factor, 0.5, out)
            })
        });
        assert_same_in_pools("over rows", || {
            over_nan(rank * d_in, |out| {
                skinny::over_rows(isa, &u, &x, rank, false, out)
            })
        });
        assert_same_in_pools("add", || {
            let mut y = x.clone();
            skinny::add(isa, &u, &v_in, rank, &mut y);
            wide(&y)
        });
    }
    check::<F32>();
    check::<Pairs>();
}

/// A few rows times a weight in either order of memory: against f64, and each row the same alone and among others.
fn check_few_rows<V: Loaded>(isa: Isa, [rows, d_out, d_in]: [usize; 3], along: bool, seed: u64) {
    let x = noise::<V>(rows * d_in, seed);
    let w = noise::<V>(d_out * d_in, seed + 1);
    let held = if along { [d_out, d_in] } else { [d_in, d_out] };
    let run = |x: &[V]| few_rows::product(isa, x, &w, held, along, x.len() / d_in * d_out);
    let y = run(&x);
    let (wide_x, wide_w) = (wide(&x), wide(&w));
    let weight = |k: usize, column: usize| match along {
        true => wide_w[column * d_in + k],
        false => wide_w[k * d_out + column],
    };
    let expected = reference([rows, d_in, d_out], |row, k| wide_x[row * d_in + k], weight);
    let rounding = if size_of::<V>() == 2 {
        2.0_f64.powi(-8)
    } else {
        0.0
    };
    for (y, sum) in wide(&y).iter().zip(expected) {
        let bound = (d_in as f64 + 4.0) * 2.0_f64.powi(-24) * sum.size + rounding * sum.value.abs();
        assert!((y - sum.value).abs() <= bound + 1e-30, "{y}, {}", sum.value);
    }
    for (x, y) in x.chunks_exact(d_in).zip(y.chunks_exact(d_out)) {
        assert_eq!(
            bytemuck::cast_slice::<V, u8>(&run(x)),
            bytemuck::cast_slice::<V, u8>(y)
        );
    }
}

#[test]
fn a_few_rows_have_the_same_bits_on_any_number_of_threads() {
    let (x, w) = (noise::<f32>(5 * 700, 1), noise::<f32>(700 * 1100, 2));
    for held in [[1100, 700], [700, 1100]] {
        let along = held[0] == 1100;
        assert_same_in_pools("few rows", || {
            few_rows::product(Isa::best(), &x, &w, held, along, 5 * 1100)
                .iter()
                .map(|value| value.to_bits())
                .collect::<Vec<_>>()
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn dense_weights(
        rows in 1_usize..90,
        d_out in 1_usize..150,
        d_in in 1_usize..150,
        rank in 0_usize..20,
        seed in any::<u32>(),
    ) {
        for isa in Isa::available() {
            check_dense::<F32>(isa, [rows, d_out, d_in, rank], seed.into());
            check_dense::<Pairs>(isa, [rows, 2 * d_out, 2 * d_in, rank], seed.into());
        }
    }

    #[test]
    fn windows_of_weights(
        rows in 1_usize..90,
        d_out in 1_usize..150,
        d_in in 1_usize..150,
        margin in 0_usize..5,
        add in any::<bool>(),
        seed in any::<u32>(),
    ) {
        let sizes = [rows, d_out, d_in, margin];
        let even = [rows, 2 * d_out, 2 * d_in, 2 * margin];
        for isa in Isa::available() {
            check_window::<F32, f32, _>(isa, sizes, Dense::new, add, seed.into());
            let widened = |w, shape| Widened(Dense::new(w, shape));
            check_window::<F32, bf16, _>(isa, sizes, widened, add, seed.into());
            check_window::<Pairs, bf16, _>(isa, even, Dense::new, add, seed.into());
        }
    }

    #[test]
    fn a_few_rows_times_a_dense_weight(
        rows in 1_usize..=few_rows::MOST,
        d_out in 1_usize..300,
        d_in in 1_usize..300,
        along in any::<bool>(),
        seed in any::<u32>(),
    ) {
        for isa in Isa::available() {
            check_few_rows::<f32>(isa, [rows, d_out, d_in], along, seed.into());
            check_few_rows::<bf16>(isa, [rows, d_out, d_in], along, seed.into());
        }
    }

    #[test]
    fn low_rank_factors(
        rows in 1_usize..300,
        d in 1_usize..1200,
        rank in 1_usize..70,
        layout in layouts(),
        seed in any::<u32>(),
    ) {
        // The reference takes as many steps.
        let d = d.min(1 << 20 >> rows.ilog2() >> rank.ilog2()).max(1);
        for isa in Isa::available() {
            check_skinny::<f32>(isa, [rows, d, rank], layout, seed.into());
            check_skinny::<bf16>(isa, [rows, d, rank], layout, seed.into());
        }
    }
}
