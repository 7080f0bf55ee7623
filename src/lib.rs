#![doc = include_str!("../docs/overview.md")]

mod config;
mod connect;

pub use config::Config;
pub use tidings_codecs as codecs;
pub use tidings_core::{
    Backoff, Batch, BoxError, Bus, BusConfig, BusEvent, Capable, Connect, DeadLetterBox, DeadLetterInfo,
    DeadLetterReason, Drained, Error, ErrorKind, Event, EventStream, HandlerError, Headers, Key, Message, MessageId,
    OutagePolicy, PublishErrors, PublishOptions, RawMessage, Result, RetryMode, RetryPolicy, Running, Secret, Service,
    Stats, SubscriptionConfig, SubscriptionName, Text, ToKey, Topic, TopicPattern, Unrouted, handler, header,
    transport,
};
#[cfg(feature = "kafka")]
pub use tidings_kafka as kafka;
#[cfg(feature = "macros")]
pub use tidings_macros::Event;
#[cfg(feature = "memory")]
pub use tidings_memory as memory;
#[cfg(feature = "nats")]
pub use tidings_nats as nats;
#[cfg(feature = "rabbitmq")]
pub use tidings_rabbitmq as rabbitmq;
#[cfg(feature = "testing")]
pub use tidings_testing as testing;

#[doc = include_str!("../docs/guide.md")]
pub mod guide {}

/// What a service needs, in one import.
pub mod prelude {
    pub use crate::handler::{Attempt, Delivered, Lease, Metadata, State};
    pub use crate::transport::{Ordering, ReplayFrom, Start};
    pub use crate::{
        Batch, Bus, Config, ErrorKind, Event, HandlerError, Headers, PublishOptions, RawMessage, RetryPolicy, Service,
        SubscriptionConfig,
    };
    pub use serde::{Deserialize, Serialize};
}
