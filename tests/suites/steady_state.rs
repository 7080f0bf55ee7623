//! A million events through one handler: memory stays flat, and core adds next to no allocation to what the codec needs.
//!
//! Allocations are counted, not timed. The numbers are printed; `--nocapture` shows them.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use allocation_counter::{AllocationInfo, measure};
use tidings::memory::MemoryConfig;
use tidings::prelude::*;
use tidings_tests::{Invoice, Order, order};
use tokio::runtime::Runtime;

const EVENTS: u64 = if cfg!(debug_assertions) { 100_000 } else { 1_000_000 };
const JSON: &str = "application/json";

async fn bill(order: Order, State(handled): State<Arc<AtomicU64>>) -> Result<Invoice, HandlerError> {
    handled.fetch_add(1, Relaxed);
    Ok(Invoice { customer: order.customer, number: order.number })
}

/// Publishes `count` orders one after another, never more than about 1,000 ahead of the handler, and waits for the rest.
async fn publish(bus: &Bus, handled: &AtomicU64, count: u64) {
    let handled = || handled.load(Relaxed);
    let start = handled();
    for number in 0..count {
        while number % 500 == 0 && number - (handled() - start) > 500 {
            tokio::task::yield_now().await;
        }
        bus.publish(&order("customer-0000000001", number)).await.unwrap();
    }
    while handled() - start < count {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
}

fn run(runtime: &Runtime, bus: &Bus, handled: &AtomicU64, count: u64) -> AllocationInfo {
    measure(|| runtime.block_on(publish(bus, handled, count)))
}

/// What encoding and decoding the same events needs by itself.
fn codec_alone(count: u64) -> f64 {
    let info = measure(|| {
        for number in 0..count {
            let payload = order("customer-0000000001", number).encode(JSON).unwrap();
            let order = Order::decode(JSON, 1, &payload).unwrap();
            Invoice { customer: order.customer, number: order.number }.encode(JSON).unwrap();
        }
    });
    info.count_total as f64 / count as f64
}

#[test]
fn a_million_events_run_in_flat_memory_with_at_most_one_allocation_per_message_beside_the_codec() {
    // One thread, because allocations are counted by thread.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let handled = Arc::new(AtomicU64::new(0));
    let (bus, running) = runtime.block_on(async {
        let config = MemoryConfig { retain: 1024 * 1024, ..MemoryConfig::default() };
        let bus = Bus::connect(config).await.unwrap();
        let running = Service::new("billing").state(Arc::clone(&handled)).on(bill).start(&bus).await.unwrap();
        (bus, running)
    });
    // Until what the memory broker keeps for replays is full.
    run(&runtime, &bus, &handled, EVENTS / 5);
    let info = run(&runtime, &bus, &handled, EVENTS * 4 / 5);
    let (total, codec) = (info.count_total as f64 / (EVENTS * 4 / 5) as f64, codec_alone(10_000));
    let grown = info.bytes_current;
    // What is left is the reference count of a payload that the log and the delivery share (`Bytes`).
    // For each event two messages: the order, published and handled, and the invoice, published.
    let added = (total - codec) / 2.0;
    println!(
        "per event {total:.3} allocations, the codec alone {codec:.3}: {added:.3} added per message; heap grew by {grown} bytes"
    );
    // A few come from the timers of the test itself.
    assert!(added < 1.001, "{added} allocations added per message");
    assert!(grown < 1024 * 1024, "the heap grew by {grown} bytes over {EVENTS} events");
    runtime.block_on(running.drain(std::time::Duration::from_secs(5)));
}
