//! Asks the service over its unix socket: HTTP/1.1, one connection for each request.

use crate::event::EventsQuery;
use crate::golden::{GoldenFiles, GoldenLearnRequest, GoldenList, GoldenReport};
use crate::policy::{ExplainQuery, GuestPolicy, PolicyCheck, PolicyExplanation};
use crate::scans::{GuestScan, ScansRequest, ScheduleReport};
use crate::types::{
    ApplyRequest, Approval, Fault, Guest, Quarantine, QuarantineEntry, Reload, RestoreRequest,
    RollbackRequest, ScanReport, SignatureChange, SignatureSet, Status,
};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full, combinators::BoxBody};
use hyper::body::{Body, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use std::io;
use std::path::{Path, PathBuf};
use tokio::net::UnixStream;

/// The longest answer that is not a stream, in bytes.
const ANSWER_MAX: usize = 64 << 20;
/// The longest event line, in bytes.
const LINE_MAX: usize = 1 << 20;

/// Why the service gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there, or not for this user.
    #[error("the service cannot be reached at {}: {reason}", socket.display())]
    Unreachable {
        /// The service's socket.
        socket: PathBuf,
        /// What the system says.
        reason: io::Error,
    },
    /// The connection ended in the middle.
    #[error("the connection to the service broke: {0}")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The service refused the request.
    #[error("{}", .0.message)]
    Refused(Fault),
    /// The answer is not what this build expects.
    #[error("the service's answer is not understood ({status}): {reason}")]
    Answer {
        /// The HTTP status.
        status: u16,
        /// What is wrong with it.
        reason: String,
    },
}

fn broken(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
    ClientError::Broken(error.into())
}

