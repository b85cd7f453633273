//! A scan on demand: nobody's access is held for it.

use crate::copy::PrivateCopy;
use crate::host::Host;
use crate::pipeline::{Answer, Archive, Reply, Request};
use seawall_engine::host::Lane;
use seawall_engine::{Metadata, Operation};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// The longest that it may wait and take.
const PATIENCE: Duration = Duration::from_secs(600);

/// Whoever asked; it may go away, and then nobody wants the answer.
struct Caller(oneshot::Sender<Answer>);

impl Reply for Caller {
    fn answer(self: Box<Self>, answer: Answer) {
        drop(self.0.send(answer));
    }

    fn is_gone(&self) -> bool {
        self.0.is_closed()
    }
}

/// The verdict on a content, from the cache or the engines; `path` is for rules that ask for it. `None`
/// when the service ends.
pub async fn judge(host: &Host, path: Vec<u8>, copy: PrivateCopy) -> Option<Answer> {
    let (size, hash) = (copy.len(), copy.hash());
    let archives = host.config().policy.archives.limits(Operation::OnDemand, &copy);
    let archive = Archive::of(&copy, archives.is_some());
    let meta =
        Metadata { path, guest: String::new(), operation: Operation::OnDemand, size, archives };
    let answer = match host.pipeline.lookup(hash, archive, &meta, &None) {
        Some(answer) => answer,
        None => {
            let (reply, answer) = oneshot::channel();
            host.pipeline.scan(Request {
                hash,
                copy,
                meta,
                tenant: None,
                lane: Lane::OnDemand,
                until: Instant::now() + PATIENCE,
                reply: Box::new(Caller(reply)),
            });
            answer.await.ok()?
        }
    };
    host.metrics.verdicts.count(answer.finding.verdict());
    Some(answer)
}
