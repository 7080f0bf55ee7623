//! Reads topics again, as no member of any group: nothing is committed.

use crate::client;
use crate::consumer::Driver;
use crate::error::{client as failed, error};
use crate::marks::Marks;
use crate::part::{Kind, Part};
use crate::publisher::Outbox;
use crate::state::Mode;
use crate::subscription::Instance;
use crate::topology::{Catalog, blocking};
use rdkafka::consumer::Consumer;
use rdkafka::{Offset, TopicPartitionList};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};
use tidings_core::transport::{Ordering, ReplayFrom, ReplaySpec, Start, SubscriptionSpec};
use tidings_core::{ErrorKind, Result, SubscriptionName};

/// Opens a replay.
pub(crate) async fn open(catalog: &Arc<Catalog>, outbox: &Arc<Outbox>, spec: ReplaySpec) -> Result<Arc<Instance>> {
    if spec.max_in_flight == 0 {
        return Err(error(ErrorKind::Config, "max_in_flight must be at least 1"));
    }
    let as_subscription = SubscriptionSpec {
        name: SubscriptionName::new("replay")?,
        topics: spec.topics.clone(),
        ordering: Ordering::Key,
        start: Start::New,
        max_in_flight: spec.max_in_flight,
        max_hold: Duration::MAX,
    };
    let instance = Instance::new(catalog, outbox, as_subscription, Mode::Replay);
    let follows = spec.follow;
    let parts = blocking(catalog, move |catalog| parts(catalog, &spec)).await?;
    let mut config = client::reader(&catalog.config, Some(&catalog.names.reader()))?;
    config.set("enable.partition.eof", if follows { "false" } else { "true" });
    let consumer = instance.consumer(&config)?;
    {
        let mut state = instance.state.lock();
        (state.follows, state.is_open) = (follows, true);
    }
    Driver::start_with(consumer, &instance, parts)?;
    Ok(instance)
}

/// What is read, from where to where. Blocks.
fn parts(catalog: &Catalog, spec: &ReplaySpec) -> Result<Vec<Part>> {
    let mut parts = Vec::new();
    for (name, partitions) in catalog.matching(&spec.topics)? {
        let name: Arc<str> = name.into();
        for partition in 0..i32::try_from(partitions).unwrap_or(i32::MAX) {
            let (low, high) = catalog.ends(&name, partition)?;
            let first = match spec.from {
                ReplayFrom::Beginning => low,
                ReplayFrom::Position(position) => position.max(low),
                ReplayFrom::Time(time) => {
                    let millis = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
                    since(catalog, (&name, partition), i64::try_from(millis).unwrap_or(i64::MAX))?.unwrap_or(high)
                }
            };
            if !spec.follow && first >= high {
                continue;
            }
            let mut part =
                Part::new(&name, partition, Kind::Topic, true).starting_at(first.min(high), Marks::default());
            part.end = (!spec.follow).then_some(high);
            parts.push(part);
        }
    }
    Ok(parts)
}

/// The first offset at or after a time; `None` if nothing is.
fn since(catalog: &Catalog, (name, partition): (&str, i32), millis: i64) -> Result<Option<u64>> {
    let why = "the position at a time cannot be looked up";
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(name, partition, Offset::Offset(millis)).map_err(|e| failed(why, e))?;
    let found = catalog.lookup.offsets_for_times(list, catalog.config.request_timeout).map_err(|e| failed(why, e))?;
    let offset = found.elements().first().map(rdkafka::topic_partition_list::TopicPartitionListElem::offset);
    Ok(match offset {
        Some(Offset::Offset(offset)) => u64::try_from(offset).ok(),
        _ => None,
    })
}
