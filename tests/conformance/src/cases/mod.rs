//! The cases, in groups. Each has the name of a promise.

mod composition;
mod data;
mod dead_letter;
mod flow;
mod groups;
mod lifecycle;
mod order;
mod publish;
mod replay;
mod settlement;

use crate::env::Env;
use tidings_core::transport::BoxFuture;

/// One case.
pub(crate) struct Case {
    group: &'static str,
    name: &'static str,
    pub(crate) needs: &'static [Need],
    pub(crate) run: fn(Env) -> BoxFuture<()>,
}

/// What a case needs of a transport or its factory, if not every one has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Confirmed messages survive the process.
    Durable,
    /// Publishing to a topic with a delay.
    PublishDelay,
    /// One owner per key.
    KeyOrdering,
    /// Slots.
    Slots,
    /// Instances that share the work where no order is asked.
    Sharing,
    /// Topics that limit how long they keep what is published.
    Retention,
    /// Starting at the beginning.
    Beginning,
    /// Reading again.
    Replay,
    /// Positions that subscriptions and replays share.
    LogPositions,
    /// Not being able to read again.
    NoReplay,
    /// Counting what is lost with its instance.
    CountsLosses,
    /// Cutting the connection.
    Cut,
    /// Restarting the broker.
    Restart,
    /// That no other case runs, because it measures this process.
    Alone,
}

impl Need {
    /// Why a case that needs this is skipped.
    pub(crate) fn lacking(self, env: &Env) -> Option<String> {
        let can = env.can();
        let (has, capability) = match self {
            Self::Durable => (can.durable, "durable"),
            Self::PublishDelay => (can.publish_delay, "publish_delay"),
            Self::KeyOrdering => (can.key_ordering, "key_ordering"),
            Self::Slots => (can.slots, "slots"),
            Self::Sharing => (can.sharing, "sharing"),
            Self::Retention => (can.retention, "retention"),
            Self::Beginning => (can.start_beginning, "start_beginning"),
            Self::Replay => (can.replay, "replay"),
            Self::LogPositions => (can.log_positions, "log_positions"),
            Self::CountsLosses => (can.counts_losses, "counts_losses"),
            Self::NoReplay => return can.replay.then(|| "its capabilities say `replay: true`".into()),
            Self::Cut => return env.factory().cannot_cut().map(Into::into),
            Self::Restart => return env.factory().cannot_restart().map(Into::into),
            Self::Alone => return None,
        };
        (!has).then(|| format!("its capabilities say `{capability}: false`"))
    }
}

impl Case {
    /// Its group and its name, such as `publish::confirmed_means_kept`.
    pub(crate) fn name(&self) -> String {
        format!("{}::{}", self.group, self.name)
    }

    /// Whether no other may run beside it.
    pub(crate) fn is_alone(&self) -> bool {
        self.needs.contains(&Need::Alone)
    }

    /// Whether no other may use its broker.
    pub(crate) fn restarts(&self) -> bool {
        self.needs.contains(&Need::Restart)
    }
}

/// All cases, in the order of their groups.
pub(crate) fn all() -> impl Iterator<Item = &'static Case> {
    [
        data::CASES,
        publish::CASES,
        settlement::CASES,
        dead_letter::CASES,
        order::CASES,
        groups::CASES,
        flow::CASES,
        lifecycle::CASES,
        replay::CASES,
        composition::CASES,
    ]
    .into_iter()
    .flatten()
}

/// The table of a group: the name of each case and what it needs.
macro_rules! cases {
    ($group:literal: $($name:ident $([$($need:ident),+])?),+ $(,)?) => {
        pub(super) const CASES: &[super::Case] = &[$(super::Case {
            group: $group,
            name: stringify!($name),
            needs: &[$($(super::Need::$need),+)?],
            run: |env| Box::pin($name(env)),
        }),+];
    };
}
use cases;
