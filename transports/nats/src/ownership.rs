//! Who owns which slot of a subscription with order per key.
//!
//! Each instance tells every now and then, in the bucket, that it lives; from who lives and the number of slots all compute the same
//! shares. A slot is owned by who has written its claim, against the revision that it has read, and its consumers are
//! pinned: what a former owner has still asked for is not served. An owner that cannot tell that it lives gives up all before
//! others may take it.

use crate::api::{Api, number};
use crate::connection::Link;
use crate::error::{ApiError, Failure, error};
use crate::state::{Kind, Recovery, Source, SourceId};
use crate::subscription::{Instance, read_slot};
use crate::topology::{Catalog, ConsumerPlan, Part, expecting};
use crate::wire;
use async_nats::{HeaderMap, HeaderValue, Subscriber};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tidings_core::transport::{Notice, Ordering, Role, share_slots};
use tidings_core::{ErrorKind, Result};
use tokio::time::{Instant, interval, sleep_until};

/// The number of slots is looked up so often, in heartbeats.
const SLOTS_EVERY: u32 = 8;
/// How long a member that has ended without a word is remembered.
const REMEMBERED: &str = "60s";

/// Between attempts to tell that this instance lives.
const AGAIN: Duration = Duration::from_millis(200);

#[derive(Serialize, Deserialize)]
struct Member {
    /// Orders members by how long they have taken part; 0 while it is not known yet.
    rank: u64,
    /// It takes nothing any more, but keeps what it owns.
    stopped: bool,
}

#[derive(Serialize, Deserialize)]
struct Claim {
    /// Empty if nobody owns it.
    owner: String,
}

/// A slot that this instance owns.
struct Owned {
    /// The revision of its claim.
    revision: u64,
    sources: Vec<SourceId>,
}

/// What the bucket says.
struct Picture {
    /// Members that live: rank and name, ascending, without those that have stopped.
    members: Vec<(u64, String)>,
    living: BTreeSet<String>,
    /// By slot: owner and revision.
    claims: BTreeMap<u32, (String, u64)>,
}

struct Ownership {
    instance: Arc<Instance>,
    parts: Vec<Part>,
    name: String,
    rank: u64,
    slots: u32,
    owned: BTreeMap<u32, Owned>,
    /// When it was last told that this instance lives.
    told: Instant,
    /// The last round has failed.
    failed: bool,
    rounds: u32,
}

/// Reads a consumer as its owner, or with others. An owner first waits for what a former one has left open.
pub(crate) async fn take_over(
    instance: &Arc<Instance>,
    mut source: Source,
    mut plan: ConsumerPlan,
    pattern: Option<String>,
) -> Result<SourceId> {
    let catalog = &instance.catalog;
    let mut info = catalog.ensure_consumer(&plan).await?;
    if plan.ordering == Ordering::Key {
        catalog.unpin(&plan.stream, &plan.name).await?;
        info = catalog.consumer(&plan.stream, &plan.name).await?;
    }
    if source.kind == Kind::Topic {
        let start = info["config"]["metadata"]["tidings-start-seq"].as_str().and_then(|start| start.parse().ok());
        plan.start = start.unwrap_or(1);
    }
    if plan.ordering == Ordering::Key {
        let (after, missing) = (number(&info, "/delivered/stream_seq"), number(&info, "/num_ack_pending"));
        source.high = after;
        if missing > 0 && source.kind == Kind::Topic {
            source.recovery = Some(Recovery { after, missing, since: Instant::now() });
        }
    }
    Ok(instance.read(source, plan, pattern, None))
}

/// Takes part in the sharing of a subscription's slots, from now on.
pub(crate) async fn start(instance: &Arc<Instance>, parts: Vec<Part>) -> Result<()> {
    let name = format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..));
    let catalog = &instance.catalog;
    let slots = catalog.slots(&instance.spec.topics).await?;
    let claims = catalog.names.claim_key(&instance.spec.name, "*");
    let client = &catalog.api.client;
    let listening = |e| error(ErrorKind::Connection, "cannot listen to the bucket").with_source(e);
    let claims = client.subscribe(claims).await.map_err(listening)?;
    let topics = client.subscribe(catalog.names.topic_key(">")).await.map_err(listening)?;
    let (instance_, told) = (Arc::clone(instance), Instant::now());
    let mut ownership = Ownership {
        instance: instance_,
        parts,
        name,
        rank: 0,
        slots,
        owned: BTreeMap::new(),
        told,
        failed: false,
        rounds: 0,
    };
    ownership.join().await?;
    instance.spawn(ownership.run(claims, topics));
    Ok(())
}

