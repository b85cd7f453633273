//! The configured engines: started, listened to, replaced, reported.
//!
//! An engine is a slot in the pipeline, and what runs it is [`Running`]: one supervised process with one
//! signature set. New signatures are another [`Running`], started beside the one in use; [`Host::use_engines`]
//! puts it in its place. The old one ends when its last scan is answered (see [`crate::signatures`]).

use crate::config::EngineConfig;
use crate::generation::Loaded;
use crate::host::Host;
use crate::metrics::resources_of_all;
use crate::pipeline::{ENGINE_QUEUE, EngineSlot, Pipeline};
use crate::signatures::set::Manifest;
use seawall_client::{Engine, EngineState, Event, EventKind, Resources};
use seawall_engine::Diagnostic;
use seawall_engine::host::{
    Description, EngineConfig as Settings, EngineHandle, EngineState as HandleState,
};
use seawall_proto::ToGuest;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Threads of each engine that scans on demand leave free.
const KEPT: u32 = 1;

/// What runs an engine.
pub struct Running {
    pub handle: EngineHandle,
    pub origin: Option<Origin>,
    /// Whether its events count. They come from its own thread.
    in_use: Arc<AtomicBool>,
    /// It was before, and its lost processes are counted.
    is_counted: AtomicBool,
}

/// The part of a set that an engine has.
pub struct Origin {
    pub set: Arc<Manifest>,
    pub folder: PathBuf,
    pub engine: String,
}

impl Origin {
    /// The operator's file behind one of the set.
    fn operators_file(&self, file: &str) -> Option<String> {
        let below = Path::new(file).strip_prefix(&self.folder).ok()?;
        let files = self.set.files(&self.engine);
        files.iter().find(|one| Path::new(&one.path) == below).map(|one| one.from.clone())
    }
}

/// What a process is started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// To be used with whatever it can load: there is nothing better.
    InUse,
    /// To be tried: any error in its signatures is a failure.
    Candidate,
}

impl Running {
    /// Starts a process for engine `number`.
    pub fn start(
        host: &Arc<Host>,
        number: usize,
        wanted: &EngineConfig,
        origin: Option<Origin>,
        trust: Trust,
    ) -> io::Result<Arc<Self>> {
        let command = match &origin {
            Some(origin) => wanted.command_with(&origin.folder),
            None => wanted.command.clone(),
        };
        let settings = Settings {
            threads: wanted.threads(),
            kept: KEPT,
            memory_mib: wanted.memory_mib,
            ready_timeout: wanted.load_timeout(),
            queue_limit: ENGINE_QUEUE,
            spare: wanted.spare,
            strict: trust == Trust::Candidate,
            ..Settings::new(wanted.name.clone(), command)
        };
        let in_use = Arc::new(AtomicBool::new(trust == Trust::InUse));
        let (listening, name, counts) =
            (Arc::clone(host), wanted.name.clone(), Arc::clone(&in_use));
        let handle = EngineHandle::start(settings, move |state| {
            listening.engine_is(number, &name, &counts, state);
        })?;
        Ok(Arc::new(Self { handle, origin, in_use, is_counted: AtomicBool::new(false) }))
    }

    /// What it has loaded, where it is ready.
    pub fn description(&self) -> Option<Description> {
        match self.handle.state() {
            HandleState::Ready { description } => Some(description),
            _ => None,
        }
    }

    /// The same, for the generation.
    pub fn loaded(&self) -> Option<Loaded> {
        self.description().map(|description| loaded(&description))
    }

