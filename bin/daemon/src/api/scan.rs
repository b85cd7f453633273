//! A scan on demand: content comes in the request's body, the report goes back.

use super::{Api, fault};
use crate::copy::{CopyError, PrivateCopy};
use crate::on_demand;
use crate::pipeline::Finding;
use axum::Json;
use axum::body::{Body, BodyDataStream};
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use seawall_client::text::escape;
use seawall_client::{Fault, ScanReport};
use serde::Deserialize;
use std::time::{Duration, Instant};
use tokio_stream::StreamExt;

/// How long a body that was refused is read on.
const LINGER: Duration = Duration::from_secs(10);
/// Bytes kept together before they go to the copy.
const PIECE: usize = 256 * 1024;

/// What the caller says of the content.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
pub struct ScanQuery {
    /// A name for the report, and for rules that ask for the file's name.
    #[serde(default)]
    name: String,
}

/// Scans the body, at most as long as the whole-file limit.
#[utoipa::path(
    post,
    path = "/v1/scan",
    params(ScanQuery),
    request_body(content_type = "application/octet-stream", content = Vec<u8>),
    responses(
        (status = 200, body = ScanReport),
        (status = 413, description = "The content is longer than the whole-file limit", body = Fault),
        (status = 507, description = "There is no room for the content", body = Fault),
    )
)]
pub async fn scan(State(api): State<Api>, Query(query): Query<ScanQuery>, body: Body) -> Response {
    let copy = match receive(&api, body).await {
        Ok(copy) => copy,
        Err(answer) => return answer,
    };
    let since = Instant::now();
    let (size, hash) = (copy.len(), copy.hash());
    let name = query.name.clone().into_bytes();
    let Some(answer) = on_demand::judge(&api.host, name, copy).await else {
        let message = "the service ends; scan again when it is back";
        return fault(StatusCode::SERVICE_UNAVAILABLE, "stopping", message);
    };
    let (detections, reason) = match &answer.finding {
        Finding::Clean => (Vec::new(), None),
        Finding::Infected(found) => (found.to_vec(), None),
        Finding::Error(why) | Finding::TimedOut(why) => (Vec::new(), Some(why.clone())),
    };
    Json(ScanReport {
        name: escape(query.name.as_bytes()),
        verdict: answer.finding.verdict(),
        reason,
        detections,
        engines: answer.engines.to_vec(),
        hash: hash.to_string(),
        size,
        cached: answer.cached,
        generation: answer.generation.0,
        duration_us: u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX),
    })
    .into_response()
}

async fn receive(api: &Api, body: Body) -> Result<PrivateCopy, Response> {
    let limit = api.host.config().policy.whole_file_limit();
    let mut copy = PrivateCopy::new(api.host.budget.whole(), limit, limit, Vec::new());
    let mut chunks = body.into_data_stream();
    let mut piece = Vec::new();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk
            .map_err(|error| fault(StatusCode::BAD_REQUEST, "broken-body", error.to_string()))?;
        piece.extend_from_slice(&chunk);
        if piece.len() >= PIECE {
            match store(copy, std::mem::take(&mut piece)).await {
                Ok(longer) => copy = longer,
                Err(answer) => {
                    tokio::spawn(take_in(chunks));
                    return Err(answer);
                }
            }
        }
    }
    store(copy, piece).await
}

/// Reads what is still on its way: a connection that is closed on it would break under the sender before
/// it has read the answer.
async fn take_in(mut chunks: BodyDataStream) {
    let rest = async { while let Some(Ok(_)) = chunks.next().await {} };
    let _enough = tokio::time::timeout(LINGER, rest).await;
}

/// Hashing and, above the budget, writing to disk: not on the asynchronous thread.
async fn store(mut copy: PrivateCopy, piece: Vec<u8>) -> Result<PrivateCopy, Response> {
    let work = tokio::task::spawn_blocking(move || {
        let fill = |to: &mut [u8]| {
            to.copy_from_slice(&piece);
            Ok::<_, CopyError>(())
        };
        copy.append(piece.len(), &mut Vec::new(), fill).map(|()| copy)
    });
    match work.await {
        Ok(Ok(copy)) => Ok(copy),
        Ok(Err(error @ CopyError::TooLong { .. })) => {
            Err(fault(StatusCode::PAYLOAD_TOO_LARGE, "too-long", error.to_string()))
        }
        Ok(Err(error)) => {
            Err(fault(StatusCode::INSUFFICIENT_STORAGE, "no-room", error.to_string()))
        }
        Err(error) => Err(fault(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string())),
    }
}
