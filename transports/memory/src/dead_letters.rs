//! Dead letters: stored apart, for as long as the broker lives.

use crate::broker::{Broker, Client, State};
use async_trait::async_trait;
use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;
use tidings_core::transport::{DeadLetter, DeadLetters};
use tidings_core::{Message, Result, SubscriptionName};

/// The dead letters of one subscription, by position.
pub(crate) type Buried = BTreeMap<u64, Arc<Message>>;

impl State {
    pub(crate) fn bury(&mut self, space: usize, name: &SubscriptionName, message: Arc<Message>) {
        self.log.charge(message.size());
        let position = self.log.next_position();
        self.spaces[space].dead.entry(name.clone()).or_default().insert(position, message);
    }

    fn dig_up(&mut self, space: usize, name: &SubscriptionName, positions: &[u64]) -> u64 {
        let Some(buried) = self.spaces[space].dead.get_mut(name) else { return 0 };
        let mut removed = 0;
        for message in positions.iter().filter_map(|position| buried.remove(position)) {
            self.log.discharge(message.size());
            removed += 1;
        }
        self.admit_waiting();
        removed
    }
}

/// The dead letters of one subscription, through one transport.
pub(crate) struct MemoryDeadLetters {
    pub(crate) broker: Arc<Broker>,
    pub(crate) client: Arc<Client>,
    pub(crate) name: SubscriptionName,
}

impl MemoryDeadLetters {
    fn with<R>(&self, read: impl FnOnce(&Buried) -> R) -> Result<R> {
        self.client.check()?;
        let state = self.broker.lock();
        Ok(read(state.spaces[self.client.space].dead.get(&self.name).unwrap_or(&Buried::new())))
    }
}

#[async_trait]
impl DeadLetters for MemoryDeadLetters {
    async fn count(&self) -> Result<u64> {
        self.with(|buried| buried.len() as u64)
    }

    async fn last(&self) -> Result<Option<u64>> {
        self.with(|buried| buried.keys().next_back().copied())
    }

    async fn page(&self, after: Option<u64>, max: usize) -> Result<Vec<DeadLetter>> {
        let from = after.map_or(Unbounded, Excluded);
        let letter = |(position, message): (&u64, &Arc<Message>)| DeadLetter {
            position: *position,
            message: Message::clone(message),
        };
        self.with(|buried| buried.range((from, Unbounded)).take(max).map(letter).collect())
    }

    async fn remove(&self, positions: &[u64]) -> Result<u64> {
        self.client.check()?;
        Ok(self.broker.lock().dig_up(self.client.space, &self.name, positions))
    }
}
