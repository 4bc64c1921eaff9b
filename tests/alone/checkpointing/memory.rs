//! What stays of a block between forward and backward, counted by the allocator.

use burn::tensor::{Device, Int, Tensor};
use burn_peft::checkpointing::{Checkpointing, Keep};
use burn_peft::model::{PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;

use super::{BATCH, VOCAB, all_linear, lora};
use crate::{ALLOCATOR, alone};
use llama::attention::Layout;
use llama::config::LlamaConfig;

#[test]
fn of_a_block_only_its_input_is_kept() {
    if !alone(of_a_block_only_its_input_is_kept) {
        return;
    }
    const WIDE: usize = 256;
    const INPUT: usize = BATCH * 128 * WIDE * 4;
    let device = Device::default().autodiff();
    let config = |layers| LlamaConfig::new(VOCAB, WIDE, 3 * WIDE, layers, 4, 2);
    let kept = |layers: usize, keep: Keep| {
        let mut model = PeftModel::new(config(layers).init(&device));
        let nf4 = TargetConfig::all_linear();
        model.quantize_nf4(&nf4, &Nf4Config::new()).unwrap();
        model.add_adapter("default", &all_linear(lora())).unwrap();
        let layout = Layout::causal(128, 0, &device);
        let tokens = || Tensor::<2, Int>::zeros([BATCH, 128], &device);
        let run = |keep| {
            let run = Checkpointing { keep, seed: 1 };
            model
                .model
                .forward_checkpointed(tokens(), &layout, run)
                .unwrap()
        };
        // Threads make their scratch when they first get work, which a busy machine may give them late.
        let passes = (0..8).map(|_| {
            let before = ALLOCATOR.current_usage();
            let forward = run(keep);
            let kept = ALLOCATOR.current_usage() - before;
            drop(forward);
            kept
        });
        passes.min().unwrap()
    };
    for (name, keep) in [
        ("everything kept", Keep::All),
        ("by block", Keep::Segments(1)),
        ("by two", Keep::Segments(2)),
    ] {
        let layer = (kept(12, keep) - kept(4, keep)) / 8;
        let inputs = layer as f64 / INPUT as f64;
        println!("{name}: {layer} bytes a layer, {inputs:.2} times its input");
        // Burn's autodiff describes every operation in about 1.3 kB, also where nothing is tracked, until a backward pass ends.
        match keep {
            Keep::All => assert!(inputs > 10.0),
            Keep::Segments(size) => assert!(layer <= INPUT / size + 64 * 1024),
        }
    }
}
