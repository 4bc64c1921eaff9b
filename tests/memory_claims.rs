//! What is often said about the memory of fine-tuning, against the plan, with the arithmetic.
//!
//! A GB is 10⁹ bytes, a GiB 2³⁰. Products copy nothing here, or dequantise one weight at a time, as on a GPU.

use burn_peft::memory::{
    Budget, Float, GB, GIB, Head, Loss, Method, ModelShape, Optimizer, Part, Plan, Products,
    Recompute, Setup, Targets, plan,
};

const BLOCKS: Recompute = Recompute::Segments(1);
const CARD_24: Budget = Budget::gb("24 GB", 24);
const CARD_48: Budget = Budget::gb("48 GB", 48);

fn fits(plan: &Plan, device: Budget) -> bool {
    !plan.fits(&[device]).is_empty()
}

/// 16 bit weights, f32 adapters of rank 8 on all linear layers, AdamW.
fn lora_8b() -> Setup {
    Setup::new(Method::Lora, Float::Bf16).with_products(Products::Direct)
}

#[test]
fn llama_3_8b_with_lora_in_16_bits_fits_24_gb() {
    let shape = ModelShape::llama3_8b();
    let setup = lora_8b().with_batch(1, 2048).with_recompute(BLOCKS);
    let plan = plan(&shape, &setup).unwrap();
    // 8 030 261 248 parameters in two bytes each.
    assert_eq!(plan.weights, 2 * 8_030_261_248);
    // 20 971 520 adapter parameters, with gradient and two moments 16 bytes each: 0.34 GB, and not the 800 MB often met.
    let state = plan.adapters + plan.gradients + plan.optimizer;
    assert_eq!(state, 16 * 20_971_520);
    assert_eq!(state, 335_544_320);
    // Of each block its input: 33 · 2048 · 4096 · 2, the last one's output too; sines and cosines 2 · 2048 · 64 · 4.
    assert_eq!(plan.activations, 33 * 2048 * 4096 * 2 + 2 * 2048 * 64 * 4);
    // 2048 · 128256 logits in two bytes, and their gradient: 1.05 GB.
    assert_eq!(plan.logits, 2 * 2048 * 128_256 * 2);
    let sum = plan.weights + state + plan.activations + plan.logits;
    assert!((18 * GB..19 * GB).contains(&sum), "{sum}");
    // Not all gradients of adapters are there while the logits are.
    assert!(plan.peak.parts.total() <= sum + GB, "{plan}");
    assert!(fits(&plan, CARD_24), "{plan}");
}

#[test]
fn without_checkpointing_a_short_sequence_of_it_fits_24_gb_too() {
    let shape = ModelShape::llama3_8b();
    let of = |seq| plan(&shape, &lora_8b().with_batch(1, seq)).unwrap();
    let [short, long] = [512, 2048].map(of);
    // A token keeps, of each of 32 blocks: x, n₁, h, n₂, q, y of 4096 values, k, v of 1024, gate, up, s of 14336, in two
    // bytes, and seven times x·A of rank 8 in four.
    let token = 2 * (6 * 4096 + 2 * 1024 + 3 * 14_336) + 7 * 8 * 4;
    assert_eq!(token, 139_488);
    // The first block's input is kept by nothing, as nothing before it trains; the last block's output by the last norm.
    let angles = 2 * 512 * 64 * 4;
    assert_eq!(short.activations, 32 * 512 * token + angles);
    assert!(fits(&short, CARD_24), "{short}");
    // 2.3 GB of activations at 512 tokens are 9.1 GB at 2048.
    assert!(!fits(&long, CARD_24), "{long}");
}

/// 70B under QLoRA: double quantisation, checkpointing, one sequence of 512 tokens; a weight at a time is dequantised.
fn qlora_70b() -> Setup {
    Setup::new(Method::QLora, Float::Bf16)
        .with_recompute(BLOCKS)
        .with_products(Products::Dequantized)
}

