//! Duplicates, contamination, lengths and mixtures.

use std::collections::HashSet;

use burn_peft::dataset::{Lengths, Mixture, NearDuplicates, contamination, exact_duplicates};

#[test]
fn exact_duplicates_are_those_of_the_same_words() {
    let texts = [
        "The cat sat.",
        "A dog",
        "the  CAT, sat",
        "cat the sat",
        "",
        "...",
        "a dog!",
    ];
    assert_eq!(
        exact_duplicates(&texts),
        [None, None, Some(0), None, None, Some(4), Some(1)]
    );
}

/// Texts of 30 words, of which every third is an earlier one with some words changed.
fn texts() -> Vec<String> {
    let mut state = 12345_u64;
    let mut next = |bound: usize| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) as usize % bound
    };
    let mut texts: Vec<Vec<usize>> = Vec::new();
    for index in 0..240 {
        let mut words: Vec<usize> = match index % 3 {
            2 => texts[next(index)].clone(),
            _ => (0..30).map(|_| next(50)).collect(),
        };
        if index % 3 == 2 {
            for _ in 0..next(8) {
                let at = next(30);
                words[at] = next(50);
            }
        }
        texts.push(words);
    }
    let text = |words: &Vec<usize>| {
        words
            .iter()
            .map(|word| format!("w{word}"))
            .collect::<Vec<_>>()
            .join(" ")
    };
    texts.iter().map(text).collect()
}

#[test]
fn near_duplicates_are_those_of_comparing_all_pairs() {
    let texts = texts();
    for (threshold, n) in [(0.8, 3), (0.5, 2), (0.95, 1)] {
        let sets: Vec<HashSet<Vec<&str>>> = texts
            .iter()
            .map(|text| {
                text.split(' ')
                    .collect::<Vec<_>>()
                    .windows(n)
                    .map(<[&str]>::to_vec)
                    .collect()
            })
            .collect();
        let similar = |a: usize, b: usize| {
            let common = sets[a].intersection(&sets[b]).count();
            common as f64 / sets[a].union(&sets[b]).count() as f64 >= threshold
        };
        let expected: Vec<Option<usize>> = (0..texts.len())
            .map(|b| (0..b).find(|&a| similar(a, b)))
            .collect();
        let found = NearDuplicates::new()
            .with_threshold(threshold)
            .with_ngram(n)
            .find(&texts)
            .unwrap();
        assert_eq!(found, expected, "threshold {threshold}");
        let count = found.iter().flatten().count();
        assert!(
            count > 5 && count < 120,
            "{count} near duplicates at {threshold}"
        );
    }
    for bad in [
        NearDuplicates::new().with_threshold(0.0),
        NearDuplicates::new().with_ngram(0),
        NearDuplicates::new().with_threshold(0.001),
    ] {
        assert!(bad.find(&texts).is_err(), "{bad:?}");
    }
    // Texts without words are no duplicates of each other.
    assert_eq!(
        NearDuplicates::new().find(&["", "."]).unwrap(),
        [None, None]
    );
}

#[test]
fn contamination_is_the_share_of_ngrams_in_the_training_data() {
    let training = ["one two three four five six", "x y z"];
    let held_out = [
        "Two, three four!",
        "two three five",
        "one",
        "one two three x y z",
    ];
    let found = contamination(training, &held_out, 2).unwrap();
    assert_eq!(found, [Some(1.0), Some(0.5), None, Some(0.8)]);
    assert!(contamination(training, &held_out, 0).is_err());
}

#[test]
fn lengths_have_quantiles_and_a_picture() {
    let lengths = Lengths::new([5, 1, 3, 2, 4, 100]);
    assert_eq!(
        (lengths.count(), lengths.total(), lengths.above(4)),
        (6, 115, 2)
    );
    let quantiles = [0.0, 0.5, 0.51, 0.95, 1.0].map(|q| lengths.quantile(q).unwrap());
    assert_eq!(quantiles, [1, 3, 4, 100, 100]);
    let (width, counts) = lengths.histogram(4);
    assert_eq!((width, counts), (26, vec![5, 0, 0, 1]));
    let text = lengths.to_string();
    assert!(
        text.starts_with(
            "6 sequences, 115 tokens: mean 19.2, least 1, median 3, 95 % 100, most 100\n"
        ),
        "{text}"
    );
    assert_eq!(text.lines().count(), 13);
    let none = Lengths::new([]);
    assert_eq!((none.quantile(0.5), none.mean()), (None, 0.0));
    assert!(none.to_string().starts_with("0 sequences"));
}

#[test]
fn a_mixture_keeps_its_shares_and_is_the_same_again() {
    let draw = |seed| -> Vec<u8> {
        let sources = vec![
            (2.0, [0_u8].into_iter().cycle()),
            (1.0, [1].into_iter().cycle()),
            (1.0, [2].into_iter().cycle()),
        ];
        Mixture::new(sources, seed).unwrap().take(8000).collect()
    };
    let first = draw(1);
    assert_eq!(first, draw(1));
    assert_ne!(first, draw(2));
    for (source, share) in [(0, 0.5), (1, 0.25), (2, 0.25)] {
        let found = first.iter().filter(|&&row| row == source).count() as f64 / 8000.0;
        // Four standard deviations.
        assert!(
            (found - share).abs() < 4.0 * (share * (1.0 - share) / 8000.0_f64).sqrt(),
            "{source}: {found}"
        );
    }
    // It ends with the first source that has no more.
    let short = Mixture::new(
        vec![(1.0, vec![0; 5].into_iter()), (1.0, vec![1; 5].into_iter())],
        3,
    )
    .unwrap();
    let rows: Vec<i32> = short.collect();
    assert!(
        rows.len() < 10
            && rows
                .iter()
                .filter(|&&row| row == 0)
                .count()
                .max(rows.iter().filter(|&&row| row == 1).count())
                == 5
    );
    for weight in [0.0, -1.0, f64::NAN] {
        assert!(Mixture::new(vec![(weight, [0].into_iter())], 1).is_err());
    }
    assert!(Mixture::<std::vec::IntoIter<i32>>::new(vec![], 1).is_err());
}
