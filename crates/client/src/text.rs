//! Names that came from a guest, made fit for a log or a terminal.
//!
//! A file's name may hold anything but `/` and NUL: line breaks that forge log lines, escape
//! sequences that drive a terminal, characters that turn the reading direction. None of them
//! leaves here.

use std::fmt::Write;

/// Bytes as text: what is not UTF-8 as `\xNN`, what [`is_hostile`] as `\n`, `\t`, `\r`, `\xNN` or
/// `\u{N}`, and a backslash doubled, so that the text tells the bytes exactly.
#[must_use]
pub fn escape(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c == '\\' { out.push_str("\\\\") } else { push(c, &mut out) }
        }
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

/// [`escape`], cut to about `most` characters.
#[must_use]
pub fn escape_short(bytes: &[u8], most: usize) -> String {
    if bytes.len() <= most {
        return escape(bytes);
    }
    escape(&bytes[..most]) + "…"
}

/// Text for a terminal: like [`escape`], but a backslash stays, so that text which the service
/// escaped already is not changed again.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    text.chars().for_each(|c| push(c, &mut out));
    out
}

fn push(c: char, out: &mut String) {
    let _ = match c {
        '\n' => out.write_str("\\n"),
        '\t' => out.write_str("\\t"),
        '\r' => out.write_str("\\r"),
        c if !is_hostile(c) => out.write_char(c),
        c if u32::from(c) < 0x80 => write!(out, "\\x{:02x}", u32::from(c)),
        c => write!(out, "\\u{{{:x}}}", u32::from(c)),
    };
}

/// Whether a terminal or a reader would take `c` for something else than itself: controls (C0, C1),
/// line and paragraph separators, and what is invisible or turns the reading direction (Unicode
/// Bidi_Control, zero-width characters, tags).
#[must_use]
pub fn is_hostile(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_drives_a_terminal_is_shown_and_not_done() {
        assert_eq!(escape(b"/tmp/a\n\x1b[2Jb"), r"/tmp/a\n\x1b[2Jb");
        assert_eq!(escape("/x/\u{202e}fdp.exe".as_bytes()), r"/x/\u{202e}fdp.exe");
        assert_eq!(escape("\u{9b}31m".as_bytes()), r"\u{9b}31m");
        assert_eq!(escape(b"/a\xff\\b"), r"/a\xff\\b");
        assert_eq!(escape("/home/jürgen/日本.txt".as_bytes()), "/home/jürgen/日本.txt");
        assert_eq!(printable("a\\n\u{1b}"), r"a\n\x1b");
    }

    #[test]
    fn a_cut_says_so() {
        assert_eq!(escape_short(b"abcdef", 3), "abc…");
        assert_eq!(escape_short(b"abc", 3), "abc");
    }

    proptest! {
        #[test]
        fn nothing_hostile_leaves(bytes: Vec<u8>) {
            prop_assert!(!escape(&bytes).chars().any(is_hostile));
        }

        #[test]
        fn different_bytes_give_different_text(a: Vec<u8>, b: Vec<u8>) {
            prop_assert_eq!(a == b, escape(&a) == escape(&b));
        }

        #[test]
        fn what_was_escaped_once_stays(bytes: Vec<u8>) {
            let once = escape(&bytes);
            prop_assert_eq!(printable(&once), once);
        }
    }
}
