//! The REST interface, version 1, on a unix socket that only the service's user can open.
//!
//! Runs on the service's one asynchronous thread; what may take long goes to blocking threads.

mod events;
mod golden;
mod policy;
mod quarantine;
mod scan;
mod scans;
pub mod signatures;

use crate::config::{Config, EngineConfig};
use crate::engines;
use crate::events::format_time;
use crate::guest::Guest as HostGuest;
use crate::host::Host;
use crate::metrics;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use quarantine as files;
use seawall_client::{
    EngineState, Event, EventKind, Fault, Guest, GuestCounts, GuestState, PrivateCopies,
    QuarantineUse, Reload, ReloadedEngine, Session, Status,
};
use seawall_proto::Mode;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use utoipa::OpenApi;

/// The interface as a document.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Seawall host service",
        description = "Status, guests, events and on-demand scans of one host. Served on the service's unix socket."
    ),
    paths(
        status,
        guests,
        events::events_of,
        scan::scan,
        scans::list,
        scans::show,
        scans::add,
        scans::order,
        scans::schedules,
        scans::run,
        scans::skip,
        golden::list,
        golden::learn,
        golden::put,
        golden::forget,
        golden::trust,
        reload,
        policy::check,
        policy::show,
        policy::explain,
        quarantine::list,
        quarantine::show,
        quarantine::content,
        quarantine::restore,
        quarantine::delete,
        quarantine::approvals,
        quarantine::approve,
        quarantine::revoke,
        signatures::list,
        signatures::apply,
        signatures::rollback,
        signatures::history
    ),
    components(schemas(Event))
)]
pub struct Document;

/// What the handlers share.
#[derive(Clone)]
pub struct Api {
    pub host: Arc<Host>,
    pub config_path: Arc<PathBuf>,
}

/// All routes.
pub fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/guests", get(guests))
        .route("/v1/events", get(events::events_of))
        // Its length is bounded while it is copied.
        .route("/v1/scan", post(scan::scan).layer(DefaultBodyLimit::disable()))
        .route("/v1/scans", get(scans::list).post(scans::add))
        .route("/v1/scans/{id}", get(scans::show))
        .route("/v1/scans/{id}/{order}", post(scans::order))
        .route("/v1/schedules", get(scans::schedules))
        .route("/v1/schedules/{name}/run", post(scans::run))
        .route("/v1/schedules/{name}/skip", post(scans::skip))
        .route("/v1/golden", get(golden::list))
        .route(
            "/v1/golden/{name}",
            put(golden::put)
                .layer(DefaultBodyLimit::max(golden::BODY_MAX))
                .post(golden::learn)
                .delete(golden::forget),
        )
        .route("/v1/guests/{guest}/golden", post(golden::trust))
        .route("/v1/reload", post(reload))
        .route("/v1/policy/check", get(policy::check))
        .route("/v1/guests/{guest}/policy", get(policy::show))
        .route("/v1/guests/{guest}/policy/explain", get(policy::explain))
        .route("/v1/quarantine", get(files::list))
        .route("/v1/quarantine/{id}", get(files::show).delete(files::delete))
        .route("/v1/quarantine/{id}/content", get(files::content))
        .route("/v1/quarantine/{id}/restore", post(files::restore))
        .route("/v1/approvals", get(files::approvals).post(files::approve).delete(files::revoke))
        .route("/v1/signatures", get(signatures::list))
        .route("/v1/signatures/apply", post(signatures::apply))
        .route("/v1/signatures/rollback", post(signatures::rollback))
        .route("/v1/signatures/history", get(signatures::history))
        .fallback(|| async {
            fault(
                StatusCode::NOT_FOUND,
                "not-found",
                "there is nothing here; see docs/openapi.json",
            )
        })
        .with_state(api)
}

