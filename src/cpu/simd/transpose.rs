//! Transposing blocks of words in registers.

use std::arch::x86_64::*;

/// `to[c][r] = from[r][c]` for eight rows and columns.
///
/// # Safety
///
/// As [`Simd::transpose`](super::Simd::transpose), on a processor with AVX.
#[inline(always)]
pub(super) unsafe fn eight(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
    // No closures here: they would not have the caller's instructions.
    macro_rules! pairs {
        ($unpack:ident, $r:literal) => {
            $unpack(
                _mm256_loadu_ps(from.add($r * from_stride)),
                _mm256_loadu_ps(from.add(($r + 1) * from_stride)),
            )
        };
    }
    // SAFETY: as asked.
    unsafe {
        // Rows 2r and 2r + 1 side by side, in the words 0, 1 (low) and 2, 3 (high) of each half.
        let low = [
            pairs!(_mm256_unpacklo_ps, 0),
            pairs!(_mm256_unpacklo_ps, 2),
            pairs!(_mm256_unpacklo_ps, 4),
            pairs!(_mm256_unpacklo_ps, 6),
        ];
        let high = [
            pairs!(_mm256_unpackhi_ps, 0),
            pairs!(_mm256_unpackhi_ps, 2),
            pairs!(_mm256_unpackhi_ps, 4),
            pairs!(_mm256_unpackhi_ps, 6),
        ];
        // Four rows of one column in each half, then the halves together.
        macro_rules! columns {
            ($c:literal, $pairs:ident, $words:literal) => {
                let top = _mm256_shuffle_ps::<$words>($pairs[0], $pairs[1]);
                let bottom = _mm256_shuffle_ps::<$words>($pairs[2], $pairs[3]);
                let first = _mm256_permute2f128_ps::<0x20>(top, bottom);
                let second = _mm256_permute2f128_ps::<0x31>(top, bottom);
                _mm256_storeu_ps(to.add($c * to_stride), first);
                _mm256_storeu_ps(to.add(($c + 4) * to_stride), second);
            };
        }
        columns!(0, low, 0x44);
        columns!(1, low, 0xee);
        columns!(2, high, 0x44);
        columns!(3, high, 0xee);
    }
}
