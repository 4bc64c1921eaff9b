//! The values of a tensor from its file into the memory that they stay in, through one bounded buffer.
//!
//! Every tensor is cut in parts that all threads read and change at once:
//!
//! * values in the file's order and type are read where they stay;
//! * those to be cast, or packed in NF4, go through a share of the buffer for each thread;
//! * a matrix to be transposed, `out[c·rows + r] = in[r·columns + c]`, goes through the whole buffer, some rows at a time
//!   (or parts of rows, where a row is longer than the buffer), in tiles so small that what is read and what is written
//!   both stay in the cache.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use burn::tensor::{DType, Device, Element, FloatDType};
use bytemuck::{Pod, cast_slice_mut, zeroed_vec};
use half::{bf16, f16};
use rayon::prelude::*;

use super::checkpoint::BaseCheckpoint;
use super::four_bit::FourBit;
use super::progress::Meter;
use crate::format::elements::swap_to_host;
use crate::nf4::{Nf4Builder, Nf4Config, Nf4Float, Nf4Piece, Nf4Weight, PIECE_UNIT};
use crate::{PeftError, Result};

/// The most bytes that a thread reads at a time: what is read stays in its cache until it is packed or transposed.
const PART: usize = 512 << 10;
/// Rows and columns of a tile.
const TILE: usize = 64;

/// A float type of weights in files.
pub(super) trait Stored: Nf4Float + Pod + Element {
    /// To the nearest, even.
    fn round(value: f32) -> Self;
}

impl Stored for f32 {
    #[inline(always)]
    fn round(value: f32) -> Self {
        value
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Stored for f16 {
    #[inline(always)]
    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// A value of one type as one of another; of its own, every bit stays.
#[inline(always)]
fn cast<S: Stored, T: Stored>(value: S) -> T {
    match S::dtype() == T::dtype() {
        true => bytemuck::cast(value),
        false => T::round(value.into()),
    }
}

/// Reads one tensor of a checkpoint through a buffer.
pub(super) struct Stream<'a> {
    pub source: Source<'a>,
    pub buffer: &'a mut [u64],
}

/// A tensor that any thread may read a part of.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub checkpoint: &'a BaseCheckpoint,
    pub meter: &'a Meter<'a>,
    pub tensor: &'a str,
    /// Of a tensor of FP4's codes, the weight that they stand for: values in f32.
    pub fp4: Option<FourBit<'a>>,
    /// Whether the file has f64, of which values in f32 are made.
    pub wide: bool,
    /// Whether a finite value may become infinite.
    pub allow_overflow: bool,
}

/// What gets past an overflow.
const WAY_OUT: &str = "load it in a wider type (`BaseOptions::with_dtype`), or let it be infinite, as PyTorch does (`with_allow_overflow`)";

/// A buffer of at most `most` bytes, and no larger than it is of use.
pub(super) fn buffer(most: usize) -> Vec<u64> {
    let useful = PART * rayon::current_num_threads().max(2);
    vec![0; most.min(useful) / size_of::<u64>()]
}

impl Stream<'_> {
    /// The `n` values, stored as `S`, as `T`s in the same order.
    pub fn in_order<S: Stored, T: Stored>(self, n: usize) -> Result<Vec<T>> {
        let mut values: Vec<T> = zeroed_vec(n);
        let source = self.source;
        if S::dtype() == T::dtype() {
            let part = PART / size_of::<T>();
            let parts = values.par_chunks_mut(part).enumerate();
            parts.try_for_each(|(index, values)| {
                source.read(index * part, values)?;
                source.count::<S>(values.len());
                Ok(())
            })?;
            return Ok(values);
        }
        let (shares, part) = shares::<S>(self.buffer);
        let parts = values.par_chunks_mut(part).enumerate();
        parts.try_for_each(|(index, values)| {
            with_share(&shares, |share| {
                let share = &mut share[..values.len()];
                source.read(index * part, share)?;
                source.check_cast::<S, T>(index * part, share)?;
                for (value, &stored) in values.iter_mut().zip(&*share) {
                    *value = cast(stored);
                }
                Ok(())
            })?;
            source.count::<S>(values.len());
            Ok(())
        })?;
        Ok(values)
    }

