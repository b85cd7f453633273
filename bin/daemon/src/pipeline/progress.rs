//! One scan's way through the engines: who is asked, who has answered, and what that means.
//!
//! Pure bookkeeping, no locks and no engines. However the engines are asked, the outcome is that of the
//! first one in the configured order that decides: by a detection, or by knowing the content to be good. An
//! engine that failed decides nothing; when nobody decides, its failure is the end.

use super::Finding;
use crate::config::{EngineOrder, ScanOrder};
use seawall_client::EngineReport;
use seawall_engine::Generation as Signatures;
use seawall_engine::host::ScanId;
use std::sync::Arc;

/// What one engine reported.
pub struct Reported {
    pub finding: Finding,
    pub told: EngineReport,
}

/// Where one engine is with this scan.
enum Place {
    Unasked,
    /// Its scan has no id when it has not been accepted yet.
    Asked(Option<ScanId>),
    Reported(Reported),
}

/// What is to be done next.
pub enum Step {
    /// Ask this engine, then look again.
    Ask(usize),
    /// Nothing until a report comes.
    Wait,
    /// It is decided; told once.
    End(Ended),
}

/// The end of a scan.
pub struct Ended {
    pub finding: Finding,
    /// Those that still look, and need not.
    pub cancel: Vec<(usize, ScanId)>,
    /// What was said, in the configured order.
    pub reports: Vec<EngineReport>,
    /// The signatures of those that looked; none for one that failed.
    pub used: Vec<(usize, Option<Signatures>)>,
}

/// See the module.
pub struct Progress {
    engines: Vec<Place>,
    /// The signatures of those that reported.
    used: Vec<(usize, Option<Signatures>)>,
    stopped: bool,
}

impl Progress {
    pub fn new(engines: usize) -> Self {
        let engines = std::iter::repeat_with(|| Place::Unasked).take(engines).collect();
        Self { engines, used: Vec::new(), stopped: false }
    }

    /// What follows from all that is known. An engine that is to be asked counts as asked.
    pub fn next(&mut self, order: ScanOrder, may_allow: impl Fn(usize) -> bool) -> Step {
        if self.stopped {
            return Step::Wait;
        }
        if let Some(finding) = self.decided(order, may_allow) {
            // Here and not later: a second report must not end it again, with nothing left to tell.
            self.stopped = true;
            let told = |place: &Place| match place {
                Place::Reported(reported) => Some(reported.told.clone()),
                Place::Unasked | Place::Asked(_) => None,
            };
            return Step::End(Ended {
                finding,
                cancel: self.asked_now(),
                reports: self.engines.iter().filter_map(told).collect(),
                used: std::mem::take(&mut self.used),
            });
        }
        let at_work = self.engines.iter().any(|place| matches!(place, Place::Asked(_)));
        let unasked = self.engines.iter().position(|place| matches!(place, Place::Unasked));
        match unasked {
            Some(number) if order.engines == EngineOrder::SideBySide || !at_work => {
                self.engines[number] = Place::Asked(None);
                Step::Ask(number)
            }
            _ => Step::Wait,
        }
    }

    /// The outcome, once nothing that is still to come can change it.
    fn decided(&self, order: ScanOrder, may_allow: impl Fn(usize) -> bool) -> Option<Finding> {
        // Somebody is still to speak; and somebody who may call the content good.
        let (mut is_open, mut may_turn) = (false, false);
        let (mut found, mut failure) = (Vec::new(), None);
        for (number, place) in self.engines.iter().enumerate() {
            let reported = match place {
                Place::Unasked | Place::Asked(_) => {
                    is_open = true;
                    may_turn |= found.is_empty() && may_allow(number);
                    continue;
                }
                Place::Reported(reported) => reported,
            };
            match &reported.finding {
                Finding::Clean if reported.told.allowed.is_some() && found.is_empty() => {
                    return (!is_open).then_some(Finding::Clean);
                }
                Finding::Clean => {}
                Finding::Infected(detections) => found.extend(detections.iter().cloned()),
                other => failure = failure.or_else(|| Some(other.clone())),
            }
        }
        if !found.is_empty() && !may_turn && (order.early_exit || !is_open) {
            return Some(Finding::Infected(Arc::new(found)));
        }
        if is_open {
            return None;
        }
        if self.engines.is_empty() {
            return Some(Finding::Error("no engine is configured".into()));
        }
        Some(failure.unwrap_or(Finding::Clean))
    }

    /// The engine has taken the scan. True when it is to give it up at once.
    pub fn asked(&mut self, number: usize, id: ScanId) -> bool {
        if let Place::Asked(known) = &mut self.engines[number] {
            *known = Some(id);
            return self.stopped;
        }
        false
    }

    /// An engine reported. False when nobody waits for that any more.
    pub fn reported(
        &mut self,
        number: usize,
        reported: Reported,
        signatures: Option<Signatures>,
    ) -> bool {
        if self.stopped {
            return false;
        }
        let looked = matches!(reported.finding, Finding::Clean | Finding::Infected(_));
        self.used.push((number, signatures.filter(|_| looked)));
        self.engines[number] = Place::Reported(reported);
        true
    }

    /// The scan is over: nothing more is asked or heard. Gives whom to tell.
    pub fn stop(&mut self) -> Vec<(usize, ScanId)> {
        self.stopped = true;
        self.asked_now()
    }

    /// Those that have it and have not reported.
    pub fn asked_now(&self) -> Vec<(usize, ScanId)> {
        let asked = self.engines.iter().enumerate().filter_map(|(number, place)| match place {
            Place::Asked(Some(id)) => Some((number, *id)),
            _ => None,
        });
        asked.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::Finding;

    fn clean() -> Reported {
        let told = EngineReport {
            engine: "e".into(),
            verdict: Finding::Clean.verdict(),
            detections: Vec::new(),
            allowed: None,
            reason: None,
            queued_us: 0,
            scanned_us: 0,
        };
        Reported { finding: Finding::Clean, told }
    }

    #[test]
    fn the_end_is_told_once_with_those_who_looked() {
        let order = ScanOrder { engines: EngineOrder::SideBySide, early_exit: true };
        let mut progress = Progress::new(2);
        for number in 0..2 {
            assert!(matches!(progress.next(order, |_| false), Step::Ask(n) if n == number));
        }
        let signatures = Signatures([1; 32]);
        assert!(progress.reported(0, clean(), Some(signatures)));
        let failed = Reported { finding: Finding::Error("no".into()), ..clean() };
        assert!(progress.reported(1, failed, Some(signatures)));
        let Step::End(end) = progress.next(order, |_| false) else { panic!("it has not ended") };
        assert_eq!(end.used, [(0, Some(signatures)), (1, None)], "one that failed has not looked");
        assert!(matches!(progress.next(order, |_| false), Step::Wait), "nobody hears it twice");
        assert!(progress.stop().is_empty());
    }
}
