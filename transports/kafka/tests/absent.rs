//! What is said when there is no broker.

use std::time::{Duration, Instant};
use tidings_core::ErrorKind;
use tidings_kafka::{KafkaConfig, KafkaTransport};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_absent_broker_is_said_within_the_deadline() {
    let config = KafkaConfig::from_url("kafka://127.0.0.1:1?connect_timeout_ms=700").unwrap();
    let begun = Instant::now();
    let error = KafkaTransport::connect(config).await.err().expect("nobody answers");
    assert_eq!(error.kind(), ErrorKind::Connection, "{error}");
    assert!(error.is_transient() && begun.elapsed() < Duration::from_secs(5), "after {:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_configuration_is_refused_before_anything_is_tried() {
    let config = KafkaConfig { namespace: "A.b".into(), ..KafkaConfig::default() };
    let error = KafkaTransport::connect(config).await.err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    let mut config = KafkaConfig::default();
    config.properties.insert("fetch.min.bytes".into(), "many".into());
    let error = KafkaTransport::connect(config).await.err().expect("refused");
    assert!(error.to_string().contains("client"), "{error}");
}
