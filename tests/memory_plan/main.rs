//! The memory plan against the allocator: the peak of live bytes of a training step, over a grid of setups.

#[path = "../../examples/llama/mod.rs"]
mod llama;
mod step;

use burn_peft::memory::{Checkpointing, Float, Method, ModelShape, Setup, plan};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

#[test]
fn predicted_peaks_are_those_of_the_allocator() {
    let mut worst: f64 = 0.0;
    let scratch = step::warm_up(&shape(64));
    println!(
        "{scratch} bytes of scratch stay with {} threads",
        rayon::current_num_threads()
    );
    println!("method  blocks  seq  vocab | predicted   measured  ratio | moment");
    for checkpointing in [Checkpointing::None, Checkpointing::Segments(1)] {
        for vocab in [2048, 32000] {
            for seq in [64, 512] {
                for method in Method::ALL {
                    let shape = shape(vocab);
                    let setup = Setup::new(method, Float::F32)
                        .with_batch(1, seq)
                        .with_checkpointing(checkpointing);
                    let plan = plan(&shape, &setup).unwrap();
                    let predicted = plan.peak.parts.total() as f64;
                    let measured = step::measure(&shape, &setup) as f64;
                    let ratio = predicted / measured;
                    worst = worst.max((ratio - 1.0).abs());
                    println!(
                        "{:6} {} {seq:4} {vocab:6} | {:9.3} {:9.3} {ratio:.4} | {}",
                        method.name(),
                        if checkpointing == Checkpointing::None {
                            "kept "
                        } else {
                            "again"
                        },
                        predicted / 1e6,
                        measured / 1e6,
                        plan.peak.moment
                    );
                }
            }
        }
    }
    assert!(worst <= 0.05, "{worst}");
}

fn shape(vocab: u64) -> ModelShape {
    ModelShape::new(vocab, 384, 1024, 6, 6, 2)
}
