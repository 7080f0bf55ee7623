//! Reads one consumer: asks the server for messages, and rebuilds what is lost.

use crate::api::number;
use crate::config::Provision;
use crate::connection::connects;
use crate::error::{Failure, error, publish};
use crate::state::{Recovery, SourceId, place};
use crate::subscription::Instance;
use crate::topology::{ConsumerPlan, GROUP};
use async_nats::{Message as Raw, StatusCode, Subscriber};
use futures_util::StreamExt;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tidings_core::transport::{Notice, Ordering};
use tidings_core::{Backoff, Error, ErrorKind, Result};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};

/// Between attempts to read again what does not answer.
const AGAIN: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
/// The most messages asked for at once.
const BATCH: usize = 500;
/// How often is looked for what expired unread.
const LOOK: Duration = Duration::from_secs(2);
/// Between notes of what was read.
const NOTE: Duration = Duration::from_secs(60);
/// Gives a message back.
const NAK: &str = "-NAK";
/// Between looks at what a former owner has left open.
const RECOVERING: Duration = Duration::from_millis(250);

/// A request for messages that the server has not ended.
struct Pull {
    number: u64,
    left: usize,
    ends: Instant,
}

/// When a stream and a consumer were created, as the server writes it; empty if that is not known yet.
#[derive(Default)]
struct Born {
    stream: String,
    consumer: String,
}

/// Reads one consumer.
pub(crate) struct Driver {
    instance: Arc<Instance>,
    id: SourceId,
    plan: ConsumerPlan,
    /// One of its patterns, by which its stream is created again.
    pattern: Option<String>,
    /// The last position that a replay reads.
    end: Option<u64>,
    inbox: String,
    pulls: VecDeque<Pull>,
    next: u64,
    /// By which the server knows this client as the one that it has pinned.
    pin: Option<String>,
    failures: u32,
    /// Nothing is asked for before.
    not_before: Instant,
    /// The consumer must be looked at: something about it is wrong.
    doubtful: bool,
    looked: Instant,
    /// The last position of which is known that all before it was read or expired.
    known: u64,
    /// The last position up to which all is known to be settled, by whichever instance. A consumer that is deleted is built again behind
    /// it: what others hold, and what was given back, is not known here.
    settled: u64,
    /// When the stream and the consumer were created.
    born: Born,
    /// When that is written down next, so that silence on a topic is not taken for a gap when it is opened again.
    note_known: Instant,
    /// Which connection this is.
    connects: u64,
    /// What was on its way when the connection was lost did not arrive.
    cut: bool,
    /// The last message of a replay's consumer.
    last: u64,
}

fn created(answer: &Value) -> String {
    answer["created"].as_str().unwrap_or_default().to_owned()
}

/// Reads until it is told to stop.
pub(crate) async fn drive(mut driver: Driver, stop: Arc<Notify>) {
    let mut connected = driver.instance.link.connected.subscribe();
    let Some(mut messages) = driver.listen().await else { return };
    let instance = Arc::clone(&driver.instance);
    if driver.tells_gaps() {
        // Before what follows it. What cannot be found out now is looked for again.
        let _ = driver.recall().await;
        let _ = driver.look_for_gap().await;
    } else if !instance.is_replay() {
        let _ = driver.meet().await;
    }
    loop {
        let change = instance.change();
        tokio::pin!(change);
        change.as_mut().enable();
        driver.notice_cut();
        if driver.cut && instance.link.is_connected() {
            driver.mend().await;
        }
        if driver.doubtful && instance.link.is_connected() {
            driver.look_again().await;
        }
        driver.ask(instance.link.is_connected()).await;
        tokio::select! {
            () = stop.notified() => break,
            message = messages.next() => match message {
                Some(message) => driver.take(message, &mut messages),
                None => return,
            },
            () = change => {}
            changed = connected.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            () = sleep_until(driver.next_look()) => driver.look().await,
        }
    }
    driver.finish(messages).await;
}