#[test]
fn a_70b_model_fits_48_gb_under_qlora() {
    let shape = ModelShape::llama3_70b();
    let plan = plan(&shape, &qlora_70b()).unwrap();
    // Of 70 553 706 496 parameters two embeddings of 128256 · 8192 and 161 norms of 8192 stay in 16 bits.
    let kept = 2 * 128_256 * 8192 + 161 * 8192;
    let packed = 70_553_706_496 - kept;
    assert_eq!(packed, 68_451_041_280);
    assert_eq!(plan.weights, packed / 2 + 2 * kept);
    // A byte for each block of 64, four for each 256 blocks, four for each of 560 tensors: 0.127 bits a parameter.
    assert_eq!(plan.scales, packed / 64 + 4 * (packed / 64 / 256) + 4 * 560);
    let base = plan.weights + plan.scales;
    assert_eq!((base + 5_000_000) / 10_000_000, 3952, "39.52 GB");
    assert_eq!((base * 10 + GIB / 2) / GIB, 368, "36.8 GiB");
    // 103 546 880 parameters of adapters at 16 bytes: 1.66 GB.
    let state = plan.adapters + plan.gradients + plan.optimizer;
    assert_eq!(state, 16 * 103_546_880);
    // 8192 · 28672 in two bytes, the largest weight dequantised.
    assert_eq!(plan.largest_transient, 2 * 8192 * 28_672);
    assert!(fits(&plan, CARD_48), "{plan}");
    let left = CARD_48.bytes - plan.peak.parts.total();
    assert!((5 * GB..7 * GB).contains(&left), "{plan}");
}

#[test]
fn and_where_that_ends() {
    let shape = ModelShape::llama3_70b();
    let of = |setup: Setup| plan(&shape, &setup).unwrap();
    let setup = qlora_70b;
    let eight = Optimizer::AdamW8bit;

    // Rank: 12 943 360 parameters a rank, 0.207 GB of 16 bytes. 39.5 GB and 38 ranks are 47.4 GB.
    let most = |setup: &Setup| {
        let fitting = (1..=64).rfind(|&rank| fits(&of(setup.clone().with_rank(rank)), CARD_48));
        fitting.unwrap()
    };
    assert_eq!(most(&setup()), 38);
    // Rank 64, 828 375 040 parameters: 13.25 GB with f32 AdamW, which is too much.
    let large = of(setup().with_rank(64));
    assert_eq!(
        large.adapters + large.gradients + large.optimizer,
        16 * 828_375_040
    );
    assert!(!fits(&large, CARD_48), "{large}");
    // In 8 bits the moments are 1.68 GB, but 3.31 GB of f32 factors and as many of gradients are 47.9 GB before any activation.
    let states = of(setup().with_rank(64).with_optimizer(eight));
    assert_eq!(states.optimizer, 2 * 828_375_040 * 260 / 256);
    let sum =
        states.weights + states.scales + states.adapters + states.gradients + states.optimizer;
    assert_eq!(sum / (GB / 10), 478);
    assert!(!fits(&states, CARD_48), "{states}");
    // Factors in bf16 halve these two: 44.6 GB and the rest.
    let narrow = setup().with_rank(64).with_optimizer(eight);
    assert!(fits(&of(narrow.with_adapter(Float::Bf16)), CARD_48));

    // Embedding and head in f32, as PEFT's preparation makes them: 2 · 128256 · 8192 · 2 bytes more, 4.20 GB.
    let wide = setup().with_embeddings(Float::F32);
    assert_eq!(
        of(wide.clone()).weights - of(setup()).weights,
        4_202_692_608
    );
    // That is 20 ranks and a little.
    assert_eq!(most(&wide), 17);

    // Without double quantisation 0.373 bits a parameter more: 3.19 GB.
    let plain = of(setup().with_nf4(burn_peft::nf4::Nf4Config::new()));
    let more = plain.scales - of(setup()).scales;
    assert_eq!((more + 5_000_000) / 10_000_000, 319);

    // Without checkpointing 512 tokens keep 80 · 512 · 277 kB: 11.3 GB.
    let kept = of(setup().with_recompute(Recompute::Never));
    assert!(!fits(&kept, CARD_48), "{kept}");
    // With it a token keeps the 81 inputs and outputs of blocks, 1.33 MB; logits and their gradient are 0.51 MB more, unless they
    // come in chunks: then it is one block's activations and gradients.
    let longest = |loss| {
        let at = |n: u64| of(setup().with_batch(1, 128 * n).with_loss(loss));
        128 * (1..64).rfind(|&n| fits(&at(n), CARD_48)).unwrap()
    };
    let chunks = Loss::Chunked {
        tokens: 256,
        vocab: 4096,
    };
    assert_eq!([Loss::Logits, chunks].map(longest), [3840, 4224]);
}

