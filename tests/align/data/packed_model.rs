//! A model on packed rows computes what it computes on each sequence alone.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor};
use burn_peft::dataset::{
    Example, Overflow, PackedBatch, PackedBatcher, PaddedBatcher, PlainText, Preference,
    TokenizeConfig,
};
use burn_peft::objective::{HeadChunks, SftLoss};
use llama::attention::Layout;
use llama::config::LlamaConfig;
use llama::model::LlamaForCausalLm;

use super::bytes;

fn model(device: &Device) -> LlamaForCausalLm {
    LlamaConfig::new(128, 32, 48, 2, 4, 2).init(device)
}

fn examples() -> Vec<Example> {
    let lens = [9, 4, 13, 2, 7, 11];
    lens.iter()
        .enumerate()
        .map(|(row, &len)| {
            let tokens = (0..len)
                .map(|i| ((row * 31 + i * i * 7 + 3) % 128) as u32)
                .collect();
            Example::new(tokens, (0..len).map(|i| i >= len / 3).collect()).unwrap()
        })
        .collect()
}

fn chunks() -> HeadChunks {
    HeadChunks::new(16, 64).unwrap()
}

fn packed_hidden(model: &LlamaForCausalLm, packed: &PackedBatch, device: &Device) -> Tensor<3> {
    let batch = packed.batch.to_device(device);
    model
        .model
        .forward(batch.tokens, &Layout::packed(packed, device), None)
}

fn packed_loss(model: &LlamaForCausalLm, packed: &PackedBatch, device: &Device) -> SftLoss {
    let hidden = packed_hidden(model, packed, device);
    let batch = packed.batch.to_device(device);
    model
        .head_loss(hidden, batch.targets, batch.mask, &chunks())
        .unwrap()
}

struct Collect<'a>(&'a Gradients, Vec<Vec<f32>>);

impl ModuleVisitor for Collect<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = param
            .val()
            .grad(self.0)
            .expect("a gradient of every parameter");
        self.1.push(gradient.try_into_vec_as::<f32>().unwrap());
    }
}

/// The sum of the loss, and all gradients.
fn run(model: &LlamaForCausalLm, loss: SftLoss) -> (f32, Vec<Vec<f32>>) {
    let gradients = loss.sum.backward();
    let mut collect = Collect(&gradients, Vec::new());
    model.visit(&mut collect);
    (loss.sum.into_scalar(), collect.1)
}

/// Every difference is small beside the largest value of its gradient: the sums are of the same terms in another order.
fn assert_close(found: &(f32, Vec<Vec<f32>>), expected: &(f32, Vec<Vec<f32>>), how: &str) {
    assert!(
        (found.0 - expected.0).abs() <= 1e-5 * expected.0.abs(),
        "{how}: {} and {}",
        found.0,
        expected.0
    );
    assert_eq!(found.1.len(), expected.1.len());
    for (index, (found, expected)) in found.1.iter().zip(&expected.1).enumerate() {
        let largest = expected
            .iter()
            .fold(0f32, |most, value| most.max(value.abs()));
        assert!(largest > 0.0, "{how}: gradient {index} is zero");
        for (a, b) in found.iter().zip(expected) {
            assert!(
                (a - b).abs() <= 2e-5 * largest,
                "{how}: gradient {index}: {a} and {b}, of up to {largest}"
            );
        }
    }
}

#[test]
fn packed_loss_and_gradients_are_those_of_padded_rows() {
    let device = Device::default().autodiff();
    let model = model(&device);
    let examples = examples();
    let refs: Vec<&Example> = examples.iter().collect();
    let padded = PaddedBatcher::new(0).collate(&examples).to_device(&device);
    let loss = model
        .loss(padded.tokens, padded.targets, padded.mask, &chunks())
        .unwrap();
    let count = loss.count;
    let expected = run(&model, loss);
    for (how, batcher) in [
        ("packed", PackedBatcher::new(5, 16)),
        ("padding-free", PackedBatcher::padding_free()),
        ("in wide rows", PackedBatcher::new(5, 64)),
    ] {
        let packed = batcher.collate(&refs).unwrap();
        let loss = packed_loss(&model, &packed, &device);
        assert_eq!(loss.count, count, "{how}");
        assert_close(&run(&model, loss), &expected, how);
    }
}