impl Driver {
    pub(crate) fn new(
        instance: Arc<Instance>,
        id: SourceId,
        plan: ConsumerPlan,
        pattern: Option<String>,
        end: Option<u64>,
    ) -> Self {
        let now = Instant::now();
        let before = plan.start.saturating_sub(1);
        Self {
            inbox: instance.catalog.api.client.new_inbox(),
            connects: connects(&instance.catalog.api.client),
            known: before,
            instance,
            id,
            plan,
            pattern,
            end,
            pulls: VecDeque::new(),
            next: 0,
            pin: None,
            failures: 0,
            not_before: now,
            doubtful: false,
            looked: now.checked_sub(LOOK).unwrap_or(now),
            cut: false,
            settled: before,
            born: Born::default(),
            note_known: now,
            last: 0,
        }
    }

    async fn listen(&self) -> Option<Subscriber> {
        match self.instance.catalog.api.client.subscribe(format!("{}.*", self.inbox)).await {
            Ok(messages) => Some(messages),
            Err(failed) => {
                let failed = error(ErrorKind::Connection, "cannot listen for messages").with_source(failed);
                self.instance.fail(failed);
                None
            }
        }
    }

    /// Short, so that a lost request is noticed soon and an owner keeps its pin: it must ask three times in `ack_wait`.
    fn expiry(&self) -> Duration {
        (self.instance.catalog.ack_wait / 4).min(Duration::from_secs(5))
    }

    fn keyed(&self) -> bool {
        self.plan.ordering == Ordering::Key && !self.instance.is_replay()
    }

    fn tells_gaps(&self) -> bool {
        !self.instance.is_replay() && self.plan.start > 0
    }

    // ---- Asking ----

    async fn ask(&mut self, connected: bool) {
        let now = Instant::now();
        let late = self.pulls.len();
        self.pulls.retain(|pull| pull.ends > now);
        if late > self.pulls.len() {
            // The server has neither served nor ended them.
            self.doubtful = true;
        }
        if !connected || self.doubtful || self.cut || now < self.not_before {
            return;
        }
        let asked = self.pulls.iter().map(|pull| pull.left).sum();
        let batch = self.wants(asked).min(BATCH);
        if batch > 0 {
            self.pull(batch).await;
        }
    }

    fn wants(&mut self, asked: usize) -> usize {
        let state = self.instance.state.lock();
        let Some(source) = state.sources.get(&self.id) else { return 0 };
        let Some(recovery) = &source.recovery else { return state.wants(self.id, asked) };
        if asked > 0 || state.stopped || source.revoking {
            return 0;
        }
        // What is open comes first if it is due; else newer messages come, of which not many are to be held back here.
        let due = recovery.since.elapsed() > self.instance.catalog.ack_wait;
        let crowded = source.newer() > self.instance.spec.max_in_flight / 2;
        let missing = usize::try_from(recovery.missing).unwrap_or(BATCH);
        drop(state);
        if crowded && !due {
            return 0;
        }
        self.not_before = Instant::now() + if due { RECOVERING * 2 } else { RECOVERING };
        missing
    }

    async fn pull(&mut self, batch: usize) {
        self.next += 1;
        let expiry = self.expiry();
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let mut body = json!({ "batch": batch, "expires": nanos(expiry), "idle_heartbeat": nanos(expiry / 3) });
        if self.keyed() {
            body["group"] = json!(GROUP);
            if let Some(pin) = &self.pin {
                body["id"] = json!(pin);
            }
        }
        let api = &self.instance.catalog.api;
        let call = api.subject(&format!("CONSUMER.MSG.NEXT.{}.{}", self.plan.stream, self.plan.name));
        let reply = format!("{}.{}", self.inbox, self.next);
        if api.client.publish_with_reply(call, reply, body.to_string().into()).await.is_ok() {
            let ends = Instant::now() + expiry + Duration::from_secs(1);
            self.pulls.push_back(Pull { number: self.next, left: batch, ends });
        }
    }

    // ---- Reading ----

