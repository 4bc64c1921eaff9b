//! SplitMix64: Steele, Lea and Flood, *Fast splittable pseudorandom number generators*, 2014, with the constants of Vigna's
//! public [`splitmix64.c`](https://prng.di.unimi.it/splitmix64.c).
//!
//! It is written out here because what is drawn must outlive versions: the `rand` crate says itself that its `StdRng` and
//! its shuffles may change between releases. The values here never do; tests pin them.

/// What `n` increments of the state differ by: 2⁶⁴ over the golden ratio, made odd.
pub(crate) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function after one increment; a bijection.
pub(crate) fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(GOLDEN);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A stream of random numbers from a seed.
pub(crate) struct Stream(pub(crate) u64);

impl Stream {
    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        let value = mix(self.0);
        self.0 = self.0.wrapping_add(GOLDEN);
        value
    }

    /// A number below `bound`, which is not 0, without bias: Lemire, *Fast random integer generation in an interval*, 2019.
    #[cfg(feature = "optim")]
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        // So many of the products' low halves are dropped that every result keeps as many.
        let surplus = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next()) * u128::from(bound);
            if product as u64 >= surplus {
                return (product >> 64) as u64;
            }
        }
    }

    /// Two independent standard normal numbers: Box and Muller, 1958.
    pub(crate) fn normal_pair(&mut self) -> [f64; 2] {
        // In (0, 1], so that the logarithm is finite, and in [0, 1).
        let scale = 1.0 / (1_u64 << 53) as f64;
        let radius = ((self.next() >> 11) + 1) as f64 * scale;
        let angle = (self.next() >> 11) as f64 * scale * std::f64::consts::TAU;
        let radius = (-2.0 * radius.ln()).sqrt();
        [radius * angle.cos(), radius * angle.sin()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first values of `splitmix64.c` for the seed 1234567, as many other implementations pin them.
    #[test]
    fn the_stream_is_splitmix64() {
        let mut stream = Stream(1_234_567);
        let expected = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
            4_593_380_528_125_082_431,
            16_408_922_859_458_223_821,
        ];
        assert_eq!(expected.map(|_| stream.next()), expected);
    }

    #[test]
    fn normal_numbers_have_mean_0_variance_1_and_no_correlation() {
        let mut stream = Stream(7);
        let n = 100_000;
        let pairs: Vec<[f64; 2]> = (0..n).map(|_| stream.normal_pair()).collect();
        let mean = |f: &dyn Fn(&[f64; 2]) -> f64| pairs.iter().map(f).sum::<f64>() / n as f64;
        for i in [0, 1] {
            assert!(mean(&|pair| pair[i]).abs() < 0.02);
            assert!((mean(&|pair| pair[i].powi(2)) - 1.0).abs() < 0.03);
            assert!((mean(&|pair| pair[i].powi(4)) - 3.0).abs() < 0.2);
        }
        assert!(mean(&|pair| pair[0] * pair[1]).abs() < 0.02);
    }
}