#[test]
fn split_sequences_are_segments_of_their_own() {
    let device = Device::default().autodiff();
    let model = model(&device);
    let examples = examples();
    let refs: Vec<&Example> = examples.iter().collect();
    // The parts as examples: of the tokens `[start, end + 1)`.
    let parts = |packed: &PackedBatch| -> Vec<Example> {
        let part = |segment: &burn_peft::dataset::PackedSegment| {
            let (example, range) = (
                &examples[segment.piece.sequence],
                segment.piece.range.clone(),
            );
            let tokens = example.tokens()[range.start..=range.end].to_vec();
            Example::new(
                tokens,
                example.supervised()[range.start..=range.end].to_vec(),
            )
            .ok()
        };
        packed.segments.iter().filter_map(part).collect()
    };
    for batcher in [
        PackedBatcher::new(0, 7).with_overflow(Overflow::Split),
        PackedBatcher::new(0, 10).with_wrapped(true),
    ] {
        let packed = batcher.collate(&refs).unwrap();
        let padded = PaddedBatcher::new(0)
            .collate(&parts(&packed))
            .to_device(&device);
        let expected = model
            .loss(padded.tokens, padded.targets, padded.mask, &chunks())
            .unwrap();
        let expected = run(&model, expected);
        assert_close(
            &run(&model, packed_loss(&model, &packed, &device)),
            &expected,
            "split",
        );
    }
}

#[test]
fn a_changed_token_leaves_other_segments_what_they_were_to_the_bit() {
    let device = Device::default();
    let model = model(&device);
    let mut examples = examples();
    let pack = |examples: &[Example]| {
        let refs: Vec<&Example> = examples.iter().collect();
        PackedBatcher::padding_free().collate(&refs).unwrap()
    };
    let before = pack(&examples);
    let bits = |packed: &PackedBatch| -> Vec<u32> {
        let hidden = packed_hidden(&model, packed, &device)
            .try_into_vec_as::<f32>()
            .unwrap();
        hidden.into_iter().map(f32::to_bits).collect()
    };
    let (first, width) = (bits(&before), 32);
    let changed = 2;
    let mut tokens = examples[changed].tokens().to_vec();
    tokens[0] = (tokens[0] + 1) % 128;
    examples[changed] = Example::new(tokens, examples[changed].supervised().to_vec()).unwrap();
    let second = bits(&pack(&examples));
    for segment in &before.segments {
        let values = segment.columns.start * width..segment.columns.end * width;
        let same = first[values.clone()] == second[values];
        assert_eq!(
            same,
            segment.piece.sequence != changed,
            "segment {segment:?}"
        );
    }
}

#[test]
fn pairs_are_packed_with_the_preferred_answers_first() {
    let rows = [("ab", "cd", "e"), ("f", "g", "hij")];
    let config = TokenizeConfig::new().with_eos(36);
    let pairs: Vec<_> = rows
        .iter()
        .map(|&(prompt, chosen, rejected)| {
            let row = Preference::new(prompt, chosen, rejected);
            config.tokenize_preference(&row, &PlainText, bytes).unwrap()
        })
        .collect();
    let packed = PackedBatcher::new(0, 8)
        .collate_preferences(&pairs)
        .unwrap();
    assert_eq!(
        (packed.pairs, packed.margins, packed.batch.sequences()),
        (2, None, vec![0, 1, 2, 3])
    );
    let labels = packed.batch.labels();
    let padded = PaddedBatcher::new(0)
        .collate_preferences(&pairs)
        .unwrap()
        .batch
        .labels();
    assert_eq!(labels.lens, padded.lens);
    let tokens = |pairs: &[(usize, usize)]| pairs.iter().map(|pair| pair.1).collect::<Vec<_>>();
    assert_eq!(tokens(&labels.pairs), tokens(&padded.pairs));
}
