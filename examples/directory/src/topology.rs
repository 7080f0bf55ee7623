//! What exists: subscriptions, created once and never changed silently. Topics need nothing: they are names in the log.

use crate::error::{damaged, error, mismatch};
use crate::store::{Store, create_folder, read_bytes, sync};
use serde::{Deserialize, Serialize};
use tidings_core::transport::{Ordering, Start, SubscriptionSpec, TopicSpec, Topology};
use tidings_core::{ErrorKind, Result, SubscriptionName};

/// What a subscription is created with, and must be opened with again: the file `spec.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Terms {
    topics: Vec<String>,
    ordering: Ordering,
    start: Start,
    /// The last position of the log that it does not read.
    from: u64,
}

impl Terms {
    /// The order and repetition of its topics mean nothing.
    fn of(spec: &SubscriptionSpec) -> Self {
        let mut topics: Vec<_> = spec.topics.iter().map(|topic| topic.as_str().to_owned()).collect();
        topics.sort_unstable();
        topics.dedup();
        Self { topics, ordering: spec.ordering, start: spec.start, from: 0 }
    }

    fn read(store: &Store, spec: &SubscriptionSpec) -> Result<Option<Self>> {
        let file = store.subscription(&spec.name).join("spec.json");
        let Some(bytes) = read_bytes(&file)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|why| damaged(&file, why))
    }

    fn check(&self, asked: &Self) -> Result<()> {
        if self.topics != asked.topics {
            return Err(mismatch("topics of the subscription", &self.topics, &asked.topics));
        }
        if self.ordering != asked.ordering {
            return Err(mismatch("ordering of the subscription", self.ordering, asked.ordering));
        }
        if self.start != asked.start {
            let what = "start of the subscription, decided when it was created (`Bus::remove_subscription` lets it begin anew)";
            return Err(mismatch(what, self.start, asked.start));
        }
        Ok(())
    }
}

/// Checks everything, then creates what is missing.
pub(crate) fn provision(store: &mut Store, topology: &Topology) -> Result<()> {
    topology.topics.iter().try_for_each(check_topic)?;
    topology.subscriptions.iter().try_for_each(|spec| check(store, spec).map(drop))?;
    topology.subscriptions.iter().try_for_each(|spec| subscription(store, spec).map(drop))
}

fn check_topic(spec: &TopicSpec) -> Result<()> {
    let refused = |why: &str| Err(error(ErrorKind::Unsupported, why).with_context("topic", &spec.topic));
    match spec {
        TopicSpec { slots: 0, .. } => {
            Err(error(ErrorKind::Config, "a topic has at least one slot").with_context("topic", &spec.topic))
        }
        TopicSpec { slots: 2.., .. } => {
            refused("a topic has one slot here, and one active instance reads it; set `slots = 1`")
        }
        TopicSpec { retention: Some(_), .. } => refused("what is published is kept forever; leave `retention` out"),
        _ => Ok(()),
    }
}

fn check(store: &Store, spec: &SubscriptionSpec) -> Result<Option<Terms>> {
    if spec.max_in_flight == 0 {
        return Err(error(ErrorKind::Config, "max_in_flight must be at least 1"));
    }
    if spec.topics.is_empty() {
        return Err(error(ErrorKind::Config, "a subscription reads at least one topic"));
    }
    let Some(terms) = Terms::read(store, spec)? else { return Ok(None) };
    terms.check(&Terms::of(spec)).map_err(|error| error.with_context("subscription", &spec.name))?;
    Ok(Some(terms))
}

/// Creates a subscription unless it is there; returns the last position that it does not read. It lasts.
pub(crate) fn subscription(store: &mut Store, spec: &SubscriptionSpec) -> Result<u64> {
    // What is due was published before.
    store.move_due()?;
    store.locked(|store| {
        if let Some(terms) = check(store, spec)? {
            // Whoever created it may have failed to.
            sync(&store.subscription(&spec.name))?;
            return Ok(terms.from);
        }
        let from = if spec.start == Start::New { store.end()? } else { 0 };
        let terms = Terms { from, ..Terms::of(spec) };
        let folder = store.subscription(&spec.name);
        create_folder(&folder)?;
        // Numbers and strings: there is nothing in it that JSON cannot say.
        store.sync_log()?;
        store.write(&folder, "spec.json", &serde_json::to_vec_pretty(&terms).unwrap_or_default())?;
        store.sync()?;
        Ok(from)
    })
}

/// Deletes a subscription, and what the log has for its address; whether there was one. It lasts.
pub(crate) fn remove(store: &mut Store, name: &SubscriptionName) -> Result<bool> {
    store.move_due()?;
    store.locked(|store| {
        let found = store.is_subscription(name)?;
        store.forget_address(name)?;
        store.remove_subscription(name)?;
        Ok(found)
    })
}
