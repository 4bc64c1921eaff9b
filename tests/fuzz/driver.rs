//! The loop: choose an input, change it, check it, keep it if it came to something new.

use std::collections::HashSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// What is to be tried.
pub struct Target {
    pub name: &'static str,
    /// Real inputs.
    pub seeds: Vec<Vec<u8>>,
    /// Changes an input a little; the other one may lend a part.
    pub mutate: fn(&mut Rng, &[u8], &[u8]) -> Vec<u8>,
    /// Panics unless what must hold does. What it returns tells outcomes apart: an input with a new one is worth going on
    /// from, as one that takes a new way through the code is.
    pub check: fn(&[u8]) -> String,
}

/// Numbers by chance, the same from the same seed: SplitMix64.
pub struct Rng(u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// One of `0..n`, and 0 of nothing.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    pub fn choose<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

fn variable(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(value) => value.parse().unwrap_or_else(|_| panic!("{name} = {value}")),
        Err(_) => default,
    }
}

/// Most inputs that are gone on from.
const CORPUS: usize = 5_000;
/// No input is larger than this; what is large is tried elsewhere.
const LONGEST: usize = 64 << 10;

/// Checks what was found before and the seeds, then changed ones until the time is over.
pub fn run(target: &Target) {
    let found = crate::repository()
        .join("tests/fuzz/found")
        .join(target.name);
    let mut corpus = target.seeds.clone();
    assert!(!corpus.is_empty());
    for entry in fs::read_dir(&found).into_iter().flatten() {
        corpus.push(fs::read(entry.unwrap().path()).unwrap());
    }
    let before = corpus.len();
    let mut outcomes = HashSet::new();
    for input in &corpus {
        outcomes.insert((target.check)(input));
    }
    let seed = variable("BURN_PEFT_FUZZ_SEED", 0);
    let time = Duration::from_secs(variable("BURN_PEFT_FUZZ_SECONDS", 2));
    let mut rng = Rng(seed);
    let (start, mut cases) = (Instant::now(), 0);
    while start.elapsed() < time {
        let (one, other) = (rng.below(corpus.len()), rng.below(corpus.len()));
        let mut input = (target.mutate)(&mut rng, &corpus[one], &corpus[other]);
        input.truncate(LONGEST);
        cases += 1;
        let begun = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| (target.check)(&input)));
        let slow = begun.elapsed() > Duration::from_secs(20);
        match outcome {
            Ok(outcome) if !slow => {
                if outcomes.insert(kind(&outcome)) && corpus.len() < CORPUS {
                    corpus.push(input);
                }
            }
            _ => {
                let mut hash = DefaultHasher::new();
                input.hash(&mut hash);
                fs::create_dir_all(&found).unwrap();
                let path = found.join(format!("{:016x}", hash.finish()));
                fs::write(&path, &input).unwrap();
                let what = if slow { "too slow" } else { "failed" };
                panic!(
                    "{what} after {cases} cases from seed {seed}: {}",
                    path.display()
                );
            }
        }
    }
    println!(
        "{}: {cases} cases, {} kinds of outcome, {before} inputs to begin with, {} in the end",
        target.name,
        outcomes.len(),
        corpus.len()
    );
    assert!(cases > 0);
}

/// An outcome without its numbers and names, of which there is no end.
fn kind(outcome: &str) -> String {
    let mut kind = String::new();
    for (i, part) in outcome.split(['`', '"']).enumerate() {
        let outside = i % 2 == 0;
        kind.extend(part.chars().filter(|c| outside && !c.is_ascii_digit()));
    }
    kind.truncate(
        kind.char_indices()
            .nth(160)
            .map_or(kind.len(), |(end, _)| end),
    );
    kind
}
