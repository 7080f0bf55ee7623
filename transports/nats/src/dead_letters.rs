//! Dead letters: one stream for all subscriptions, a subject for each, kept until they are removed.

use crate::connection::Link;
use crate::error::{closed, error};
use crate::topology::Catalog;
use crate::wire;
use async_trait::async_trait;
use serde_json::json;
use std::sync::Arc;
use tidings_core::transport::{DeadLetter, DeadLetters};
use tidings_core::{ErrorKind, Result, SubscriptionName};

/// The dead letters of one subscription.
pub(crate) struct NatsDeadLetters {
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) link: Arc<Link>,
    pub(crate) name: SubscriptionName,
}

impl NatsDeadLetters {
    /// Stream and subject.
    fn place(&self) -> Result<(String, String)> {
        if self.link.is_closed() {
            return Err(closed());
        }
        Ok((self.catalog.names.dead_stream(), self.catalog.names.dead(&self.name)))
    }
}

#[async_trait]
impl DeadLetters for NatsDeadLetters {
    async fn count(&self) -> Result<u64> {
        let (stream, subject) = self.place()?;
        let body = json!({ "subjects_filter": subject });
        match self.catalog.api.call(&format!("STREAM.INFO.{stream}"), &body).await {
            Ok(info) => Ok(info["state"]["subjects"][&subject].as_u64().unwrap_or(0)),
            Err(failure) if failure.is_not_found() => Ok(0),
            Err(failure) => Err(failure.into()),
        }
    }

    async fn last(&self) -> Result<Option<u64>> {
        let (stream, subject) = self.place()?;
        Ok(self.catalog.api.last_message(&stream, &subject).await?.map(|stored| stored.sequence))
    }

    async fn page(&self, after: Option<u64>, max: usize) -> Result<Vec<DeadLetter>> {
        let (stream, subject) = self.place()?;
        let (mut letters, mut next) = (Vec::new(), after.map_or(1, |after| after.saturating_add(1)));
        while letters.len() < max {
            let Some(stored) = self.catalog.api.next_message(&stream, next, &subject).await? else { break };
            let origin = wire::Origin { topic: None, stream: &stream, position: stored.sequence };
            let message = wire::decode(stored.headers.as_ref(), &stored.payload, &origin);
            letters.push(DeadLetter { position: stored.sequence, message });
            next = stored.sequence + 1;
        }
        Ok(letters)
    }

    async fn remove(&self, positions: &[u64]) -> Result<u64> {
        let (stream, subject) = self.place()?;
        let mut removed = 0;
        for position in positions {
            // Positions are those of all subscriptions: another one's is not touched.
            let found = self.catalog.api.message(&stream, &json!({ "seq": position })).await?;
            if found.is_none_or(|stored| stored.subject != subject) {
                continue;
            }
            let body = json!({ "seq": position, "no_erase": true });
            match self.catalog.api.call(&format!("STREAM.MSG.DELETE.{stream}"), &body).await {
                Ok(_) => removed += 1,
                Err(failure) if failure.is_not_found() => {}
                Err(crate::error::Failure::Api(api)) if api.err_code == 10043 => {}
                Err(failure) => {
                    let failed = tidings_core::Error::from(failure);
                    let kind = if failed.is_transient() { failed.kind() } else { ErrorKind::Refused };
                    return Err(error(kind, "a dead letter cannot be deleted").with_source(failed));
                }
            }
        }
        Ok(removed)
    }
}
