//! Weights in four bits, as bitsandbytes makes state dictionaries of them and transformers saves them.
//!
//! A weight `w [d_out, d_in]` of `n` values in `b` blocks is these tensors:
//!
//! | Tensor | Type and shape |
//! |---|---|
//! | `w` | U8 `[ceil(n/2), 1]`, or the same bytes as another type (`quant_storage`) |
//! | `w.absmax` | F32 `[b]`; doubly quantised, U8 `[b]` |
//! | `w.quant_map` | F32 `[16]`, the codebook |
//! | `w.nested_absmax` | doubly quantised, F32 `[ceil(b/256)]` |
//! | `w.nested_quant_map` | doubly quantised, F32 `[256]`, the dynamic map |
//! | `w.quant_state.bitsandbytes__nf4` | U8, JSON: see [`QuantState`] |
//!
//! Whether a weight is packed is seen from them. Codes and scales are taken as they are; the two maps must be those that
//! this crate computes with, and what the JSON says must be true of the tensors.
//!
//! Source: bitsandbytes 0.50.2 and transformers 5.24.

use safetensors::Dtype;

use super::checkpoint::{BaseCheckpoint, BaseTensor};
use super::fp4;
use super::quant_state::{MAX_STATE_BYTES, QuantState, QuantType};
use super::report::{BaseMismatch, DTypeMismatch};
use crate::format::Mismatch;
use crate::nf4::codebook;
use crate::nf4::double::{DYNAMIC_MAP, NESTED_BLOCK_SIZE};
use crate::{PeftError, Result};

/// The types that `quant_storage` can be.
const STORAGE: [Dtype; 6] = [
    Dtype::U8,
    Dtype::I8,
    Dtype::F16,
    Dtype::BF16,
    Dtype::F32,
    Dtype::F64,
];

/// One of the tensors of a packed weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Codes,
    Absmax,
    QuantMap,
    NestedAbsmax,
    NestedQuantMap,
    State(QuantType),
}

impl Part {
    /// All there are beside the codes.
    const COMPANIONS: [Self; 6] = [
        Self::Absmax,
        Self::QuantMap,
        Self::NestedAbsmax,
        Self::NestedQuantMap,
        Self::State(QuantType::Nf4),
        Self::State(QuantType::Fp4),
    ];

    /// Those that a weight in this state has.
    pub fn of(state: &QuantState) -> Vec<Self> {
        let nested = [Self::NestedAbsmax, Self::NestedQuantMap];
        let nested = nested.into_iter().filter(|_| state.nested_offset.is_some());
        let plain = [Self::Codes, Self::Absmax, Self::QuantMap];
        let parts = plain.into_iter().chain(nested);
        parts.chain([Self::State(state.quant_type)]).collect()
    }

    /// The name of the tensor of the weight `weight`.
    pub fn tensor(self, weight: &str) -> String {
        match self {
            Self::Codes => weight.to_owned(),
            Self::Absmax => format!("{weight}.absmax"),
            Self::QuantMap => format!("{weight}.quant_map"),
            Self::NestedAbsmax => format!("{weight}.nested_absmax"),
            Self::NestedQuantMap => format!("{weight}.nested_quant_map"),
            Self::State(quant_type) => {
                format!("{weight}.quant_state.bitsandbytes__{}", quant_type.name())
            }
        }
    }

    /// Its type and shape; the JSON's length is its own.
    pub fn expected(self, state: &QuantState) -> (Dtype, Vec<usize>) {
        let blocks = state.blocks();
        match self {
            Self::Codes => (Dtype::U8, vec![state.packed_len(), 1]),
            Self::Absmax if state.nested_offset.is_some() => (Dtype::U8, vec![blocks]),
            Self::Absmax => (Dtype::F32, vec![blocks]),
            Self::QuantMap => (Dtype::F32, vec![16]),
            Self::NestedAbsmax => (Dtype::F32, vec![blocks.div_ceil(NESTED_BLOCK_SIZE)]),
            Self::NestedQuantMap => (Dtype::F32, vec![DYNAMIC_MAP.len()]),
            Self::State(_) => (Dtype::U8, Vec::new()),
        }
    }
}

/// The names of the tensors that only a packed weight of this name has, of those that are there; none for a dense weight.
pub(super) fn companions(checkpoint: &BaseCheckpoint, weight: &str) -> Vec<String> {
    let names = Part::COMPANIONS.map(|part| part.tensor(weight)).into_iter();
    names
        .filter(|name| checkpoint.tensor(name).is_some())
        .collect()
}