/// The service's REST interface, version 1.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the service that listens on `socket`. Connects at each request.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// The service's socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// How the service is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.get("/v1/status").await
    }

    /// All configured guests.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn guests(&self) -> Result<Vec<Guest>, ClientError> {
        self.get("/v1/guests").await
    }

    /// The events that `query` wants.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn events(&self, query: &EventsQuery) -> Result<Lines, ClientError> {
        let answer = self.send(Method::GET, &events_path(query), Empty::new()).await?;
        Ok(Lines { body: answer.into_body(), pending: Vec::new() })
    }

    /// Scans `content`; `name` is for the report and the engines' hints.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn scan<B>(&self, name: &str, content: B) -> Result<ScanReport, ClientError>
    where
        B: Body<Data = Bytes> + Send + Sync + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + std::error::Error + Send + Sync,
    {
        let path = format!("/v1/scan?name={}", encode_query(name));
        read(self.send(Method::POST, &path, content).await?).await
    }

    /// Has the service read its configuration and its engines' signatures again.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn reload(&self) -> Result<Reload, ClientError> {
        read(self.send(Method::POST, "/v1/reload", Empty::new()).await?).await
    }

    /// What a reload would say of the files as they are now.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn check_policy(&self) -> Result<PolicyCheck, ClientError> {
        self.get("/v1/policy/check").await
    }

    /// A guest's policy.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn guest_policy(&self, guest: &str) -> Result<GuestPolicy, ClientError> {
        self.get(&format!("/v1/guests/{}/policy", encode_query(guest))).await
    }

    /// What happens to an access in a guest.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn explain_policy(
        &self,
        guest: &str,
        access: &ExplainQuery,
    ) -> Result<PolicyExplanation, ClientError> {
        let (guest, query) =
            (encode_query(guest), serde_urlencoded::to_string(access).map_err(broken)?);
        self.get(&format!("/v1/guests/{guest}/policy/explain?{query}")).await
    }

    /// All scans of guests, without what they found by name.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn scans(&self) -> Result<Vec<GuestScan>, ClientError> {
        self.get("/v1/scans").await
    }

    /// One scan of a guest.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn guest_scan(&self, id: u64) -> Result<GuestScan, ClientError> {
        self.get(&format!("/v1/scans/{id}")).await
    }

    /// Has guests scanned.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn scan_guests(&self, wanted: &ScansRequest) -> Result<Vec<GuestScan>, ClientError> {
        self.send_json(Method::POST, "/v1/scans", wanted).await
    }

    /// Pauses, resumes or cancels a scan of a guest: `pause`, `resume` or `cancel`.
    ///
    /// # Errors
    /// [`ClientError`]; code `wrong-state` where its state does not allow that.
    pub async fn order_scan(&self, id: u64, order: &str) -> Result<GuestScan, ClientError> {
        let path = format!("/v1/scans/{id}/{}", encode_query(order));
        read(self.send(Method::POST, &path, Empty::new()).await?).await
    }

    /// All schedules.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn schedules(&self) -> Result<Vec<ScheduleReport>, ClientError> {
        self.get("/v1/schedules").await
    }

    /// Has a schedule run now.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn run_schedule(&self, name: &str) -> Result<Vec<GuestScan>, ClientError> {
        let path = format!("/v1/schedules/{}/run", encode_query(name));
        read(self.send(Method::POST, &path, Empty::new()).await?).await
    }

    /// Has a schedule's next time left out.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn skip_schedule(&self, name: &str) -> Result<ScheduleReport, ClientError> {
        let path = format!("/v1/schedules/{}/skip", encode_query(name));
        read(self.send(Method::POST, &path, Empty::new()).await?).await
    }

    /// All golden images, and of which guests they are not used.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn golden(&self) -> Result<GoldenReport, ClientError> {
        self.get("/v1/golden").await
    }

    /// Has a guest scanned and learned as a golden image.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn learn_golden(
        &self,
        name: &str,
        wanted: &GoldenLearnRequest,
    ) -> Result<GuestScan, ClientError> {
        let path = format!("/v1/golden/{}", encode_query(name));
        self.send_json(Method::POST, &path, wanted).await
    }

    /// Gives the files of a tree, which are a golden image from then on.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn put_golden(
        &self,
        name: &str,
        wanted: &GoldenFiles,
    ) -> Result<GoldenList, ClientError> {
        let path = format!("/v1/golden/{}", encode_query(name));
        self.send_json(Method::PUT, &path, wanted).await
    }

    /// Forgets a golden image.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn forget_golden(&self, name: &str) -> Result<GoldenReport, ClientError> {
        let path = format!("/v1/golden/{}", encode_query(name));
        read(self.send(Method::DELETE, &path, Empty::new()).await?).await
    }

    /// Has golden images used again for a guest that did not agree with one.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn trust_golden(&self, guest: &str) -> Result<GoldenReport, ClientError> {
        let path = format!("/v1/guests/{}/golden", encode_query(guest));
        read(self.send(Method::POST, &path, Empty::new()).await?).await
    }

    /// What is in quarantine, of one guest if named.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn quarantine(&self, guest: Option<&str>) -> Result<Quarantine, ClientError> {
        let query =
            guest.map_or_else(String::new, |guest| format!("?guest={}", encode_query(guest)));
        self.get(&format!("/v1/quarantine{query}")).await
    }

    /// One entry, named by its id or enough of its first digits.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn quarantine_entry(&self, id: &str) -> Result<QuarantineEntry, ClientError> {
        self.get(&format!("/v1/quarantine/{}", encode_query(id))).await
    }

    /// The content of an entry, piece by piece.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn quarantined_content(&self, id: &str) -> Result<Pieces, ClientError> {
        let path = format!("/v1/quarantine/{}/content", encode_query(id));
        let answer = self.send(Method::GET, &path, Empty::new()).await?;
        Ok(Pieces(answer.into_body()))
    }

    /// Gives a file back to a guest.
    ///
    /// # Errors
    /// [`ClientError`]; code `exists` where a file is in the way.
    pub async fn restore(
        &self,
        id: &str,
        wanted: &RestoreRequest,
    ) -> Result<QuarantineEntry, ClientError> {
        let path = format!("/v1/quarantine/{}/restore", encode_query(id));
        self.send_json(Method::POST, &path, wanted).await
    }

    /// Deletes an entry for good.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn delete_quarantined(&self, id: &str) -> Result<QuarantineEntry, ClientError> {
        let path = format!("/v1/quarantine/{}", encode_query(id));
        read(self.send(Method::DELETE, &path, Empty::new()).await?).await
    }

    /// All contents that pass although they are detected.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn approvals(&self) -> Result<Vec<Approval>, ClientError> {
        self.get("/v1/approvals").await
    }

    /// Lets a content pass; gives all that pass now.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn approve(&self, approval: &Approval) -> Result<Vec<Approval>, ClientError> {
        self.send_json(Method::POST, "/v1/approvals", approval).await
    }

    /// Takes an approval back; gives all that are left.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn revoke(&self, approval: &Approval) -> Result<Vec<Approval>, ClientError> {
        self.send_json(Method::DELETE, "/v1/approvals", approval).await
    }

    /// The signature sets that are kept, the newest last.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn signatures(&self) -> Result<Vec<SignatureSet>, ClientError> {
        self.get("/v1/signatures").await
    }

    /// Changes of signatures that are remembered, the newest last.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn signature_history(&self) -> Result<Vec<SignatureChange>, ClientError> {
        self.get("/v1/signatures/history").await
    }

    /// Has a folder become the signature set in use, and waits for the end. It goes on without whoever asked.
    ///
    /// # Errors
    /// [`ClientError`]; a set that is refused is none.
    pub async fn apply_signatures(
        &self,
        wanted: &ApplyRequest,
    ) -> Result<SignatureChange, ClientError> {
        self.send_json(Method::POST, "/v1/signatures/apply", wanted).await
    }

    /// Goes back to an earlier signature set.
    ///
    /// # Errors
    /// [`ClientError`]; where there is none the answer says so.
    pub async fn roll_back_signatures(
        &self,
        wanted: &RollbackRequest,
    ) -> Result<SignatureChange, ClientError> {
        self.send_json(Method::POST, "/v1/signatures/rollback", wanted).await
    }

    async fn send_json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        value: &impl serde::Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(value).map_err(broken)?;
        read(self.send(method, path, Full::new(Bytes::from(body))).await?).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        read(self.send(Method::GET, path, Empty::new()).await?).await
    }

    async fn send<B>(
        &self,
        method: Method,
        path: &str,
        body: B,
    ) -> Result<Response<Incoming>, ClientError>
    where
        B: Body<Data = Bytes> + Send + Sync + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + std::error::Error + Send + Sync,
    {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|reason| ClientError::Unreachable { socket: self.socket.clone(), reason })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        tokio::spawn(connection);
        let body: BoxBody<Bytes, B::Error> = BoxBody::new(body);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "seawalld")
            .header("content-type", "application/json")
            .body(body)
            .map_err(broken)?;
        let answer = sender.send_request(request).await.map_err(broken)?;
        if answer.status().is_success() { Ok(answer) } else { Err(fault(answer).await) }
    }
}

