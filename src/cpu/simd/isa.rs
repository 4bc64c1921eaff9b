//! Which instruction set a kernel runs on: the fastest one of this processor, or the one that a user names.

use std::ffi::OsStr;
use std::fmt;
use std::sync::OnceLock;

use super::portable::Portable;
use super::{Kernel, KernelOfPairs};
#[cfg(target_arch = "x86_64")]
use super::{avx2::Avx2, avx512::Avx512};

/// The environment variable that names an instruction set: `avx512-bf16`, `avx512`, `avx2` or `portable`.
const FORCE: &str = "BURN_PEFT_SIMD";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
    /// The kernels of AVX-512 over instructions in plain code, with products of bf16 or without.
    #[cfg(all(test, feature = "emulated-avx512", target_arch = "x86_64"))]
    Emulated {
        bf16: bool,
    },
}

/// All of them, the fastest first.
const ALL: &[(Kind, &str)] = &[
    #[cfg(target_arch = "x86_64")]
    (Kind::Avx512Bf16, "avx512-bf16"),
    #[cfg(target_arch = "x86_64")]
    (Kind::Avx512, "avx512"),
    #[cfg(target_arch = "x86_64")]
    (Kind::Avx2, "avx2"),
    (Kind::Portable, "portable"),
    #[cfg(all(test, feature = "emulated-avx512", target_arch = "x86_64"))]
    (Kind::Emulated { bf16: true }, "avx512-bf16 emulated"),
    #[cfg(all(test, feature = "emulated-avx512", target_arch = "x86_64"))]
    (Kind::Emulated { bf16: false }, "avx512 emulated"),
];

impl Kind {
    fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                Self::Avx512.is_available() && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && Self::Avx2.is_available()
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Self::Portable => true,
            #[cfg(all(test, feature = "emulated-avx512", target_arch = "x86_64"))]
            Self::Emulated { .. } => Self::Avx2.is_available(),
        }
    }
}

/// An instruction set that this processor has.
///
/// It is the proof that [`dispatch`] needs: only [`available`](Isa::available) and [`best`](Isa::best) make one, and both
/// ask the processor first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Isa(Kind);

/// An instruction set of this processor that multiplies pairs of bf16.
#[derive(Clone, Copy)]
pub(crate) struct IsaOfPairs(PairsKind);

#[derive(Clone, Copy)]
enum PairsKind {
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(all(test, feature = "emulated-avx512", target_arch = "x86_64"))]
    Emulated,
}

impl Isa {
    /// The instruction sets of this processor, the fastest first.
    pub(crate) fn available() -> impl Iterator<Item = Self> {
        let kinds = ALL.iter().map(|&(kind, _)| kind);
        kinds.filter(|kind| kind.is_available()).map(Self)
    }

    /// The same, if it multiplies pairs of bf16 by instructions of its own.
    pub(crate) fn of_pairs(self) -> Option<IsaOfPairs> {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Bf16 => Some(IsaOfPairs(PairsKind::Avx512Bf16)),
            #[cfg(all(test, feature = "emulated-avx512", target_arch = "x86_64"))]
            Kind::Emulated { bf16: true } => Some(IsaOfPairs(PairsKind::Emulated)),
            _ => None,
        }
    }

    /// The fastest one of this processor, or the one that the environment variable `BURN_PEFT_SIMD` names.
    ///
    /// A name that is unknown, or of instructions that this processor does not have, changes nothing but for a line on the
    /// standard error, once in a process.
    pub(crate) fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| match std::env::var_os(FORCE) {
            None => Self::fastest(),
            Some(name) => Self::named(&name).unwrap_or_else(|| {
                eprintln!("{}", Self::refusal(&name));
                Self::fastest()
            }),
        })
    }

    fn fastest() -> Self {
        Self::available().next().unwrap_or(Self(Kind::Portable))
    }

    /// The instruction set of this name, if this processor has it. No name at all means the fastest.
    fn named(name: &OsStr) -> Option<Self> {
        if name.is_empty() {
            return Some(Self::fastest());
        }
        let isa = ALL.iter().find(|&&(_, known)| name == known)?.0;
        isa.is_available().then_some(Self(isa))
    }

    /// What is said of a name that names nothing here.
    fn refusal(name: &OsStr) -> String {
        let names = Self::available().map(|isa| isa.to_string());
        format!(
            "burn-peft: {FORCE}={} is ignored: this machine has {}; {} is used",
            name.to_string_lossy(),
            names.collect::<Vec<_>>().join(", "),
            Self::fastest(),
        )
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = ALL.iter().find(|(kind, _)| *kind == self.0);
        f.write_str(name.map_or("", |(_, name)| name))
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Runs a kernel with the instructions of `isa`.
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    // SAFETY: the processor has the instructions, or there would be no such `isa`.
    unsafe {
        match isa.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Bf16 => with_avx512_bf16(kernel),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => with_avx512(kernel),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => with_avx2(kernel),
            Kind::Portable => kernel.run::<Portable>(),
            #[cfg(all(test, feature = "emulated-avx512", target_arch = "x86_64"))]
            Kind::Emulated { bf16 } => emulated(kernel, bf16),
        }
    }
}

