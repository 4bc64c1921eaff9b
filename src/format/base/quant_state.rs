//! What bitsandbytes says of a packed weight in JSON, in the tensor `<weight>.quant_state.bitsandbytes__nf4`.
//!
//! ```text
//! {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [d_out, d_in]}
//! ```
//!
//! with double quantisation also `"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": o`, where `o` is
//! the mean that was taken off the scales. `dtype` is what the weight was quantised from and is restored to.
//!
//! Source: `QuantState.as_dict` and `from_dict` of bitsandbytes 0.50.2.

use burn::tensor::FloatDType;
use serde_json::{Map, Value, json};

use super::python_json;
use crate::format::json;
use crate::nf4::BlockSize;
use crate::nf4::blocks::packed_len;
use crate::nf4::double::NESTED_BLOCK_SIZE;
use crate::{PeftError, Result};

/// Longest JSON of a state that is read, in bytes; real ones have less than 250.
pub(super) const MAX_STATE_BYTES: usize = 4096;

/// Which sixteen values the codes of a packed weight stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QuantType {
    /// Quantiles of a normal distribution.
    Nf4,
    /// A float of one sign bit, two of exponent, one of mantissa.
    Fp4,
}

impl QuantType {
    pub const ALL: [Self; 2] = [Self::Nf4, Self::Fp4];

    /// bitsandbytes' name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }
}

/// The state of a packed weight, but for its tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct QuantState {
    pub quant_type: QuantType,
    pub block_size: BlockSize,
    /// What the weight is restored to.
    pub dtype: FloatDType,
    /// `[d_out, d_in]`.
    pub shape: [usize; 2],
    /// With double quantisation, the mean that was taken off the scales.
    pub nested_offset: Option<f32>,
}

impl QuantState {
    /// Reads the JSON of the tensor `tensor`, whose name ends in `quant_type`.
    ///
    /// # Errors
    ///
    /// [`PeftError::Json`]; [`PeftError::Config`] with `tensor` and the key for a value that bitsandbytes does not write, a
    /// key that is missing, and one that is not known.
    pub fn parse(tensor: &str, quant_type: QuantType, json: &[u8]) -> Result<Self> {
        let mut keys = Keys {
            tensor,
            object: json::object(json)?,
        };
        keys.text("quant_type", &[quant_type.name()])?;
        let block_size = keys.number("blocksize")?;
        let block_size = BlockSize::new(block_size)
            .map_err(|_| keys.error("blocksize", block_size, "a block size of bitsandbytes"))?;
        let dtype = keys.text("dtype", &["float32", "bfloat16", "float16"])?;
        let shape = keys.shape()?;
        let nested = ["nested_blocksize", "nested_dtype", "nested_offset"];
        let nested_offset = match nested.iter().any(|key| keys.object.contains_key(*key)) {
            false => None,
            true => {
                let found = keys.number("nested_blocksize")?;
                if found != NESTED_BLOCK_SIZE {
                    return Err(keys.error("nested_blocksize", found, "256"));
                }
                keys.text("nested_dtype", &["float32"])?;
                Some(keys.float("nested_offset")?)
            }
        };
        if let Some((key, value)) = keys.object.iter().next() {
            return Err(keys.error(key, value, "no such key"));
        }
        Ok(Self {
            quant_type,
            block_size,
            dtype: match dtype {
                0 => FloatDType::F32,
                1 => FloatDType::BF16,
                _ => FloatDType::F16,
            },
            shape,
            nested_offset,
        })
    }

    /// How many values there are.
    pub fn num_weights(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// Bytes of their codes.
    pub fn packed_len(&self) -> usize {
        packed_len(self.num_weights())
    }

    /// How many blocks they make.
    pub fn blocks(&self) -> usize {
        self.block_size.blocks(self.num_weights())
    }

    /// Bytes of the scales in a file.
    pub fn scale_bytes(&self) -> usize {
        let blocks = self.blocks();
        match self.nested_offset {
            None => 4 * blocks,
            Some(_) => blocks + 4 * blocks.div_ceil(NESTED_BLOCK_SIZE),
        }
    }

    /// The JSON, to the byte as bitsandbytes writes it.
    pub fn to_json(self) -> String {
        let mut state = json!({
            "quant_type": self.quant_type.name(),
            "blocksize": self.block_size.get(),
            "dtype": torch_name(self.dtype),
            "shape": self.shape,
        });
        if let (Some(offset), Value::Object(state)) = (self.nested_offset, &mut state) {
            state.insert("nested_blocksize".into(), NESTED_BLOCK_SIZE.into());
            state.insert("nested_dtype".into(), "float32".into());
            state.insert("nested_offset".into(), f64::from(offset).into());
        }
        python_json::on_one_line(&state)
    }
}

/// PyTorch's name of a float type; that of f32 for those that files of models do not have.
pub(super) fn torch_name(dtype: FloatDType) -> &'static str {
    match dtype {
        FloatDType::BF16 => "bfloat16",
        FloatDType::F16 => "float16",
        _ => "float32",
    }
}

/// The keys of the JSON that are still to be read.
struct Keys<'a> {
    tensor: &'a str,
    object: Map<String, Value>,
}

