//! H8: values that are no numbers.

use burn_peft::PeftError;
use burn_peft::format::{AdapterFile, ReadOptions, WEIGHTS_FILE};

use super::{MODULES, Scratch, key};

/// Type, its size, the bits of a value.
const BITS: [(&str, usize, u32); 7] = [
    ("F32", 4, 0x7f80_0000),
    ("F32", 4, 0xff80_0000),
    ("F32", 4, 0x7fc0_0000),
    // A NaN that signals, and one with a payload.
    ("F32", 4, 0x7f80_0001),
    ("F32", 4, 0xffff_ffff),
    ("BF16", 2, 0x7f80),
    ("F16", 2, 0x7e00),
];

// H8
#[test]
fn values_that_are_not_finite_are_refused_and_the_first_is_named() {
    for (dtype, size, bits) in BITS {
        // In the first and last value of A, and in B.
        for (factor, index) in [("A", 0), ("A", 11), ("B", 7)] {
            let scratch = Scratch::new();
            let shapes: [(_, &[usize]); 2] = [("A", &[2, 6]), ("B", &[6, 2])];
            let tensors: Vec<_> = MODULES
                .iter()
                .flat_map(|path| {
                    shapes.map(|(factor, shape)| (key(path, factor), dtype, size, shape))
                })
                .collect();
            scratch.zeros(&tensors);
            assert!(scratch.read().is_ok());
            let mut file = scratch.bytes(WEIGHTS_FILE);
            let before = file.len() - 48 * size + if factor == "A" { 0 } else { 12 * size };
            let at = before + index * size;
            file[at..at + size].copy_from_slice(&bits.to_le_bytes()[..size]);
            // And in a later one, which is not the first.
            let last = file.len() - size;
            file[last..].copy_from_slice(&bits.to_le_bytes()[..size]);
            scratch.weights(&file);
            match scratch.refused_in(WEIGHTS_FILE) {
                PeftError::NotFinite {
                    tensor, index: i, ..
                } => assert_eq!((tensor, i), (key(MODULES[0], factor), index)),
                other => panic!("{dtype}: {other}"),
            }
            // Whoever wants them gets the very bits.
            let options = ReadOptions {
                allow_non_finite: true,
                ..Default::default()
            };
            let read = AdapterFile::read(scratch.path(), &options).unwrap();
            let found = if factor == "A" {
                &read.tensors[0].a
            } else {
                &read.tensors[0].b
            };
            assert_eq!(found.as_bytes(), &file[before..before + 12 * size]);
        }
    }
}
