//! Takes messages to the broker.

use crate::broker::{Broker, Client};
use std::sync::Arc;
use tidings_core::transport::{Outgoing, Publisher};

/// The publisher of one transport.
///
/// A message is stored, and confirmed, before `submit` returns; over `capacity` it waits here, in turn, until there
/// is room or nobody waits for the answer.
pub(crate) struct MemoryPublisher {
    pub(crate) broker: Arc<Broker>,
    pub(crate) client: Arc<Client>,
}

impl Publisher for MemoryPublisher {
    fn submit(&self, batch: &mut dyn Iterator<Item = Outgoing>) {
        let mut state = self.broker.lock();
        state.advance();
        state.submit(&self.client, batch);
    }
}
