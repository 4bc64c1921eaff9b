//! Whether a plan fits: memories to compare it with, each a name and a number of bytes.

use super::plan::Plan;

/// A gigabyte of manufacturers of memory: 10⁹ bytes.
pub const GB: u128 = 1_000_000_000;
/// A gibibyte: 2³⁰ bytes.
pub const GIB: u128 = 1 << 30;

/// A memory that a run may have, or not.
///
/// What drivers, a context and other programs take is not left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// What it is called.
    pub name: &'static str,
    /// What it holds.
    pub bytes: u128,
}

impl Budget {
    /// 24 GB, as sold: 24 GiB.
    pub const RTX_4090: Self = Self::gib("RTX 4090, 24 GB", 24);
    /// 32 GB, as sold: 32 GiB.
    pub const RTX_5090: Self = Self::gib("RTX 5090, 32 GB", 32);
    /// 48 GB, as sold: 48 GiB. The same holds for an L40S.
    pub const A6000: Self = Self::gib("RTX A6000, 48 GB", 48);
    /// 80 GB, as sold: 80 GiB. The same holds for an H100.
    pub const A100_80: Self = Self::gib("A100, 80 GB", 80);
    /// 141 GB.
    pub const H200: Self = Self::gb("H200, 141 GB", 141);
    /// The memory of a small computer.
    pub const HOST_16: Self = Self::gib("host, 16 GiB", 16);
    /// Of a larger one.
    pub const HOST_64: Self = Self::gib("host, 64 GiB", 64);

    /// All of these, by size.
    pub const KNOWN: [Self; 7] = [
        Self::HOST_16,
        Self::RTX_4090,
        Self::RTX_5090,
        Self::A6000,
        Self::HOST_64,
        Self::A100_80,
        Self::H200,
    ];

    /// So many gigabytes of 10⁹ bytes.
    pub const fn gb(name: &'static str, gb: u64) -> Self {
        Self {
            name,
            bytes: gb as u128 * GB,
        }
    }

    /// So many gibibytes of 2³⁰ bytes.
    pub const fn gib(name: &'static str, gib: u64) -> Self {
        Self {
            name,
            bytes: gib as u128 * GIB,
        }
    }
}

impl Plan {
    /// Those of `budgets` that hold the peak, in their order.
    pub fn fits(&self, budgets: &[Budget]) -> Vec<Budget> {
        let needed = self.peak.parts.total();
        let fitting = budgets.iter().filter(|budget| budget.bytes >= needed);
        fitting.copied().collect()
    }

    /// How many devices of so many bytes hold the peak together, if it were split evenly and without any copies: no fewer do.
    ///
    /// At least one. A device of no bytes holds nothing, hence none there.
    pub fn devices_of(&self, bytes: u128) -> Option<u128> {
        let needed = self.peak.parts.total();
        (bytes > 0).then(|| needed.div_ceil(bytes).max(1))
    }
}
