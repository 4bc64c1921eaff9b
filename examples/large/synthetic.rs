//! Weights that are no model's, made as fast as they are packed: about normal, distinct in every place, the same on every machine.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use half::bf16;
use rayon::prelude::*;

/// Standard deviation, as Hugging Face initialises a Llama.
const STD: f32 = 0.02;
/// Values that a task of a thread makes.
const TASK: usize = 1 << 16;

/// Makes every parameter of `module` one that gets its values when it is first used: ones for norms, numbers for matrices.
pub fn fill<M: Module>(module: M, seed: u64) -> M {
    module.map(&mut Fill {
        next: mix(seed ^ 0x005e_edbe_a7e5),
    })
}

struct Fill {
    /// Where the stream of the next parameter begins.
    next: u64,
}

impl ModuleMapper for Fill {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let stream = self.next;
        self.next = mix(stream);
        let shape = param.lazy_shape();
        let dims = shape.clone();
        let make = move |device: &Device, require_grad: bool| {
            let len = dims.num_elements();
            let values = match D {
                1 => vec![bf16::ONE; len],
                _ => numbers(stream, len),
            };
            let data = TensorData::new(values, dims.clone());
            device.memory_persistent_allocations(data, |data| {
                Tensor::from_data(data, (device, DType::BF16)).set_require_grad(require_grad)
            })
        };
        Param::uninitialized(param.id, make, param.lazy_device(), false, shape)
    }
}

/// `len` numbers of mean 0 and deviation [`STD`]: sums of four uniform ones.
fn numbers(stream: u64, len: usize) -> Vec<bf16> {
    let mut values = vec![bf16::ZERO; len];
    let tasks = values.par_chunks_mut(TASK).enumerate();
    tasks.for_each(|(task, values)| {
        for (place, value) in values.iter_mut().enumerate() {
            let bits = mix(stream ^ (task * TASK + place) as u64);
            let sum: i32 = (0..4).map(|part| (bits >> (16 * part)) as u16 as i32).sum();
            // A uniform u16 has the deviation 65536/√12, the sum of four of them twice that.
            let normal = (sum - 2 * 65_535) as f32 * (1.0 / 37_837.2);
            *value = bf16::from_f32(STD * normal);
        }
    });
    values
}

/// SplitMix64's output function (G. Steele, D. Lea, C. Flood, 2014).
pub fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
