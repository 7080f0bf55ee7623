//! What a transport's author writes.

use async_trait::async_trait;
use std::sync::Arc;
use std::time::Duration;
use tidings_core::Result;
use tidings_core::transport::Transport;

/// A transport under test: how to reach its broker.
#[async_trait]
pub trait Factory: Send + Sync + 'static {
    /// The first part of the names of its cases, such as `nats`.
    fn name(&self) -> &'static str;

    /// The broker as one case sees it, in a namespace that no other case uses.
    ///
    /// # Errors
    /// The broker cannot be reached: the case fails and says so.
    async fn open(&self, namespace: &str) -> Result<Arc<dyn Broker>>;

    /// Whether the broker lives in this process, so that its stored messages count as this process's memory.
    fn in_process(&self) -> bool {
        false
    }

    /// For how long a delivery stays with an instance that says nothing, where that is limited: the cases let handlers run
    /// for longer, and wait for as long after a crash. Configure the transport under test with a short one. Default: 1 s.
    fn lease(&self) -> Duration {
        Duration::from_secs(1)
    }

    /// Why [`Broker::cut`] cannot be done; `None` if it can.
    fn cannot_cut(&self) -> Option<&'static str> {
        Some("the factory cannot cut a connection")
    }

    /// Why [`Broker::restart`] cannot be done; `None` if it can.
    fn cannot_restart(&self) -> Option<&'static str> {
        Some("the factory cannot restart its broker")
    }
}

/// The broker as one case sees it.
#[async_trait]
pub trait Broker: Send + Sync {
    /// A new connection, as another process would make it: what it shares with the others, it shares by the broker.
    async fn connect(&self) -> Result<Arc<dyn Transport>>;

    /// Cuts all connections of this case. They may be made again at once.
    async fn cut(&self) -> Result<()> {
        Ok(())
    }

    /// Kills the broker and starts it again; returns when it can be reached. No other case runs meanwhile.
    async fn restart(&self) -> Result<()> {
        Ok(())
    }

    /// Removes what the retention of a topic no longer covers, where the broker would take longer by itself.
    async fn expire(&self, _topic: &str) -> Result<()> {
        Ok(())
    }

    /// Removes everything in the namespace.
    async fn clean_up(&self) -> Result<()>;
}
