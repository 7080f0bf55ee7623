//! Takes messages to the thread.

use crate::store::after;
use crate::wire::Stored;
use crate::worker::{Link, Post};
use std::sync::Arc;
use tidings_core::transport::{Outgoing, Publisher};

/// The publisher of one transport.
///
/// A message waits in memory, in order, until it is on the disk and confirmed. There is always room: core bounds what is
/// unconfirmed, and what is [`owed`](Outgoing::owed) is little.
pub(crate) struct DirectoryPublisher {
    pub(crate) link: Arc<Link>,
}

impl Publisher for DirectoryPublisher {
    fn submit(&self, batch: &mut dyn Iterator<Item = Outgoing>) {
        let post = |out: Outgoing| {
            let delay = out.delay.unwrap_or_default();
            let stored =
                Stored { to: out.destination, received: after(delay), message: Arc::unwrap_or_clone(out.message) };
            Post { stored, delayed: !delay.is_zero(), receipt: out.receipt }
        };
        self.link.queue.post(batch.map(post).collect());
    }
}
