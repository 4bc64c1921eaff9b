//! What a step of the optimisers holds, in live bytes counted by the allocator.

use burn::module::{Module, Param};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_peft::optim::AdamW8bitConfig;

use crate::{ALLOCATOR, alone};

#[derive(Module, Debug)]
struct One {
    values: Param<Tensor<2>>,
}

const ROWS: usize = 4096;
/// No multiple of a block: the last one of the parameter is a part.
const COLUMNS: usize = 1001;
const VALUES: usize = ROWS * COLUMNS;
const KIB: usize = 1024;
/// Maps of parameters and states, tasks of threads.
const SMALL: usize = 32 * KIB;

fn one(dtype: FloatDType) -> One {
    let device = Device::default().autodiff();
    let options = (&device, DType::from(dtype));
    One {
        values: Param::from_tensor(Tensor::ones([ROWS, COLUMNS], options)),
    }
}

/// Live bytes of a step above those before it: at its peak, and afterwards, when the gradient is gone.
fn step(optimizer: &mut ModuleOptimizer, module: One) -> (One, usize, isize) {
    let dtype = FloatDType::from(module.values.val().dtype());
    let options = (&Device::default(), DType::from(dtype));
    let mut grads = GradientsParams::new();
    grads.register(
        module.values.id,
        Tensor::<2>::ones([ROWS, COLUMNS], options),
    );
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let module = optimizer.step(1e-3, module, grads);
    let peak = ALLOCATOR.peak_usage() - before;
    (
        module,
        peak,
        ALLOCATOR.current_usage() as isize - before as isize,
    )
}

/// One test function: the allocator counts for the whole process.
#[test]
fn eight_bit_moments_take_two_bytes_a_value_and_a_step_none() {
    if !alone(eight_bit_moments_take_two_bytes_a_value_and_a_step_none) {
        return;
    }
    // Threads begin with memory of their own.
    rayon::broadcast(|_| ());
    let _ = step(&mut AdamW8bitConfig::new().init(), one(FloatDType::F32));
    let blocks = VALUES.div_ceil(256);
    // A code for each of two moments, of whole blocks, and a scale for each block.
    let state = 2 * 256 * blocks + 2 * 4 * blocks;
    assert!(state < VALUES * 2 + VALUES * 8 / 256 + 520);
    for (dtype, size) in [(FloatDType::F32, 4), (FloatDType::BF16, 2)] {
        let parameter = size * VALUES;
        let mut optimizer = AdamW8bitConfig::new().init();
        let (module, peak, stays) = step(&mut optimizer, one(dtype));
        println!("{dtype:?}: first step {peak} at most, {stays} stay of a state of {state}");
        assert!(peak <= state + SMALL, "{peak}");
        let stays = (stays + parameter as isize) as usize;
        assert!((state..state + SMALL).contains(&stays), "{stays}");

        let (module, peak, stays) = step(&mut optimizer, module);
        println!("{dtype:?}: second step {peak} at most, {stays} stay");
        assert!(peak <= SMALL, "{peak}");
        assert!(stays <= SMALL as isize - parameter as isize, "{stays}");

        // Who keeps the old model has two.
        let kept = module.clone();
        let (module, peak, _) = step(&mut optimizer, module);
        println!("{dtype:?}: third step, the model held elsewhere, {peak} at most");
        assert!(peak <= parameter + SMALL, "{peak}");
        drop((kept, module));
    }
    // What is measured is what is meant: Burn's AdamW keeps two values in f32, and makes more on the way.
    let mut optimizer = AdamWConfig::new().init();
    let (module, _, stays) = step(&mut optimizer, one(FloatDType::F32));
    assert!(stays >= 4 * VALUES as isize - SMALL as isize, "{stays}");
    let (_, peak, _) = step(&mut optimizer, module);
    println!("Burn's AdamW: {peak} at most");
    assert!(peak >= 4 * VALUES - SMALL, "{peak}");
}
