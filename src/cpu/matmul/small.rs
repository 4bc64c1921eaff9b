//! Products of small matrices in a scratch, tile by tile.

use crate::cpu::simd::{Simd, Tile};

/// Rows of values with a distance between their beginnings.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) stride: usize,
}

/// `c[j][l] (+)= Σ_p b[j][p] · a[p][l]` for `rows` of `c`, `depth` and `width`, a multiple of 16.
///
/// Rows are computed in whole tiles: what is beyond the last of `b` and `c`, up to a multiple of 24, is read and
/// written too, as far as it is in memory.
///
/// # Safety
///
/// As [`Simd`].
#[inline(always)]
pub(crate) unsafe fn product<S: Simd>(
    a: Matrix,
    b: Matrix,
    [rows, depth, width]: [usize; 3],
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
) {
    if rows == 0 || width == 0 {
        return;
    }
    assert!(width.is_multiple_of(16) && width <= c_stride);
    assert!(depth == 0 || (depth - 1) * a.stride + width <= a.values.len());
    let mut start = 0;
    while start < width {
        let vectors = ((width - start) / S::LANES).min(S::TILE_VECTORS);
        let columns = S::tile_columns(vectors);
        let last = rows.next_multiple_of(columns) - 1;
        assert!(last * b.stride + depth <= b.values.len());
        assert!(last * c_stride + width <= c.len());
        for j in (0..rows).step_by(columns) {
            let tile = Tile {
                vectors,
                depth,
                a: a.values[start.min(a.values.len())..].as_ptr(),
                a_stride: a.stride,
                b: b.values[j * b.stride..].as_ptr(),
                b_stride: b.stride,
                c: c[j * c_stride + start..].as_mut_ptr(),
                c_stride,
                accumulate,
            };
            // SAFETY: within all three, as asserted.
            unsafe { S::tile(tile) };
        }
        start += vectors * S::LANES;
    }
}