/// How long an owner that does not tell that it lives keeps what it owns.
fn patience(catalog: &Catalog) -> Duration {
    catalog.ack_wait / 2
}

impl Ownership {
    fn catalog(&self) -> &Catalog {
        &self.instance.catalog
    }

    /// An owner has no longer for a request than it may keep what it owns.
    fn api(&self) -> Api {
        let (api, patience) = (&self.catalog().api, patience(self.catalog()));
        if self.owned.is_empty() {
            return api.clone();
        }
        api.impatient(patience.saturating_sub(self.told.elapsed()).max(patience / 5))
    }

    fn link(&self) -> &Link {
        &self.instance.link
    }

    /// The first word gives the rank.
    async fn join(&mut self) -> Result<()> {
        self.rank = self.tell().await?;
        self.tell().await?;
        Ok(())
    }

    /// Tells that this instance lives.
    async fn tell(&mut self) -> Result<u64, Failure> {
        let begun = Instant::now();
        let member = Member { rank: self.rank, stopped: self.instance.state.lock().stopped };
        let mut headers = HeaderMap::new();
        if let Ok(ttl) = HeaderValue::from_str(REMEMBERED) {
            headers.insert(wire::TTL, ttl);
        }
        let key = self.catalog().names.member_key(&self.instance.spec.name, &self.name);
        let sequence = self.api().store(&key, headers, written(&member)?.into()).await?;
        self.told = begun;
        Ok(sequence)
    }

