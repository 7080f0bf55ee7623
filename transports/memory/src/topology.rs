//! What exists: topics and subscriptions, created once and never changed silently.

use crate::broker::{Broker, Client, Seat, State, TopicState};
use crate::error::{error, mismatch};
use crate::group::{Group, Joining, Terms};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use tidings_core::transport::{Ordering, ReplayFrom, ReplaySpec, Start, SubscriptionSpec, TopicSpec, Topology};
use tidings_core::{ErrorKind, Result, SubscriptionName, Topic};

impl Terms {
    /// What a subscription is created with; the order and repetition of its topics mean nothing.
    fn of(spec: &SubscriptionSpec) -> Self {
        let mut topics = spec.topics.clone();
        topics.sort_unstable();
        topics.dedup();
        Self { topics, ordering: spec.ordering, start: spec.start }
    }

    fn check(&self, asked: &Self) -> Result<()> {
        if self.topics != asked.topics {
            let list = |terms: &Self| terms.topics.iter().map(ToString::to_string).collect::<Vec<_>>();
            return Err(mismatch("topics of the subscription", list(self), list(asked)));
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

impl State {
    pub(crate) fn provision(&mut self, space: usize, topology: &Topology) -> Result<()> {
        self.advance();
        topology.topics.iter().try_for_each(|spec| self.check_topic(space, spec))?;
        topology.subscriptions.iter().try_for_each(|spec| self.check_subscription(space, spec))?;
        topology.topics.iter().for_each(|spec| self.provision_topic(space, spec));
        topology.subscriptions.iter().try_for_each(|spec| self.subscription(space, spec).map(drop))
    }

    fn check_topic(&self, space: usize, spec: &TopicSpec) -> Result<()> {
        if spec.slots == 0 {
            let why = "a topic has at least one slot";
            return Err(error(ErrorKind::Config, why).with_context("topic", &spec.topic));
        }
        let Some(topic) = self.spaces[space].topics.get(&spec.topic) else { return Ok(()) };
        let has = &self.topics[*topic as usize];
        if has.slots != spec.slots {
            return Err(mismatch("slots of the topic", has.slots, spec.slots).with_context("topic", &spec.topic));
        }
        if has.provisioned && has.retention != spec.retention {
            let error = mismatch("retention of the topic", has.retention, spec.retention);
            return Err(error.with_context("topic", &spec.topic));
        }
        Ok(())
    }

    fn provision_topic(&mut self, space: usize, spec: &TopicSpec) {
        let topic = match self.spaces[space].topics.get(&spec.topic) {
            Some(topic) => *topic,
            None => self.create_topic(space, &spec.topic, spec.slots),
        };
        let has = &mut self.topics[topic as usize];
        (has.provisioned, has.retention) = (true, spec.retention);
        self.limited |= spec.retention.is_some();
    }

    /// The number of a topic, which is created when it is first published to.
    pub(crate) fn topic(&mut self, space: usize, topic: &Topic) -> u32 {
        if self.topics.get(self.last as usize).is_some_and(|last| last.space == space && last.topic == *topic) {
            return self.last;
        }
        self.last = match self.spaces[space].topics.get(topic) {
            Some(topic) => *topic,
            None => self.create_topic(space, topic, 1),
        };
        self.last
    }

    fn create_topic(&mut self, space: usize, topic: &Topic, slots: u32) -> u32 {
        let mut groups = Vec::new();
        for (key, group) in &mut self.groups {
            if group.space == space && group.replay != Some(false) && group.reads(topic) {
                group.grow(slots);
                groups.push(key);
            }
        }
        let number = self.topics.len() as u32;
        let topic = topic.clone();
        self.spaces[space].topics.insert(topic.clone(), number);
        self.topics.push(TopicState { space, topic, slots, retention: None, provisioned: false, groups });
        number
    }

    fn check_subscription(&self, space: usize, spec: &SubscriptionSpec) -> Result<()> {
        if spec.max_in_flight == 0 {
            return Err(error(ErrorKind::Config, "max_in_flight must be at least 1"));
        }
        if spec.topics.is_empty() {
            return Err(error(ErrorKind::Config, "a subscription reads at least one topic"));
        }
        match self.spaces[space].groups.get(&spec.name) {
            Some(group) => self.groups[*group].terms.check(&Terms::of(spec)),
            None => Ok(()),
        }
        .map_err(|error| error.with_context("subscription", &spec.name))
    }

    fn subscription(&mut self, space: usize, spec: &SubscriptionSpec) -> Result<usize> {
        self.check_subscription(space, spec)?;
        if let Some(group) = self.spaces[space].groups.get(&spec.name) {
            return Ok(*group);
        }
        let key = self.add_group(Group::new(space, Terms::of(spec), None), true);
        self.spaces[space].groups.insert(spec.name.clone(), key);
        if spec.start == Start::Beginning {
            self.catch_up(key, ReplayFrom::Beginning, None);
        }
        Ok(key)
    }

    /// Forgets a subscription, with what waits for it; whether there was one.
    pub(crate) fn remove(&mut self, space: usize, name: &SubscriptionName) -> bool {
        let Some(group) = self.spaces[space].groups.remove(name) else { return false };
        self.remove_group(group);
        self.admit_waiting();
        true
    }

    /// Adds a group, which is handed what is published from now on if it `follows`.
    fn add_group(&mut self, mut group: Group, follows: bool) -> usize {
        let entry = self.groups.vacant_entry();
        let key = entry.key();
        for topic in &mut self.topics {
            if topic.space == group.space && group.reads(&topic.topic) {
                group.grow(topic.slots);
                topic.groups.extend(follows.then_some(key));
            }
        }
        entry.insert(group);
        key
    }

    fn join(&mut self, client: &Client, group: usize, max_in_flight: usize) -> (Seat, Arc<AtomicU32>) {
        let (instance, epoch) = (self.number(), Arc::new(AtomicU32::new(1)));
        let joining = Joining { instance, client: client.id, epoch: Arc::clone(&epoch), max_in_flight };
        let key = self.groups[group].join(joining);
        (Seat { group, key, instance }, epoch)
    }

    pub(crate) fn subscribe(&mut self, client: &Client, spec: &SubscriptionSpec) -> Result<(Seat, Arc<AtomicU32>)> {
        self.advance();
        let group = self.subscription(client.space, spec)?;
        Ok(self.join(client, group, spec.max_in_flight))
    }

    pub(crate) fn replay(
        &mut self,
        broker: &Broker,
        client: &Client,
        spec: ReplaySpec,
    ) -> Result<(Seat, Arc<AtomicU32>)> {
        if spec.max_in_flight == 0 {
            return Err(error(ErrorKind::Config, "max_in_flight must be at least 1"));
        }
        self.advance();
        let since = match spec.from {
            ReplayFrom::Time(time) => broker.instant_of(time),
            ReplayFrom::Beginning | ReplayFrom::Position(_) => None,
        };
        let terms = Terms { topics: spec.topics, ordering: Ordering::Key, start: Start::New };
        let group = self.add_group(Group::new(client.space, terms, Some(spec.follow)), spec.follow);
        self.catch_up(group, spec.from, since);
        Ok(self.join(client, group, spec.max_in_flight))
    }
}
