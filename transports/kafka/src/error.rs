//! Errors of this transport.

use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode as Code;
use std::borrow::Cow;
use std::fmt;
use tidings_core::transport::Fate;
use tidings_core::{Error, ErrorKind};

pub(crate) const NAME: &str = "kafka";

pub(crate) fn error(kind: ErrorKind, why: impl Into<Cow<'static, str>>) -> Error {
    Error::new(kind, why).with_transport(NAME)
}

pub(crate) fn closed() -> Error {
    error(ErrorKind::Closed, "the transport is closed")
}

pub(crate) fn mismatch(what: &str, has: impl fmt::Debug, asked: impl fmt::Debug) -> Error {
    error(ErrorKind::Mismatch, format!("{what}: it exists with {has:?}, asked for was {asked:?}"))
}

/// What the client or the broker said, as an error of the kind that it is.
pub(crate) fn client(why: &'static str, failed: KafkaError) -> Error {
    let kind = failed.rdkafka_error_code().map_or(ErrorKind::Connection, kind);
    error(kind, why).with_source(failed)
}

/// What the broker said about one topic or group.
pub(crate) fn code(why: &'static str, code: Code) -> Error {
    error(kind(code), format!("{why}: {code}"))
}

fn kind(code: Code) -> ErrorKind {
    match code {
        Code::Authentication
        | Code::SaslAuthenticationFailed
        | Code::TopicAuthorizationFailed
        | Code::GroupAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::UnsupportedSASLMechanism => ErrorKind::Denied,
        Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::UnknownPartition => ErrorKind::NotFound,
        Code::MessageSizeTooLarge | Code::InvalidMessageSize => ErrorKind::TooLarge,
        Code::QueueFull | Code::ThrottlingQuotaExceeded => ErrorKind::Full,
        Code::MessageTimedOut | Code::OperationTimedOut | Code::RequestTimedOut | Code::TimedOutQueue => {
            ErrorKind::Timeout
        }
        Code::BrokerTransportFailure
        | Code::AllBrokersDown
        | Code::Resolve
        | Code::LeaderNotAvailable
        | Code::NotLeaderForPartition
        | Code::BrokerNotAvailable
        | Code::ReplicaNotAvailable
        | Code::NetworkException
        | Code::CoordinatorLoadInProgress
        | Code::CoordinatorNotAvailable
        | Code::NotCoordinator
        | Code::NotEnoughReplicas
        | Code::NotEnoughReplicasAfterAppend
        | Code::RebalanceInProgress
        | Code::WaitingForCoordinator
        | Code::NotController
        | Code::KafkaStorageError
        | Code::UnknownProducerId
        | Code::OutOfOrderSequenceNumber
        | Code::Retry
        | Code::PurgeQueue
        | Code::PurgeInflight
        | Code::Fatal
        | Code::State => ErrorKind::Connection,
        Code::PolicyViolation | Code::InvalidReplicationFactor | Code::InvalidPartitions | Code::InvalidConfig => {
            ErrorKind::Refused
        }
        _ => ErrorKind::Refused,
    }
}

/// Why a message was not confirmed, and whether the broker may have it.
pub(crate) fn publish(failed: KafkaError) -> (Fate, Error) {
    let fate = match failed.rdkafka_error_code() {
        // What was never sent, and what the broker has refused.
        Some(
            Code::PurgeQueue
            | Code::QueueFull
            | Code::MessageSizeTooLarge
            | Code::UnknownTopic
            | Code::UnknownPartition
            | Code::UnknownTopicOrPartition
            | Code::TopicAuthorizationFailed
            | Code::ClusterAuthorizationFailed
            | Code::InvalidRecord
            | Code::InvalidTopic
            | Code::PolicyViolation
            | Code::NotEnoughReplicas,
        ) => Fate::NotPersisted,
        _ => Fate::PossiblyPersisted,
    };
    (fate, client("the message was not confirmed", failed).with_operation("publish"))
}