    /// The values of a matrix `[rows, columns]`, stored as `S`, as `T`s in the order of its transpose.
    pub fn transposed<S: Stored, T: Stored>(self, [rows, columns]: [usize; 2]) -> Result<Vec<T>> {
        let mut values: Vec<T> = zeroed_vec(rows * columns);
        if values.is_empty() {
            return Ok(values);
        }
        let source = self.source;
        let buffer: &mut [S] = cast_slice_mut(self.buffer);
        let [height, width] = turn([rows, columns], buffer.len());
        for first_row in (0..rows).step_by(height) {
            let height = height.min(rows - first_row);
            for first_column in (0..columns).step_by(width) {
                let width = width.min(columns - first_column);
                let read = &mut buffer[..height * width];
                // Whole rows lie one after the other, and may be read in any parts.
                let whole = width == columns;
                let part = if whole { PART / size_of::<S>() } else { width };
                let parts = read.par_chunks_mut(part).enumerate();
                parts.try_for_each(|(index, values)| {
                    let first = match whole {
                        true => first_row * columns + index * part,
                        false => (first_row + index) * columns + first_column,
                    };
                    source.read(first, values)?;
                    source.check_cast::<S, T>(first, values)?;
                    source.count::<S>(values.len());
                    Ok(())
                })?;
                let written = &mut values[first_column * rows..][..width * rows];
                let bands = written.par_chunks_mut(TILE * rows).enumerate();
                bands.for_each(|(band, out)| {
                    let columns = band * TILE..width.min((band + 1) * TILE);
                    turn_band(read, width, columns, out, rows, first_row);
                });
            }
        }
        Ok(values)
    }

    /// The values of a matrix `[d_out, d_in]`, stored as `S`, packed. They are to compose to the type `dtype`.
    ///
    /// # Errors
    ///
    /// [`PeftError::NotFinite`] for the first value that is not finite, [`PeftError::Overflow`] for one that `dtype` does not
    /// have, in [`PeftError::InFile`].
    pub fn packed<S: Stored>(
        self,
        shape: [usize; 2],
        config: &Nf4Config,
        dtype: FloatDType,
        device: &Device,
    ) -> Result<Nf4Weight> {
        let mut builder = Nf4Builder::new(shape, config);
        let source = self.source;
        let (shares, part) = shares::<S>(self.buffer);
        let pieces = builder.pieces(part).enumerate();
        let failed = pieces.find_map_first(|(index, piece)| {
            let n = piece.len().min(shape[0] * shape[1] - index * part);
            let result = with_share(&shares, |share| {
                let share = &mut share[..n];
                source.read(index * part, share)?;
                source.check_overflow(index * part, share, dtype.into())?;
                source.quantize(piece, index * part, share)
            });
            source.count::<S>(n);
            result.err()
        });
        let packed = match failed {
            Some(error) => Err(error),
            None => builder.finish(source.tensor, device),
        };
        packed.map_err(|error| source.in_file(error))
    }

    /// Whether the tensor has the bytes of another, which has as many.
    pub fn equals(self, other: &str, num_bytes: usize) -> Result<bool> {
        let source = self.source;
        let (shares, part) = shares::<f32>(self.buffer);
        let part = part * size_of::<f32>() / 2;
        let parts = (0..num_bytes.div_ceil(part)).into_par_iter();
        let found = parts.find_map_any(|index| {
            let first = index * part;
            let n = part.min(num_bytes - first);
            let equal = with_share(&shares, |share| {
                let (one, two) = cast_slice_mut::<f32, u8>(share).split_at_mut(part);
                let (one, two) = (&mut one[..n], &mut two[..n]);
                source.checkpoint.read_at(source.tensor, first, one)?;
                source.checkpoint.read_at(other, first, two)?;
                source.meter.add_bytes(2 * n);
                Ok(one == two)
            });
            match equal {
                Ok(true) => None,
                other => Some(other),
            }
        });
        found.unwrap_or(Ok(true))
    }
}

