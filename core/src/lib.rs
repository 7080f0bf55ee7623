//! The contract of Tidings: what services use, and what transports implement.
//!
//! Services depend on the facade crate `tidings`, which re-exports this one. Two faces are kept apart:
//!
//! - what services use: [`Event`], [`Message`], [`Topic`], [`RetryPolicy`], ...
//! - what transports implement: [`transport`].

mod bus;
mod clock;
mod dead_letter;
mod error;
mod event;
mod events;
pub mod handler;
mod headers;
mod id;
mod key;
mod letters;
mod message;
mod publish;
mod retry;
mod secret;
mod service;
mod text;
mod time;
mod topic;
pub mod transport;

pub use bus::{Bus, BusConfig, Capable, Connect, PublishErrors, PublishOptions};
pub use clock::{Clock, from_rfc3339, to_rfc3339};
pub use dead_letter::{DeadLetterReason, header};
pub use error::{BoxError, Error, ErrorKind, Result};
pub use event::{Event, ToKey};
pub use events::{BusEvent, EventStream, Events};
pub use handler::{Batch, HandlerError, RawMessage};
pub use headers::Headers;
pub use id::MessageId;
pub use key::Key;
pub use letters::{DeadLetterBox, DeadLetterInfo};
pub use message::Message;
pub use retry::{Backoff, RetryMode, RetryPolicy};
pub use secrecy::{ExposeSecret, SecretString};
pub use secret::Secret;
pub use service::{Drained, OutagePolicy, Running, Service, Stats, SubscriptionConfig, Unrouted};
pub use text::Text;
pub use topic::{MAX_NAME, RESERVED_TOPIC_PREFIX, SubscriptionName, Topic, TopicPattern};
