//! How much of a file is read: what is written stays within the same limits.
//!
//! A file is data from anywhere, and a number in it must not decide how much memory is taken. The limits are far above what
//! models have: the largest have some 70,000 linear layers, of which a packed one is six tensors.

/// Largest header of a safetensors file that is read, in bytes: that of the `safetensors` library.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most tensors of a file.
pub const MAX_TENSORS: usize = 500_000;
/// Largest index of a checkpoint that is read, in bytes.
pub const MAX_INDEX_BYTES: u64 = 128 << 20;
/// Most tensors of an index, or of all its files.
pub const MAX_INDEX_TENSORS: usize = 1_000_000;
/// Most files of an index; each is held open, of which a process may often have 1024.
pub const MAX_SHARDS: usize = 512;
/// Longest name of a tensor, in bytes; those of the largest models have less than 200.
const MAX_NAME_BYTES: usize = 4096;
/// Most dimensions of a tensor. Those of models have one to five.
const MAX_DIMENSIONS: usize = 16;
/// Most entries of the metadata. Trainers that describe themselves there write less than 100.
const MAX_METADATA: usize = 4096;

/// Limits on the files of a base model, and what may stand twice in them. The default ones are above those of every published model; a file beyond them is an
/// error, and a higher limit lets it pass.
///
/// Reading a header or an index takes a few times its size in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileLimits {
    /// Bytes of the header of a safetensors file. Default: [`MAX_HEADER_BYTES`].
    pub header_bytes: u64,
    /// Tensors of one file. Default: [`MAX_TENSORS`].
    pub tensors: usize,
    /// Bytes of a tensor's name. Default: 4096.
    pub name_bytes: usize,
    /// Axes of a tensor. Default: 16.
    pub dimensions: usize,
    /// Entries of a file's metadata. Default: 4096.
    pub metadata: usize,
    /// Bytes of an index. Default: [`MAX_INDEX_BYTES`].
    pub index_bytes: u64,
    /// Tensors of an index, or of all its files. Default: [`MAX_INDEX_TENSORS`].
    pub index_tensors: usize,
    /// Files of an index. Default: [`MAX_SHARDS`].
    pub shards: usize,
    /// Whether a name may stand twice in a header, an index or a `config.json`; then the last entry counts, as in Python. Default:
    /// false, since other readers take the first.
    pub repeated_names: bool,
}

impl Default for FileLimits {
    fn default() -> Self {
        Self {
            header_bytes: MAX_HEADER_BYTES,
            tensors: MAX_TENSORS,
            name_bytes: MAX_NAME_BYTES,
            dimensions: MAX_DIMENSIONS,
            metadata: MAX_METADATA,
            index_bytes: MAX_INDEX_BYTES,
            index_tensors: MAX_INDEX_TENSORS,
            shards: MAX_SHARDS,
            repeated_names: false,
        }
    }
}

impl FileLimits {
    /// The default limits.
    pub fn new() -> Self {
        Self::default()
    }

    /// No limits: for files that are trusted.
    pub fn unlimited() -> Self {
        Self {
            header_bytes: u64::MAX,
            tensors: usize::MAX,
            name_bytes: usize::MAX,
            dimensions: usize::MAX,
            metadata: usize::MAX,
            index_bytes: u64::MAX,
            index_tensors: usize::MAX,
            shards: usize::MAX,
            repeated_names: false,
        }
    }

    /// Sets the most bytes of a header.
    pub fn with_header_bytes(mut self, bytes: u64) -> Self {
        self.header_bytes = bytes;
        self
    }

    /// Sets the most tensors of a file.
    pub fn with_tensors(mut self, tensors: usize) -> Self {
        self.tensors = tensors;
        self
    }

    /// Sets the most bytes of a tensor's name.
    pub fn with_name_bytes(mut self, bytes: usize) -> Self {
        self.name_bytes = bytes;
        self
    }

    /// Sets the most axes of a tensor.
    pub fn with_dimensions(mut self, dimensions: usize) -> Self {
        self.dimensions = dimensions;
        self
    }

    /// Sets the most entries of a file's metadata.
    pub fn with_metadata(mut self, entries: usize) -> Self {
        self.metadata = entries;
        self
    }

    /// Sets the most bytes of an index.
    pub fn with_index_bytes(mut self, bytes: u64) -> Self {
        self.index_bytes = bytes;
        self
    }

    /// Sets the most tensors of an index.
    pub fn with_index_tensors(mut self, tensors: usize) -> Self {
        self.index_tensors = tensors;
        self
    }

    /// Sets whether a name may stand twice.
    pub fn with_repeated_names(mut self, allow: bool) -> Self {
        self.repeated_names = allow;
        self
    }

    /// Sets the most files of an index.
    pub fn with_shards(mut self, shards: usize) -> Self {
        self.shards = shards;
        self
    }
}