impl Source<'_> {
    /// Values `[d_out, d_in]` that are there already, packed.
    ///
    /// # Errors
    ///
    /// As [`Stream::packed`].
    pub fn packed_values<S: Stored>(
        &self,
        values: &[S],
        shape: [usize; 2],
        config: &Nf4Config,
        dtype: FloatDType,
        device: &Device,
    ) -> Result<Nf4Weight> {
        let part = PART / size_of::<S>();
        let mut builder = Nf4Builder::new(shape, config);
        let pieces = builder.pieces(part).enumerate();
        let failed = pieces.find_map_first(|(index, piece)| {
            let values = &values[index * part..][..piece.len().min(values.len() - index * part)];
            let checked = self.check_overflow(index * part, values, dtype.into());
            checked
                .and_then(|()| self.quantize(piece, index * part, values))
                .err()
        });
        let packed = match failed {
            Some(error) => Err(error),
            None => builder.finish(self.tensor, device),
        };
        packed.map_err(|error| self.in_file(error))
    }

    fn quantize<S: Stored>(&self, piece: Nf4Piece, first: usize, values: &[S]) -> Result<()> {
        piece.quantize(values).map_err(|at| PeftError::NotFinite {
            tensor: self.tensor.to_owned(),
            index: first + at,
            value: values[at].into(),
        })
    }

    /// Checks that no finite value from index `first` on becomes infinite as a `T`.
    fn check_cast<S: Stored, T: Stored>(&self, first: usize, values: &[S]) -> Result<()> {
        self.check_overflow(first, values, T::dtype())
            .map_err(|error| self.in_file(error))
    }

    /// As [`check_cast`](Self::check_cast), by the name of the type.
    pub fn check_overflow<S: Stored>(
        &self,
        first: usize,
        values: &[S],
        dtype: DType,
    ) -> Result<()> {
        let Some(limit) = infinite_from(dtype).filter(|_| S::dtype() != dtype) else {
            return Ok(());
        };
        let overflows = |value: &S| {
            let value: f32 = (*value).into();
            value.is_finite() && value.abs() >= limit
        };
        if self.allow_overflow {
            return Ok(());
        }
        match values.iter().position(overflows) {
            None => Ok(()),
            Some(at) => {
                let value: f32 = values[at].into();
                Err(self.overflow(first + at, value.into(), dtype))
            }
        }
    }

    fn overflow(&self, index: usize, value: f64, dtype: DType) -> PeftError {
        PeftError::Overflow {
            tensor: self.tensor.to_owned(),
            index,
            value,
            dtype: format!("{dtype:?}"),
            way_out: WAY_OUT,
        }
    }

    pub fn in_file(&self, error: PeftError) -> PeftError {
        match self.checkpoint.tensor(self.tensor) {
            Some(tensor) => error.in_file(tensor.file),
            None => error,
        }
    }

    /// Reads f64 as the f32 nearest to each.
    fn read_wide(&self, first: usize, values: &mut [f32]) -> Result<()> {
        let mut wide = vec![0_f64; values.len()];
        let bytes: &mut [u8] = cast_slice_mut(&mut wide);
        self.checkpoint.read_at(self.tensor, 8 * first, bytes)?;
        swap_to_host(bytes, DType::F64);
        for (at, (value, &wide)) in values.iter_mut().zip(&wide).enumerate() {
            *value = wide as f32;
            if value.is_infinite() && wide.is_finite() && !self.allow_overflow {
                let error = self.overflow(first + at, wide, DType::F32);
                return Err(self.in_file(error));
            }
        }
        Ok(())
    }

    fn read<S: Stored>(&self, first: usize, values: &mut [S]) -> Result<()> {
        if let Some(weight) = self.fp4 {
            return weight.fp4(first, cast_slice_mut(values));
        }
        if self.wide {
            return self.read_wide(first, cast_slice_mut(values));
        }
        let bytes: &mut [u8] = cast_slice_mut(values);
        let offset = first * size_of::<S>();
        self.checkpoint.read_at(self.tensor, offset, bytes)?;
        swap_to_host(bytes, S::dtype());
        Ok(())
    }

    /// Counts what was read. Whoever is told may wait for others: no share is held meanwhile.
    fn count<S>(&self, values: usize) {
        // Of FP4, whose bytes two parts may share, all are counted at the end.
        if self.fp4.is_none() {
            let size = if self.wide { 8 } else { size_of::<S>() };
            self.meter.add_bytes(values * size);
        }
    }
}

/// From which absolute value on an f32 is infinite in a narrower type: halfway from its largest value to what would follow,
/// since a tie goes to the even one.
fn infinite_from(dtype: DType) -> Option<f32> {
    match dtype {
        DType::F16 => Some(65_520.0),
        DType::BF16 => Some(f32::from_bits(0x7f7f_8000)),
        _ => None,
    }
}

/// Values of a matrix `[rows, columns]` in the order of its transpose.
pub(super) fn transposed_values<S: Stored>(values: &[S], [rows, columns]: [usize; 2]) -> Vec<S> {
    let mut out: Vec<S> = zeroed_vec(values.len());
    if values.is_empty() {
        return out;
    }
    let bands = out.par_chunks_mut(TILE * rows).enumerate();
    bands.for_each(|(band, out)| {
        let columns_of_band = band * TILE..columns.min((band + 1) * TILE);
        turn_band(values, columns, columns_of_band, out, rows, 0);
    });
    out
}

