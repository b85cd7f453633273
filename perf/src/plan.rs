//! What is measured, and how much of it.

use serde::Serialize;

/// Who watches the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Setup {
    Unprotected,
    Listener,
    MarksOnly,
    Ours,
    /// Ours, and no file is marked: each open raises an event, which the driver answers from what it remembers.
    Unmarked,
    /// Debian's clamonacc with prevention, and a clamd.
    Clamonacc,
}

impl Setup {
    pub const ALL: [Self; 6] = [
        Self::Unprotected,
        Self::Listener,
        Self::MarksOnly,
        Self::Ours,
        Self::Unmarked,
        Self::Clamonacc,
    ];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unprotected => "unprotected",
            Self::Listener => "listener",
            Self::MarksOnly => "marks only",
            Self::Ours => "ours",
            Self::Unmarked => "ours, unmarked",
            Self::Clamonacc => "clamonacc",
        }
    }

    /// The name of its mount point; all of one length, since a path's length costs time.
    pub fn folder(self) -> &'static str {
        match self {
            Self::Unprotected => "a",
            Self::Listener => "b",
            Self::MarksOnly => "m",
            Self::Ours => "o",
            Self::Unmarked => "u",
            Self::Clamonacc => "c",
        }
    }
}

/// Which file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// One that was opened before and has not changed.
    Repeat,
    /// The same, and it is read to its end.
    Read,
    /// One that was clean before there were new signatures, and has a content that the host knows to be clean since.
    NewSignatures,
    /// One that was never opened, with a content that the host knows.
    KnownContent,
    /// One that was never opened, with a content that was never seen.
    NewContent,
}

impl What {
    /// Whether each open is of a file that was not opened before.
    pub fn needs_new_files(self) -> bool {
        matches!(self, Self::KnownContent | Self::NewContent)
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Repeat => "repeat open",
            Self::Read => "repeat open and read",
            Self::NewSignatures => "after new signatures",
            Self::KnownContent => "new file, known content",
            Self::NewContent => "new file, new content",
        }
    }
}

/// How the opens follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pace {
    /// One after the other.
    BackToBack,
    /// One each millisecond: whoever answers sleeps in between.
    OnePerMs,
    /// Four threads open, each one after the other. The time is that of all, by the number of opens.
    FourAtOnce,
}

impl Pace {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::BackToBack => "back to back",
            Self::OnePerMs => "one per ms",
            Self::FourAtOnce => "four at once",
        }
    }
}

/// The contents' sizes in bytes.
pub const SIZES: [u32; 3] = [4 << 10, 64 << 10, 1 << 20];

/// The size of the files that are read.
const READ_SIZE: u32 = 64 << 10;

/// And of those that clamonacc is tried on.
const RIVAL_SIZE: u32 = 64 << 10;

/// A size for people.
pub fn size_name(size: u32) -> String {
    if size >= 1 << 20 { format!("{} MiB", size >> 20) } else { format!("{} KiB", size >> 10) }
}

/// One row of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Case {
    pub setup: Setup,
    pub what: What,
    pub pace: Pace,
    pub size: u32,
}

impl Case {
    /// All cases in the order in which they are reported.
    pub fn all() -> Vec<Self> {
        use Pace::{BackToBack, FourAtOnce, OnePerMs};
        use What::{KnownContent, NewContent, NewSignatures, Read, Repeat};
        let kinds = [
            (Setup::Unprotected, Repeat, BackToBack),
            (Setup::Listener, Repeat, BackToBack),
            (Setup::Listener, Repeat, OnePerMs),
            (Setup::Listener, Repeat, FourAtOnce),
            (Setup::MarksOnly, Repeat, BackToBack),
            (Setup::Ours, Repeat, BackToBack),
            (Setup::Unprotected, Read, BackToBack),
            (Setup::Listener, Read, BackToBack),
            (Setup::MarksOnly, Read, BackToBack),
            (Setup::Ours, Read, BackToBack),
            (Setup::Unmarked, Repeat, BackToBack),
            (Setup::Unmarked, Repeat, OnePerMs),
            (Setup::Unmarked, Repeat, FourAtOnce),
            (Setup::Ours, KnownContent, FourAtOnce),
            (Setup::Ours, NewSignatures, BackToBack),
            (Setup::Ours, KnownContent, BackToBack),
            (Setup::Ours, KnownContent, OnePerMs),
            (Setup::Ours, NewContent, BackToBack),
            (Setup::Clamonacc, NewContent, BackToBack),
            (Setup::Clamonacc, Repeat, BackToBack),
        ];
        let of = |(setup, what, pace)| SIZES.map(|size| Self { setup, what, pace, size });
        let is_one = |case: &Self| match (case.what, case.pace) {
            (Read, _) => case.size == READ_SIZE,
            _ if case.setup == Setup::Clamonacc => case.size == RIVAL_SIZE,
            (_, FourAtOnce) => case.size == SIZES[0],
            _ => true,
        };
        kinds.into_iter().flat_map(of).filter(is_one).collect()
    }

