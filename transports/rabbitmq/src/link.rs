//! A connection that heals itself: one for publishing and one for consuming, so that an alarm stops the one alone.

use crate::RabbitMqConfig;
use crate::error::{closed, error, failed, late, refused};
use futures_util::StreamExt;
use lapin::options::ConfirmSelectOptions;
use lapin::{Channel, Connection, ConnectionProperties, Event};
use parking_lot::Mutex;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;
use tidings_core::{Backoff, BusEvent, Error, ErrorKind, Events, Result, Text};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// Between tries to connect again.
const AGAIN: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
/// How often a connection is looked at that says nothing.
const LOOK: Duration = Duration::from_secs(1);

/// What is broken now, connections and channels: told once when that begins, and once when all of it is over.
pub(crate) struct Outages {
    events: Events,
    open: Mutex<usize>,
    closed: AtomicBool,
}

/// Something is broken for as long as this lives.
pub(crate) struct Outage(Arc<Outages>);

impl Outages {
    pub(crate) fn new(events: &Events) -> Arc<Self> {
        Arc::new(Self { events: events.clone(), open: Mutex::new(0), closed: AtomicBool::new(false) })
    }

    pub(crate) fn begin(self: &Arc<Self>, reason: Text) -> Outage {
        let mut open = self.open.lock();
        *open += 1;
        if *open == 1 {
            self.events.tell(BusEvent::Disconnected { reason });
        } else {
            tracing::debug!(%reason, "rabbitmq: broken too");
        }
        Outage(Arc::clone(self))
    }

    /// What ends from now on ends because the transport is closed.
    fn close(&self) {
        self.closed.store(true, SeqCst);
    }
}

impl Drop for Outage {
    fn drop(&mut self) {
        let mut open = self.0.open.lock();
        *open -= 1;
        if *open == 0 && !self.0.closed.load(SeqCst) {
            self.0.events.tell(BusEvent::Connected);
        }
    }
}

/// A supervised connection; it ends when nobody holds it.
pub(crate) struct Link {
    line: Arc<Line>,
    supervisor: AbortHandle,
}

/// What the supervisor and its users share.
struct Line {
    config: Arc<RabbitMqConfig>,
    role: &'static str,
    outages: Arc<Outages>,
    live: watch::Sender<Option<Arc<Connection>>>,
    closed: AtomicBool,
    blocked: AtomicBool,
    fault: Mutex<Option<Text>>,
}

impl Link {
    /// Connects, at the latest within the configured time.
    pub(crate) async fn connect(
        config: &Arc<RabbitMqConfig>,
        role: &'static str,
        outages: &Arc<Outages>,
    ) -> Result<Arc<Self>> {
        let first = dial(config, role).await?;
        let line = Arc::new(Line {
            config: Arc::clone(config),
            role,
            outages: Arc::clone(outages),
            live: watch::Sender::new(Some(Arc::new(first))),
            closed: AtomicBool::new(false),
            blocked: AtomicBool::new(false),
            fault: Mutex::new(None),
        });
        let supervisor = tokio::spawn(supervise(Arc::clone(&line))).abort_handle();
        Ok(Arc::new(Self { line, supervisor }))
    }

    /// The connection, once there is one.
    pub(crate) async fn live(&self) -> Result<Arc<Connection>> {
        let mut live = self.line.live.subscribe();
        loop {
            if self.is_closed() {
                return Err(closed());
            }
            let now = live.borrow_and_update().clone();
            if let Some(connection) = now.filter(|connection| connection.status().connected()) {
                return Ok(connection);
            }
            // The sender lives as long as this.
            let _ = timeout(LOOK, live.changed()).await;
        }
    }

    /// A new channel, within the configured time.
    pub(crate) async fn channel(&self) -> Result<Channel> {
        self.within("a channel", async { self.live().await?.create_channel().await.map_err(failed) }).await
    }

    /// A new channel that has its publishes confirmed.
    pub(crate) async fn confirming(&self) -> Result<Channel> {
        let channel = self.channel().await?;
        let select = async { channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(failed) };
        self.within("confirms", select).await?;
        Ok(channel)
    }

    /// Does what may be done again until the connection does not fail under it, for as long as an answer may take.
    pub(crate) async fn patiently<T, F>(&self, work: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let deadline = Instant::now() + self.line.config.timeout();
        loop {
            match work().await {
                Err(error)
                    if error.kind() == ErrorKind::Connection && error.is_transient() && Instant::now() < deadline =>
                {
                    sleep(Duration::from_millis(50)).await;
                }
                done => return done,
            }
        }
    }

