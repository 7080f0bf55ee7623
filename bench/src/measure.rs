//! Time and CPU of one loop, and what rounds of it say.

use cpu_time::ProcessTime;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Counts events. What is measured begins with the first after the warm-up and ends with the last, so that connecting,
/// opening and closing are not in it.
pub struct Meter {
    warm_up: u64,
    count: u64,
    seen: AtomicU64,
    begun: Mutex<Option<(Instant, ProcessTime)>>,
    sample: Mutex<Option<Sample>>,
    over: Notify,
}

/// One measured loop.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub time: Duration,
    /// User and system time of this process, all threads.
    pub cpu: Duration,
    pub count: u64,
}

impl Meter {
    pub fn new(warm_up: u64, count: u64) -> Self {
        let (seen, over) = (AtomicU64::new(0), Notify::new());
        Self { warm_up, count, seen, begun: Mutex::default(), sample: Mutex::default(), over }
    }

    pub fn warm_up(&self) -> u64 {
        self.warm_up
    }

    /// How many events there must be.
    pub fn total(&self) -> u64 {
        self.warm_up + self.count
    }

    /// One event more was confirmed, or handled. Whether more are to come.
    pub fn tick(&self) -> bool {
        self.tick_many(1)
    }

    /// Several events at once.
    pub fn tick_many(&self, count: u64) -> bool {
        let before = self.seen.fetch_add(count, Relaxed);
        let after = before + count;
        if before < self.warm_up && after >= self.warm_up {
            *lock(&self.begun) = Some((Instant::now(), ProcessTime::now()));
        }
        if before < self.total() && after >= self.total() {
            let sample = lock(&self.begun).map(|(time, cpu)| Sample {
                time: time.elapsed(),
                cpu: cpu.elapsed(),
                count: self.count,
            });
            *lock(&self.sample) = sample;
            self.over.notify_one();
        }
        after < self.total()
    }

    /// Waits for the last event. One may wait.
    pub async fn over(&self) {
        self.over.notified().await;
    }

    pub fn sample(&self) -> Option<Sample> {
        *lock(&self.sample)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Sample {
    pub fn per_second(&self) -> f64 {
        self.count as f64 / self.time.as_secs_f64()
    }

    /// Microseconds of this process's CPU for one event.
    pub fn cpu_micros(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.count as f64
    }
}

/// The numbers in their order, of which the middle one, and others, can be asked for.
#[derive(Clone, Debug)]
pub struct Ranked(Vec<f64>);

impl Ranked {
    pub fn new(numbers: impl IntoIterator<Item = f64>) -> Self {
        let mut numbers: Vec<_> = numbers.into_iter().collect();
        numbers.sort_by(f64::total_cmp);
        Self(numbers)
    }

    /// The number below which a share of them lies, by the nearest rank.
    pub fn at(&self, share: f64) -> f64 {
        let last = self.0.len().saturating_sub(1);
        self.0.get((share * last as f64).round() as usize).copied().unwrap_or(f64::NAN)
    }

    pub fn median(&self) -> f64 {
        self.at(0.5)
    }
}
