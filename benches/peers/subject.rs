//! Everything that is timed on our side, ours and Burn's own: a case becomes a closure that runs it once.

use std::hint::black_box;

use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_peft::nf4::{Nf4Config, Nf4Data, Nf4Float, Nf4Weight};
use half::bf16;

use crate::case::Case;
use crate::common::layer::{Layer, Method};
use crate::common::train_step::train_step;
use crate::common::{activations, weight};

/// Runs the case once.
pub type Run = Box<dyn FnMut()>;

/// With few rows a product is as fast as its weight is read, and the weights of a model do not stay in a cache from one
/// token to the next. So up to this many rows go through several weights in turn.
const FEW: usize = 8;
/// Bytes of the weights taken in turn: more than caches hold.
const IN_TURN: usize = 128 << 20;

/// Makes everything a case needs.
///
/// # Errors
///
/// When there is no such subject.
pub fn build(case: &Case) -> Result<Run, String> {
    let device = Device::default();
    let [d_in, d_out] = case.dims;
    let float = FloatDType::from(case.dtype);
    let layer = |method| layer(case, method);
    Ok(match case.subject.as_str() {
        "quantize" => {
            // bitsandbytes' layout, as its own quantise gets.
            let values: Vec<f32> = weight([d_out, d_in], DType::F32, &device)
                .into_data()
                .try_into_vec()
                .expect("f32 was asked for");
            let config = Nf4Config::new();
            Box::new(move || {
                let data = Nf4Data::quantize("weight", &values, [d_out, d_in], &config);
                black_box(data.unwrap());
            })
        }
        "quantize-linear" => {
            let dense = weight(case.dims, DType::F32, &device);
            Box::new(move || drop(black_box(nf4(dense.clone()))))
        }
        "dequantize" => {
            let packed = nf4(weight(case.dims, DType::F32, &device));
            Box::new(move || drop(black_box(packed.dequantize(float))))
        }
        "dequantize-reused" => match case.dtype {
            DType::BF16 => dequantize_reused(case, bf16::ZERO),
            _ => dequantize_reused(case, 0_f32),
        },
        "product" => product(case, |packed, x| packed.matmul(x)),
        "product-plain" => product(case, move |packed, x| {
            x.matmul(packed.dequantize(float).transpose())
        }),
        "product-transposed" => {
            let packed = nf4(weight(case.dims, DType::F32, &device));
            let y = activations([case.tokens, d_out], case.dtype, &device);
            Box::new(move || drop(black_box(packed.matmul_transposed(y.clone()))))
        }
        "burn-dense" => dense(case, || weight(case.dims, case.dtype, &device)),
        "burn-dense-view" => dense(case, || {
            weight([d_out, d_in], case.dtype, &device).transpose()
        }),
        "qlora" => layer(Method::QLora),
        "qlora-double" => layer(Method::QLoraDouble),
        "lora" => layer(Method::Lora),
        "dora" => layer(Method::Dora),
        "qdora" => layer(Method::QDora),
        "frozen" => layer(Method::Frozen),
        "burn-lora" => layer(Method::BurnLora),
        "burn-qlora" => layer(Method::BurnQLora),
        "step-qlora" => Box::new(train_step(true, float)),
        "step-lora" => Box::new(train_step(false, float)),
        subject => return Err(format!("no such subject: {subject}")),
    })
}

fn nf4(dense: Tensor<2>) -> Nf4Weight {
    Nf4Weight::quantize("weight", dense, &Nf4Config::new()).expect("the weight is finite")
}

/// Into the same memory every time.
fn dequantize_reused<T: Nf4Float + 'static>(case: &Case, zero: T) -> Run {
    let packed = nf4(weight(case.dims, DType::F32, &Device::default())).to_data();
    let mut values = vec![zero; packed.num_weights()];
    Box::new(move || {
        let done = packed.dequantize_into(black_box(&mut values));
        done.expect("as many values as weights");
    })
}

/// A product with packed weights.
fn product(case: &Case, product: impl Fn(&Nf4Weight, Tensor<2>) -> Tensor<2> + 'static) -> Run {
    let device = Device::default();
    let packed = nf4(weight(case.dims, DType::F32, &device));
    let data = packed.to_data();
    let weights = (0..copies(case, packed.num_bytes()))
        .map(|_| Nf4Weight::from_data(&data, &device))
        .collect();
    let x = activations([case.tokens, case.dims[0]], case.dtype, &device);
    in_turn(weights, move |weight| {
        black_box(product(weight, x.clone()));
    })
}

/// The product with dense weights `[d_in, d_out]`, which may be views.
fn dense(case: &Case, weight: impl Fn() -> Tensor<2>) -> Run {
    let bytes = case.dims[0] * case.dims[1] * case.dtype.size();
    let weights = (0..copies(case, bytes)).map(|_| weight()).collect();
    let x = activations([case.tokens, case.dims[0]], case.dtype, &Device::default());
    in_turn(weights, move |weight: &Tensor<2>| {
        black_box(x.clone().matmul(weight.clone()));
    })
}

/// How many weights of `bytes` are taken in turn.
fn copies(case: &Case, bytes: usize) -> usize {
    match case.tokens {
        ..=FEW => IN_TURN.div_ceil(bytes),
        _ => 1,
    }
}

fn in_turn<T: 'static>(items: Vec<T>, run: impl Fn(&T) + 'static) -> Run {
    let mut turn = 0;
    Box::new(move || {
        run(&items[turn]);
        turn = (turn + 1) % items.len();
    })
}

fn layer(case: &Case, method: Method) -> Run {
    let device = Device::default().autodiff();
    let layer = Layer::new(method, case.dims, case.rank, &device);
    let x = activations([case.tokens, case.dims[0]], case.dtype, &device);
    Box::new(move || layer.forward_backward(&x))
}
