//! Wall-clock time that a test can stop.

use std::time::SystemTime;
use tokio::time::Instant;

/// Where the time of day comes from: the system, or the (pausable) timer of tokio.
///
/// Everything in core that stamps or compares the time of day asks a clock, so that a test under
/// `tokio::time::pause` sees ten minutes pass in no time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock(Option<(SystemTime, Instant)>);

impl Clock {
    /// The system's clock.
    pub const SYSTEM: Self = Self(None);

    /// A clock that starts at the system's time and then follows tokio's timer.
    #[must_use]
    pub fn of_tokio() -> Self {
        Self(Some((SystemTime::now(), Instant::now())))
    }

    /// The time of day.
    #[must_use]
    pub fn now(&self) -> SystemTime {
        match self.0 {
            None => SystemTime::now(),
            Some((start, since)) => start + since.elapsed(),
        }
    }
}

/// A time as RFC 3339 with microseconds, in UTC: `2026-11-24T08:27:18.000001Z`.
#[must_use]
pub fn to_rfc3339(time: SystemTime) -> String {
    let format = |t: jiff::Timestamp| format!("{t:.6}");
    // What jiff cannot hold lies beyond the year 9999.
    jiff::Timestamp::try_from(time).map_or_else(|_| format(jiff::Timestamp::MAX), format)
}

/// Reads a time as RFC 3339; `None` if it is not one.
#[must_use]
pub fn from_rfc3339(text: &str) -> Option<SystemTime> {
    text.parse::<jiff::Timestamp>().ok().and_then(|time| SystemTime::try_from(time).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_come_back_to_the_microsecond() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_micros(1_764_000_000_000_001);
        assert_eq!(to_rfc3339(time), "2025-11-24T16:00:00.000001Z");
        assert_eq!(from_rfc3339("2025-11-24T17:00:00.000001+01:00"), Some(time));
        assert_eq!(from_rfc3339("yesterday"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn follows_the_paused_timer() {
        let clock = Clock::of_tokio();
        let start = clock.now();
        tokio::time::advance(Duration::from_secs(600)).await;
        assert_eq!(clock.now().duration_since(start).unwrap(), Duration::from_secs(600));
    }
}