/// The state of the packed weight `weight`, which is to have the `shape` `[d_out, d_in]`. Notes what its tensors lack to be
/// one; then there is no state, or it is not to be used.
///
/// # Errors
///
/// [`PeftError::InFile`] with what the JSON says that bitsandbytes does not write; [`PeftError::Malformed`] for maps of other
/// values than this crate computes with; [`PeftError::Io`].
pub(super) fn state(
    checkpoint: &BaseCheckpoint,
    weight: &str,
    shape: [usize; 2],
    mismatch: &mut BaseMismatch,
) -> Result<Option<QuantState>> {
    let mut states = QuantType::ALL.into_iter().filter_map(|quant_type| {
        let name = Part::State(quant_type).tensor(weight);
        Some((quant_type, checkpoint.tensor(&name)?))
    });
    let Some((quant_type, tensor)) = states.next() else {
        let state = Part::State(QuantType::Nf4).tensor(weight);
        mismatch.missing.push(state);
        return Ok(None);
    };
    if tensor.dtype != Dtype::U8 {
        mismatch.dtypes.push(other_dtype(&tensor, "U8"));
        return Ok(None);
    }
    if tensor.shape.len() != 1 || tensor.num_bytes > MAX_STATE_BYTES {
        mismatch
            .shapes
            .push(other_shape(&tensor, vec![MAX_STATE_BYTES]));
        return Ok(None);
    }
    let json = checkpoint.read(tensor.name)?;
    let state = QuantState::parse(tensor.name, quant_type, &json)
        .map_err(|error| error.in_file(tensor.file))?;
    if state.shape != shape {
        mismatch.shapes.push(Mismatch {
            tensor: weight.to_owned(),
            expected: shape.to_vec(),
            found: state.shape.to_vec(),
        });
        return Ok(None);
    }
    let parts = Part::of(&state);
    for part in &parts {
        match checkpoint.tensor(&part.tensor(weight)) {
            None => mismatch.missing.push(part.tensor(weight)),
            Some(tensor) => check(*part, &tensor, &state, checkpoint, mismatch)?,
        }
    }
    for part in Part::COMPANIONS {
        let name = part.tensor(weight);
        if !parts.contains(&part) && checkpoint.tensor(&name).is_some() {
            mismatch.unexpected.push(name);
        }
    }
    Ok(Some(state))
}

/// Checks a tensor against the state of its weight.
fn check(
    part: Part,
    tensor: &BaseTensor,
    state: &QuantState,
    checkpoint: &BaseCheckpoint,
    mismatch: &mut BaseMismatch,
) -> Result<()> {
    let (dtype, mut shape) = part.expected(state);
    match part {
        Part::State(_) => return Ok(()),
        Part::Codes if STORAGE.contains(&tensor.dtype) => {
            let size = tensor.dtype.bitsize() / 8;
            if shape[0].is_multiple_of(size) {
                shape[0] /= size;
            }
        }
        _ if tensor.dtype != dtype => {
            mismatch
                .dtypes
                .push(other_dtype(tensor, &dtype.to_string()));
            return Ok(());
        }
        _ => {}
    }
    if tensor.shape != shape {
        mismatch.shapes.push(other_shape(tensor, shape));
        return Ok(());
    }
    let (map, expected): (&str, &[f32]) = match (part, state.quant_type) {
        (Part::QuantMap, QuantType::Nf4) => ("the codebook of NF4", &codebook::CODEBOOK),
        (Part::QuantMap, QuantType::Fp4) => ("the codebook of FP4", &fp4::CODEBOOK),
        (Part::NestedQuantMap, _) => ("the dynamic map", &DYNAMIC_MAP),
        _ => return Ok(()),
    };
    let bytes = checkpoint.read(tensor.name)?;
    let (values, _) = bytes.as_chunks();
    let values = values.iter().map(|bytes| f32::from_le_bytes(*bytes));
    let mut pairs = values.zip(expected).enumerate();
    match pairs.find(|(_, (found, expected))| found != *expected) {
        None => Ok(()),
        Some((index, (found, expected))) => Err(PeftError::Malformed {
            path: tensor.file.to_owned(),
            reason: format!(
                "tensor `{}`: {found} at {index}, where {map} of bitsandbytes has {expected}",
                tensor.name.escape_debug()
            ),
        }),
    }
}

fn other_dtype(tensor: &BaseTensor, expected: &str) -> DTypeMismatch {
    DTypeMismatch {
        tensor: tensor.name.to_owned(),
        expected: expected.to_owned(),
        found: tensor.dtype.to_string(),
    }
}

fn other_shape(tensor: &BaseTensor, expected: Vec<usize>) -> Mismatch {
    Mismatch {
        tensor: tensor.name.to_owned(),
        expected,
        found: tensor.shape.to_vec(),
    }
}