#[test]
fn full_fine_tuning_of_70b_needs_a_cluster() {
    let shape = ModelShape::llama3_70b();
    let full = Setup::new(Method::Full, Float::Bf16)
        .with_recompute(BLOCKS)
        .with_products(Products::Direct);
    let narrow = plan(&shape, &full).unwrap();
    // Two bytes of weight, two of gradient, two moments of four: 12 bytes a parameter, 846.6 GB.
    let sum = narrow.weights + narrow.gradients + narrow.optimizer;
    assert_eq!(sum, 12 * 70_553_706_496);
    assert_eq!(sum / GB, 846);
    assert_eq!(narrow.devices_of(80 * GB), Some(11), "{narrow}");
    // All in f32 16 bytes: 1128.9 GB.
    let wide = Setup::new(Method::Full, Float::F32)
        .with_recompute(BLOCKS)
        .with_products(Products::Direct);
    let wide = plan(&shape, &wide).unwrap();
    assert_eq!(
        wide.weights + wide.gradients + wide.optimizer,
        16 * 70_553_706_496
    );
    assert_eq!(wide.devices_of(80 * GB), Some(15), "{wide}");
    assert!(Budget::KNOWN.iter().all(|&device| !fits(&narrow, device)));
}

#[test]
fn an_8b_step_fits_8_gib() {
    let shape = ModelShape::llama3_8b();
    let setup = Setup::new(Method::QLora, Float::Bf16)
        .with_rank(16)
        .with_batch(1, 128)
        .with_recompute(BLOCKS)
        .with_loss(Loss::Chunked {
            tokens: 256,
            vocab: 4096,
        });
    let plan = plan(&shape, &setup).unwrap();
    // 3.60 GB of NF4 and 2.10 of embedding and head in 16 bits, and norms.
    let base = plan.weights + plan.scales;
    assert_eq!((base + 5_000_000) / 10_000_000, 570, "5.70 GB");
    // 41 943 040 parameters of adapters at 16 bytes: 0.67 GB.
    assert_eq!(plan.adapters + plan.gradients + plan.optimizer, 671_088_640);
    assert!(plan.peak.parts.total() < 8 * GIB, "{plan}");
    // An NF4 head takes 0.78 GB less.
    let small = burn_peft::memory::plan(&shape, &setup.with_head(Head::Nf4)).unwrap();
    let head: u128 = 128_256 * 4096;
    let saved = base - small.weights - small.scales;
    assert_eq!(
        saved,
        2 * head - head / 2 - head / 64 - 4 * (head / 64).div_ceil(256) - 4
    );
}

#[test]
fn some_layers_tell_what_all_of_them_need() {
    let setup = qlora_70b().with_rank(16);
    let shape = ModelShape::llama3_70b();
    let of = |layers| plan(&shape.clone().with_layers(layers), &setup).unwrap();
    let [seven, eight, all] = [7, 8, 80].map(of);
    // What stands is a constant and so much a layer; so is what is kept.
    let parts: [fn(&Plan) -> u128; 6] = [
        |plan| plan.weights,
        |plan| plan.scales,
        |plan| plan.adapters,
        |plan| plan.gradients,
        |plan| plan.optimizer,
        |plan| plan.activations,
    ];
    for part in parts {
        let layer = part(&eight) - part(&seven);
        assert_eq!(part(&all), part(&eight) + 72 * layer);
    }
    assert_eq!(all.peak.parts.of(Part::Weights), all.weights);
}

#[test]
fn targets_and_batches_only_ever_add() {
    let shape = ModelShape::llama3_8b();
    let peak = |setup: Setup| plan(&shape, &setup).unwrap().peak.parts.total();
    let few = lora_8b().with_targets(Targets::QUERY_VALUE);
    assert!(peak(few.clone()) < peak(lora_8b()));
    assert!(peak(few.clone()) < peak(few.with_batch(2, 512)));
}