/// An answer that says what happened.
fn fault(status: StatusCode, code: &str, message: impl Into<String>) -> Response {
    let fault = Fault { code: code.to_owned(), message: message.into() };
    (status, Json(fault)).into_response()
}

/// How the service is.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = Status)))]
async fn status(State(api): State<Api>) -> Json<Status> {
    let host = &api.host;
    let numbers = 0..host.pipeline.engines().len();
    let engines: Vec<_> = numbers.map(|number| engines::report(&host.pipeline, number)).collect();
    let signatures = host.signatures.report();
    let takes_of_sets = |engine: &EngineConfig| !engine.signatures.is_nothing();
    let guests = host.guests.all();
    let mut counts = GuestCounts::default();
    let mut problems = Vec::new();
    for engine in engines.iter().filter(|engine| engine.state != EngineState::Ready) {
        let why = engine.reason.clone().unwrap_or_else(|| "it loads its signatures".into());
        problems.push(format!("engine {} is not ready: {why}", engine.name));
    }
    for engine in host.first_config.engines.0.iter().filter(|engine| takes_of_sets(engine)) {
        if signatures.set.is_some() && !host.signatures.has_files_for(&engine.name) {
            problems
                .push(format!("the signature set in use has no file for engine {}", engine.name));
        }
    }
    if let Some(why) = &signatures.refused {
        problems.push(format!("new signatures were refused, those before are in use: {why}"));
    }
    if signatures.set.is_none() && host.first_config.engines.0.iter().any(takes_of_sets) {
        problems.push(
            "there are no signatures yet: `seawall signatures apply DIR` takes a folder of them"
                .to_owned(),
        );
    }
    for engine in engines.iter().filter(|engine| !engine.refused.is_empty()) {
        problems.push(format!(
            "engine {} refused its new signatures; the last good set is in use",
            engine.name
        ));
    }
    for engine in &engines {
        let broken = engine.diagnostics.iter().filter(|found| found.level == "error").count();
        if broken > 0 && engine.state == EngineState::Ready {
            problems.push(format!("engine {} left out {broken} broken signatures", engine.name));
        }
    }
    for guest in &guests {
        match guest.watch.lock().unwrap_or_else(PoisonError::into_inner).state {
            GuestState::Protected => counts.protected += 1,
            GuestState::Silent => counts.silent += 1,
            GuestState::Unprotected => {
                counts.unprotected += 1;
                problems.push(format!("guest {} is unprotected", guest.name()));
            }
            GuestState::NeverSeen => counts.never_seen += 1,
        }
        if let Some(fault) = guest.fault() {
            problems.push(format!("guest {}: {fault}", guest.name()));
        }
    }
    // What it did not take is lost; what the service does for guests goes on.
    problems.extend(host.events.problem().into_iter().chain(host.state.problem()));
    let (used, most) = host.quarantine.usage();
    Json(Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        healthy: problems.is_empty(),
        problems,
        started: format_time(host.started),
        generation: host.pipeline.generations.current().0,
        engines,
        signatures,
        guests: counts,
        counters: host.metrics.read(),
        cached_verdicts: host.pipeline.cached_verdicts(),
        private_copies: PrivateCopies {
            memory_bytes: host.budget.used(),
            memory_limit_bytes: host.budget.limit(),
            spooled_bytes: host.budget.spooled(),
        },
        quarantine: QuarantineUse { used_bytes: used, most_bytes: most },
        policy: host.config().policy.shown(),
        resources: metrics::resources(std::process::id()).unwrap_or_default(),
    })
}

/// All configured guests.
#[utoipa::path(get, path = "/v1/guests", responses((status = 200, body = Vec<Guest>)))]
async fn guests(State(api): State<Api>) -> Json<Vec<Guest>> {
    Json(api.host.guests.all().iter().map(|guest| describe(&api.host, guest)).collect())
}