    /// Those whose name has this in it, and what they are compared with.
    pub fn named(only: Option<&str>) -> impl Iterator<Item = Self> {
        let is_named = move |case: &Self| only.is_none_or(|only| case.name().contains(only));
        let is_peer = move |peer: &Self, case: &Self| {
            Setup::ALL.iter().any(|setup| case.peer(*setup).as_ref() == Some(peer))
                || case.rivals().iter().any(|(rival, _)| rival == peer)
        };
        Self::all().into_iter().filter(move |case| {
            let all = Self::all();
            is_named(case) || all.iter().any(|other| is_named(other) && is_peer(case, other))
        })
    }

    /// Its name in the report and in raw results.
    pub fn name(&self) -> String {
        let Self { setup, what, pace, size } = self;
        format!("{}, {}, {}, {}", setup.name(), what.name(), size_name(*size), pace.name())
    }

    /// Whether the same files are opened again and again.
    fn is_repeat(&self) -> bool {
        matches!(self.what, What::Repeat | What::Read)
    }

    /// What is aimed at: at most so many times the other setup.
    pub fn goals(&self) -> Vec<(Setup, f64)> {
        let by_size = |goals: [f64; 3]| {
            let at = SIZES.iter().position(|size| *size == self.size);
            at.map(|at| (Setup::Listener, goals[at])).into_iter().collect()
        };
        match (self.setup, self.what, self.pace) {
            (Setup::Ours, What::Repeat | What::Read, Pace::BackToBack) => {
                vec![(Setup::MarksOnly, 1.03), (Setup::Listener, 0.35)]
            }
            // 0.9 and 0.45 times the throughput.
            (Setup::Unmarked, _, Pace::FourAtOnce) => vec![(Setup::Listener, 1.111)],
            (Setup::Ours, What::KnownContent, Pace::FourAtOnce) => vec![(Setup::Listener, 2.222)],
            (Setup::Unmarked, ..) => vec![(Setup::Listener, 1.1)],
            (Setup::Ours, What::NewSignatures, _) => vec![(Setup::Listener, 1.2)],
            (Setup::Ours, What::KnownContent, Pace::BackToBack) => by_size([1.4, 2.8, 20.0]),
            (Setup::Ours, What::KnownContent, Pace::OnePerMs) => by_size([4.5, 6.0, 22.0]),
            _ => Vec::new(),
        }
    }

    /// Cases of another product that do as much for whoever opens, and at most what part of their time it is to take.
    pub fn rivals(&self) -> Vec<(Self, f64)> {
        let is_known = self.what == What::KnownContent && self.pace == Pace::BackToBack;
        if self.setup != Setup::Ours || !is_known || self.size != RIVAL_SIZE {
            return Vec::new();
        }
        let of = |what| Self { setup: Setup::Clamonacc, what, ..*self };
        vec![(of(What::NewContent), 1.0 / 12.0), (of(What::Repeat), 1.0 / 5.0)]
    }

    /// The case of another setup that it is compared with, where there is one.
    pub fn peer(&self, setup: Setup) -> Option<Self> {
        let what = if self.what == What::Read { What::Read } else { What::Repeat };
        let peer = Self { setup, what, ..*self };
        // A marked file raises no event, so it is compared with what raises none; everything else
        // only with a listener, which also gets one event for each open.
        let fits = match setup {
            Setup::Listener => true,
            Setup::MarksOnly => self.setup == Setup::Ours && self.is_repeat(),
            Setup::Unprotected => self.is_repeat(),
            Setup::Ours | Setup::Unmarked | Setup::Clamonacc => false,
        };
        (fits && peer != *self && Self::all().contains(&peer)).then_some(peer)
    }
}

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Amounts {
    pub rounds: u32,
    /// Opens of a case where files are opened again and again.
    repeats: u32,
    /// New files of a case with known content: small ones, and those of 1 MiB.
    known: [u32; 2],
    /// The same with new content.
    new: [u32; 2],
    /// Opens of a case with one per millisecond, where files are opened again and again.
    paced: u32,
}