    /// A connection of its own, for what the server may answer by closing it.
    pub(crate) async fn another(&self) -> Result<Connection> {
        dial(&self.line.config, "probe").await
    }

    /// What comes within the configured time.
    pub(crate) async fn within<T>(&self, what: &'static str, answer: impl Future<Output = Result<T>>) -> Result<T> {
        let time = self.line.config.timeout();
        timeout(time, answer).await.unwrap_or_else(|_| Err(self.too_late(what, time)))
    }

    /// A server that is short of memory or disk answers nothing, and has said so.
    fn too_late(&self, what: &'static str, time: Duration) -> Error {
        let fault = self.line.fault.lock().clone().filter(|_| self.is_blocked());
        let because =
            |fault| error(ErrorKind::Timeout, format!("no answer from the server within {time:?}: {what}; {fault}"));
        fault.map_or_else(|| late(what, time), because)
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.line.closed.load(SeqCst)
    }

    /// Whether the server takes nothing from it, for want of memory or disk.
    pub(crate) fn is_blocked(&self) -> bool {
        self.line.blocked.load(SeqCst)
    }

    /// Why it cannot be used now.
    pub(crate) fn fault(&self) -> Option<Error> {
        if self.is_closed() {
            return Some(closed());
        }
        let text = self.line.fault.lock().clone()?;
        let kind = if self.is_blocked() { ErrorKind::Full } else { ErrorKind::Connection };
        Some(error(kind, text.to_string()).with_context("connection", self.line.role))
    }

    /// Hangs up, at the latest at the deadline.
    pub(crate) async fn close(&self, deadline: Instant) {
        if self.line.closed.swap(true, SeqCst) {
            return;
        }
        self.line.outages.close();
        self.supervisor.abort();
        if let Some(connection) = self.line.live.send_replace(None) {
            // It is gone either way.
            let _ = timeout_at(deadline, connection.close(200, "closed".into())).await;
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.line.outages.close();
        self.supervisor.abort();
        self.line.closed.store(true, SeqCst);
        self.line.live.send_replace(None);
    }
}

async fn dial(config: &RabbitMqConfig, role: &'static str) -> Result<Connection> {
    let (uri, tls) = (config.uri()?, config.tls_config()?);
    let name = format!("tidings {role} {}", config.namespace);
    let properties = ConnectionProperties::default().with_connection_name(name.trim_end().into());
    let runtime = lapin::runtime::default_runtime().map_err(refused)?;
    let connecting = Connection::connect_uri_with_config(uri, properties, tls, runtime);
    let time = config.timeout();
    let connected = timeout(time, connecting).await.map_err(|_| late("the connection", time))?;
    connected.map_err(refused).map_err(|error| error.with_context("host", &config.host))
}

/// Waits for the connection to end, then makes another, for ever.
async fn supervise(line: Arc<Line>) {
    loop {
        let Some(connection) = line.live.borrow().clone() else { return };
        let reason = watch_over(&line, &connection).await;
        drop(connection);
        line.blocked.store(false, SeqCst);
        *line.fault.lock() = Some(reason.clone());
        line.live.send_replace(None);
        let outage = line.outages.begin(reason);
        let connection = dial_again(&line).await;
        *line.fault.lock() = None;
        line.live.send_replace(Some(Arc::new(connection)));
        drop(outage);
    }
}

async fn dial_again(line: &Line) -> Connection {
    for round in 1.. {
        match dial(&line.config, line.role).await {
            Ok(connection) => return connection,
            Err(error) => *line.fault.lock() = Some(format!("it is being repaired: {error}").into()),
        }
        sleep(AGAIN.delay(round)).await;
    }
    std::future::pending().await
}

/// Returns why the connection has ended.
async fn watch_over(line: &Line, connection: &Connection) -> Text {
    let mut events = connection.events_listener();
    loop {
        let event = timeout(LOOK, events.next()).await;
        match event {
            Ok(Some(Event::ConnectionBlocked(reason))) => {
                line.blocked.store(true, SeqCst);
                let reason: Text = format!("the server takes no publishes: {reason}").into();
                *line.fault.lock() = Some(reason.clone());
                tracing::warn!(%reason, "rabbitmq: blocked");
            }
            Ok(Some(Event::ConnectionUnblocked)) => {
                line.blocked.store(false, SeqCst);
                *line.fault.lock() = None;
            }
            Ok(Some(Event::Error(error))) if !connection.status().connected() => return error.to_string().into(),
            Ok(None) => return Text::from_static("the connection is gone"),
            Ok(Some(_)) | Err(_) if connection.status().connected() => {}
            Ok(Some(_)) | Err(_) => return Text::from_static("the connection is lost"),
        }
    }
}
