//! What clients hear: clamd's answers, one line each whatever is told. No I/O.

use crate::pipeline::Finding;

/// Longest name of a detection or reason, in characters: clients keep a line in 5 KiB.
const LONGEST_TEXT: usize = 300;

/// To which command an answer belongs.
#[derive(Debug, Clone, Copy)]
pub struct To {
    /// Its number in the session; 0 outside of one.
    pub id: u32,
    /// What ends the answer.
    pub ending: u8,
}

impl To {
    /// An answer about the command itself.
    pub fn says(self, text: &str) -> Vec<u8> {
        let mut line = Vec::with_capacity(text.len() + 16);
        if self.id > 0 {
            line.extend_from_slice(format!("{}: ", self.id).as_bytes());
        }
        line.extend_from_slice(text.as_bytes());
        line.push(self.ending);
        line
    }

    /// An answer about something that was scanned.
    pub fn says_of(self, what: &[u8], text: &str) -> Vec<u8> {
        let mut line = self.says("");
        line.pop();
        line.extend(what.iter().map(|byte| if byte.is_ascii_control() { b'?' } else { *byte }));
        line.extend_from_slice(b": ");
        line.extend_from_slice(text.as_bytes());
        line.push(self.ending);
        line
    }

    /// What was found in something: the first, or all.
    pub fn tells(self, what: &[u8], finding: &Finding, all: bool) -> Vec<u8> {
        match finding {
            Finding::Clean => self.says_of(what, "OK"),
            Finding::Infected(found) => {
                let count = if all { found.len() } else { 1 };
                let names = found.iter().take(count).map(|detection| name(&detection.name));
                names.flat_map(|name| self.says_of(what, &format!("{name} FOUND"))).collect()
            }
            Finding::Error(why) | Finding::TimedOut(why) => {
                self.says_of(what, &format!("{} ERROR", reason(why)))
            }
        }
    }
}

/// A detection's name as clients can take it apart: no blanks, no colons, nothing for a terminal.
fn name(name: &str) -> String {
    let plain = |c: char| if c.is_control() || c.is_whitespace() || c == ':' { '_' } else { c };
    let name: String = name.chars().take(LONGEST_TEXT).map(plain).collect();
    if name.is_empty() { "unnamed".to_owned() } else { name }
}

/// A reason: clients look for its last colon to find where the file's name ends.
fn reason(why: &str) -> String {
    let plain = |c: char| match c {
        ':' => ',',
        c if c.is_control() => ' ',
        c => c,
    };
    why.chars().take(LONGEST_TEXT).map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use seawall_client::Detection;
    use std::sync::Arc;

    fn infected(names: &[&str]) -> Finding {
        let detection = |name: &&str| Detection {
            name: (*name).to_owned(),
            severity: "high".into(),
            family: None,
            cleaning: None,
            member: None,
            engine: "first".into(),
        };
        Finding::Infected(Arc::new(names.iter().map(detection).collect()))
    }

    #[test]
    fn answers_are_clamds() {
        let (plain, third) = (To { id: 0, ending: 0 }, To { id: 3, ending: b'\n' });
        assert_eq!(plain.says("PONG"), b"PONG\0");
        assert_eq!(third.says("PONG"), b"3: PONG\n");
        assert_eq!(plain.tells(b"stream", &Finding::Clean, false), b"stream: OK\0");
        let two = infected(&["One", "a: b\0\n\x1b"]);
        assert_eq!(third.tells(b"/x", &two, false), b"3: /x: One FOUND\n");
        assert_eq!(plain.tells(b"/x", &two, true), b"/x: One FOUND\0/x: a__b___ FOUND\0");
        assert_eq!(plain.tells(b"/x", &infected(&[""]), true), b"/x: unnamed FOUND\0");
        let error = Finding::Error("engine one: it\nbroke".into());
        assert_eq!(plain.tells(b"a\nb", &error, false), b"a?b: engine one, it broke ERROR\0");
        let late = Finding::TimedOut("late".into());
        assert_eq!(plain.tells(b"fd[9]", &late, false), b"fd[9]: late ERROR\0");
    }

    proptest! {
        #[test]
        fn an_answer_is_one_line_and_says_what_it_is(name in any::<String>(), path: Vec<u8>) {
            for ending in [0, b'\n'] {
                let to = To { id: 1, ending };
                for (finding, last) in [
                    (infected(&[&name]), &b" FOUND"[..]),
                    (Finding::Error(name.clone()), b" ERROR"),
                    (Finding::TimedOut(name.clone()), b" ERROR"),
                ] {
                    let line = to.tells(&path, &finding, true);
                    let (end, text) = line.split_last().unwrap();
                    prop_assert!(*end == ending && text.ends_with(last));
                    prop_assert!(!text.iter().any(u8::is_ascii_control));
                }
            }
        }
    }
}