/// The first opens of each case are not counted: they pay for what ran before.
pub const WARM_UP: u32 = 2;

impl Amounts {
    /// For figures.
    pub fn full() -> Self {
        Self { rounds: 9, repeats: 2000, known: [100, 24], new: [50, 12], paced: 100 }
    }

    /// For the question whether the benchmark works.
    pub fn quick() -> Self {
        Self { rounds: 2, repeats: 50, known: [8, 4], new: [4, 2], paced: 8 }
    }

    /// Opens of a case in one round, with those that are not counted.
    pub fn opens(&self, case: &Case) -> u32 {
        let large = usize::from(case.size >= 1 << 20);
        let counted = match (case.what, case.pace) {
            (What::NewSignatures, _) => return crate::files::CONTENTS,
            (What::Repeat | What::Read, Pace::BackToBack | Pace::FourAtOnce) => self.repeats,
            (What::Repeat | What::Read, Pace::OnePerMs) => self.paced,
            // Four threads take a while to begin.
            (What::KnownContent, Pace::FourAtOnce) => 6 * self.known[large],
            (What::KnownContent, _) => self.known[large],
            (What::NewContent, _) => self.new[large],
        };
        counted + WARM_UP
    }

    /// Bytes of content that all cases of a setup need.
    pub fn bytes(&self, setup: Setup) -> u64 {
        let again = SIZES.map(|size| u64::from(size) * u64::from(crate::files::CONTENTS));
        let once = Case::all().into_iter().filter(|case| case.what.needs_new_files());
        let once = once.filter(|case| case.setup == setup);
        let once = once.map(|case| u64::from(case.size) * u64::from(self.opens(&case)));
        again.iter().sum::<u64>() + once.sum::<u64>() * u64::from(self.rounds)
    }
}

/// Pseudo-random numbers (splitmix64, Steele, Lea and Flood, OOPSLA 2014): for the order of cases and
/// for contents.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Fisher and Yates.
    pub fn shuffle<T>(&mut self, all: &mut [T]) {
        for at in (1..all.len()).rev() {
            let other = usize::try_from(self.next() % (at as u64 + 1)).unwrap_or(0);
            all.swap(at, other);
        }
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(setup: Setup, what: What, pace: Pace) -> Case {
        Case { setup, what, pace, size: SIZES[0] }
    }

    #[test]
    fn each_case_is_compared_with_what_does_as_much() {
        let paced = case(Setup::Ours, What::KnownContent, Pace::OnePerMs);
        let listener = case(Setup::Listener, What::Repeat, Pace::OnePerMs);
        assert_eq!(paced.peer(Setup::Listener), Some(listener));
        assert_eq!(paced.peer(Setup::MarksOnly), None);
        assert_eq!(listener.peer(Setup::Listener), None, "not with itself");
        let repeat = case(Setup::Ours, What::Repeat, Pace::BackToBack);
        for setup in [Setup::Unprotected, Setup::Listener, Setup::MarksOnly] {
            assert_eq!(repeat.peer(setup), Some(Case { setup, ..repeat }));
        }
    }

    #[test]
    fn some_cases_alone_are_chosen_with_what_they_are_compared_with() {
        assert_eq!(Case::named(None).count(), Case::all().len());
        let names: Vec<String> =
            Case::named(Some("after new signatures, 4 KiB")).map(|case| case.name()).collect();
        let peer = "listener, repeat open, 4 KiB, back to back";
        assert_eq!(names, [peer, "ours, after new signatures, 4 KiB, back to back"]);
    }

    #[test]
    fn names_are_unique_and_shuffling_loses_nothing() {
        let mut names: Vec<String> = Case::all().iter().map(Case::name).collect();
        let before = names.clone();
        Random(7).shuffle(&mut names);
        assert_ne!(names, before);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), before.len());
    }
}
