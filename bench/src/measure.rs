//! Time, CPU, allocations and latencies of one loop, and what rounds of it say.

use cpu_time::ProcessTime;
use stats_alloc::INSTRUMENTED_SYSTEM;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Counts events. What is measured begins with the first after the warm-up and ends with the last, so that connecting,
/// opening and closing are not in it.
pub struct Meter {
    warm_up: u64,
    count: u64,
    seen: AtomicU64,
    begun: OnceLock<Begun>,
    sample: Mutex<Option<Sample>>,
    /// From when each event was made to when it was handled, the warm-up's too.
    took: Mutex<Vec<Duration>>,
    /// The most bytes that were allocated at a time, and what was before.
    peak: AtomicUsize,
    before: usize,
    counts: bool,
    pace: Option<Pace>,
    first: Notify,
    over: Notify,
}

/// What was when the warm-up was over.
struct Begun {
    time: Instant,
    cpu: ProcessTime,
    allocations: usize,
}

/// Publishing that is held back: the next only so long after the one before, and none but one before it was handled.
struct Pace {
    every: Duration,
    handled: Arc<Meter>,
}

/// One measured loop.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub time: Duration,
    /// User and system time of this process, all threads.
    pub cpu: Duration,
    pub count: u64,
    /// Half of the events, and 99 of 100, took no longer than this.
    pub latency: Option<(Duration, Duration)>,
    pub memory: Memory,
}

/// What was allocated, if this process counts that.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// By one event.
    pub allocations: f64,
    /// The most bytes at a time, above what there was before the loop.
    pub peak: usize,
}

/// Whether this process counts what it allocates: only one that has the counting allocator does.
pub fn counts() -> bool {
    INSTRUMENTED_SYSTEM.stats().allocations > 0
}

fn live() -> usize {
    let stats = INSTRUMENTED_SYSTEM.stats();
    stats.bytes_allocated.saturating_sub(stats.bytes_deallocated)
}

impl Meter {
    pub fn new(warm_up: u64, count: u64) -> Self {
        Self {
            warm_up,
            count,
            seen: AtomicU64::new(0),
            begun: OnceLock::new(),
            sample: Mutex::default(),
            took: Mutex::default(),
            peak: AtomicUsize::new(0),
            before: live(),
            counts: counts(),
            pace: None,
            first: Notify::new(),
            over: Notify::new(),
        }
    }

    /// For publishing what `handled` will see, with so long between two, and the second only when the first was handled.
    pub fn paced(handled: &Arc<Self>, every: Duration) -> Self {
        Self { pace: Some(Pace { every, handled: Arc::clone(handled) }), ..Self::new(0, handled.total()) }
    }

    /// Waits until the event of this number may be published.
    pub async fn due(&self, number: u64) {
        match &self.pace {
            Some(pace) if number == 1 => pace.handled.first.notified().await,
            Some(pace) if number > 1 => tokio::time::sleep(pace.every).await,
            _ => {}
        }
    }

    pub fn warm_up(&self) -> u64 {
        self.warm_up
    }

    /// How many events there must be.
    pub fn total(&self) -> u64 {
        self.warm_up + self.count
    }

    /// Begins before the first event, where an event is not handled at once and there is no warm-up.
    pub fn begin(&self) {
        self.begun.get_or_init(Begun::now);
    }

    /// One event was handled so long after it was made.
    pub fn took(&self, time: Duration) {
        lock(&self.took).push(time);
    }

    /// One event more was confirmed, or handled. Whether more are to come.
    pub fn tick(&self) -> bool {
        self.tick_many(1)
    }

    /// Several events at once.
    pub fn tick_many(&self, count: u64) -> bool {
        let before = self.seen.fetch_add(count, Relaxed);
        let after = before + count;
        if before == 0 {
            self.first.notify_one();
        }
        if before < self.warm_up.max(1) && after >= self.warm_up {
            let _ = self.begun.set(Begun::now());
        }
        if self.counts && after >= self.warm_up {
            self.peak.fetch_max(live(), Relaxed);
        }
        if before < self.total() && after >= self.total() {
            // Whoever saw the last event of the warm-up may still be about to tell.
            *lock(&self.sample) = Some(self.ended(self.begun.wait()));
            self.over.notify_one();
        }
        after < self.total()
    }

    fn ended(&self, begun: &Begun) -> Sample {
        let (time, cpu) = (begun.time.elapsed(), begun.cpu.elapsed());
        let allocations = INSTRUMENTED_SYSTEM.stats().allocations - begun.allocations;
        let memory = Memory {
            allocations: allocations as f64 / self.count as f64,
            peak: self.peak.load(Relaxed).saturating_sub(self.before),
        };
        Sample { time, cpu, count: self.count, latency: self.latency(), memory }
    }

    fn latency(&self) -> Option<(Duration, Duration)> {
        let took = lock(&self.took);
        let seconds = took.get(usize::try_from(self.warm_up).ok()?..)?.iter().map(Duration::as_secs_f64);
        let ranked = Ranked::new(seconds);
        let at = |share| Duration::try_from_secs_f64(ranked.at(share)).ok();
        at(0.5).zip(at(0.99))
    }

    /// Waits for the last event. One may wait.
    pub async fn over(&self) {
        self.over.notified().await;
    }

    pub fn sample(&self) -> Option<Sample> {
        *lock(&self.sample)
    }
}

impl Begun {
    fn now() -> Self {
        let allocations = INSTRUMENTED_SYSTEM.stats().allocations;
        Self { allocations, time: Instant::now(), cpu: ProcessTime::now() }
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
