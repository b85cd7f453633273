//! An engine that finds one word: `word FILE`, whose first line is the word.

use std::process::ExitCode;

use seawall_engine::runtime::{Engine, LoadError, Request, ScanError, Scanner, run};
use seawall_engine::{Description, Detection, Generation, Outcome};

struct Word(Vec<u8>);

impl Word {
    /// Before the sandbox, once. What is read here is the signature set.
    fn load() -> Result<Self, LoadError> {
        let refuse = |reason: String| LoadError::new("word-file", reason);
        let Some(path) = std::env::args().nth(1) else {
            return Err(refuse("give the file with the word as argument".into()));
        };
        let text = std::fs::read(&path).map_err(|error| refuse(format!("{path}: {error}")))?;
        match text.split(|byte| b"\r\n".contains(byte)).next() {
            Some(word) if !word.is_empty() => Ok(Self(word.to_vec())),
            _ => Err(refuse(format!("{path}: its first line is empty"))),
        }
    }
}

impl Engine for Word {
    fn describe(&self) -> Description {
        // A digest of all that verdicts depend on.
        let generation = Generation(blake3::hash(&self.0).into());
        Description::new("word", "1", generation).with_rules(1)
    }

    fn scanner(&self) -> Result<Box<dyn Scanner + '_>, LoadError> {
        Ok(Box::new(Search(&self.0)))
    }
}

struct Search<'a>(&'a [u8]);

impl Scanner for Search<'_> {
    /// In the sandbox, on a worker thread.
    fn scan(&mut self, request: &Request<'_>) -> Result<Outcome, ScanError> {
        let bytes = request.content.bytes()?;
        for (at, window) in bytes.windows(self.0.len()).enumerate() {
            if at % 65536 == 0 && request.is_cancelled() {
                return Err(ScanError::Cancelled);
            }
            if window == self.0 {
                let found = Detection { offset: Some(at as u64), ..Detection::new("Word") };
                return Ok(Outcome::Infected(vec![found]));
            }
        }
        Ok(Outcome::Clean)
    }
}

fn main() -> ExitCode {
    run(|_start| Word::load())
}