    /// Takes in a message and all that are here already.
    fn take(&mut self, first: Raw, messages: &mut Subscriber) {
        let mut message = first;
        self.notice_cut();
        let instance = Arc::clone(&self.instance);
        let mut state = instance.state.lock();
        for _ in 0..BATCH {
            match message.status {
                Some(code) if code != StatusCode::OK => {
                    drop(state);
                    self.status(&message, code);
                    state = instance.state.lock();
                }
                _ if !self.is_next(&message) => self.cut = true,
                _ => {
                    self.note(&message);
                    state.arrive(self.id, message, self.end, &instance.writer);
                }
            }
            match futures_util::FutureExt::now_or_never(messages.next()).flatten() {
                Some(next) => message = next,
                None => return,
            }
        }
    }

    /// One message less is to come.
    fn note(&mut self, message: &Raw) {
        self.failures = 0;
        if let Some(pull) = self.pulls.front_mut() {
            pull.left -= 1;
            if pull.left == 0 {
                self.pulls.pop_front();
            }
        }
        if let Some(pin) =
            message.headers.as_ref().filter(|_| self.keyed()).and_then(|headers| headers.get("Nats-Pin-Id"))
            && self.pin.as_deref() != Some(pin.as_str())
        {
            self.pin = Some(pin.as_str().to_owned());
        }
    }

    fn status(&mut self, message: &Raw, code: StatusCode) {
        let pull = message.subject.rsplit('.').next().and_then(|number| number.parse::<u64>().ok());
        if code.as_u16() == 100 {
            return;
        }
        self.pulls.retain(|open| Some(open.number) != pull);
        let why = message.description.as_deref().unwrap_or_default();
        match code.as_u16() {
            // Nothing came in time.
            404 | 408 => self.failures = 0,
            // Somebody else is pinned, or nobody any more.
            423 => {
                self.pin = None;
                self.back_off();
            }
            409 if why.contains("Batch Completed") => {}
            409 if why.contains("Consumer Deleted") => self.doubtful = true,
            503 => self.doubtful = true,
            _ => {
                self.back_off();
                tracing::debug!(consumer = %self.plan.name, %code, why, "a request for messages ended");
            }
        }
    }

    fn back_off(&mut self) {
        self.failures = self.failures.saturating_add(1);
        self.not_before = Instant::now() + AGAIN.delay(self.failures);
    }

    /// Takes in what is still on its way, and listens no more.
    async fn finish(mut self, mut messages: Subscriber) {
        if messages.drain().await.is_err() {
            return;
        }
        while let Ok(Some(message)) = tokio::time::timeout(self.expiry(), messages.next()).await {
            self.take(message, &mut messages);
        }
    }

    // ---- Looking ----

    fn is_recovering(&self) -> bool {
        self.instance.state.lock().sources.get(&self.id).is_some_and(|source| source.recovery.is_some())
    }

    fn next_look(&self) -> Instant {
        let recovering = self.is_recovering();
        let ends = self.pulls.iter().map(|pull| pull.ends).min();
        let wait = if self.not_before > Instant::now() { Some(self.not_before) } else { None };
        let look = self.looked + if recovering { RECOVERING } else { LOOK };
        ends.into_iter().chain(wait).chain([look]).min().unwrap_or(look)
    }

    async fn look(&mut self) {
        let recovering = self.is_recovering();
        if self.looked.elapsed() < if recovering { RECOVERING } else { LOOK } || !self.instance.link.is_connected() {
            return;
        }
        self.looked = Instant::now();
        // What does not answer now is asked again.
        let looked = if recovering {
            self.look_at_recovery().await
        } else if self.tells_gaps() {
            self.look_for_gap().await
        } else {
            Ok(())
        };
        // Who asks for no messages learns of a deletion only here.
        let gone = looked.is_err_and(|failure| failure.is_not_found());
        self.doubtful |= gone && self.instance.catalog.provision == Provision::Create;
    }

    /// What was settled, or expired, since the takeover does not come.
    async fn look_at_recovery(&mut self) -> Result<(), Failure> {
        let (_, pending) = self.pending().await?;
        let mut state = self.instance.state.lock();
        state.end_recovery(self.id, pending == 0);
        drop(state);
        self.instance.changed();
        Ok(())
    }

