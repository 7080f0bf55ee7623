//! Reads topics again, by consumers of its own that move no subscription.

use crate::api::number;
use crate::connection::Link;
use crate::error::error;
use crate::source::{create_ephemeral, replay_name};
use crate::state::{Kind, Mode, Source};
use crate::subscription::Instance;
use crate::topology::{Catalog, ConsumerPlan, Part};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tidings_core::transport::{Ordering, ReplayFrom, ReplaySpec, Start, SubscriptionSpec};
use tidings_core::{ErrorKind, Result, SubscriptionName, to_rfc3339};

/// Opens a replay.
pub(crate) async fn open(catalog: &Arc<Catalog>, link: &Arc<Link>, spec: ReplaySpec) -> Result<Arc<Instance>> {
    if spec.max_in_flight == 0 {
        return Err(error(ErrorKind::Config, "max_in_flight must be at least 1"));
    }
    // One that follows needs the streams of what is published later.
    let parts = catalog.parts(&spec.topics, spec.follow).await?;
    let as_subscription = SubscriptionSpec {
        name: SubscriptionName::new("replay")?,
        topics: spec.topics.clone(),
        ordering: Ordering::Key,
        start: Start::New,
        max_in_flight: spec.max_in_flight,
        max_hold: Duration::MAX,
    };
    let instance = Instance::start(catalog, link, as_subscription, Mode::Replay).await?;
    for (n, part) in (0..).zip(&parts) {
        read_part(&instance, part, n, &spec).await?;
    }
    Ok(instance)
}

async fn read_part(instance: &Arc<Instance>, part: &Part, n: u32, spec: &ReplaySpec) -> Result<()> {
    let plan = ConsumerPlan {
        stream: part.stream.name.clone(),
        name: replay_name(),
        filters: instance.catalog.all_filters(part),
        ordering: Ordering::None,
        metadata: BTreeMap::new(),
        start: 1,
    };
    let created = create_ephemeral(instance, &plan, &start(spec.from)).await?;
    let mut source = Source::new(Kind::Topic, 0, n << 16, &plan.stream);
    source.done = !spec.follow && number(&created, "/num_pending") == 0;
    let end = if spec.follow { None } else { Some(part.stream.last()) };
    let pattern = part.patterns.first().map(ToString::to_string);
    instance.read(source, plan, pattern, end);
    Ok(())
}

fn start(from: ReplayFrom) -> Value {
    match from {
        ReplayFrom::Beginning | ReplayFrom::Position(0 | 1) => json!({ "deliver_policy": "all" }),
        ReplayFrom::Position(position) => json!({ "deliver_policy": "by_start_sequence", "opt_start_seq": position }),
        ReplayFrom::Time(time) => json!({ "deliver_policy": "by_start_time", "opt_start_time": to_rfc3339(time) }),
    }
}
