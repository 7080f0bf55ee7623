//! Requests to the server's JetStream API.

use crate::connection::{Link, connects};
use crate::error::{ApiError, Failure, error, timed_out};
use crate::{error as errors, wire};
use async_nats::header::HeaderMap;
use async_nats::{Client, RequestError, RequestErrorKind, StatusCode};
use bytes::Bytes;
use futures_util::StreamExt;
use serde_json::{Value, json};
use std::future::Future;
use std::time::{Duration, SystemTime};
use tidings_core::{Error, ErrorKind, Result, from_rfc3339};
use tokio::sync::watch;
use tokio::time::timeout;

/// The API, as one connection sees it.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) client: Client,
    /// `$JS.API`, or that of a domain.
    prefix: String,
    timeout: Duration,
    connected: watch::Receiver<bool>,
}

/// A message that the server has stored.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) subject: String,
    pub(crate) sequence: u64,
    pub(crate) time: Option<SystemTime>,
    pub(crate) headers: Option<HeaderMap>,
    pub(crate) payload: Bytes,
}

impl Api {
    pub(crate) fn new(client: Client, link: &Link, domain: Option<&str>, timeout: Duration) -> Self {
        let prefix = domain.map_or_else(|| "$JS.API".to_owned(), |domain| format!("$JS.{domain}.API"));
        Self { client, prefix, timeout, connected: link.connected.subscribe() }
    }

    /// The same, with less time for each request.
    pub(crate) fn impatient(&self, timeout: Duration) -> Self {
        Self { timeout: timeout.min(self.timeout), ..self.clone() }
    }

    /// Asks, and asks again whenever the connection was lost meanwhile: an answer that was on its way is lost, or comes only
    /// in part. Nothing that is asked here does harm when it is done twice.
    async fn ask<T, F: Future<Output = T>>(&self, request: &str, mut attempt: impl FnMut() -> F) -> Result<T> {
        let mut connected = self.connected.clone();
        let asking = async {
            loop {
                connected.wait_for(|connected| *connected).await.map_err(|_| errors::closed())?;
                let before = connects(&self.client);
                tokio::select! {
                    answer = attempt() => if connects(&self.client) == before { return Ok(answer) },
                    changed = connected.changed() => changed.map_err(|_| errors::closed())?,
                }
            }
        };
        let answer = timeout(self.timeout, asking).await;
        answer.map_err(|_| timed_out("the server did not answer in time").with_context("request", request))?
    }

    pub(crate) fn subject(&self, call: &str) -> String {
        format!("{}.{call}", self.prefix)
    }

    /// One request; what it asks for is said by `call`, such as `STREAM.INFO.shop`.
    pub(crate) async fn call(&self, call: &str, body: &Value) -> Result<Value, Failure> {
        let payload = if body.is_null() { Bytes::new() } else { body.to_string().into() };
        let answer = self.request(self.subject(call), None, payload).await?;
        let answer: Value = serde_json::from_slice(&answer.payload)
            .map_err(|e| error(ErrorKind::Internal, "the server's answer cannot be read").with_source(e))?;
        match api_error(&answer) {
            Some(failed) => Err(Failure::Api(failed)),
            None => Ok(answer),
        }
    }

    /// One request to any subject.
    pub(crate) async fn request(
        &self,
        subject: String,
        headers: Option<HeaderMap>,
        payload: Bytes,
    ) -> Result<async_nats::Message> {
        let attempt = || {
            let request = async_nats::Request::new().payload(payload.clone()).timeout(None);
            let request = match &headers {
                Some(headers) => request.headers(headers.clone()),
                None => request,
            };
            self.client.send_request(subject.clone(), request)
        };
        self.ask(&subject, attempt).await?.map_err(unsent)
    }

    /// Publishes one message and waits until it is stored; its sequence.
    pub(crate) async fn store(&self, subject: &str, headers: HeaderMap, payload: Bytes) -> Result<u64, Failure> {
        let answer = self.request(subject.to_owned(), Some(headers), payload).await?;
        parse_ack(&answer).map(|ack| ack.sequence)
    }

    /// The newest messages of all subjects that these filters match.
    pub(crate) async fn newest(&self, stream: &str, filters: &[String]) -> Result<Vec<Stored>, Failure> {
        let call = self.subject(&format!("DIRECT.GET.{stream}"));
        let body = Bytes::from(json!({ "multi_last": filters, "batch": 1000 }).to_string());
        self.ask(&call, || self.batch(call.clone(), body.clone())).await?
    }

    /// One request that is answered by many messages.
    async fn batch(&self, call: String, body: Bytes) -> Result<Vec<Stored>, Failure> {
        let inbox = self.client.new_inbox();
        let unreachable = |e| error(ErrorKind::Connection, "the request could not be sent").with_source(e);
        let mut answers = self.client.subscribe(inbox.clone()).await.map_err(unreachable)?;
        self.client.publish_with_reply(call, inbox, body).await.map_err(errors::publish)?;
        let mut found = Vec::new();
        while let Some(answer) = answers.next().await {
            match answer.status {
                None | Some(StatusCode::OK) => found.extend(stored(answer)),
                Some(code) => return end_of_batch(code, answer.description).map(|()| found),
            }
        }
        Err(Failure::Other(errors::closed()))
    }