    /// Tells what expired unread: the stream begins after the last position that is known to have been read.
    async fn look_for_gap(&mut self) -> Result<(), Failure> {
        let stream = self.instance.catalog.stream_info(&self.plan.stream).await?;
        let (first, last) = (number(&stream, "/state/first_seq"), number(&stream, "/state/last_seq"));
        let info = self.instance.catalog.consumer(&self.plan.stream, &self.plan.name).await?;
        if self.is_another(&stream, Some(&info)) {
            return Ok(());
        }
        self.settled = self.settled.max(number(&info, "/ack_floor/stream_seq"));
        let delivered = number(&info, "/delivered/stream_seq");
        let read = self.known.max(delivered);
        if first > read + 1 {
            let pattern = self.pattern.as_deref().filter(|_| self.plan.filters.len() <= 2);
            let topic = pattern.and_then(|pattern| tidings_core::Topic::new(pattern).ok());
            self.instance.state.lock().tell(Notice::Gap {
                topic,
                missed_at_most: first - read - 1,
                from: read + 1,
                to: first,
            });
        }
        self.known = read.max(first.saturating_sub(1));
        if number(&info, "/num_pending") == 0 {
            self.known = self.known.max(last);
        }
        self.note_known().await
    }

    fn read_key(&self) -> String {
        self.instance.catalog.names.read_key(&self.plan.stream, &self.plan.name)
    }

    /// Reads up to where a former life has read.
    async fn recall(&mut self) -> Result<(), Failure> {
        let catalog = &self.instance.catalog;
        let found = catalog.api.last_message(&catalog.names.bucket_stream(), &self.read_key()).await?;
        let noted = found.and_then(|stored| std::str::from_utf8(&stored.payload).ok()?.parse::<u64>().ok());
        let last = number(&catalog.stream_info(&self.plan.stream).await?, "/state/last_seq");
        // A stream that was created anew counts from the beginning.
        self.known = self.known.max(noted.filter(|noted| *noted <= last).unwrap_or(0));
        Ok(())
    }

    async fn note_known(&mut self) -> Result<(), Failure> {
        if self.note_known > Instant::now() {
            return Ok(());
        }
        self.note_known = Instant::now() + NOTE;
        let (api, known) = (&self.instance.catalog.api, self.known.to_string());
        api.store(&self.read_key(), async_nats::HeaderMap::new(), known.into()).await.map(drop)
    }

    // ---- After a cut ----

    /// The server forgets requests with their connection, and what it has sent meanwhile is on its way to nobody.
    fn notice_cut(&mut self) {
        let current = connects(&self.instance.catalog.api.client);
        if current == self.connects {
            return;
        }
        (self.connects, self.cut) = (current, true);
        self.pulls.clear();
        if self.keeps_order() {
            self.instance.state.lock().doubt(self.id);
        }
    }

    /// Whether nothing newer may be handed out before what the server has sent is here.
    fn keeps_order(&self) -> bool {
        self.keyed() && self.plan.start > 0
    }

    /// The server sends what a replay reads once: nothing of it may be missing.
    fn is_next(&mut self, message: &Raw) -> bool {
        if !self.instance.is_replay() {
            return true;
        }
        let Some(place) = message.reply.as_ref().and_then(|reply| place(reply)) else { return false };
        if place.consumer != self.plan.name || place.number != self.last + 1 {
            return false;
        }
        self.last += 1;
        true
    }

    /// Finds out what is missing after a cut.
    async fn mend(&mut self) {
        if !self.instance.is_replay() {
            self.instance.state.lock().ack_again(self.id, &self.instance.writer);
        }
        let mended = if self.instance.is_replay() {
            self.read_on().await
        } else if self.keeps_order() {
            self.find_missing().await
        } else {
            Ok(())
        };
        match mended {
            Ok(()) => self.cut = false,
            Err(failure) if failure.is_not_found() => (self.cut, self.doubtful) = (false, true),
            Err(failed) => {
                tracing::debug!(consumer = %self.plan.name, error = %Error::from(failed), "not mended yet");
                self.failures = self.failures.saturating_add(1);
                sleep(AGAIN.delay(self.failures)).await;
            }
        }
    }

