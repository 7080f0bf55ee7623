//! Dead letters: a folder of files for each subscription. They never expire.

use crate::store::{Store, digits, numbers, read, sync};
use crate::worker::Link;
use async_trait::async_trait;
use std::fs;
use std::io::ErrorKind::NotFound;
use std::sync::Arc;
use tidings_core::transport::{DeadLetter, DeadLetters};
use tidings_core::{Result, SubscriptionName};

/// The dead letters of one subscription, through one transport.
pub(crate) struct DirectoryDeadLetters {
    pub(crate) link: Arc<Link>,
    pub(crate) name: SubscriptionName,
}

impl DirectoryDeadLetters {
    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Store, &SubscriptionName) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let name = self.name.clone();
        self.link.queue.ask("dead letters", move |disk| work(&mut disk.store, &name)).await
    }
}

#[async_trait]
impl DeadLetters for DirectoryDeadLetters {
    async fn count(&self) -> Result<u64> {
        self.with(|store, name| Ok(numbers(&store.dead(name))?.len() as u64)).await
    }

    async fn last(&self) -> Result<Option<u64>> {
        self.with(|store, name| Ok(numbers(&store.dead(name))?.last().copied())).await
    }

    async fn page(&self, after: Option<u64>, max: usize) -> Result<Vec<DeadLetter>> {
        self.with(move |store, name| page(store, name, after, max)).await
    }

    async fn remove(&self, positions: &[u64]) -> Result<u64> {
        let positions = positions.to_vec();
        self.with(move |store, name| remove(store, name, &positions)).await
    }
}

fn page(store: &Store, name: &SubscriptionName, after: Option<u64>, max: usize) -> Result<Vec<DeadLetter>> {
    let folder = store.dead(name);
    let mut letters = Vec::new();
    for position in numbers(&folder)?.into_iter().filter(|position| after.is_none_or(|after| *position > after)) {
        if letters.len() >= max {
            break;
        }
        // What was removed meanwhile is not there any more.
        if let Some(stored) = read(&folder.join(digits(position)))? {
            let message = stored.map_err(|damaged| damaged.error())?.message;
            letters.push(DeadLetter { position, message });
        }
    }
    Ok(letters)
}

fn remove(store: &Store, name: &SubscriptionName, positions: &[u64]) -> Result<u64> {
    let folder = store.dead(name);
    let mut removed = 0;
    for position in positions {
        let file = folder.join(digits(*position));
        match fs::remove_file(&file) {
            Ok(()) => removed += 1,
            Err(error) if error.kind() == NotFound => {}
            Err(error) => return Err(crate::error::failed(&file)(error)),
        }
    }
    if removed > 0 {
        sync(&folder)?;
    }
    Ok(removed)
}