/// The buffer in a share for each thread, and how many values a part has that fits in one.
fn shares<S: Stored>(buffer: &mut [u64]) -> (Vec<Mutex<&mut [S]>>, usize) {
    let threads = rayon::current_num_threads().max(1);
    let values: &mut [S] = cast_slice_mut(buffer);
    let most = (values.len() / threads).min(PART / size_of::<S>());
    let part = (most / PIECE_UNIT * PIECE_UNIT).max(PIECE_UNIT);
    let shares = values.chunks_exact_mut(part).take(threads);
    (shares.map(Mutex::new).collect(), part)
}

/// Runs `f` with this thread's share; where there are more threads than shares, they take turns.
fn with_share<S, T>(shares: &[Mutex<&mut [S]>], f: impl FnOnce(&mut [S]) -> T) -> T {
    let thread = rayon::current_thread_index().unwrap_or(0);
    let share = &shares[thread % shares.len()];
    f(&mut share.lock().unwrap_or_else(PoisonError::into_inner))
}

/// How many rows, and columns of them, of a matrix are read at a time for at most `most` values: whole rows, unless so few
/// of them fit that what is written of each column would be less than a tile.
fn turn([rows, columns]: [usize; 2], most: usize) -> [usize; 2] {
    let fitting = most / columns;
    if fitting >= rows {
        return [rows, columns];
    }
    if fitting >= TILE {
        return [fitting / TILE * TILE, columns];
    }
    let height = rows.min(TILE);
    [height, columns.min(most / height)]
}

/// The transpose of some columns of `read [height, width]`, to `out [columns, rows]` from column `first` on.
fn turn_band<S: Stored, T: Stored>(
    read: &[S],
    width: usize,
    columns: Range<usize>,
    out: &mut [T],
    rows: usize,
    first: usize,
) {
    let mut tile = [[T::zeroed(); TILE]; TILE];
    for (index, lines) in read.chunks(width * TILE).enumerate() {
        let height = lines.len() / width;
        for (r, line) in lines.chunks_exact(width).enumerate() {
            for (c, &value) in line[columns.clone()].iter().enumerate() {
                tile[c][r] = cast(value);
            }
        }
        for (line, out) in tile.iter().zip(out.chunks_exact_mut(rows)) {
            out[first + index * TILE..][..height].copy_from_slice(&line[..height]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_turned_at_a_time_fits_and_covers() {
        for [rows, columns] in [[1, 1], [4096, 4096], [3, 1 << 20], [1 << 20, 3], [33, 700]] {
            for most in [PIECE_UNIT, 1 << 15, 1 << 22] {
                let [height, width] = turn([rows, columns], most);
                assert!(height * width <= most && (1..=rows).contains(&height));
                assert!((1..=columns).contains(&width));
                assert!(width == columns || height == rows.min(TILE));
            }
        }
    }

    #[test]
    fn a_value_overflows_from_its_limit_on() {
        for (dtype, round) in [
            (
                DType::F16,
                (|v| f16::from_f32(v).to_f32()) as fn(f32) -> f32,
            ),
            (DType::BF16, |v| bf16::from_f32(v).to_f32()),
        ] {
            let limit = infinite_from(dtype).unwrap();
            let below = f32::from_bits(limit.to_bits() - 1);
            assert!(round(below).is_finite() && round(limit).is_infinite());
            assert!(round(-below).is_finite() && round(-limit).is_infinite());
        }
    }

    #[test]
    fn values_are_turned_as_a_stream_turns_them() {
        for [rows, columns] in [[1, 1], [3, 130], [200, 70], [64, 64]] {
            let values: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
            let turned = transposed_values(&values, [rows, columns]);
            for (i, value) in turned.iter().enumerate() {
                assert_eq!(*value, values[i % rows * columns + i / rows]);
            }
        }
    }

    #[test]
    fn casting_to_its_own_type_keeps_every_bit() {
        for bits in 0..=u16::MAX {
            let value: bf16 = cast(bf16::from_bits(bits));
            assert_eq!(value.to_bits(), bits);
            let value: f16 = cast(f16::from_bits(bits));
            assert_eq!(value.to_bits(), bits);
        }
        let nan = f32::from_bits(0x7fa0_0001);
        assert_eq!(cast::<f32, f32>(nan).to_bits(), nan.to_bits());
        assert_eq!(cast::<f32, bf16>(1.003_906_4).to_bits(), 0x3f81);
    }
}
