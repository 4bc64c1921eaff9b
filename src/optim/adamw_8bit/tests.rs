//! The step on blocks, against its definition in plain loops.

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use proptest::prelude::*;

use super::super::block_wise::{BLOCK, WORDS};
use super::super::dynamic_map::{DynamicMap, SIGNED, UNSIGNED};
use super::blocks::Codes;
use super::portable;
use super::update::Update;

/// A moment on the host, one code a byte.
#[derive(Clone, Debug, PartialEq)]
struct Moment {
    codes: Vec<u8>,
    absmax: Vec<u32>,
}

/// The step by its definition, one value after the other; the bits of all that it leaves.
fn plain(values: &mut [f32], grads: &[f32], moments: &mut [Moment; 2], update: &Update) {
    let n = values.len();
    let restored = [(0, &SIGNED), (1, &UNSIGNED)].map(|(moment, map)| {
        let Moment { codes, absmax } = &moments[moment];
        let value =
            |i: usize| map.values[usize::from(codes[i])] * f32::from_bits(absmax[i / BLOCK]);
        (0..n).map(value).collect::<Vec<f32>>()
    });
    let [mut m, mut v] = restored;
    for i in 0..n {
        [values[i], m[i], v[i]] = update.of_value(values[i], grads[i], m[i], v[i]);
    }
    *moments = [quantized(&SIGNED, m), quantized(&UNSIGNED, v)];
}

fn quantized(map: &DynamicMap, mut values: Vec<f32>) -> Moment {
    values.resize(values.len().next_multiple_of(BLOCK), 0.0);
    let (mut codes, mut absmax) = (Vec::new(), Vec::new());
    for block in values.chunks(BLOCK) {
        if block.iter().any(|x| !x.is_finite()) {
            codes.extend([0; BLOCK]);
            absmax.push(f32::NAN.to_bits());
            continue;
        }
        let largest = block.iter().fold(0f32, |most, x| most.max(x.abs()));
        let divisor = if largest == 0.0 { 1.0 } else { largest };
        // The number of midpoints below, in f64, where they are exact.
        codes.extend(block.iter().map(|x| {
            let s = f64::from(x / divisor);
            let below = |pair: &&[f32]| (f64::from(pair[0]) + f64::from(pair[1])) / 2.0 < s;
            map.values.windows(2).filter(below).count() as u8
        }));
        absmax.push(largest.to_bits());
    }
    Moment { codes, absmax }
}

fn on_device(moments: &[Moment; 2]) -> [Codes; 2] {
    let device = Device::default();
    moments.each_ref().map(|Moment { codes, absmax }| {
        let words = codes.as_chunks::<4>().0.iter();
        let words: Vec<i32> = words.map(|&word| i32::from_le_bytes(word)).collect();
        let absmax: Vec<f32> = absmax.iter().map(|&bits| f32::from_bits(bits)).collect();
        let (len, blocks) = (words.len(), absmax.len());
        let codes = Codes::from_data(
            TensorData::new(words, [len]),
            TensorData::new(absmax, [blocks]),
            &device,
        );
        codes.unwrap()
    })
}

fn on_host(moments: [Codes; 2]) -> [Moment; 2] {
    moments.map(|Codes { words, absmax }| {
        let words: Vec<i32> = words.into_data().try_into_vec().unwrap();
        let absmax: Vec<f32> = absmax.into_data().try_into_vec().unwrap();
        Moment {
            codes: words.into_iter().flat_map(i32::to_le_bytes).collect(),
            // One NaN is as good as another.
            absmax: absmax
                .into_iter()
                .map(|x| if x.is_nan() { f32::NAN } else { x }.to_bits())
                .collect(),
        }
    })
}

fn zeros(n: usize) -> [Moment; 2] {
    let blocks = n.div_ceil(BLOCK);
    [0; 2].map(|_| Moment {
        codes: vec![0; blocks * 4 * WORDS],
        absmax: vec![0; blocks],
    })
}

fn update(time: usize) -> Update {
    Update::new([0.9, 0.999], 1e-8, 0.01, 1e-3, time)
}

type Stepper = Box<dyn Fn(Tensor<2>, Tensor<2>, [Codes; 2], &Update) -> (Tensor<2>, [Codes; 2])>;

fn steppers() -> Vec<(String, Stepper)> {
    let mut all: Vec<(String, Stepper)> = vec![
        ("portable".into(), Box::new(portable::step)),
        (
            "portable in strips".into(),
            Box::new(|w, g, m, u| portable::step_by(2, w, g, m, u)),
        ),
    ];
    #[cfg(feature = "flex")]
    for isa in crate::cpu::simd::Isa::available() {
        let step: Stepper = Box::new(move |w, g, m, u| super::flex::step_by(isa, w, g, m, u));
        all.push((format!("{isa:?}"), step));
    }
    all
}

