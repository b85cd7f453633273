//! What is wrong with the lists, within bounds: a file of the wrong kind has a million wrong lines.

use seawall_engine::{Diagnostic, Level};

/// Diagnostics of one file's lines that are told one by one.
const MOST_LINES: u32 = 16;
/// Diagnostics that are kept.
const MOST: usize = 500;

/// Diagnostics, and how many there are besides those kept.
#[derive(Default, Debug)]
pub struct Report {
    kept: Vec<Diagnostic>,
    errors: u64,
    warnings: u64,
    /// Lines of the current file that were told, and those that were only counted.
    told: u32,
    more_errors: u64,
    more_warnings: u64,
}

impl Report {
    /// Nothing is wrong.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one.
    pub fn add(&mut self, one: Diagnostic) {
        self.count(one.level, 1);
        self.keep(one);
    }

    /// A file's lines follow.
    pub fn begin_file(&mut self) {
        (self.told, self.more_errors, self.more_warnings) = (0, 0, 0);
    }

    /// Adds what is wrong with a line of the current file, or only counts it.
    pub fn add_line(&mut self, one: impl FnOnce() -> Diagnostic) {
        let one = one();
        if self.told < MOST_LINES {
            self.told += 1;
            self.add(one);
            return;
        }
        self.count(one.level, 1);
        match one.level {
            Level::Error => self.more_errors += 1,
            Level::Warning => self.more_warnings += 1,
        }
    }

    /// The current file's lines are over: what was only counted is told in a word, which `summary`
    /// makes of a level and a number.
    pub fn end_file(&mut self, summary: impl Fn(Level, u64) -> Diagnostic) {
        for (level, more) in
            [(Level::Error, self.more_errors), (Level::Warning, self.more_warnings)]
        {
            if more > 0 {
                self.keep(summary(level, more));
            }
        }
    }

    /// Number of errors, those not kept included.
    pub fn errors(&self) -> u64 {
        self.errors
    }

    /// Number of warnings, those not kept included.
    pub fn warnings(&self) -> u64 {
        self.warnings
    }

    /// Those kept, errors first, and how many were left out.
    pub fn diagnostics(&self) -> (Vec<Diagnostic>, u32) {
        let mut sorted = self.kept.clone();
        sorted.sort_by_key(|one| one.level == Level::Warning);
        let omitted = sorted.len().saturating_sub(MOST);
        sorted.truncate(MOST);
        (sorted, u32::try_from(omitted).unwrap_or(u32::MAX))
    }

    fn count(&mut self, level: Level, more: u64) {
        match level {
            Level::Error => self.errors += more,
            Level::Warning => self.warnings += more,
        }
    }

    fn keep(&mut self, one: Diagnostic) {
        self.kept.push(one);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_wrong_lines_are_told_in_seventeen_diagnostics() {
        let mut report = Report::new();
        report.add(Diagnostic::warning("w", "first"));
        report.begin_file();
        (0..1_000_000).for_each(|_| report.add_line(|| Diagnostic::error("hash-line", "wrong")));
        report.end_file(|level, more| Diagnostic {
            level,
            ..Diagnostic::error("x", more.to_string())
        });
        let (kept, omitted) = report.diagnostics();
        assert_eq!((report.errors(), report.warnings()), (1_000_000, 1));
        assert_eq!((kept.len(), omitted), (18, 0));
        assert_eq!(kept[16].reason, "999984");
        assert_eq!(kept[17].level, Level::Warning);
    }

    #[test]
    fn errors_are_kept_before_warnings() {
        let mut report = Report::new();
        (0..MOST + 5).for_each(|_| report.add(Diagnostic::warning("w", "x")));
        report.add(Diagnostic::error("e", "x"));
        let (kept, omitted) = report.diagnostics();
        assert_eq!((kept.len(), omitted, kept[0].level), (MOST, 6, Level::Error));
    }
}