    /// Goes on with another consumer behind what was read; the server forgets the old one.
    async fn read_on(&mut self) -> Result<(), Failure> {
        let high = self.instance.state.lock().sources.get(&self.id).map_or(0, |source| source.high);
        self.rebuild_replay(high + 1).await.map_err(Failure::from)
    }

    /// What is pending at the server and not here is missing: it comes when it was not acked in time, or is asked for.
    async fn find_missing(&mut self) -> Result<(), Failure> {
        let (info, pending) = self.pending().await?;
        let pinned = info.pointer("/priority_groups/0/pinned_client_id").and_then(Value::as_str);
        if pending > 0 && pinned.is_some() && pinned == self.pin.as_deref() {
            self.ask_for_missing(&info).await?;
        }
        let mut state = self.instance.state.lock();
        if let Some(source) = state.sources.get_mut(&self.id) {
            let after = number(&info, "/delivered/stream_seq");
            source.recovery = Some(Recovery { after, missing: pending, since: Instant::now() });
        }
        state.end_recovery(self.id, pending == 0);
        Ok(())
    }

    /// Gives back what the server has sent to this client, still its owner, and what is not here. The server ignores what is
    /// said of positions that are not pending. It handles requests for messages beside that: asked before all is given
    /// back, it would send newer ones instead, and these fill the window until what is missing was not acked in time.
    async fn ask_for_missing(&self, info: &Value) -> Result<(), Failure> {
        let positions = number(info, "/ack_floor/stream_seq") + 1..=number(info, "/delivered/stream_seq");
        let lost = self.instance.state.lock().lost(self.id, positions, number(info, "/delivered/consumer_seq"));
        let api = &self.instance.catalog.api;
        let Some((last, others)) = lost.split_last() else { return Ok(()) };
        for reply in others {
            api.client.publish(reply.clone(), NAK.into()).await.map_err(publish)?;
        }
        // Its answer stands for all before it.
        api.request(last.to_string(), None, NAK.into()).await?;
        Ok(())
    }

    /// What the server says of the consumer, and how many messages at the most are pending there and not here.
    async fn pending(&self) -> Result<(Value, u64), Failure> {
        let before = self.instance.state.lock().held(self.id);
        let info = self.instance.catalog.consumer(&self.plan.stream, &self.plan.name).await?;
        let delivered = number(&info, "/delivered/stream_seq");
        // Those held before and after were pending in between, if the server knows that it has sent them.
        let after = self.instance.state.lock().held(self.id);
        let held = before.intersection(&after).filter(|position| **position <= delivered).count() as u64;
        let pending = number(&info, "/num_ack_pending").saturating_sub(held);
        Ok((info, pending))
    }

    // ---- Rebuilding ----

    /// Looks whether the consumer is still there, and builds it again.
    async fn look_again(&mut self) {
        match self.rebuild().await {
            Ok(()) => (self.doubtful, self.failures) = (false, 0),
            Err(failed)
                if failed.kind() == ErrorKind::NotFound && self.instance.catalog.provision != Provision::Create =>
            {
                self.doubtful = false;
                self.not_before = Instant::now() + Duration::from_secs(3600);
                self.instance.fail(failed);
            }
            Err(failed) => {
                tracing::warn!(consumer = %self.plan.name, error = %failed, "the consumer cannot be read; trying again");
                self.failures = self.failures.saturating_add(1);
                sleep(AGAIN.delay(self.failures)).await;
            }
        }
    }

