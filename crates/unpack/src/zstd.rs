//! Zstandard content, which is any number of frames one after the other (RFC 8878, 3).

use std::io::{self, Read};

use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

/// First three bytes of a frame that holds nothing for the reader, in little endian; the lowest half byte is free.
const SKIPPABLE: u32 = 0x184d_2a50;

/// All frames of a content.
pub struct Frames<R: Read> {
    state: State<R>,
    window: u64,
}

enum State<R: Read> {
    Between(R),
    Within(Box<StreamingDecoder<Begun<R>, FrameDecoder>>),
    Over,
}

/// What begins with bytes that were read before.
struct Begun<R> {
    front: [u8; 4],
    at: usize,
    rest: R,
}

impl<R: Read> Read for Begun<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.front.len() {
            return self.rest.read(buffer);
        }
        let count = (&self.front[self.at..]).read(buffer)?;
        self.at += count;
        Ok(count)
    }
}

impl<R: Read> Frames<R> {
    /// Reads from here; a frame that needs a window of more bytes is an error.
    pub fn new(from: R, window: u64) -> Self {
        Self { state: State::Between(from), window }
    }

    /// Goes to the next frame, past those that hold nothing.
    fn next(&mut self, mut from: R) -> io::Result<State<R>> {
        loop {
            let mut front = Vec::with_capacity(4);
            from.by_ref().take(4).read_to_end(&mut front)?;
            let Ok(front) = <[u8; 4]>::try_from(front.as_slice()) else {
                let at_end = front.is_empty();
                return if at_end {
                    Ok(State::Over)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            };
            if u32::from_le_bytes(front) & !0xf == SKIPPABLE {
                let mut length = [0; 4];
                from.read_exact(&mut length)?;
                let length = u64::from(u32::from_le_bytes(length));
                let skipped = io::copy(&mut from.by_ref().take(length), &mut io::sink())?;
                if skipped < length {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                continue;
            }
            let mut frames = FrameDecoder::new();
            frames.set_max_window_size(self.window);
            let begun = Begun { front, at: 0, rest: from };
            let decoder = StreamingDecoder::new_with_decoder(begun, frames);
            return decoder.map(|one| State::Within(Box::new(one))).map_err(io::Error::other);
        }
    }
}

impl<R: Read> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            match std::mem::replace(&mut self.state, State::Over) {
                State::Over => return Ok(0),
                State::Between(from) => self.state = self.next(from)?,
                State::Within(mut decoder) => match decoder.read(buffer)? {
                    0 => self.state = State::Between(decoder.into_inner().rest),
                    count => {
                        self.state = State::Within(decoder);
                        return Ok(count);
                    }
                },
            }
        }
    }
}
