//! Layers around handlers.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::time::Duration;
use tidings::handler::{Next, Outcome, Request};
use tidings::prelude::*;
use tidings::transport::BoxFuture;
use tidings_tests::{Order, Seen, bus, dead_letters, order};

/// Notes what it sees and fails what its name says.
#[derive(Clone)]
struct Note {
    name: &'static str,
    seen: Seen<String>,
    inner: Next,
}

impl tower_service::Service<Request> for Note {
    type Response = tidings::handler::Outputs;
    type Error = HandlerError;
    type Future = BoxFuture<Outcome>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), HandlerError>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let (name, seen, mut inner) = (self.name, self.seen.clone(), self.inner.clone());
        Box::pin(async move {
            seen.push(format!("{name} {} {}", request.subscription, request.attempt));
            let outcome = inner.call(request).await;
            seen.push(format!("{name} {}", if outcome.is_ok() { "ok" } else { "failed" }));
            outcome
        })
    }
}

fn note(
    name: &'static str,
    seen: &Seen<String>,
) -> impl tower_layer::Layer<Next, Service = Note> + Send + Sync + 'static {
    let seen = seen.clone();
    tower_layer::layer_fn(move |inner| Note { name, seen: seen.clone(), inner })
}

#[tokio::test(start_paused = true)]
async fn layers_see_each_run_the_first_outermost_and_retries_are_around_them() {
    let (bus, seen): (_, Seen<String>) = (bus().await, Seen::default());
    let service = Service::new("billing").layer(note("outer", &seen)).layer(note("inner", &seen)).on(
        async |_: Order, Attempt(attempt): Attempt| -> Result<(), HandlerError> {
            if attempt == 1 { Err("once".into()) } else { Ok(()) }
        },
    );
    let running = service.start(&bus).await.unwrap();
    bus.publish(&order("ada", 1)).await.unwrap();
    let seen = seen.count(8).await;
    let name = "billing.shop.order.placed";
    let expected = [1, 2].into_iter().zip(["failed", "ok"]).flat_map(|(attempt, end)| {
        [
            format!("outer {name} {attempt}"),
            format!("inner {name} {attempt}"),
            format!("inner {end}"),
            format!("outer {end}"),
        ]
    });
    assert_eq!(seen, expected.collect::<Vec<_>>());
    running.drain(Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn a_layer_can_reject() {
    #[derive(Clone)]
    struct Refuse;
    impl tower_service::Service<Request> for Refuse {
        type Response = tidings::handler::Outputs;
        type Error = HandlerError;
        type Future = std::future::Ready<Outcome>;
        fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), HandlerError>> {
            std::task::Poll::Ready(Ok(()))
        }
        fn call(&mut self, _: Request) -> Self::Future {
            std::future::ready(Err(HandlerError::reject("not today")))
        }
    }
    let bus = bus().await;
    let service = Service::new("billing").layer(tower_layer::layer_fn(|_: Next| Refuse)).on(async |_: Order| ());
    let _running = service.start(&bus).await.unwrap();
    bus.publish(&order("ada", 1)).await.unwrap();
    let letter = dead_letters(&bus, "billing.shop.order.placed", 1).await.remove(0);
    assert_eq!(letter.headers.get_str(tidings::header::ERROR), Some("not today"));
}
