//! Dead letters: a compacted topic for each subscription, in which each has a key of its own, so that a tombstone removes it.

use crate::error::{closed, error};
use crate::publisher::Outbox;
use crate::topology::{Catalog, blocking};
use crate::wire::{Decoder, Origin, without_letter_key};
use async_trait::async_trait;
use parking_lot::Mutex;
use rdkafka::message::{BorrowedMessage, Message as _};
use rdkafka::producer::BaseRecord;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidings_core::transport::{DeadLetter, DeadLetters};
use tidings_core::{ErrorKind, Result, SubscriptionName};

/// After how long what was read is read again from the beginning: by then tombstones may be compacted away unread.
const READ_ANEW: Duration = Duration::from_secs(3600);

/// Which dead letters there are, as far as the topic was read.
#[derive(Default)]
struct Index {
    next: u64,
    keys: BTreeMap<u64, Vec<u8>>,
    positions: HashMap<Vec<u8>, u64>,
    begun: Option<Instant>,
}

impl Index {
    fn note(&mut self, record: &BorrowedMessage<'_>) {
        let offset = u64::try_from(record.offset()).unwrap_or(0);
        self.next = offset + 1;
        // Others write without keys: what they wrote can be read and not removed.
        let key = record.key().unwrap_or_default().to_vec();
        if record.payload().is_none() {
            if let Some(position) = self.positions.remove(&key) {
                self.keys.remove(&position);
            }
            return;
        }
        if !key.is_empty() {
            self.positions.insert(key.clone(), offset);
        }
        self.keys.insert(offset, key);
    }

    fn forget(&mut self, position: u64) {
        if let Some(key) = self.keys.remove(&position) {
            self.positions.remove(&key);
        }
    }
}

/// The dead letters of one subscription.
pub(crate) struct KafkaDeadLetters {
    catalog: Arc<Catalog>,
    outbox: Arc<Outbox>,
    topic: String,
    index: Arc<Mutex<Index>>,
}

impl KafkaDeadLetters {
    pub(crate) fn new(catalog: &Arc<Catalog>, outbox: &Arc<Outbox>, name: &SubscriptionName) -> Self {
        let topic = catalog.names.dead(name);
        Self { catalog: Arc::clone(catalog), outbox: Arc::clone(outbox), topic, index: Arc::default() }
    }

    /// Reads what was added since, then looks.
    async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Catalog, &str, &mut Index) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        if self.catalog.link.is_closed() {
            return Err(closed());
        }
        let (topic, index) = (self.topic.clone(), Arc::clone(&self.index));
        blocking(&self.catalog, move |catalog| {
            let mut index = index.lock();
            refresh(catalog, &topic, &mut index)?;
            look(catalog, &topic, &mut index)
        })
        .await
    }
}

fn refresh(catalog: &Catalog, topic: &str, index: &mut Index) -> Result<()> {
    if catalog.partitions(topic)?.is_none() {
        *index = Index::default();
        return Ok(());
    }
    let (low, high) = catalog.ends(topic, 0)?;
    if high < index.next || index.begun.is_none_or(|begun| begun.elapsed() > READ_ANEW) {
        *index = Index { begun: Some(Instant::now()), ..Index::default() };
    }
    let range = index.next.max(low)..high;
    catalog.reader.read(topic, 0, range, |record| {
        index.note(record);
        true
    })?;
    index.next = index.next.max(high);
    Ok(())
}

/// Up to `max` dead letters after a position.
fn page(
    catalog: &Catalog,
    topic: &str,
    index: &mut Index,
    (after, max): (Option<u64>, usize),
) -> Result<Vec<DeadLetter>> {
    let first = after.map_or(0, |after| after.saturating_add(1));
    let wanted: Vec<u64> = index.keys.range(first..).take(max).map(|(position, _)| *position).collect();
    let (Some(from), Some(to)) = (wanted.first(), wanted.last()) else { return Ok(Vec::new()) };
    let (mut letters, mut decoder) = (Vec::with_capacity(wanted.len()), Decoder::default());
    catalog.reader.read(topic, 0, *from..to + 1, |record| {
        let position = u64::try_from(record.offset()).unwrap_or(0);
        if wanted.binary_search(&position).is_ok() {
            let origin = Origin { topic: None, name: topic, partition: 0, offset: record.offset() };
            let message = without_letter_key(decoder.decode(record, &origin).message, record.key());
            letters.push(DeadLetter { position, message });
        }
        true
    })?;
    let found = |position: &u64| letters.binary_search_by_key(position, |letter| letter.position).is_ok();
    wanted.iter().filter(|position| !found(position)).for_each(|position| index.forget(*position));
    Ok(letters)
}

#[async_trait]
impl DeadLetters for KafkaDeadLetters {
    async fn count(&self) -> Result<u64> {
        self.look(|_, _, index| Ok(index.keys.len() as u64)).await
    }

    async fn last(&self) -> Result<Option<u64>> {
        self.look(|_, _, index| Ok(index.keys.last_key_value().map(|(position, _)| *position))).await
    }

    async fn page(&self, after: Option<u64>, max: usize) -> Result<Vec<DeadLetter>> {
        self.look(move |catalog, topic, index| page(catalog, topic, index, (after, max))).await
    }

    async fn remove(&self, positions: &[u64]) -> Result<u64> {
        let wanted = positions.to_vec();
        let keys = self.look(move |_, _, index| {
            let mut keys: Vec<_> =
                wanted.iter().filter_map(|p| index.keys.get(p).map(|key| (*p, key.clone()))).collect();
            keys.sort_unstable();
            keys.dedup();
            Ok(keys)
        });
        let mut removed = 0;
        for (position, key) in keys.await? {
            if key.is_empty() {
                let why = "a dead letter of another client has no key, by which alone it could be removed";
                return Err(error(ErrorKind::Refused, why).with_context("position", position));
            }
            let record = BaseRecord { key: Some(&key[..]), ..BaseRecord::to(&self.topic).partition(0) };
            self.outbox.write(record).await?;
            self.index.lock().forget(position);
            removed += 1;
        }
        Ok(removed)
    }
}
