//! Reads at a place in a file that leave its cursor to nobody: several threads may read one open file at once.

use std::fs::File;
use std::io::Result;

/// Fills `out` with the bytes of `file` from `offset` on; `UnexpectedEof` where the file ends before.
#[cfg(unix)]
pub(super) fn read_exact_at(file: &File, out: &mut [u8], offset: u64) -> Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

/// Fills `out` with the bytes of `file` from `offset` on; `UnexpectedEof` where the file ends before.
#[cfg(windows)]
pub(super) fn read_exact_at(file: &File, mut out: &mut [u8], mut offset: u64) -> Result<()> {
    use std::io::ErrorKind;
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, offset) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                out = &mut out[n..];
                offset += n as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Fills `out` with the bytes of `file` from `offset` on; `UnexpectedEof` where the file ends before.
#[cfg(not(any(unix, windows)))]
pub(super) fn read_exact_at(mut file: &File, out: &mut [u8], offset: u64) -> Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    use std::sync::{Mutex, PoisonError};
    // The cursor is the file's; one reader at a time has it.
    static CURSOR: Mutex<()> = Mutex::new(());
    let _held = CURSOR.lock().unwrap_or_else(PoisonError::into_inner);
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(out)
}
