//! The transports of this repository, as the conformance suite takes them.

pub use crate::rabbitmq::RabbitMq;
use async_trait::async_trait;
use std::sync::{Arc, Mutex, Weak};
use tidings::memory::{MemoryConfig, MemoryTransport};
use tidings::transport::Transport;
use tidings_conformance::{Broker, Factory};
use tidings_core::{Connect, Error, ErrorKind, Result};
use tidings_directory::DirectoryConfig;

/// The example of a transport: a directory of files for each case.
#[derive(Clone, Debug, Default)]
pub struct Directory;

struct DirectoryBroker {
    config: DirectoryConfig,
}

#[async_trait]
impl Factory for Directory {
    fn name(&self) -> &'static str {
        "directory"
    }

    async fn open(&self, namespace: &str) -> Result<Arc<dyn Broker>> {
        let path = std::env::temp_dir().join("tidings-directory").join(namespace);
        Ok(Arc::new(DirectoryBroker { config: DirectoryConfig { path, ..DirectoryConfig::default() } }))
    }

    fn cannot_cut(&self) -> Option<&'static str> {
        Some("there is no connection to a directory")
    }

    fn cannot_restart(&self) -> Option<&'static str> {
        Some("there is no server behind a directory")
    }
}

#[async_trait]
impl Broker for DirectoryBroker {
    async fn connect(&self) -> Result<Arc<dyn Transport>> {
        Ok(self.config.clone().connect().await?.0)
    }

    async fn clean_up(&self) -> Result<()> {
        // What a case left behind may still write.
        let mut tries = 0;
        loop {
            match std::fs::remove_dir_all(&self.config.path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound && tries == 100 => {
                    return Err(Error::new(ErrorKind::Internal, "the directory cannot be removed").with_source(error));
                }
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => tries += 1,
                _ => return Ok(()),
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

/// The memory transport: one broker for each case.
#[derive(Clone, Debug, Default)]
pub struct Memory;

struct MemoryBroker {
    config: MemoryConfig,
    /// A broker ends with its last handle.
    _keeps: Arc<MemoryTransport>,
    connected: Mutex<Vec<Weak<MemoryTransport>>>,
}

#[async_trait]
impl Factory for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }

    async fn open(&self, namespace: &str) -> Result<Arc<dyn Broker>> {
        let config = MemoryConfig::named(namespace);
        let keeps = MemoryTransport::connect(config.clone())?;
        Ok(Arc::new(MemoryBroker { config, _keeps: keeps, connected: Mutex::default() }))
    }

    fn in_process(&self) -> bool {
        true
    }

    fn cannot_cut(&self) -> Option<&'static str> {
        None
    }

    fn cannot_restart(&self) -> Option<&'static str> {
        Some("it ends with its process: `durable: false`")
    }
}

#[async_trait]
impl Broker for MemoryBroker {
    async fn connect(&self) -> Result<Arc<dyn Transport>> {
        let transport = MemoryTransport::connect(self.config.clone())?;
        self.connected.lock().expect("no panic inside").push(Arc::downgrade(&transport));
        Ok(transport)
    }

    async fn cut(&self) -> Result<()> {
        for transport in self.connected.lock().expect("no panic inside").iter().filter_map(Weak::upgrade) {
            let broker = transport.native().downcast_ref::<tidings::memory::MemoryBroker>();
            broker.expect("its native client").cut();
        }
        Ok(())
    }

    async fn clean_up(&self) -> Result<()> {
        Ok(())
    }
}
