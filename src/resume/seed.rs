//! Randomness that depends on the seed and the step alone, by the mixing function of SplitMix64. The values never change,
//! since a checkpoint outlives versions; the tests pin them.

use burn::tensor::Device;

use crate::splitmix::{GOLDEN, Stream, mix};

/// Streams of one seed that must not meet.
const DEVICE: u64 = 0;
const ORDER: u64 = 1;

/// The seed of a run: a pure function from a place in the run to the randomness used there.
///
/// A generator has a state, which Burn's backends cannot give back, so that a run could not go on where it stopped. Here
/// nothing has one: what is drawn at a step follows from the seed and the step, whether or not the steps before it ran in
/// this process. All results are the same on every platform and in every version of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Seed(pub u64);

impl Seed {
    /// 64 bits for the micro-step `micro_step` of the step `step`. Different places have unrelated values.
    pub fn at(self, step: u64, micro_step: u64) -> u64 {
        self.derive([DEVICE, step, micro_step])
    }

    /// Seeds the device with [`at`](Self::at): dropout and random tensors from here on are those of this micro-step. Call it
    /// before each forward pass in training.
    ///
    /// Burn's CPU backend Flex has one generator for the whole process: what other threads draw in between changes what
    /// this one draws. For an exact repetition, only one thread may draw.
    pub fn seed_device(self, device: &Device, step: u64, micro_step: u64) {
        device.seed(self.at(step, micro_step));
    }

    /// The numbers `0..len` in the order of pass `epoch`: every order is as likely (Fisher-Yates). Takes `O(len)` time.
    pub fn order(self, epoch: u64, len: usize) -> Vec<usize> {
        let mut stream = Stream(self.derive([ORDER, epoch, 0]));
        let mut order: Vec<usize> = (0..len).collect();
        for last in (1..len).rev() {
            order.swap(last, stream.below(last as u64 + 1) as usize);
        }
        order
    }

    /// The examples of batch `index`, counted from 0 over the whole run, of `size` out of `len` examples: passes follow
    /// each other, each in its [`order`](Self::order), and a batch may span two. Empty if `len` is 0.
    ///
    /// The place in the data is thereby a function of the step, with `k` micro-steps each: `index = step·k + micro_step`.
    /// Computes the order of each pass it takes from; over much data with small batches, keep the `order` of a pass.
    pub fn batch(self, index: u64, size: usize, len: usize) -> Vec<usize> {
        let mut batch = Vec::with_capacity(size);
        if len == 0 {
            return batch;
        }
        let first = u128::from(index) * size as u128;
        let (mut epoch, mut place) = ((first / len as u128) as u64, (first % len as u128) as usize);
        while batch.len() < size {
            let order = self.order(epoch, len);
            batch.extend(order[place..].iter().take(size - batch.len()));
            (epoch, place) = (epoch.wrapping_add(1), 0);
        }
        batch
    }

    /// For a given prefix of `words`, different next words lead to different states: each line is a bijection of its word.
    fn derive(self, words: [u64; 3]) -> u64 {
        words.into_iter().fold(mix(self.0), |state, word| {
            mix(state ^ mix(word.wrapping_add(GOLDEN)))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    /// From an implementation in Python, written after the sources.
    const PINNED: [u64; 5] = [
        0x013b458674fa528e,
        0x36b0316fef9f4795,
        0x0ad73069d1fb886b,
        0x41eed4e0c8f1ebae,
        0x6d09929510ba7f62,
    ];
    const ORDERS: [[usize; 10]; 2] = [
        [8, 3, 2, 6, 4, 7, 1, 9, 5, 0],
        [1, 2, 0, 3, 7, 4, 6, 5, 9, 8],
    ];

    /// A change here would change the rest of every run that is resumed.
    #[test]
    fn values_stay_what_they_are() {
        let values = [
            (0, 0, 0),
            (0, 0, 1),
            (0, 1, 0),
            (42, 7, 3),
            (u64::MAX, u64::MAX, 0),
        ];
        let found = values.map(|(seed, step, micro_step)| Seed(seed).at(step, micro_step));
        assert_eq!(found, PINNED);
        assert_eq!(Seed(42).order(0, 10), ORDERS[0]);
        assert_eq!(Seed(42).order(1, 10), ORDERS[1]);
    }

    #[test]
    fn neighbouring_places_share_no_value() {
        let mut seen = HashSet::new();
        for seed in 0..8 {
            for step in 0..64 {
                for micro_step in 0..16 {
                    assert!(seen.insert(Seed(seed).at(step, micro_step)));
                }
            }
        }
    }

    /// Each of 6 orders about 1000 times: 5 standard deviations are 144.
    #[test]
    fn orders_are_equally_likely() {
        let mut counts = std::collections::HashMap::new();
        for epoch in 0..6000 {
            *counts.entry(Seed(1).order(epoch, 3)).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(
            counts.values().all(|count| (856..1144).contains(count)),
            "{counts:?}"
        );
    }

    proptest! {
        #[test]
        fn an_order_is_a_permutation(seed: u64, epoch: u64, len in 0usize..300) {
            let order = Seed(seed).order(epoch, len);
            let set: HashSet<usize> = order.iter().copied().collect();
            prop_assert_eq!(order.len(), len);
            prop_assert!(set.len() == len && order.iter().all(|&i| i < len));
        }

        #[test]
        fn batches_are_the_orders_one_after_another(seed: u64, size in 1usize..9, len in 1usize..30) {
            let seed = Seed(seed);
            let batches: Vec<usize> = (0..20).flat_map(|index| seed.batch(index, size, len)).collect();
            let orders: Vec<usize> = (0..).flat_map(|epoch| seed.order(epoch, len)).take(20 * size).collect();
            prop_assert_eq!(batches, orders);
        }
    }

    #[test]
    fn extreme_places_have_values_too() {
        assert!(Seed(1).batch(3, 4, 0).is_empty());
        assert!(Seed(1).batch(3, 0, 4).is_empty());
        let batch = Seed(1).batch(u64::MAX, 5, 3);
        assert!(batch.len() == 5 && batch.iter().all(|&i| i < 3));
    }
}
