//! Codes and scales equal those of bitsandbytes to the byte, and what they restore to the bit.

use burn_peft::nf4::{Nf4Config, Nf4Data, Nf4Scales};

use crate::nf4::golden::{Golden, bytes};

/// Quantises every matrix of a file, and restores every state of it; the numbers of states and of restored outputs.
fn assert_equal(file: &str) -> (usize, usize) {
    let golden = Golden::read(file);
    let cases = golden.cases();
    let outputs = cases.iter().map(|case| {
        let packed = golden.part(case, "packed").unwrap().u8();
        let absmax = golden.part(case, "absmax").unwrap();
        let config = Nf4Config::new().with_block_size(case.block_size);
        let data = case.input.quantize(&config).unwrap();
        assert!(data.codes() == packed, "{}: codes", case.key);
        assert!(
            bytes(&data.absmax()) == absmax.bytes(),
            "{}: absmax",
            case.key
        );

        let scales = Nf4Scales::Plain(absmax.f32());
        let (shape, block_size) = (case.input.shape(), case.block_size);
        let stored =
            Nf4Data::from_parts(case.key, shape, block_size, packed.into(), scales).unwrap();
        golden.assert_restored(case, &stored.dequantize())
    });
    let outputs = outputs.sum();
    (cases.len(), outputs)
}

/// Zero blocks, constants, outliers, subnormals, 3e38, magnitudes far apart, and the thresholds one ulp around; in f32,
/// bf16 and f16, in all eight block sizes, with full and partial last blocks.
#[test]
fn edges_equal_bitsandbytes() {
    assert_eq!(assert_equal("edges.safetensors"), (50 + 6, 25 + 6));
}

/// Odd counts, rows that are no multiple of the block, matrices of less than a block, blocks of 4096 whose scales
/// differ by powers of ten; in f32, bf16 and f16.
///
/// The four matrices `wrong_*` have rows of 1376, 96, 48 and 32 values: there bitsandbytes on a CPU quantises right but
/// restores wrong (it takes another block's scale when d_in is a multiple of 16 and none of the block size). What they
/// must restore to was computed by the specification, `CODEBOOK[code] * absmax[i / block_size]`, and the script that
/// did it asserted that bitsandbytes gives something else.
#[test]
fn shapes_equal_bitsandbytes_where_it_is_right() {
    let golden = Golden::read("shapes.safetensors");
    let cases = golden.cases();
    let wrong = cases
        .iter()
        .filter(|case| golden.part(case, "spec").is_some())
        .count();
    assert_eq!(wrong, 4);
    assert_eq!(
        assert_equal("shapes.safetensors"),
        (24 + 30 + wrong, 1 + 10 * 5 + wrong)
    );
}