    /// Waits until it is ready, or tells why it is not.
    pub fn wait(&self, patience: Duration) -> Result<Description, Vec<seawall_client::Diagnostic>> {
        let until = Instant::now() + patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let loaded = self.handle.wait_loaded(left);
            match self.handle.state() {
                HandleState::Ready { description } => return Ok(description),
                HandleState::Failed { diagnostics } => return Err(self.tell(&diagnostics)),
                HandleState::Starting | HandleState::Restarting { .. }
                    if !loaded || left.is_zero() =>
                {
                    let late = Diagnostic::error("engine-slow", "it is not ready in time");
                    return Err(self.tell(&[late]));
                }
                // It was ready and crashed: the next process comes.
                HandleState::Starting | HandleState::Restarting { .. } => {
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }

    /// What an engine says of its signatures, with the names of the operator's files.
    pub fn tell(&self, diagnostics: &[Diagnostic]) -> Vec<seawall_client::Diagnostic> {
        let tell = |from: &Diagnostic| {
            let origin = self.origin.as_ref();
            let file = origin.and_then(|origin| origin.operators_file(&from.file));
            seawall_client::Diagnostic {
                level: format!("{:?}", from.level).to_lowercase(),
                file: file.unwrap_or_else(|| from.file.clone()),
                line: from.line,
                column: from.column,
                code: from.code.clone(),
                reason: from.reason.clone(),
            }
        };
        diagnostics.iter().map(tell).collect()
    }

    /// What its processes cost.
    pub fn resources(&self) -> Option<Resources> {
        self.handle.status().pid.and_then(resources_of_all)
    }
}

fn loaded(description: &Description) -> Loaded {
    Loaded { signatures: description.generation, by_name: description.by_name }
}

/// Starts all engines; they get ready in the background.
pub fn start(host: &Arc<Host>) -> io::Result<()> {
    let (mut slots, mut all) = (Vec::new(), Vec::new());
    for (number, wanted) in host.first_config.engines.0.iter().enumerate() {
        let origin = host.signatures.origin(wanted);
        all.push(Running::start(host, number, wanted, origin, Trust::InUse)?);
        slots.push(EngineSlot::new(wanted));
    }
    host.pipeline.set_engines(slots, all);
    Ok(())
}

impl Host {
    /// Has these run their engines from now on, all at once, and tells every guest. Gives those that did until
    /// now.
    ///
    /// # Errors
    /// One of them is not ready any more; nothing has changed.
    pub fn use_engines(
        &self,
        new: &[(usize, Arc<Running>)],
    ) -> Result<Vec<(usize, Arc<Running>)>, String> {
        let telling = self.telling();
        // First this, then their state: what they become afterwards they tell themselves.
        new.iter().for_each(|(_, running)| running.in_use.store(true, SeqCst));
        let mut ready = Vec::new();
        for (number, running) in new {
            let Some(description) = running.description() else {
                new.iter().for_each(|(_, running)| running.in_use.store(false, SeqCst));
                let name = running.handle.name();
                return Err(format!(
                    "engine {name} was ready and is not any more; its log says why"
                ));
            };
            ready.push((*number, description));
        }
        let before = self.pipeline.in_use();
        let old: Vec<_> =
            new.iter().map(|(number, _)| (*number, Arc::clone(&before[*number]))).collect();
        for ((number, old), (_, new)) in old.iter().zip(new) {
            old.in_use.store(false, SeqCst);
            let slot = &self.pipeline.engines()[*number];
            slot.restarts_before.fetch_add(old.handle.status().restarts, Relaxed);
            old.is_counted.store(true, Relaxed);
            if new.is_counted.swap(false, Relaxed) {
                slot.restarts_before.fetch_sub(new.handle.status().restarts, Relaxed);
            }
            slot.set_refused(Vec::new());
        }
        self.pipeline.take_into_use(new);
        let mut generation = None;
        for (number, description) in &ready {
            generation = self.pipeline.engine_has(*number, loaded(description)).or(generation);
        }
        if let Some(generation) = generation {
            self.broadcast(&ToGuest::Generation(generation));
        }
        drop(telling);
        for ((_, running), (_, description)) in new.iter().zip(&ready) {
            self.tell_ready(running.handle.name(), description);
        }
        Ok(old)
    }

    /// An engine that is in use changed its state. Runs on its supervisor's thread: nothing here waits.
    fn engine_is(&self, number: usize, engine: &str, counts: &AtomicBool, state: HandleState) {
        if !counts.load(SeqCst) {
            return;
        }
        match state {
            HandleState::Starting => {}
            HandleState::Ready { description } => {
                {
                    let _telling = self.telling();
                    // Another may have taken its place meanwhile: what this one has counts no more.
                    if !counts.load(SeqCst) {
                        return;
                    }
                    if let Some(new) = self.pipeline.engine_has(number, loaded(&description)) {
                        self.broadcast(&ToGuest::Generation(new));
                    }
                }
                self.tell_ready(engine, &description);
            }
            HandleState::Restarting { reason } => {
                tracing::warn!(engine, "the engine is started again: {reason}");
                self.events.emit(about(EventKind::EngineRestarting, engine).reason(reason));
            }
            HandleState::Failed { diagnostics } => {
                // Not there yet where it fails at once.
                let running = self.pipeline.in_use().get(number).map(Arc::clone);
                let why = running.map_or_else(
                    || diagnostics.first().map_or_else(String::new, ToString::to_string),
                    |running| lines(&running.tell(&diagnostics)),
                );
                tracing::error!(engine, "the engine cannot run: {why}");
                self.events.emit(about(EventKind::EngineFailed, engine).reason(why));
            }
        }
    }

    fn tell_ready(&self, engine: &str, description: &Description) {
        let signatures = description.generation.short();
        tracing::info!(engine, signatures, rules = description.rules, "the engine is ready");
        let mut told = about(EventKind::EngineReady, engine)
            .reason(format!("{} {}", description.name, description.version));
        told.count = Some(description.rules.into());
        told.generation = Some(self.pipeline.generations.current().0);
        self.events.emit(told);
    }

    /// New signatures are not taken: of one engine, or a whole set.
    pub fn tell_refused(&self, engine: Option<&str>, why: &str) {
        tracing::error!(engine, "new signatures are refused, the last good set stays: {why}");
        let mut event = Event::new(EventKind::SignaturesRefused).reason(why.to_owned());
        event.engine = engine.map(str::to_owned);
        self.events.emit(event);
    }
}

fn about(kind: EventKind, engine: &str) -> Event {
    let mut event = Event::new(kind);
    event.engine = Some(engine.to_owned());
    event
}

/// The first of what an engine says, in one line.
pub fn lines(diagnostics: &[seawall_client::Diagnostic]) -> String {
    let line = |one: &seawall_client::Diagnostic| {
        let place = match (one.file.as_str(), one.line) {
            ("", _) => String::new(),
            (file, 0) => format!("{file}: "),
            (file, line) => format!("{file}:{line}:{}: ", one.column),
        };
        format!("{place}{}[{}]: {}", one.level, one.code, one.reason)
    };
    let all: Vec<_> = diagnostics.iter().take(8).map(line).collect();
    if all.is_empty() { "it does not say why".to_owned() } else { all.join("; ") }
}

/// An engine as `status` tells it.
pub fn report(pipeline: &Pipeline, number: usize) -> Engine {
    let (engine, running) = (&pipeline.engines()[number], &pipeline.in_use()[number]);
    let status = running.handle.status();
    let mut report = Engine {
        name: status.name,
        state: EngineState::Starting,
        reason: None,
        version: None,
        signatures: None,
        rules: None,
        diagnostics: Vec::new(),
        refused: engine.refused(),
        loading: engine.loading.load(Relaxed),
        pid: status.pid,
        spare_pid: status.spare_pid,
        restarts: status.restarts + engine.restarts_before.load(Relaxed),
        queued: status.queued as u64,
        in_flight: status.in_flight as u64,
        scans: engine.scans.load(Relaxed),
        failures: engine.failures.load(Relaxed),
        resources: status.pid.and_then(resources_of_all),
    };
    match status.state {
        HandleState::Starting => {}
        HandleState::Ready { description } => {
            report.state = EngineState::Ready;
            report.version = Some(format!("{} {}", description.name, description.version));
            report.signatures = Some(description.generation.to_string());
            report.rules = Some(description.rules);
            report.diagnostics = running.tell(&description.diagnostics);
        }
        HandleState::Restarting { reason } => {
            report.state = EngineState::Restarting;
            report.reason = Some(reason);
        }
        HandleState::Failed { diagnostics } => {
            report.state = EngineState::Failed;
            report.diagnostics = running.tell(&diagnostics);
            report.reason = Some(lines(&report.diagnostics));
        }
    }
    report
}

/// What was refused last, for each engine.
pub type Refused = Mutex<Vec<seawall_client::Diagnostic>>;

impl EngineSlot {
    /// Why its last new signatures were not taken.
    pub fn refused(&self) -> Vec<seawall_client::Diagnostic> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set_refused(&self, why: Vec<seawall_client::Diagnostic>) {
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }
}