async fn fault(answer: Response<Incoming>) -> ClientError {
    let status = answer.status();
    let body = match collect(answer.into_body()).await {
        Ok(body) => body,
        Err(error) => return error,
    };
    match serde_json::from_slice(&body) {
        Ok(fault) => ClientError::Refused(fault),
        Err(_) => ClientError::Answer {
            status: status.as_u16(),
            reason: crate::text::escape_short(&body, 200),
        },
    }
}

async fn read<T: DeserializeOwned>(answer: Response<Incoming>) -> Result<T, ClientError> {
    let body = collect(answer.into_body()).await?;
    serde_json::from_slice(&body).map_err(|error| ClientError::Answer {
        status: StatusCode::OK.as_u16(),
        reason: error.to_string(),
    })
}

async fn collect(body: Incoming) -> Result<Bytes, ClientError> {
    let limited = http_body_util::Limited::new(body, ANSWER_MAX);
    Ok(limited.collect().await.map_err(broken)?.to_bytes())
}

/// A content as it arrives.
#[derive(Debug)]
pub struct Pieces(Incoming);

impl Pieces {
    /// The next piece; `None` after the last one.
    ///
    /// # Errors
    /// [`ClientError::Broken`]: what came is not the whole.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            let Some(frame) = self.0.frame().await else { return Ok(None) };
            if let Ok(data) = frame.map_err(broken)?.into_data() {
                return Ok(Some(data));
            }
        }
    }
}

/// Event lines as they arrive; each is one JSON object ([`Event`](crate::Event)).
#[derive(Debug)]
pub struct Lines {
    body: Incoming,
    pending: Vec<u8>,
}

impl Lines {
    /// The next line, without its end; `None` after the last one.
    ///
    /// # Errors
    /// [`ClientError::Broken`].
    pub async fn next(&mut self) -> Result<Option<String>, ClientError> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).take(end).collect();
                return String::from_utf8(line).map(Some).map_err(broken);
            }
            if self.pending.len() > LINE_MAX {
                return Err(broken("an event line without an end"));
            }
            match self.body.frame().await {
                Some(frame) => {
                    if let Ok(data) = frame.map_err(broken)?.into_data() {
                        self.pending.extend_from_slice(&data);
                    }
                }
                None => return Ok(None),
            }
        }
    }
}

fn events_path(query: &EventsQuery) -> String {
    let EventsQuery { guest, kind, since, until, hash, path, verdict, after, limit, follow } =
        query;
    let texts = [
        ("guest", guest.clone()),
        ("kind", kind.clone()),
        ("since", since.clone()),
        ("until", until.clone()),
        ("hash", hash.clone()),
        ("path", path.clone()),
        ("verdict", verdict.clone()),
        ("after", after.map(|id| id.to_string())),
        ("limit", limit.map(|count| count.to_string())),
    ];
    let mut uri = format!("/v1/events?follow={follow}");
    for (name, value) in texts {
        if let Some(value) = value {
            uri += &format!("&{name}={}", encode_query(&value));
        }
    }
    uri
}

/// Percent-encodes a query value (RFC 3986, section 2.3: everything but unreserved characters).
fn encode_query(value: &str) -> String {
    use std::fmt::Write;
    let mut out = String::with_capacity(value.len());
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_names_only_what_is_wanted() {
        assert_eq!(events_path(&EventsQuery::default()), "/v1/events?follow=false");
        let query = EventsQuery {
            path: Some("/a&b".into()),
            after: Some(7),
            follow: true,
            ..EventsQuery::default()
        };
        assert_eq!(events_path(&query), "/v1/events?follow=true&path=%2Fa%26b&after=7");
    }

    #[test]
    fn names_travel_in_a_query() {
        assert_eq!(encode_query("a b&c=ü/~"), "a%20b%26c%3D%C3%BC%2F~");
    }
}