/// Values of all magnitudes, or a few that are out of the ordinary.
fn gradients(n: usize) -> impl Strategy<Value = Vec<f32>> {
    let value = prop_oneof![
        10 => -1f32..1.0,
        3 => (-1f32..1.0, -30i32..10).prop_map(|(x, power)| x * 2f32.powi(power)),
        1 => Just(0.0),
    ];
    proptest::collection::vec(value, n)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Bit for bit: no sum in it has an order.
    #[test]
    fn every_way_is_the_plain_one(
        (rows, grads) in (1usize..80, 1usize..5).prop_flat_map(|(rows, steps)| {
            (Just(rows), proptest::collection::vec(gradients(rows * 37), steps))
        }),
        w in -2f32..2.0, bf16: bool, bf16_grads: bool,
    ) {
        let (n, device) = (rows * 37, Device::default());
        let tensor = |values: &[f32], half: bool| {
            let data = TensorData::new(values.to_vec(), [rows, 37]);
            let tensor = Tensor::<2>::from_data(data, &device);
            if half { tensor.cast(FloatDType::BF16) } else { tensor }
        };
        let host = |tensor: Tensor<2>| -> Vec<f32> {
            tensor.into_data().convert_dtype(burn::tensor::DType::F32).try_into_vec().unwrap()
        };
        let start: Vec<f32> = (0..n).map(|i| w * (i as f32).sin()).collect();
        for (name, step) in steppers() {
            let mut found = (tensor(&start, bf16), on_device(&zeros(n)));
            let mut expected = (host(tensor(&start, bf16)), zeros(n));
            for (time, grad) in (1..).zip(&grads) {
                let grad = tensor(grad, bf16_grads);
                found = step(found.0, grad.clone(), found.1, &update(time));
                plain(&mut expected.0, &host(grad), &mut expected.1, &update(time));
                expected.0 = host(tensor(&expected.0, bf16));
                prop_assert_eq!(host(found.0.clone()), expected.0.clone(), "{}", name);
                prop_assert!(on_host(found.1.clone()) == expected.1, "{name}");
            }
        }
    }
}

/// Views of other tensors, transposed and cut out, and tensors that somebody else holds as well, who keeps what he had.
#[test]
fn views_and_shared_tensors_are_stepped_too() {
    let device = Device::default();
    let wide = |offset: f32| {
        let values: Vec<f32> = (0..40 * 50).map(|i| (i as f32 + offset).sin()).collect();
        Tensor::<2>::from_data(TensorData::new(values, [40, 50]), &device)
    };
    let views: [fn(Tensor<2>) -> Tensor<2>; 3] = [
        |t| t.transpose(),
        |t| t.slice([3..33, 7..49]),
        |t| t.slice([8..40, 0..50]),
    ];
    for (name, step) in steppers() {
        for view in views {
            let (tensor, grad) = (view(wide(0.0)), view(wide(9.0)));
            let host = |tensor: &Tensor<2>| tensor.to_data().try_into_vec::<f32>().unwrap();
            let (mut expected, kept) = (host(&tensor), host(&tensor));
            let n = expected.len();
            let mut moments = zeros(n);
            plain(&mut expected, &host(&grad), &mut moments, &update(1));
            let state = on_device(&zeros(n));
            let (found, after) = step(tensor.clone(), grad, state.clone(), &update(1));
            assert_eq!(host(&found), expected, "{name}");
            assert_eq!(found.dims(), tensor.dims(), "{name}");
            assert!(on_host(after) == moments, "{name}");
            assert_eq!(host(&tensor), kept, "{name}");
            assert!(on_host(state) == zeros(n), "{name}");
        }
    }
}

/// A gradient that is not finite is seen in its whole block from then on, and in no other.
#[test]
fn what_is_not_finite_stays_in_its_block_and_is_seen() {
    let device = Device::default();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
        for (name, step) in steppers() {
            let mut grads = vec![1.0; 3 * BLOCK];
            grads[BLOCK + 5] = bad;
            let of = |values: &[f32]| {
                Tensor::<2>::from_data(TensorData::new(values.to_vec(), [3, BLOCK]), &device)
            };
            let first = step(
                of(&grads),
                of(&grads),
                on_device(&zeros(3 * BLOCK)),
                &update(1),
            );
            grads[BLOCK + 5] = 1.0;
            let (second, _) = step(first.0, of(&grads), first.1, &update(2));
            let values: Vec<f32> = second.into_data().try_into_vec().unwrap();
            for (block, values) in values.chunks(BLOCK).enumerate() {
                let nan = values.iter().filter(|x| x.is_nan()).count();
                assert_eq!(nan, if block == 1 { BLOCK } else { 0 }, "{name} {bad}");
            }
        }
    }
}