    async fn run(mut self, mut claims: Subscriber, mut topics: Subscriber) {
        let instance = Arc::clone(&self.instance);
        let mut connected = instance.link.connected.subscribe();
        let mut tick = interval(patience(&instance.catalog) / 5);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let lost_at = self.told + patience(self.catalog());
            let change = instance.change();
            tokio::pin!(change);
            change.as_mut().enable();
            let leaving = self.is_leaving();
            tokio::select! {
                () = instance.closing.notified() => return self.leave().await,
                _ = tick.tick() => self.round().await,
                Ok(()) = connected.changed() => self.round().await,
                () = tokio::time::sleep(AGAIN), if self.failed => self.round().await,
                Some(_) = claims.next() => self.round().await,
                Some(_) = topics.next() => {
                    self.rounds = 0;
                    self.round().await;
                }
                // Something of a slot that is handed on was settled.
                () = change, if leaving => self.hand_on().await,
                () = sleep_until(lost_at), if !self.owned.is_empty() => self.lose_all(),
            }
        }
    }

    fn is_leaving(&self) -> bool {
        let state = self.instance.state.lock();
        self.owned.values().flat_map(|owned| &owned.sources).any(|id| state.sources.get(id).is_some_and(|s| s.revoking))
    }

    async fn round(&mut self) {
        // A stop is told at once by the next round.
        let round = self.try_round().await;
        self.failed = round.is_err();
        if let Err(failed) = round {
            let failed = tidings_core::Error::from(failed);
            tracing::debug!(subscription = %self.instance.spec.name, error = %failed, "the bucket cannot be read or written now");
        }
        if self.told.elapsed() > patience(self.catalog()) {
            self.lose_all();
        }
        self.tell_role();
    }

    async fn try_round(&mut self) -> Result<(), Failure> {
        if !self.link().is_connected() {
            return Ok(());
        }
        self.tell().await?;
        if self.rounds.is_multiple_of(SLOTS_EVERY) {
            self.slots = self.slots.max(self.catalog().slots(&self.instance.spec.topics).await?);
        }
        self.rounds = self.rounds.wrapping_add(1);
        let picture = self.look().await?;
        for slot in 0..self.slots {
            self.settle_slot(slot, &picture).await?;
        }
        self.hand_on().await;
        Ok(())
    }

    /// By the server's clock: who has told it lately, measured from what was told last.
    async fn look(&self) -> Result<Picture, Failure> {
        let names = &self.catalog().names;
        let (members, claims) =
            (names.member_key(&self.instance.spec.name, "*"), names.claim_key(&self.instance.spec.name, "*"));
        let stored = self.api().newest(&names.bucket_stream(), &[members.clone(), claims.clone()]).await?;
        let now = stored
            .iter()
            .filter(|s| s.subject.ends_with(&self.name))
            .find_map(|s| s.time)
            .unwrap_or(SystemTime::UNIX_EPOCH);
        let mut picture = Picture { members: Vec::new(), living: BTreeSet::new(), claims: BTreeMap::new() };
        for stored in stored {
            let Some((key, last)) = stored.subject.rsplit_once('.') else { continue };
            if members.strip_suffix(".*") == Some(key) {
                let age = stored.time.and_then(|time| now.duration_since(time).ok()).unwrap_or_default();
                let Ok(member) = serde_json::from_slice::<Member>(&stored.payload) else { continue };
                if age > patience(self.catalog()) || member.rank == 0 {
                    continue;
                }
                picture.living.insert(last.to_owned());
                if !member.stopped {
                    picture.members.push((member.rank, last.to_owned()));
                }
            } else if let (Ok(slot), Ok(claim)) = (last.parse(), serde_json::from_slice::<Claim>(&stored.payload)) {
                picture.claims.insert(slot, (claim.owner, stored.sequence));
            }
        }
        picture.members.sort_unstable();
        Ok(picture)
    }

    async fn settle_slot(&mut self, slot: u32, picture: &Picture) -> Result<(), Failure> {
        let ranks: Vec<u64> = picture.members.iter().map(|(rank, _)| *rank).collect();
        let wanted = share_slots(self.slots as usize, &ranks).get(slot as usize).copied().flatten();
        let mine = wanted.is_some_and(|at| picture.members[at].1 == self.name);
        let claim = picture.claims.get(&slot);
        match (claim, self.owned.contains_key(&slot)) {
            (Some((owner, _)), true) if *owner != self.name => self.lose(slot),
            (None, true) => self.lose(slot),
            (Some(_), true) if !mine && wanted.is_some() => self.revoke(slot),
            (Some(_), true) => {}
            (None, false) if mine => self.claim(slot, 0).await?,
            // From a former life of this instance, or left by one that has ended.
            (Some((owner, revision)), false) if mine && (*owner == self.name || !picture.living.contains(owner)) => {
                self.claim(slot, *revision).await?;
            }
            // Lost, or handed on in part: no other takes it from one that lives.
            (Some((owner, revision)), false) if *owner == self.name => self.free(slot, *revision).await?,
            _ => {}
        }
        Ok(())
    }

    async fn claim(&mut self, slot: u32, last: u64) -> Result<(), Failure> {
        let key = self.catalog().names.claim_key(&self.instance.spec.name, &slot.to_string());
        let claim = written(&Claim { owner: self.name.clone() })?;
        let revision = match self.api().store(&key, expecting(last), claim.into()).await {
            Ok(revision) => revision,
            // Another instance was faster.
            Err(failure) if failure.is(ApiError::WRONG_LAST_SEQUENCE) => return Ok(()),
            Err(failure) => return Err(failure),
        };
        match read_slot(&self.instance, &self.parts, slot).await {
            Ok(sources) => drop(self.owned.insert(slot, Owned { revision, sources })),
            Err(failed) => {
                // Begun again in the next round, from what was claimed.
                self.forget_sources(slot);
                return Err(failed.into());
            }
        }
        Ok(())
    }

    /// Drops what was opened of a slot that could not be opened whole.
    fn forget_sources(&self, slot: u32) {
        let ids: Vec<_> = {
            let state = self.instance.state.lock();
            state.sources.iter().filter(|(_, source)| source.slot == slot).map(|(id, _)| *id).collect()
        };
        ids.into_iter().for_each(|id| self.instance.abandon(id));
    }

    /// Hands nothing of a slot out any more, so that it can be handed on.
    fn revoke(&self, slot: u32) {
        let mut state = self.instance.state.lock();
        let Some(owned) = self.owned.get(&slot) else { return };
        let mut any = false;
        for id in &owned.sources {
            if let Some(source) = state.sources.get_mut(id) {
                any |= !std::mem::replace(&mut source.revoking, true);
            }
        }
        if any {
            state.tell(Notice::Leases);
        }
    }

    /// Hands on the slots that are revoked and of which nothing is out.
    async fn hand_on(&mut self) {
        let ready: Vec<u32> = {
            let state = self.instance.state.lock();
            let is_ready = |owned: &Owned| {
                let mut sources = owned.sources.iter().filter_map(|id| state.sources.get(id));
                sources.all(|source| source.revoking && !source.is_out())
            };
            self.owned.iter().filter(|(_, owned)| is_ready(owned)).map(|(slot, _)| *slot).collect()
        };
        for slot in ready {
            if let Err(failed) = self.release(slot).await {
                tracing::debug!(slot, error = %tidings_core::Error::from(failed), "a slot could not be handed on in order");
            }
        }
        self.tell_role();
    }

    /// Gives back what is not settled, in order, then lets the slot go.
    async fn release(&mut self, slot: u32) -> Result<(), Failure> {
        let Some(owned) = self.owned.remove(&slot) else { return Ok(()) };
        self.instance.give_back(&owned.sources).await;
        let plans: Vec<_> = {
            let mut state = self.instance.state.lock();
            let streams =
                owned.sources.iter().filter_map(|id| state.sources.get(id)).map(|source| source.stream.clone());
            let streams: Vec<_> = streams.collect();
            owned.sources.iter().for_each(|id| state.lose(*id));
            streams
        };
        let consumer = self.catalog().names.consumer(&self.instance.spec.name, slot);
        for stream in plans {
            self.catalog().unpin(&stream, &consumer).await?;
        }
        tracing::debug!(slot, revision = owned.revision, "a slot is handed on");
        self.free(slot, owned.revision).await
    }

    /// Writes that nobody owns a slot, unless somebody was faster.
    async fn free(&self, slot: u32, revision: u64) -> Result<(), Failure> {
        let key = self.catalog().names.claim_key(&self.instance.spec.name, &slot.to_string());
        let claim = written(&Claim { owner: String::new() })?;
        match self.api().store(&key, expecting(revision), claim.into()).await {
            Err(failure) if failure.is(ApiError::WRONG_LAST_SEQUENCE) => Ok(()),
            freed => freed.map(drop),
        }
    }

    fn lose(&mut self, slot: u32) {
        if let Some(owned) = self.owned.remove(&slot) {
            owned.sources.into_iter().for_each(|id| self.instance.abandon(id));
            self.instance.state.lock().tell(Notice::Leases);
        }
    }

    fn lose_all(&mut self) {
        let slots: Vec<_> = self.owned.keys().copied().collect();
        slots.into_iter().for_each(|slot| self.lose(slot));
        self.tell_role();
    }

    fn tell_role(&self) {
        let slots: Vec<u32> = self.owned.keys().copied().collect();
        let role = if slots.is_empty() { Role::StandBy } else { Role::Active { slots } };
        self.instance.state.lock().tell_role(role);
    }

    /// Gives up all, in order, and takes part no longer.
    async fn leave(mut self) {
        let slots: Vec<_> = self.owned.keys().copied().collect();
        for slot in slots {
            // What could not be handed on in order is taken over when this instance is missed.
            let _ = self.release(slot).await;
        }
        let key = self.catalog().names.member_key(&self.instance.spec.name, &self.name);
        let _ = self.catalog().forget(&key).await;
        let client = &self.catalog().api.client;
        let _ =
            client.publish(self.catalog().names.claim_key(&self.instance.spec.name, "free"), bytes::Bytes::new()).await;
        let mut state = self.instance.state.lock();
        let left: Vec<_> = state.sources.keys().copied().collect();
        left.into_iter().for_each(|id| state.lose(id));
        drop(state);
        self.instance.changed();
    }
}

fn written(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| error(ErrorKind::Internal, "it cannot be written").with_source(e))
}
