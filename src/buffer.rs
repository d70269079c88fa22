//! Bytes in memory: getting room for them, and telling zeroes from data.

use crate::error::{Error, Result};

/// A buffer of `len` zero bytes; ENOMEM, not an abort, where there is no memory
/// for it: a block may be as large as 2G.
pub fn buffer(len: u64) -> Result<Vec<u8>> {
    let mut buffer = Vec::new();
    buffer
        .try_reserve_exact(len as usize)
        .map_err(|_| Error::no_memory(format!("no memory for a buffer of {len} bytes")))?;
    buffer.resize(len as usize, 0);
    Ok(buffer)
}

/// Appends to a list that may become long; ENOMEM, not an abort, as above.
pub fn push<T>(list: &mut Vec<T>, item: T) -> Result<()> {
    list.try_reserve(1)
        .map_err(|_| Error::no_memory(format!("no memory for a list of {}", list.len() + 1)))?;
    list.push(item);
    Ok(())
}

/// All that `items` gives, as a list; ENOMEM, not an abort, as above.
pub fn list<T>(items: impl Iterator<Item = T>) -> Result<Vec<T>> {
    let mut list = Vec::new();
    for item in items {
        push(&mut list, item)?;
    }
    Ok(list)
}

/// Whether all of `bytes` are zero. Stops at the first word that is not.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Most data shows at once, before any loop is set up.
    if bytes.first().is_some_and(|byte| *byte != 0) {
        return false;
    }
    let words = bytes.chunks_exact(16);
    let rest = words.remainder();
    words
        .map(|word| u128::from_ne_bytes(word.try_into().expect("16 bytes")))
        .all(|word| word == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_is_not_zero() {
        for len in [0, 1, 15, 16, 17, 33, 100] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "byte {at} of {len}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn a_buffer_that_memory_has_no_room_for_is_an_error() {
        assert_eq!(buffer(5).expect("room for five"), [0; 5]);
        let error = buffer(u64::MAX / 2).expect_err("no room");
        assert_eq!(error.errno(), libc::ENOMEM);
    }
}
