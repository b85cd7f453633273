//! The configured engines: started, listened to, reloaded, reported.

use crate::config::Config;
use crate::generation::Loaded;
use crate::host::Host;
use crate::metrics::resources;
use crate::pipeline::{ENGINE_QUEUE, EngineSlot};
use seawall_client::{Engine, EngineState, Event, EventKind, ReloadedEngine};
use seawall_engine::Diagnostic;
use seawall_engine::host::{
    EngineConfig, EngineEvent, EngineHandle, EngineState as HandleState, Refusal,
};
use seawall_proto::ToGuest;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::channel;
use std::time::Duration;

/// How long a reload waits for new signatures: an engine's own limit, and a little more.
const RELOAD_MAX: Duration = Duration::from_secs(125);

/// Starts all engines; they get ready in the background.
pub fn start(host: &Arc<Host>, config: &Config) -> io::Result<()> {
    let mut engines = Vec::new();
    for (number, wanted) in config.engines.0.iter().enumerate() {
        let settings = EngineConfig {
            threads: wanted.threads,
            memory_mib: wanted.memory_mib,
            queue_limit: ENGINE_QUEUE,
            ..EngineConfig::new(wanted.name.clone(), wanted.command.clone())
        };
        let (listening, name) = (Arc::clone(host), wanted.name.clone());
        let handle = EngineHandle::start(settings, move |event| {
            listening.engine_event(number, &name, event)
        })?;
        engines.push(EngineSlot {
            handle,
            scan_timeout: wanted.scan_timeout(),
            may_allow: wanted.may_allow,
            scans: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        });
    }
    host.pipeline.set_engines(engines);
    Ok(())
}

impl Host {
    /// Runs on an engine's supervisor thread: nothing here waits.
    fn engine_event(&self, number: usize, engine: &str, event: EngineEvent) {
        match event {
            EngineEvent::State(HandleState::Starting) => {}
            EngineEvent::State(HandleState::Ready { description }) => {
                {
                    let _telling = self.telling();
                    let new = self.pipeline.engine_has(
                        number,
                        Loaded { signatures: description.generation, by_name: description.by_name },
                    );
                    if let Some(new) = new {
                        self.broadcast(&ToGuest::Generation(new));
                    }
                }
                let signatures = description.generation.short();
                tracing::info!(
                    engine,
                    signatures,
                    rules = description.rules,
                    "the engine is ready"
                );
                for diagnostic in &description.diagnostics {
                    tracing::warn!(engine, "{diagnostic}");
                }
                let mut told = about(EventKind::EngineReady, engine)
                    .reason(format!("{} {}", description.name, description.version));
                told.count = Some(description.rules.into());
                told.generation = Some(self.pipeline.generations.current().0);
                self.events.emit(told);
            }
            EngineEvent::State(HandleState::Restarting { reason }) => {
                tracing::warn!(engine, "the engine is started again: {reason}");
                self.events.emit(about(EventKind::EngineRestarting, engine).reason(reason));
            }
            EngineEvent::State(HandleState::Failed { diagnostics }) => {
                let why = lines(&diagnostics);
                tracing::error!(engine, "the engine cannot run: {why}");
                self.events.emit(about(EventKind::EngineFailed, engine).reason(why));
            }
            EngineEvent::Refused(Refusal { diagnostics, .. }) => {
                let why = lines(&diagnostics);
                tracing::error!(
                    engine,
                    "new signatures are refused, the last good set stays: {why}"
                );
                self.events.emit(about(EventKind::SignaturesRefused, engine).reason(why));
            }
        }
    }

    /// Has every engine load its signatures again, and waits for the end of it.
    pub fn reload_engines(&self) -> Vec<ReloadedEngine> {
        let (done, results) = channel();
        let engines = self.pipeline.engines();
        for (number, engine) in engines.iter().enumerate() {
            let done = done.clone();
            // Whoever waited has gone after RELOAD_MAX; the event log tells the end.
            engine.handle.replace(move |result| drop(done.send((number, result))));
        }
        drop(done);
        let mut reloaded: Vec<_> = engines
            .iter()
            .map(|engine| ReloadedEngine {
                engine: engine.handle.name().to_owned(),
                taken: false,
                rules: None,
                diagnostics: Vec::new(),
            })
            .collect();
        while let Ok((number, result)) = results.recv_timeout(RELOAD_MAX) {
            let slot = &mut reloaded[number];
            match result {
                Ok(description) => {
                    slot.taken = true;
                    slot.rules = Some(description.rules);
                    slot.diagnostics = description.diagnostics.iter().map(diagnostic).collect();
                }
                Err(refusal) => {
                    slot.diagnostics = refusal.diagnostics.iter().map(diagnostic).collect();
                }
            }
        }
        reloaded
    }
}

fn about(kind: EventKind, engine: &str) -> Event {
    let mut event = Event::new(kind);
    event.engine = Some(engine.to_owned());
    event
}

fn lines(diagnostics: &[Diagnostic]) -> String {
    let all: Vec<_> = diagnostics.iter().take(8).map(ToString::to_string).collect();
    if all.is_empty() { "it does not say why".to_owned() } else { all.join("; ") }
}

fn diagnostic(from: &Diagnostic) -> seawall_client::Diagnostic {
    seawall_client::Diagnostic {
        level: format!("{:?}", from.level).to_lowercase(),
        file: from.file.clone(),
        line: from.line,
        column: from.column,
        code: from.code.clone(),
        reason: from.reason.clone(),
    }
}

/// An engine as `status` tells it.
pub fn report(engine: &EngineSlot) -> Engine {
    let status = engine.handle.status();
    let mut report = Engine {
        name: status.name,
        state: EngineState::Starting,
        reason: None,
        version: None,
        signatures: None,
        rules: None,
        diagnostics: Vec::new(),
        refused: status
            .refused
            .map(|refusal| refusal.diagnostics.iter().map(diagnostic).collect())
            .unwrap_or_default(),
        loading: status.loading,
        pid: status.pid,
        restarts: status.restarts,
        queued: status.queued as u64,
        in_flight: status.in_flight as u64,
        scans: engine.scans.load(Relaxed),
        failures: engine.failures.load(Relaxed),
        resources: status.pid.and_then(resources),
    };
    match status.state {
        HandleState::Starting => {}
        HandleState::Ready { description } => {
            report.state = EngineState::Ready;
            report.version = Some(format!("{} {}", description.name, description.version));
            report.signatures = Some(description.generation.to_string());
            report.rules = Some(description.rules);
            report.diagnostics = description.diagnostics.iter().map(diagnostic).collect();
        }
        HandleState::Restarting { reason } => {
            report.state = EngineState::Restarting;
            report.reason = Some(reason);
        }
        HandleState::Failed { diagnostics } => {
            report.state = EngineState::Failed;
            report.reason = Some(lines(&diagnostics));
            report.diagnostics = diagnostics.iter().map(diagnostic).collect();
        }
    }
    report
}
