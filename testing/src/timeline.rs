//! What has happened, in order, and how it is written for people.

use std::fmt;
use std::time::Duration;
use tidings_core::transport::Destination;
use tidings_core::{Message, SubscriptionName, Text, header};

/// How many lines are printed, the last ones.
const LINES: usize = 200;

/// The how-manieth message of a test, by source and id: what is repeated keeps its number.
pub(crate) type Number = usize;

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) at: Duration,
    pub(crate) what: What,
}

#[derive(Debug)]
pub(crate) enum What {
    Published(Box<Published>),
    Run(Run),
    /// A retry of which no run was seen.
    Retried(Retried),
    Note(String),
}

#[derive(Debug)]
pub(crate) struct Published {
    pub(crate) to: Destination,
    pub(crate) message: Message,
    pub(crate) number: Number,
    /// The message whose handler returned it.
    pub(crate) cause: Option<Number>,
    pub(crate) delay: Option<Duration>,
    pub(crate) sent: Sent,
}

#[derive(Debug, PartialEq)]
pub(crate) enum Sent {
    Unconfirmed,
    Confirmed,
    Failed(String),
}

#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) subscription: SubscriptionName,
    /// What it works on, by number and type.
    pub(crate) events: Vec<(Number, Text)>,
    pub(crate) attempt: u32,
    pub(crate) took: Duration,
    pub(crate) end: End,
    /// Which of them were not handled although it has succeeded: a result for each said so, a layer around it, or the
    /// broker, which refused what it returned.
    pub(crate) but: Vec<Number>,
    /// After how long it is followed by another.
    pub(crate) again: Option<Duration>,
}

#[derive(Debug, PartialEq)]
pub(crate) enum End {
    Running,
    Succeeded,
    Failed(String),
    /// Its future was dropped: a time-out, a panic or the end of its service.
    CutOff,
}

#[derive(Debug)]
pub(crate) struct Retried {
    pub(crate) subscription: SubscriptionName,
    pub(crate) number: Number,
    pub(crate) delay: Duration,
    pub(crate) error: String,
}

impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, message) = (self.number, &self.message);
        let header = |name| message.headers.get_str(name).unwrap_or_default();
        match &self.to {
            Destination::Topic(topic) => {
                write!(f, "published {topic} #{number}")?;
                if *topic.text() != message.event_type {
                    write!(f, " ({})", message.event_type)?;
                }
                if let Some(key) = &message.key {
                    write!(f, " key={key}")?;
                }
                if let Some(cause) = self.cause {
                    write!(f, " because of #{cause}")?;
                }
            }
            Destination::Subscription(name) => write!(f, "sent #{number} to {name} alone")?,
            Destination::DeadLetter(name) => {
                let (reason, attempts) = (header(header::REASON), header(header::ATTEMPTS));
                let attempts = if attempts.is_empty() { "0" } else { attempts };
                let error = header(header::ERROR);
                write!(f, "{name} dead-lettered #{number}: {reason} after {attempts} failed run(s): {error}")?;
            }
        }
        if let Some(delay) = self.delay {
            write!(f, ", due in {:?}", round(delay))?;
        }
        match &self.sent {
            Sent::Confirmed => Ok(()),
            Sent::Unconfirmed => f.write_str(", NOT CONFIRMED yet"),
            Sent::Failed(why) => write!(f, ", FAILED: {why}"),
        }
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} run {} of", self.subscription, self.attempt)?;
        self.events.iter().try_for_each(|(number, _)| write!(f, " #{number}"))?;
        match &self.end {
            End::Running => f.write_str(" GOES ON")?,
            End::Succeeded => {
                f.write_str(" succeeded")?;
                self.but.iter().try_for_each(|number| write!(f, ", but not for #{number}"))?;
            }
            End::Failed(error) => write!(f, " failed: {error}")?,
            End::CutOff => f.write_str(" was cut off")?,
        }
        let took = round(self.took);
        if !took.is_zero() {
            write!(f, " (took {took:?})")?;
        }
        self.again.map_or(Ok(()), |delay| write!(f, "; again in {:?}", round(delay)))
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "+{:.3} ", self.at.as_secs_f64())?;
        match &self.what {
            What::Published(published) => published.fmt(f),
            What::Run(run) => run.fmt(f),
            What::Retried(Retried { subscription, number, delay, error }) => {
                write!(f, "{subscription} failed for #{number}: {error}; again in {:?}", round(*delay))
            }
            What::Note(text) => f.write_str(text),
        }
    }
}

/// To the millisecond, which is as fine as the lines are.
fn round(time: Duration) -> Duration {
    Duration::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

/// The last lines.
pub(crate) fn write(entries: &[Entry]) -> String {
    let earlier = entries.len().saturating_sub(LINES);
    let mut text = if earlier > 0 { format!("  ({earlier} earlier lines)\n") } else { String::new() };
    for entry in &entries[earlier..] {
        text.push_str(&format!("  {entry}\n"));
    }
    text
}
