//! Where values are written first, so that a payload costs one allocation of its exact size.

use bytes::Bytes;
use std::cell::Cell;
use tidings_core::Result;

/// What a thread keeps between payloads, in bytes; a larger buffer is given back.
const KEEP: usize = 64 * 1024;

thread_local! {
    static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// The bytes that `write` puts into an empty buffer.
pub(crate) fn filled(write: impl FnOnce(&mut Vec<u8>) -> Result<()>) -> Result<Bytes> {
    // Taken, not borrowed: a `Serialize` may encode something itself, and then gets a new one.
    let mut buffer = SCRATCH.take();
    buffer.clear();
    let payload = write(&mut buffer).map(|()| Bytes::copy_from_slice(&buffer));
    if buffer.capacity() <= KEEP {
        SCRATCH.set(buffer);
    }
    payload
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_and_large_payloads_keep_apart() {
        let text = |text: &'static [u8]| {
            move |buffer: &mut Vec<u8>| {
                buffer.extend_from_slice(text);
                Ok(())
            }
        };
        let outer = filled(|buffer| {
            buffer.extend_from_slice(b"out");
            assert_eq!(filled(text(b"inner"))?, "inner");
            text(b"er")(buffer)
        });
        assert_eq!(outer.unwrap(), "outer");
        assert_eq!(filled(text(&[7; KEEP + 1])).unwrap().len(), KEEP + 1);
        assert_eq!(filled(text(b"x")).unwrap(), "x");
        assert!(SCRATCH.take().capacity() <= KEEP);
    }
}
