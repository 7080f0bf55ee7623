//! Wall-clock time that a test can stop.

use std::time::{Duration, SystemTime};
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
    usual_text(time).unwrap_or_else(|| any_text(time))
}

fn any_text(time: SystemTime) -> String {
    let format = |t: jiff::Timestamp| format!("{t:.6}");
    // What jiff cannot hold lies beyond the year 9999.
    jiff::Timestamp::try_from(time).map_or_else(|_| format(jiff::Timestamp::MAX), format)
}

/// What each message is written with, for a fifth of the price; `None` before 1970 and from the year 9999 on.
fn usual_text(time: SystemTime) -> Option<String> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // The Gregorian calendar repeats after 400 years of 146,097 days; years begin in March, so that leap days end them.
    let (era, of_era) = ((days + 719_468) / 146_097, (days + 719_468) % 146_097);
    let of_era_years = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * of_era_years + of_era_years / 4 - of_era_years / 100);
    let since_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * since_march + 2) / 5 + 1;
    let month = if since_march < 10 { since_march + 3 } else { since_march - 9 };
    let year = era * 400 + of_era_years + u64::from(month <= 2);
    let mut text = *b"0000-00-00T00:00:00.000000Z";
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    let parts = [(0..4, year), (5..7, month), (8..10, day), (11..13, hour), (14..16, minute), (17..19, second)];
    for (place, number) in parts.into_iter().chain([(20..26, u64::from(since.subsec_micros()))]) {
        write_digits(text.get_mut(place)?, number);
    }
    (year < 9_999).then(|| String::from_utf8_lossy(&text).into_owned())
}

fn write_digits(digits: &mut [u8], mut number: u64) {
    for digit in digits.iter_mut().rev() {
        // One digit, which fits.
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

/// Reads a time as RFC 3339; `None` if it is not one.
#[must_use]
pub fn from_rfc3339(text: &str) -> Option<SystemTime> {
    usual(text.as_bytes()).or_else(|| any(text))
}

fn any(text: &str) -> Option<SystemTime> {
    text.parse::<jiff::Timestamp>().ok().and_then(|time| SystemTime::try_from(time).ok())
}

/// What almost every message has twice, `2026-11-24T08:27:18.000001Z`, read for a sixth of the price; `None` for all else.
fn usual(text: &[u8]) -> Option<SystemTime> {
    const LENGTHS: [u64; 12] = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let (start, fraction) = text.strip_suffix(b"Z")?.split_first_chunk::<19>()?;
    let [y0, y1, y2, y3, b'-', m0, m1, b'-', d0, d1, b'T', h0, h1, b':', n0, n1, b':', s0, s1] = *start else {
        return None;
    };
    let (year, month, day) = (number(&[y0, y1, y2, y3])?, number(&[m0, m1])?, number(&[d0, d1])?);
    let (hour, minute, second) = (number(&[h0, h1])?, number(&[n0, n1])?, number(&[s0, s1])?);
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let before = LENGTHS.get(..usize::try_from(month.checked_sub(1)?).ok()?)?;
    let length = *LENGTHS.get(before.len())? + u64::from(month == 2 && is_leap(year));
    // What jiff can hold ends a day before the year 9999 does.
    if !(1970..9999).contains(&year) || day == 0 || day > length || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    // As many leap days as there were before this year, of which 477 were before 1970.
    let leaps = (year - 1) / 4 - (year - 1) / 100 + (year - 1) / 400 - 477 + u64::from(month > 2 && is_leap(year));
    let days = (year - 1970) * 365 + leaps + before.iter().sum::<u64>() + day - 1;
    let nanos = match fraction {
        [] => 0,
        [b'.', digits @ ..] if matches!(digits.len(), 1..=9) => number(digits)? * 10_u64.pow(9 - digits.len() as u32),
        _ => return None,
    };
    let seconds = ((days * 24 + hour) * 60 + minute) * 60 + second;
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_nanos(nanos))
}

fn number(digits: &[u8]) -> Option<u64> {
    digits.iter().try_fold(0, |number, digit| digit.is_ascii_digit().then(|| number * 10 + u64::from(digit - b'0')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_come_back_to_the_microsecond() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_micros(1_764_000_000_000_001);
        assert_eq!(to_rfc3339(time), "2025-11-24T16:00:00.000001Z");
        assert_eq!(from_rfc3339("2025-11-24T17:00:00.000001+01:00"), Some(time));
        assert_eq!(from_rfc3339("yesterday"), None);
    }

    #[test]
    fn the_usual_times_are_written_like_any_other() {
        let mut random = fastrand::Rng::with_seed(1);
        let after = |nanos: u128| {
            SystemTime::UNIX_EPOCH + Duration::new((nanos / 1_000_000_000) as u64, (nanos % 1_000_000_000) as u32)
        };
        let day = 86_400_u128 * 1_000_000_000;
        // Every day up to the year 2500, and others up to the year 10000.
        let days = (0..193_600).map(|number| after(number * day + random.u128(..day)));
        let far = (0..20_000).map(|n| after(fastrand::Rng::with_seed(n).u128(..2_932_800 * day)));
        let before = (1..1_000).map(|n| SystemTime::UNIX_EPOCH - Duration::from_millis(n * 12_345_678));
        for time in days.collect::<Vec<_>>().into_iter().chain(far).chain(before) {
            assert_eq!(to_rfc3339(time), any_text(time), "{time:?}");
        }
        assert!(usual_text(SystemTime::now()).is_some(), "the short way is taken");
        assert!(usual_text(after(u128::from(u64::MAX))).is_some());
    }

    #[test]
    fn the_usual_form_is_read_like_any_other() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut texts: Vec<String> = (0..20_000)
            .map(|_| {
                let (y, m, d) = (random.u16(1969..2402), random.u8(0..14), random.u8(0..33));
                let (h, n, s) = (random.u8(0..25), random.u8(0..61), random.u8(0..61));
                let fraction = [String::new(), ".".into(), format!(".{}", random.u64(..3_000_000_000))];
                format!("{y:04}-{m:02}-{d:02}T{h:02}:{n:02}:{s:02}{}Z", fraction[random.usize(..3)])
            })
            .collect();
        for year in [1972, 2000, 2023, 2024, 2100, 9999] {
            texts.extend(["02-28", "02-29", "02-30", "03-01", "12-31"].map(|day| format!("{year}-{day}T23:59:59.5Z")));
        }
        texts.extend(
            ["", "Z", "2026-11-24T08:27:18", "2026-11-24t08:27:18z", "2026-11-24T08:27:1\u{e4}Z"].map(String::from),
        );
        let read = texts.iter().filter(|text| {
            assert_eq!(from_rfc3339(text), any(text), "{text}");
            usual(text.as_bytes()).is_some()
        });
        assert!(read.count() > 5_000, "the short way was taken");
    }

    #[tokio::test(start_paused = true)]
    async fn follows_the_paused_timer() {
        let clock = Clock::of_tokio();
        let start = clock.now();
        tokio::time::advance(Duration::from_secs(600)).await;
        assert_eq!(clock.now().duration_since(start).unwrap(), Duration::from_secs(600));
    }
}
