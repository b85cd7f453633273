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
    /// It is decided.
    End(Finding),
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
            return Step::End(finding);
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
        self.used.push((number, signatures));
        self.engines[number] = Place::Reported(reported);
        true
    }

    /// The scan is over: nothing more is asked or heard. Gives whom to tell, and what was said, in the
    /// configured order.
    #[allow(clippy::type_complexity)] // Three lists that belong to nobody else.
    pub fn stop(
        &mut self,
    ) -> (Vec<(usize, ScanId)>, Vec<EngineReport>, Vec<(usize, Option<Signatures>)>) {
        self.stopped = true;
        let (mut cancel, mut reports) = (Vec::new(), Vec::new());
        for (number, place) in self.engines.iter_mut().enumerate() {
            match place {
                Place::Asked(Some(id)) => cancel.push((number, *id)),
                Place::Reported(reported) => reports.push(reported.told.clone()),
                Place::Unasked | Place::Asked(None) => {}
            }
        }
        (cancel, reports, std::mem::take(&mut self.used))
    }
}
