//! What goes wrong on purpose.

use std::fmt;
use std::time::Duration;

/// What goes wrong on purpose, now and then, in every subscription under test: to prove that handlers are idempotent and
/// that a service gets through.
///
/// All of it is what brokers and machines do; nothing here breaks a promise of Tidings. Which events are hit is drawn from
/// the seed, for each subscription by itself, and the seed is printed when an assertion fails. On the memory
/// transport the same seed hits the same events again, as long as the service itself does the same again.
///
/// # Examples
///
/// ```
/// use tidings_testing::Faults;
///
/// let faults = Faults::seeded(7).duplicate(0.2).crash_after_handle(0.1).fail_first(1);
/// assert_eq!(faults.to_string(), "seed 7, duplicate 0.2, crash_after_handle 0.1, fail_first 1");
/// ```
#[derive(Clone, Debug, PartialEq)]
#[must_use]
pub struct Faults {
    pub(crate) seed: u64,
    pub(crate) duplicate: f64,
    pub(crate) crash_after_handle: f64,
    pub(crate) fail_first: u32,
    pub(crate) delay: Duration,
}

impl Faults {
    /// No faults yet, drawn from `seed`.
    pub fn seeded(seed: u64) -> Self {
        Self { seed, duplicate: 0.0, crash_after_handle: 0.0, fail_first: 0, delay: Duration::ZERO }
    }

    /// No faults yet, drawn from the seed in `TIDINGS_TEST_SEED`; without that variable from another one each time.
    ///
    /// # Panics
    /// If the variable is not a whole number.
    pub fn from_env() -> Self {
        let seed = std::env::var("TIDINGS_TEST_SEED").ok();
        Self::seeded(seed.map_or_else(
            || fastrand::u64(..1_000_000),
            |seed| seed.parse().unwrap_or_else(|_| panic!("TIDINGS_TEST_SEED must be a whole number, not `{seed}`")),
        ))
    }

    /// This share of all deliveries, 0 to 1, comes a second time, as a publish that was repeated: marked as a possible
    /// duplicate, behind what was published meanwhile.
    pub fn duplicate(mut self, share: f64) -> Self {
        self.duplicate = share.clamp(0.0, 1.0);
        self
    }

    /// For this share of all events, 0 to 1, the instance ends after the handler has succeeded and what it returned is
    /// published, and before the broker knows: the event comes again, marked, and what was returned is published again,
    /// with the same ids. Once for each event and subscription.
    pub fn crash_after_handle(mut self, share: f64) -> Self {
        self.crash_after_handle = share.clamp(0.0, 1.0);
        self
    }

    /// The first `runs` runs of each event fail for now; half of them before the handler has begun, half of them after
    /// it has succeeded. Keep it under the retry policy's attempts (5 by default), or all of it is dead-lettered.
    pub fn fail_first(mut self, runs: u32) -> Self {
        self.fail_first = runs;
        self
    }

    /// Each run begins late, by a random time up to this, so that other keys and other services overtake it. It counts
    /// against the time that a handler may take.
    pub fn delay(mut self, up_to: Duration) -> Self {
        self.delay = up_to;
        self
    }

    /// Random numbers for one subscription.
    pub(crate) fn random(&self, subscription: &str) -> fastrand::Rng {
        let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        fastrand::Rng::with_seed(subscription.bytes().fold(0xcbf2_9ce4_8422_2325 ^ self.seed, fnv))
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {}", self.seed)?;
        for (name, share) in [("duplicate", self.duplicate), ("crash_after_handle", self.crash_after_handle)] {
            if share > 0.0 {
                write!(f, ", {name} {share}")?;
            }
        }
        if self.fail_first > 0 {
            write!(f, ", fail_first {}", self.fail_first)?;
        }
        if !self.delay.is_zero() {
            write!(f, ", delay up to {:?}", self.delay)?;
        }
        Ok(())
    }
}
