//! Settles what one instance was handed. It outlives the instance.

use crate::state::Call;
use crate::subscription::Instance;
use std::sync::Weak;
use tidings_core::transport::{Lease, Settle, Settlement, Tag};

pub(crate) struct KafkaSettle(pub(crate) Weak<Instance>);

impl Settle for KafkaSettle {
    fn settle(&self, tag: Tag, settlement: Settlement) {
        if let Some(instance) = self.0.upgrade() {
            let call = instance.state.lock().settle(tag, settlement);
            if call == Call::Now {
                instance.signal.raise();
            }
        }
    }

    fn lease(&self, tag: Tag) -> Lease {
        self.0.upgrade().map_or(Lease::Lost, |instance| instance.state.lock().lease(tag))
    }
}