fn describe(host: &Host, guest: &HostGuest) -> Guest {
    let watch = guest.watch.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let session = guest.session();
    let sighting = host.state.sighting(guest.name());
    let mode = guest.policy().mode;
    let reason = match (watch.state, &session) {
        (GuestState::Protected, _) if mode == Mode::Off => "its policy has nothing scanned",
        (GuestState::Protected, _) => "",
        (GuestState::NeverSeen, _) => "no driver has connected since the guest was configured",
        (_, Some(_)) => "its driver is connected but sends no heartbeat",
        (_, None) => "its driver is not connected",
    };
    let config = host.config();
    let group = config.guest(guest.name()).and_then(|own| config.governed(own).group);
    Guest {
        name: guest.name().to_owned(),
        group: group.map(|group| group.name.clone()),
        mode: mode.to_string(),
        state: watch.state,
        reason: reason.to_owned(),
        since: format_time(watch.since),
        first_seen: sighting.map(|seen| format_time(seen.first)),
        last_seen: sighting.map(|seen| format_time(seen.last)),
        region: guest.region.as_ref().map(|region| region.path().display().to_string()),
        region_fault: guest.fault(),
        session: session.map(|session| {
            let (age, counters, coverage) = session.report();
            Session {
                link: session.link,
                started: format_time(session.started),
                driver: session.driver.clone(),
                heartbeat_age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
                outstanding: session.outstanding.load(std::sync::atomic::Ordering::Relaxed),
                counters,
                coverage,
            }
        }),
        requests: guest.requests.load(std::sync::atomic::Ordering::Relaxed),
        verdicts: guest.verdicts.read(),
    }
}

/// Reads the configuration and the engines' signatures again.
#[utoipa::path(post, path = "/v1/reload", responses((status = 200, body = Reload)))]
async fn reload(State(api): State<Api>) -> Response {
    match tokio::task::spawn_blocking(move || api.reload()).await {
        Ok(reload) => Json(reload).into_response(),
        Err(error) => fault(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string()),
    }
}

impl Api {
    /// Takes over what can be taken over while running. A wrong configuration changes nothing.
    pub fn reload(&self) -> Reload {
        let config = match Config::load(&self.config_path) {
            Ok(config) => config,
            Err(error) => {
                tracing::error!(
                    "the configuration cannot be read again, the running one stays:\n{error}"
                );
                let event = Event::new(EventKind::ConfigRefused).reason(error.to_string());
                self.host.events.emit(event);
                return Reload { config_error: Some(error.to_string()), ..Reload::default() };
            }
        };
        let guests = self.host.config().guests.len();
        if config.guests.is_empty() && guests > 0 {
            let why = format!(
                "{}: it names no guest, and {guests} are protected now; to protect none, stop the service",
                self.config_path.display()
            );
            tracing::error!("the configuration is refused, the running one stays: {why}");
            self.host.events.emit(Event::new(EventKind::ConfigRefused).reason(why.clone()));
            return Reload { config_error: Some(why), ..Reload::default() };
        }
        let restart_needed = self.host.take_over(config);
        let engines = self.reload_engines();
        let taken = engines.iter().all(|engine| engine.taken);
        Reload { taken, config_error: None, restart_needed, engines }
    }

    /// Waits until the engines have loaded their signatures again.
    fn reload_engines(&self) -> Vec<ReloadedEngine> {
        let (tell, told) = std::sync::mpsc::channel();
        let refused = |why: String| {
            let names = self.host.pipeline.engines().iter().map(|engine| engine.name.clone());
            let diagnostic = signatures::diagnostic(&why);
            let none = |engine| ReloadedEngine {
                engine,
                taken: false,
                rules: None,
                diagnostics: vec![diagnostic.clone()],
            };
            names.map(none).collect()
        };
        match self.host.signatures.reload(move |engines| drop(tell.send(engines))) {
            Ok(()) => told.recv().unwrap_or_else(|error| refused(error.to_string())),
            Err(busy) => refused(busy.to_string()),
        }
    }
}