    async fn rebuild(&mut self) -> Result<()> {
        let catalog = Arc::clone(&self.instance.catalog);
        let found = match catalog.consumer(&self.plan.stream, &self.plan.name).await {
            Ok(found) => Some(found),
            Err(failure) if failure.is_not_found() => None,
            Err(failure) => return Err(failure.into()),
        };
        let stream = match catalog.stream_info(&self.plan.stream).await {
            Err(failure) if failure.is_not_found() => {
                self.rebuild_stream().await?;
                catalog.stream_info(&self.plan.stream).await?
            }
            answer => answer?,
        };
        let anew = self.is_another(&stream, found.as_ref());
        if found.is_some() {
            return Ok(());
        }
        self.pulls.clear();
        self.pin = None;
        if self.instance.is_replay() {
            return self.read_on().await.map_err(Error::from);
        }
        if self.plan.start > 0 {
            self.plan.start = self.settled + 1;
            self.plan.metadata.insert("tidings-start-seq", self.plan.start.to_string());
        }
        tracing::warn!(consumer = %self.plan.name, stream = %self.plan.stream, "the consumer was gone; it is built again");
        let built = catalog.ensure_consumer(&self.plan).await?;
        self.born.consumer = created(&built);
        if !anew {
            self.instance.state.lock().begun_again(self.id, number(&stream, "/state/last_seq"));
        }
        Ok(())
    }

    /// Takes note of which stream and consumer these are; whether another stream has the name of the one that was read.
    fn is_another(&mut self, stream: &Value, consumer: Option<&Value>) -> bool {
        let is_another = |known: &str, now: &str| !known.is_empty() && known != now;
        let last = number(stream, "/state/last_seq");
        let now =
            Born { stream: created(stream), consumer: consumer.map_or_else(|| self.born.consumer.clone(), created) };
        let mut state = self.instance.state.lock();
        let high = state.sources.get(&self.id).map_or(0, |source| source.high);
        let anew = is_another(&self.born.stream, &now.stream) || (self.born.stream.is_empty() && last < high);
        if anew {
            state.reset(self.id);
            (self.known, self.settled) = (0, 0);
        } else if is_another(&self.born.consumer, &now.consumer) {
            state.begun_again(self.id, last);
        }
        self.born = now;
        anew
    }

    /// Learns which stream and consumer these are.
    async fn meet(&mut self) -> Result<(), Failure> {
        let catalog = Arc::clone(&self.instance.catalog);
        let stream = catalog.stream_info(&self.plan.stream).await?;
        let info = catalog.consumer(&self.plan.stream, &self.plan.name).await?;
        self.is_another(&stream, Some(&info));
        Ok(())
    }

    async fn rebuild_stream(&self) -> Result<()> {
        let catalog = &self.instance.catalog;
        match &self.pattern {
            Some(pattern) => {
                let stream = catalog.stream_of(pattern, true).await?;
                if stream.is_none_or(|stream| stream.name != self.plan.stream) {
                    let why = "the stream was deleted, and another one holds its topics; open the subscription again";
                    return Err(error(ErrorKind::NotFound, why));
                }
            }
            None => {
                catalog.doubt();
                if !catalog.address_stream().await? {
                    return Err(error(ErrorKind::NotFound, "the stream for addresses was deleted"));
                }
            }
        }
        Ok(())
    }

    async fn rebuild_replay(&mut self, from: u64) -> Result<()> {
        (self.plan.start, self.last) = (from, 0);
        self.plan.name = replay_name();
        create_ephemeral(
            &self.instance,
            &self.plan,
            &json!({ "deliver_policy": "by_start_sequence", "opt_start_seq": from }),
        )
        .await
        .map(drop)
    }
}

/// A name for the consumer of a replay.
pub(crate) fn replay_name() -> String {
    format!("tidings-replay-{:016x}", fastrand::u64(..))
}

/// Creates the consumer of a replay, which the server forgets when nobody reads it.
pub(crate) async fn create_ephemeral(instance: &Instance, plan: &ConsumerPlan, start: &Value) -> Result<Value> {
    let mut config = json!({
        "name": plan.name, "ack_policy": "none", "filter_subjects": plan.filters, "replay_policy": "instant",
        "inactive_threshold": 120_000_000_000_u64, "mem_storage": true, "num_replicas": 1, "max_waiting": 512,
    });
    if let (Some(config), Some(start)) = (config.as_object_mut(), start.as_object()) {
        config.extend(start.clone());
    }
    let body = json!({ "stream_name": plan.stream, "config": config, "action": "create" });
    let call = format!("CONSUMER.CREATE.{}.{}", plan.stream, plan.name);
    instance.catalog.api.call(&call, &body).await.map_err(Error::from)
}