impl Keys<'_> {
    fn error(&self, key: &str, value: impl ToString, expected: &str) -> PeftError {
        const MOST: usize = 80;
        let mut value = value.to_string();
        value.truncate(value.floor_char_boundary(MOST));
        PeftError::config(format!("`{key}` of `{}`", self.tensor), value, expected)
    }

    fn take(&mut self, key: &str) -> Result<Value> {
        let value = self.object.shift_remove(key);
        value.ok_or_else(|| self.error(key, "nothing", "a value"))
    }

    /// Which of the `allowed` texts stands there.
    fn text(&mut self, key: &str, allowed: &[&str]) -> Result<usize> {
        let value = self.take(key)?;
        let found = value.as_str();
        let found = found.and_then(|found| allowed.iter().position(|text| *text == found));
        found.ok_or_else(|| self.error(key, value, &format!("one of {allowed:?}")))
    }

    fn number(&mut self, key: &str) -> Result<usize> {
        let value = self.take(key)?;
        as_usize(&value).ok_or_else(|| self.error(key, value, "a whole number"))
    }

    /// An f32, which Python writes as the double that it is.
    fn float(&mut self, key: &str) -> Result<f32> {
        let value = self.take(key)?;
        let float = value.as_f64().map(|float| float as f32);
        let float = float.filter(|float| float.is_finite());
        float.ok_or_else(|| self.error(key, value, "a finite number"))
    }

    fn shape(&mut self) -> Result<[usize; 2]> {
        let value = self.take("shape")?;
        let sides = value.as_array().map(|sides| sides.iter().map(as_usize));
        let sides: Option<Vec<usize>> = sides.and_then(Iterator::collect);
        match sides.as_deref() {
            Some(&[d_out, d_in]) if d_out.checked_mul(d_in).is_some() => Ok([d_out, d_in]),
            _ => Err(self.error("shape", value, "[d_out, d_in]")),
        }
    }
}

fn as_usize(value: &Value) -> Option<usize> {
    usize::try_from(value.as_u64()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str =
        r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 128]}"#;
    const DOUBLE: &str = r#"{"quant_type": "fp4", "blocksize": 4096, "dtype": "bfloat16", "shape": [1, 3], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.23443420231342316}"#;

    fn parse(json: &str) -> Result<QuantState> {
        QuantState::parse("w.quant_state", QuantType::Nf4, json.as_bytes())
    }

    #[test]
    fn what_bitsandbytes_writes_is_read_and_written_to_the_byte() {
        let plain = parse(PLAIN).unwrap();
        assert_eq!(plain.shape, [64, 128]);
        assert_eq!(plain.nested_offset, None);
        assert_eq!(plain.to_json(), PLAIN);
        let double = QuantState::parse("w", QuantType::Fp4, DOUBLE.as_bytes()).unwrap();
        assert_eq!(double.nested_offset, Some(0.234_434_2));
        assert_eq!(double.dtype, FloatDType::BF16);
        assert_eq!(double.to_json(), DOUBLE);
    }

    #[test]
    fn what_it_does_not_write_is_an_error_that_names_tensor_and_key() {
        for (from, to, key) in [
            ("nf4", "fp4", "quant_type"),
            ("nf4", "int4", "quant_type"),
            ("\"nf4\"", "4", "quant_type"),
            ("64,", "63,", "blocksize"),
            ("64,", "16,", "blocksize"),
            ("64,", "-64,", "blocksize"),
            ("64,", "64.0,", "blocksize"),
            ("64,", "18446744073709551615,", "blocksize"),
            ("float32", "float64", "dtype"),
            ("float32", "torch.float32", "dtype"),
            ("[64, 128]", "[64, 128, 1]", "shape"),
            ("[64, 128]", "[8192]", "shape"),
            ("[64, 128]", "[-64, 128]", "shape"),
            ("[64, 128]", "null", "shape"),
            ("[64, 128]", "[4294967296, 4294967296]", "shape"),
            ("[64, 128]", "[64, \"128\"]", "shape"),
            ("\"shape\"", "\"size\"", "shape"),
            ("}", ", \"x\": 1}", "x"),
            ("}", ", \"nested_blocksize\": 256}", "nested_dtype"),
            ("}", ", \"nested_offset\": 0.5}", "nested_blocksize"),
        ] {
            let error = parse(&PLAIN.replace(from, to)).unwrap_err();
            assert!(
                matches!(&error, PeftError::Config { name, .. } if *name == format!("`{key}` of `w.quant_state`")),
                "{to}: {error}"
            );
        }
        let nested = |from: &str, to: &str| {
            let json = DOUBLE.replace("fp4", "nf4").replace(from, to);
            parse(&json).unwrap_err().to_string()
        };
        assert!(nested("256", "255").contains("nested_blocksize"));
        assert!(nested("float32", "float16").contains("nested_dtype"));
        assert!(nested("0.23443420231342316", "1e39").contains("nested_offset"));
        assert!(nested("0.23443420231342316", "null").contains("nested_offset"));
    }

    #[test]
    fn what_is_no_json_or_has_a_key_twice_is_an_error() {
        for json in [
            "",
            "[]",
            "{",
            &PLAIN.replace("\"dtype\"", "\"quant_type\": \"nf4\", \"dtype\""),
            &PLAIN.replace("64,", "NaN,"),
        ] {
            let error = parse(json).unwrap_err();
            assert!(matches!(error, PeftError::Json { .. }), "{json}: {error}");
        }
    }
}
