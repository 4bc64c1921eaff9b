//! A head whose keys are packed in parts, against one whose keys are packed at once.

use std::ops::Range;

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::cpu::output::over;
use crate::cpu::value::noise;

#[derive(Clone, Debug)]
struct Case {
    kv_heads: usize,
    group: usize,
    d: usize,
    keys: usize,
    ranges: Vec<Range<usize>>,
    /// Blocks of keys that are packed at a time.
    blocks: usize,
    seed: u64,
}

/// What a case gives: `y`, `dq`, `dk` and `dv`.
fn run<V: Value>(isa: Isa, case: &Case, packed: usize) -> [Vec<V>; 4] {
    let &Case {
        kv_heads,
        group,
        d,
        keys,
        ref ranges,
        seed,
        ..
    } = case;
    let (heads, queries) = (kv_heads * group, ranges.len());
    let visible = Visible::from_ranges(ranges, queries, keys);
    let [of_queries, of_keys] = [heads * queries * d, kv_heads * keys * d];
    let [q, dy] = [0, 1].map(|i| noise::<V>(of_queries, seed + i));
    let [k, v] = [2, 3].map(|i| noise::<V>(of_keys, seed + i));
    let by_query = |values| Heads::new(values, [1, heads, queries, d], [0, queries * d, d]);
    let by_key = |values| Heads::new(values, [1, kv_heads, keys, d], [0, keys * d, d]);
    let attention = Attention {
        q: by_query(&q),
        k: by_key(&k),
        v: by_key(&v),
        visible: &visible,
        scale: 0.7,
        packed,
    };
    let nan = V::round(f32::NAN);
    let y = over(nan, of_queries, |y| attention.forward(isa, y));
    let [mut dk, mut dv] = [Vec::new(), Vec::new()];
    let dq = over(nan, of_queries, |dq| {
        dk = over(nan, of_keys, |dk| {
            dv = over(nan, of_keys, |dv| {
                attention.backward(isa, by_query(&dy), [&mut *dq, &mut *dk, dv]);
            });
        });
    });
    [y, dq, dk, dv]
}

fn check<V: Value>(case: &Case) {
    let width = case.d.next_multiple_of(16);
    for isa in Isa::available() {
        let whole = run::<V>(isa, case, PACKED);
        let parts = run::<V>(isa, case, case.blocks * BLOCK * width);
        let wide = |values: &[V]| values.iter().map(|&v| v.into()).collect::<Vec<f32>>();
        for (i, (found, expected)) in parts.iter().zip(&whole).enumerate() {
            let (found, expected) = (wide(found), wide(expected));
            let largest = expected
                .iter()
                .fold(1.0_f32, |most, value| most.max(value.abs()));
            // The order of the sums over keys, and a rounding to the dtype either way.
            let bound = match (i, size_of::<V>()) {
                (0 | 1, 4) => 1e-6 * largest * (case.keys as f32).sqrt(),
                (0 | 1, _) => largest / 128.0,
                // Sums over queries are in one order.
                _ => 0.0,
            };
            for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert!(
                    (found - expected).abs() <= bound,
                    "result {i}[{at}] on {isa}: {found}, not {expected}"
                );
            }
        }
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (1_usize..3, 1_usize..3, 1_usize..40, 1_usize..4);
    let ranges = (1_usize..120, 1_usize..300).prop_flat_map(|(queries, keys)| {
        let range = (0..=keys, 0..=keys).prop_map(|(a, b)| a.min(b)..a.max(b));
        let any = prop::collection::vec(range, queries);
        let causal = Just((0..queries).map(|query| 0..(query + 1).min(keys)).collect());
        (Just(keys), prop_oneof![any, causal])
    });
    (sizes, ranges, any::<u32>()).prop_map(
        |((kv_heads, group, d, blocks), (keys, ranges), seed)| Case {
            kv_heads,
            group,
            d,
            keys,
            ranges,
            blocks,
            seed: seed.into(),
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn parts_give_what_the_whole_gives(case in cases()) {
        check::<f32>(&case);
        check::<bf16>(&case);
    }
}

/// The scratch of a thread does not grow with the keys but for the scores of a block of queries.
#[test]
fn scratch_is_bounded() {
    for d in [64, 128, 256] {
        let sizes = |keys: usize| {
            let values = vec![0.0_f32; keys * d];
            let heads = || Heads::new(&values, [1, 1, keys, d], [0, 0, d]);
            let visible = Visible::from_ranges(&vec![0..keys; keys], keys, keys);
            let attention = Attention {
                q: heads(),
                k: heads(),
                v: heads(),
                visible: &visible,
                scale: 1.0,
                packed: PACKED,
            };
            let sizes = attention.sizes();
            [ForwardMemory::len(&sizes), BackwardMemory::len(&sizes)].map(|len| 4 * len)
        };
        let mebibyte = 1 << 20;
        for keys in [512, 8192] {
            let [forward, backward] = sizes(keys);
            assert!(forward <= 3 * mebibyte + 192 * keys, "{forward} for {d}");
            assert!(backward <= 7 * mebibyte + 384 * keys, "{backward} for {d}");
        }
    }
}
