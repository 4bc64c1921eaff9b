//! A safetensors file, read by position into bounded buffers.
//!
//! ```text
//! u64 n, little-endian | n bytes of JSON: name -> {dtype, shape, [begin, end)} | the values
//! ```
//!
//! The order of the checks: a regular file, the length `n` against a limit and the file's size, the header as
//! [`safetensors`](https://github.com/huggingface/safetensors) demands it (offsets without gap or overlap that agree with
//! shape and type) and with no name twice, the number of tensors, and that the values end where the file ends. Nothing
//! is allocated before the size it needs was checked. The file is not mapped into memory: a mapped file that another
//! process truncates kills the reader.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use safetensors::tensor::TensorInfo;

use super::digest::{Digest, DigestCheck};
use super::disguise::{recognised, start_of};
use super::elements;
use super::header::Header;
use super::limits::FileLimits;
use super::positional;
use super::read::open_regular;
use crate::{PeftError, Result};

/// An open safetensors file whose header was checked.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    /// Where the values begin.
    start: u64,
    tensors: BTreeMap<String, TensorInfo>,
    digest: Digest,
}

impl SafetensorsFile {
    /// Opens `path` and checks its header. No value is read.
    ///
    /// # Errors
    ///
    /// [`PeftError::Io`], and [`PeftError::Malformed`] for what is no regular file, is larger than `max_bytes`, or is
    /// no whole safetensors file.
    pub fn open(path: impl AsRef<Path>, max_bytes: u64) -> Result<Self> {
        Self::open_with(path, max_bytes, &FileLimits::default())
    }

    /// As [`open`](Self::open), with other limits on the header.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open). For a file that is something else by its first bytes (a pointer of Git LFS, an HTML page, a
    /// pickle) the error says so, and what to do.
    pub fn open_with(path: impl AsRef<Path>, max_bytes: u64, limits: &FileLimits) -> Result<Self> {
        let path = path.as_ref();
        let malformed = |reason: String| {
            let error = PeftError::Malformed {
                path: path.to_owned(),
                reason,
            };
            recognised(path, &start_of(path), error)
        };
        let (mut file, size) = open_regular(path, max_bytes)?;
        let mut length = [0; 8];
        if size < 8 {
            return Err(malformed(format!(
                "{size} bytes are too few for a safetensors file"
            )));
        }
        file.read_exact(&mut length).map_err(PeftError::io(path))?;
        let length = u64::from_le_bytes(length);
        if length > size - 8 {
            return Err(malformed(format!(
                "a header of {length} bytes, but the file has {size} in all: it is no safetensors file, or was cut, as by a download that did not finish"
            )));
        }
        if length > limits.header_bytes {
            return Err(malformed(format!(
                "a header of {length} bytes: at most {} are read, or `FileLimits::header_bytes`",
                limits.header_bytes
            )));
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(PeftError::io(path))?;
        let Header {
            tensors,
            metadata,
            data_len,
        } = Header::parse(&header, limits).map_err(malformed)?;
        let start = 8 + length;
        let found = size - start;
        if data_len as u64 != found {
            let difference = match (data_len as u64).checked_sub(found) {
                Some(missing) => {
                    format!("{missing} missing, as after a download that did not finish")
                }
                None => format!("{} too many", found - data_len as u64),
            };
            return Err(malformed(format!(
                "the header describes {data_len} bytes of values, the file has {found}: {difference}"
            )));
        }
        let digest = Digest::find(&header, &metadata);
        Ok(Self {
            path: path.to_owned(),
            file,
            start,
            tensors,
            digest,
        })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checks the digest in the file's metadata against all its bytes and those of its configuration.
    ///
    /// # Errors
    ///
    /// [`PeftError::Digest`] and [`PeftError::Io`].
    pub(super) fn check_digest(&mut self, config: &[u8], check: DigestCheck) -> Result<()> {
        self.digest.check(&self.path, &mut self.file, config, check)
    }

    /// The names of the tensors, sorted, each with its shape.
    pub fn shapes(&self) -> impl ExactSizeIterator<Item = (&str, &[usize])> {
        self.tensors
            .iter()
            .map(|(name, info)| (name.as_str(), info.shape.as_slice()))
    }

    /// What the header says of every tensor, sorted by name.
    pub(super) fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// Fills `out` with the bytes of the tensor `name` from its byte `offset` on, little-endian as they are in the file.
    /// May be called from several threads at once.
    ///
    /// # Errors
    ///
    /// [`PeftError::Malformed`] for a tensor that the file does not have, for bytes beyond its end, and if the file was cut
    /// since it was opened; [`PeftError::Io`].
    pub fn read_at(&self, name: &str, offset: usize, out: &mut [u8]) -> Result<()> {
        let (begin, end) = self.info(name)?.data_offsets;
        let fits = (end - begin).checked_sub(offset);
        if fits.is_none_or(|left| left < out.len()) {
            return Err(self.malformed(format!(
                "tensor `{}`: {} bytes asked for at its byte {offset}, it has {}",
                name.escape_debug(),
                out.len(),
                end - begin
            )));
        }
        let offset = self.start + (begin + offset) as u64;
        positional::read_exact_at(&self.file, out, offset).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => self.malformed(format!(
                "tensor `{}`: the file ends before its bytes {offset} to {}; it was whole when it was opened",
                name.escape_debug(),
                offset + out.len() as u64
            )),
            _ => PeftError::io(&self.path)(error),
        })
    }

    /// Reads the tensor `name` in its own element type. Holds one copy of the values.
    ///
    /// # Errors
    ///
    /// [`PeftError::DType`] for what is not F32, BF16 or F16, in [`PeftError::InFile`]; those of
    /// [`read_at`](Self::read_at).
    pub fn read(&self, name: &str) -> Result<TensorData> {
        let info = self.info(name)?;
        let dtype =
            elements::from_file(name, info.dtype).map_err(|error| error.in_file(&self.path))?;
        let (begin, end) = info.data_offsets;
        let mut bytes = vec![0; end - begin];
        self.read_at(name, 0, &mut bytes)?;
        elements::swap_to_host(&mut bytes, dtype);
        TensorData::try_from_bytes_vec(bytes, info.shape.clone(), dtype)
            .map_err(|error| self.malformed(format!("tensor `{name}`: {error}")))
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors
            .get(name)
            .ok_or_else(|| self.malformed(format!("there is no tensor `{}`", name.escape_debug())))
    }

    fn malformed(&self, reason: String) -> PeftError {
        PeftError::Malformed {
            path: self.path.clone(),
            reason,
        }
    }
}