    /// The first message of `subject` at or after a sequence.
    pub(crate) async fn next_message(&self, stream: &str, sequence: u64, subject: &str) -> Result<Option<Stored>> {
        self.message(stream, &json!({ "seq": sequence, "next_by_subj": subject })).await
    }

    /// The newest message of `subject`.
    pub(crate) async fn last_message(&self, stream: &str, subject: &str) -> Result<Option<Stored>> {
        self.message(stream, &json!({ "last_by_subj": subject })).await
    }

    pub(crate) async fn message(&self, stream: &str, which: &Value) -> Result<Option<Stored>> {
        match self.call(&format!("STREAM.MSG.GET.{stream}"), which).await {
            Ok(answer) => read_stored(&answer["message"]).map(Some),
            Err(failure) if failure.is_not_found() => Ok(None),
            Err(failure) => Err(failure.into()),
        }
    }
}

fn unsent(failed: RequestError) -> Error {
    let (kind, why) = match failed.kind() {
        RequestErrorKind::NoResponders => {
            (ErrorKind::Connection, "JetStream does not answer; it is off, or has no leader now")
        }
        _ => (ErrorKind::Connection, "the request could not be sent"),
    };
    error(kind, why).with_source(failed)
}

/// How an answer with a status ends a batch: 204 is the end, 404 says that there is nothing.
fn end_of_batch(code: StatusCode, description: Option<String>) -> Result<(), Failure> {
    match code.as_u16() {
        204 | 404 => Ok(()),
        503 => Err(Failure::Api(ApiError {
            code: 404,
            err_code: ApiError::STREAM_NOT_FOUND,
            description: "no stream answers".into(),
        })),
        other => Err(Failure::Api(ApiError {
            code: u64::from(other),
            err_code: 0,
            description: description.unwrap_or_default(),
        })),
    }
}

fn stored(answer: async_nats::Message) -> Option<Stored> {
    let headers = answer.headers?;
    let sequence = headers.get("Nats-Sequence")?.as_str().parse().ok()?;
    let subject = headers.get("Nats-Subject")?.as_str().to_owned();
    let time = headers.get("Nats-Time-Stamp").and_then(|time| from_rfc3339(time.as_str()));
    Some(Stored { subject, sequence, time, headers: Some(headers), payload: answer.payload })
}

fn read_stored(message: &Value) -> Result<Stored> {
    let wrong = || error(ErrorKind::Internal, "a stored message cannot be read");
    let bytes = |name: &str| match message[name].as_str() {
        None => Ok(Vec::new()),
        Some(encoded) => {
            base64::Engine::decode(&base64::engine::general_purpose::STANDARD, encoded).map_err(|_| wrong())
        }
    };
    Ok(Stored {
        subject: message["subject"].as_str().ok_or_else(wrong)?.to_owned(),
        sequence: message["seq"].as_u64().ok_or_else(wrong)?,
        time: message["time"].as_str().and_then(from_rfc3339),
        headers: Some(wire::parse_headers(&bytes("hdrs")?)),
        payload: bytes("data")?.into(),
    })
}

fn api_error(answer: &Value) -> Option<ApiError> {
    let failed = answer.get("error")?;
    Some(ApiError {
        code: failed["code"].as_u64().unwrap_or(0),
        err_code: failed["err_code"].as_u64().unwrap_or(0),
        description: failed["description"].as_str().unwrap_or("it did not say").to_owned(),
    })
}

/// The answer to a publish.
#[derive(serde::Deserialize)]
struct AckBody {
    error: Option<Value>,
    seq: Option<u64>,
}

/// Where a message was stored.
#[derive(Debug)]
pub(crate) struct Ack {
    pub(crate) sequence: u64,
}

/// Reads the answer to a publish. A message that is stored already, under the id that is a hash of what is published, is stored.
pub(crate) fn parse_ack(answer: &async_nats::Message) -> Result<Ack, Failure> {
    if answer.status == Some(StatusCode::NO_RESPONDERS) {
        return Err(Failure::Api(ApiError {
            code: 404,
            err_code: ApiError::STREAM_NOT_FOUND,
            description: "no stream holds the subject".into(),
        }));
    }
    let wrong = || error(ErrorKind::Internal, "the server's answer cannot be read").with_transient(true);
    let body: AckBody = serde_json::from_slice(&answer.payload).map_err(|e| wrong().with_source(e))?;
    if let Some(failed) = body.error {
        return Err(Failure::Api(api_error(&json!({ "error": failed })).ok_or_else(wrong)?));
    }
    Ok(Ack { sequence: body.seq.ok_or_else(wrong)? })
}

/// A number in an answer; what is missing is 0.
pub(crate) fn number(value: &Value, path: &str) -> u64 {
    value.pointer(path).and_then(Value::as_u64).unwrap_or(0)
}

pub(crate) fn during(operation: &'static str) -> impl Fn(Failure) -> Error {
    move |failure| Error::from(failure).with_operation(operation)
}