/// Runs a kernel over products of bf16 with the instructions of `isa`.
pub(crate) fn dispatch_of_pairs<K: KernelOfPairs>(isa: IsaOfPairs, kernel: K) {
    // SAFETY: as above.
    match isa.0 {
        #[cfg(target_arch = "x86_64")]
        PairsKind::Avx512Bf16 => unsafe { of_pairs(kernel) },
        #[cfg(all(test, feature = "emulated-avx512", target_arch = "x86_64"))]
        PairsKind::Emulated => unsafe { of_emulated_pairs(kernel) },
    }
}

/// # Safety
///
/// The processor has AVX-512 F, BW, VL and BF16, AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx2,fma")]
unsafe fn of_pairs<K: KernelOfPairs>(kernel: K) {
    // SAFETY: as above.
    unsafe { kernel.run::<Avx512<true>>() }
}

/// # Safety
///
/// The processor has AVX2 and FMA.
#[cfg(all(test, feature = "emulated-avx512", target_arch = "x86_64"))]
#[target_feature(enable = "avx2,fma")]
unsafe fn of_emulated_pairs<K: KernelOfPairs>(kernel: K) {
    // SAFETY: as above.
    unsafe { kernel.run::<super::emulated::avx512::Avx512<true>>() }
}

/// # Safety
///
/// The processor has AVX-512 F, BW, VL and BF16, AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx2,fma")]
unsafe fn with_avx512_bf16<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: as above.
    unsafe { kernel.run::<Avx512<true>>() }
}

/// # Safety
///
/// The processor has AVX-512 F, BW and VL, AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
unsafe fn with_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: as above.
    unsafe { kernel.run::<Avx512<false>>() }
}

/// # Safety
///
/// The processor has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn with_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: as above.
    unsafe { kernel.run::<Avx2>() }
}

/// # Safety
///
/// The processor has AVX2 and FMA.
#[cfg(all(test, feature = "emulated-avx512", target_arch = "x86_64"))]
#[target_feature(enable = "avx2,fma")]
unsafe fn emulated<K: Kernel>(kernel: K, bf16: bool) -> K::Output {
    use super::emulated::avx512::Avx512;
    // SAFETY: as above.
    unsafe {
        match bf16 {
            true => kernel.run::<Avx512<true>>(),
            false => kernel.run::<Avx512<false>>(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_available_instruction_set_is_found_by_its_name() {
        for isa in Isa::available() {
            assert_eq!(Isa::named(OsStr::new(&isa.to_string())), Some(isa));
        }
        assert_eq!(Isa::named(OsStr::new("")), Some(Isa::fastest()));
        assert!(Isa::available().any(|isa| isa.to_string() == "portable"));
    }

    #[test]
    fn a_name_that_names_nothing_is_refused_with_those_that_do() {
        for name in ["typo", "AVX2", "portable ", "avx512-bf17"] {
            assert_eq!(Isa::named(OsStr::new(name)), None);
            let refusal = Isa::refusal(OsStr::new(name));
            assert!(refusal.contains(&format!("BURN_PEFT_SIMD={name} ")));
            assert!(refusal.contains("portable"), "{refusal}");
        }
    }
}
