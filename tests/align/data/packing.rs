//! Which sequences share a row, and what packed batches hold.

use std::cmp::Reverse;

use burn_peft::dataset::{
    Example, Overflow, PackedBatcher, PackingReport, PaddedBatcher, Piece, pack, pack_wrapped,
};
use proptest::prelude::*;

/// Best-fit decreasing as it is defined: a scan over all rows.
fn scanned(lens: &[usize], capacity: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..lens.len()).collect();
    order.sort_by_key(|&i| Reverse(lens[i]));
    let mut rooms: Vec<usize> = Vec::new();
    for i in order {
        let fits = (0..rooms.len()).filter(|&row| rooms[row] >= lens[i]);
        match fits.min_by_key(|&row| (rooms[row], row)) {
            Some(row) => rooms[row] -= lens[i],
            None => rooms.push(capacity - lens[i]),
        }
    }
    rooms
}

fn covered(rows: &[Vec<Piece>], lens: &[usize]) -> bool {
    let mut seen: Vec<Vec<bool>> = lens.iter().map(|&len| vec![false; len]).collect();
    for piece in rows.iter().flatten() {
        for place in piece.range.clone() {
            if std::mem::replace(&mut seen[piece.sequence][place], true) {
                return false;
            }
        }
    }
    seen.iter().flatten().all(|&seen| seen)
}

fn example(len: usize, first: u32) -> Example {
    let tokens: Vec<u32> = (first..first + len as u32).collect();
    Example::new(tokens, (0..len).map(|i| i >= len / 2).collect()).unwrap()
}

#[test]
fn longer_sequences_are_refused_cut_or_split() {
    let error = pack(&[3, 12], 10, Overflow::Refuse)
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("length of sequence 1 = 12"), "{error}");
    let rows = pack(&[3, 12], 10, Overflow::Truncate).unwrap();
    assert_eq!(
        rows,
        [
            vec![Piece {
                sequence: 1,
                range: 0..10
            }],
            vec![Piece {
                sequence: 0,
                range: 0..3
            }]
        ]
    );
    let rows = pack(&[3, 12], 10, Overflow::Split).unwrap();
    assert_eq!(
        rows[1],
        [
            Piece {
                sequence: 0,
                range: 0..3
            },
            Piece {
                sequence: 1,
                range: 10..12
            }
        ]
    );
    for (lens, capacity) in [(&[1][..], 0), (&[0], 5)] {
        assert!(pack(lens, capacity, Overflow::Split).is_err());
        assert!(pack_wrapped(lens, capacity).is_err());
    }
}

#[test]
fn the_report_says_what_is_saved() {
    let lens = [3, 8, 5, 2];
    let rows = pack(&lens, 10, Overflow::Refuse).unwrap();
    let report = PackingReport::new(&lens, &rows, 10, 2);
    assert_eq!((report.tokens, report.packed, report.padded), (18, 20, 26));
    assert_eq!(
        report.to_string(),
        "4 sequences of 18 tokens in 2 rows: 10.0 % padding, 30.8 % in padded batches of 2; 23.1 % of the places saved"
    );
}

#[test]
fn a_packed_batch_holds_its_examples_one_after_another() {
    let (a, b, c) = (example(5, 10), example(3, 20), example(4, 30));
    let packed = PackedBatcher::new(99, 6).collate(&[&a, &b, &c]).unwrap();
    assert_eq!((packed.batch.rows, packed.batch.columns), (2, 6));
    assert_eq!(
        packed.batch.tokens,
        [10, 11, 12, 13, 20, 21, 30, 31, 32, 99, 99, 99]
    );
    assert_eq!(
        packed.batch.targets,
        [11, 12, 13, 14, 21, 22, 31, 32, 33, 99, 99, 99]
    );
    assert_eq!(packed.positions, [0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 0, 0]);
    let seen = packed.visible();
    assert_eq!(seen.of_row(0), [0..1, 0..2, 0..3, 0..4, 4..5, 4..6]);
    assert_eq!(seen.of_row(1), [0..1, 0..2, 0..3, 0..0, 0..0, 0..0]);
    assert_eq!(
        packed.visible_within(2).of_row(0),
        [0..1, 0..2, 1..3, 2..4, 4..5, 4..6]
    );
    // The labels come by example, whatever the rows.
    let labels = packed.labels();
    assert_eq!(packed.sequences(), [0, 1, 2]);
    assert_eq!(labels.lens, [3, 2, 2]);
    let expected = [
        (1, 12),
        (2, 13),
        (3, 14),
        (4, 21),
        (5, 22),
        (7, 32),
        (8, 33),
    ];
    assert_eq!(labels.pairs, expected);
}

#[test]
fn padding_free_is_one_row_in_the_order_given() {
    let (a, b) = (example(3, 10), example(5, 20));
    let packed = PackedBatcher::padding_free().collate(&[&a, &b]).unwrap();
    assert_eq!((packed.batch.rows, packed.batch.columns), (1, 6));
    assert_eq!(packed.batch.tokens, [10, 11, 20, 21, 22, 23]);
    assert!(!packed.batch.padding.contains(&true));
    let none = PackedBatcher::padding_free().collate(&[]).unwrap();
    assert_eq!(none.batch.rows, 0);
}

proptest! {
    #[test]
    fn every_place_is_packed_once(lens in proptest::collection::vec(1usize..30, 0..40), capacity in 30usize..60) {
        let rows = pack(&lens, capacity, Overflow::Refuse).unwrap();
        prop_assert!(covered(&rows, &lens));
        let rooms: Vec<usize> = rows.iter().map(|row| capacity - row.iter().map(Piece::len).sum::<usize>()).collect();
        prop_assert_eq!(rooms, scanned(&lens, capacity));
    }

    #[test]
    fn splitting_and_wrapping_lose_nothing(lens in proptest::collection::vec(1usize..50, 0..30), capacity in 1usize..20) {
        for rows in [pack(&lens, capacity, Overflow::Split).unwrap(), pack_wrapped(&lens, capacity).unwrap()] {
            prop_assert!(covered(&rows, &lens));
            prop_assert!(rows.iter().all(|row| row.iter().map(Piece::len).sum::<usize>() <= capacity));
        }
        // Wrapped, every row but the last is full.
        let rows = pack_wrapped(&lens, capacity).unwrap();
        let full = rows.iter().rev().skip(1).all(|row| row.iter().map(Piece::len).sum::<usize>() == capacity);
        prop_assert!(full);
    }

    /// However examples are packed, as many targets count as padded, with the same tokens for each example.
    #[test]
    fn packed_labels_are_those_of_padded_rows(lens in proptest::collection::vec(2usize..12, 1..12), capacity in 11usize..25, how in 0usize..3) {
        let examples: Vec<Example> = lens.iter().enumerate().map(|(i, &len)| example(len, 100 * i as u32)).collect();
        let refs: Vec<&Example> = examples.iter().collect();
        let batcher = match how {
            0 => PackedBatcher::new(0, capacity),
            1 => PackedBatcher::new(0, capacity).with_wrapped(true),
            _ => PackedBatcher::new(0, capacity / 3).with_overflow(Overflow::Split),
        };
        let packed = batcher.collate(&refs).unwrap().labels();
        let padded = PaddedBatcher::new(0).collate(&examples).labels();
        prop_assert_eq!(&packed.lens, &padded.lens);
        let tokens = |labels: &burn_peft::dataset::SequenceLabels| labels.pairs.iter().map(|pair| pair.1).collect::<Vec<_>>();
        prop_assert_eq!(tokens(&packed), tokens(&padded));
    }
}
