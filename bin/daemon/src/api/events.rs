//! Events: those that are written, and those that come.

use super::{Api, fault};
use crate::database::DatabaseError;
use crate::events::Events;
use crate::events::filter::{Filter, FilterError};
use crate::events::store::{Line, Reader};
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use seawall_client::{Event, EventsQuery, Fault};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::{Receiver, error::RecvError};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Without a `limit`, and the most.
const LIMIT: u32 = 50;
const LIMIT_MAX: u32 = 100_000;
/// How long an answer waits for what is being written.
const FLUSH: Duration = Duration::from_secs(2);
/// Events read at once: hostile names make an event as long as 24 KiB.
const PAGE: u32 = 100;

/// Events as JSON lines, in the order of their ids; with `follow` the answer goes on for as long as
/// the caller reads.
#[utoipa::path(
    get,
    path = "/v1/events",
    params(EventsQuery),
    responses(
        (status = 200, content_type = "application/x-ndjson", body = Event),
        (status = 400, description = "A filter is wrong", body = Fault),
        (status = 503, description = "The events cannot be read", body = Fault),
    )
)]
pub async fn events_of(State(api): State<Api>, Query(query): Query<EventsQuery>) -> Response {
    let filter = match filter_of(&query) {
        Ok(filter) => filter,
        Err(error) => return fault(StatusCode::BAD_REQUEST, "wrong-filter", error.to_string()),
    };
    let guest = filter
        .guest
        .clone()
        .filter(|name| !api.host.config().guests.iter().any(|guest| guest.is_named(name)));
    // Before the disk is read: what comes meanwhile is in one or the other.
    let coming = query.follow.then(|| api.host.events.follow());
    let events = api.host.events.clone();
    let begin = move || {
        // One that was taken out of the configuration still has its past.
        let is_known = match &guest {
            Some(name) => events.knows_guest(name)?,
            None => true,
        };
        if is_known { Stream::begin(events, filter, &query).map(Some) } else { Ok(None) }
    };
    let begun = tokio::task::spawn_blocking(begin).await;
    let stream = match begun {
        Ok(Ok(Some(stream))) => stream,
        Ok(Ok(None)) => {
            let message = "no guest of this name is configured, and no event is about one; \
                           `seawall guests` lists them";
            return fault(StatusCode::BAD_REQUEST, "wrong-filter", message);
        }
        Ok(Err(error)) => {
            let message =
                format!("the events cannot be read: {error}; the service's log says more");
            return fault(StatusCode::SERVICE_UNAVAILABLE, "no-events", message);
        }
        Err(error) => {
            return fault(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string());
        }
    };
    let (lines, body) = mpsc::channel(64);
    tokio::spawn(stream.run(coming, lines));
    let body = Body::from_stream(ReceiverStream::new(body));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

fn filter_of(query: &EventsQuery) -> Result<Filter, FilterError> {
    let text = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let filter = Filter {
        guest: text(&query.guest),
        kinds: text(&query.kind).map_or(Ok(Vec::new()), |text| Filter::kinds(&text))?,
        since: text(&query.since).map(|text| Filter::time(&text)).transpose()?,
        until: text(&query.until).map(|text| Filter::time(&text)).transpose()?,
        hash: text(&query.hash).map(|text| Filter::hash(&text)).transpose()?,
        path: text(&query.path),
        verdict: text(&query.verdict).map(|text| Filter::verdict(&text)).transpose()?,
    };
    filter.check(query.follow)?;
    Ok(filter)
}

type Lines = mpsc::Sender<Result<Bytes, io::Error>>;

/// One answer under way.
struct Stream {
    events: Events,
    filter: Filter,
    reader: Reader,
    /// Everything wanted with a lower id has been sent.
    next: u64,
    /// How many may still be sent from the disk.
    left: u64,
}

impl Stream {
    /// Finds where to begin. Reads the disk.
    fn begin(events: Events, filter: Filter, query: &EventsQuery) -> Result<Self, DatabaseError> {
        let limit = query.limit.unwrap_or(LIMIT).min(LIMIT_MAX);
        // What has happened by now is there, and the file of a new service too.
        events.flush(FLUSH);
        let found = events.read(filter.clone()).and_then(|reader| {
            let next = match query.after {
                Some(after) => after.saturating_add(1),
                None => reader.newest(limit)?,
            };
            Ok((reader, next))
        });
        let (reader, next) = found.inspect_err(|error| suspect(&events, error))?;
        // Who follows misses nothing.
        let left = if query.follow { u64::MAX } else { limit.into() };
        Ok(Self { events, filter, reader, next, left })
    }

    /// Sends what is written and then what comes, until the caller has gone.
    async fn run(mut self, coming: Option<Receiver<Arc<Line>>>, lines: Lines) {
        let Some(stream) = self.written(&lines).await else { return };
        self = stream;
        let Some(mut coming) = coming else { return };
        loop {
            let next = tokio::select! {
                next = coming.recv() => next,
                () = lines.closed() => return,
            };
            match next {
                Ok(line) if line.id < self.next => {}
                Ok(line) => {
                    self.next = line.id + 1;
                    if self.filter.fits(&line.event, line.at)
                        && !send(&lines, line.text.clone()).await
                    {
                        return;
                    }
                }
                // What it missed is on the disk.
                Err(RecvError::Lagged(_)) => match self.written(&lines).await {
                    Some(stream) => self = stream,
                    None => return,
                },
                Err(RecvError::Closed) => return,
            }
        }
    }

    /// Sends what is written, page by page. `None` when there is nobody to go on for.
    async fn written(mut self, lines: &Lines) -> Option<Self> {
        while self.left > 0 {
            let count = u32::try_from(self.left).unwrap_or(u32::MAX).min(PAGE);
            let read = tokio::task::spawn_blocking(move || {
                let page = self.reader.page(self.next, count);
                (self, page)
            });
            let (stream, page) = read.await.ok()?;
            self = stream;
            let page = match page {
                Ok(page) => page,
                Err(error) => {
                    suspect(&self.events, &error);
                    // A broken answer, so that nobody takes what was sent for all there is.
                    let _ = lines.send(Err(io::Error::other(error.to_string()))).await;
                    return None;
                }
            };
            let is_last = page.len() < count as usize;
            self.left -= page.len() as u64;
            for (id, line) in page {
                self.next = id + 1;
                if !send(lines, line).await {
                    return None;
                }
            }
            if is_last {
                break;
            }
        }
        Some(self)
    }
}

async fn send(lines: &Lines, mut line: String) -> bool {
    line.push('\n');
    lines.send(Ok(line.into())).await.is_ok()
}

fn suspect(events: &Events, error: &DatabaseError) {
    tracing::warn!(%error, "events cannot be read");
    if error.is_damage() {
        events.suspect();
    }
}
