//! What everything is called on the server. No two things get one name: what the SDK adds starts with `_` or stands behind
//! a `:` or `/`, none of which a topic, a subscription or a namespace can hold.

use crate::error::short;
use lapin::types::ShortString;
use tidings_core::{Result, SubscriptionName, Topic, TopicPattern};

/// How many bits a delay has, in steps of [`STEP_MS`].
pub(crate) const LEVELS: usize = 26;
/// The delay of the lowest level, in milliseconds.
pub(crate) const STEP_MS: u64 = 50;

/// The names in one namespace.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    prefix: String,
}

impl Names {
    pub(crate) fn new(namespace: &str) -> Self {
        let prefix = if namespace.is_empty() { String::new() } else { format!("{namespace}:") };
        Self { prefix }
    }

    fn named(&self, rest: impl std::fmt::Display) -> Result<ShortString> {
        short(format!("{}{rest}", self.prefix))
    }

    /// For what every message needs, which costs a tenth of formatting it.
    fn fixed(&self, rest: &'static str) -> Result<ShortString> {
        short([&self.prefix, rest].concat())
    }

    /// The topic exchange that everything is published to.
    pub(crate) fn topics(&self) -> Result<ShortString> {
        self.fixed("tidings")
    }

    /// The queue of a subscription.
    pub(crate) fn queue(&self, name: &SubscriptionName) -> Result<ShortString> {
        self.named(name)
    }

    /// The queue of one slot of a subscription.
    pub(crate) fn slot(&self, name: &SubscriptionName, slot: u32) -> Result<ShortString> {
        self.named(format_args!("{name}/{slot}"))
    }

    /// The exchange that spreads a subscription over its slots.
    pub(crate) fn spread(&self, name: &SubscriptionName) -> Result<ShortString> {
        self.named(format_args!("_tidings.slots.{name}"))
    }

    pub(crate) fn dead_letters(&self, name: &SubscriptionName) -> Result<ShortString> {
        self.named(format_args!("_tidings.dead.{name}"))
    }

    /// The stream of a retained topic.
    pub(crate) fn log(&self, topic: &Topic) -> Result<ShortString> {
        self.named(format_args!("_tidings.log.{topic}"))
    }

    /// The direct exchange to the address of each subscription.
    pub(crate) fn addresses(&self) -> Result<ShortString> {
        self.fixed("_tidings.to")
    }

    /// Where instances of subscriptions greet each other.
    pub(crate) fn members(&self) -> Result<ShortString> {
        self.named("_tidings.members")
    }

    /// The queue that holds what topics and subscriptions were created with.
    pub(crate) fn register(&self) -> Result<ShortString> {
        self.named("_tidings.topology")
    }

    /// A queue that exists while somebody does something that nobody else may do meanwhile.
    pub(crate) fn lock(&self, of: &str) -> Result<ShortString> {
        self.named(format_args!("_tidings.lock.{of}"))
    }

    /// The exchange, and the queue, of one level of the delay chain.
    pub(crate) fn delay(&self, level: usize) -> Result<ShortString> {
        self.named(format_args!("_tidings.delay.{level:02}"))
    }

    /// Where the delay chain ends.
    pub(crate) fn due(&self) -> Result<ShortString> {
        self.named("_tidings.due")
    }

    /// What was delayed and has nowhere to go.
    pub(crate) fn undeliverable(&self) -> Result<ShortString> {
        self.named("_tidings.undeliverable")
    }

    /// Where what was delayed for a topic that nobody reads goes.
    pub(crate) fn nowhere(&self) -> Result<ShortString> {
        self.named("_tidings.nowhere")
    }
}

/// A pattern as a topic exchange takes it: its `#` matches nothing too, where `>` is at least one token.
pub(crate) fn binding(pattern: &TopicPattern) -> String {
    match pattern.as_str().strip_suffix('>') {
        Some(start) => format!("{start}*.#"),
        None => pattern.as_str().to_owned(),
    }
}

/// Where what is due for a topic or pattern is bound to.
pub(crate) fn due_topic(binding: &str) -> String {
    format!("#._t.{binding}")
}

/// Where what is due for a subscription is bound to: its name is one token there.
pub(crate) fn due_address(name: &SubscriptionName) -> String {
    format!("#._s.{}", name.as_str().replace('.', ":"))
}

/// Whom a delayed message is for.
#[derive(Clone, Copy)]
pub(crate) enum Due<'a> {
    Topic(&'a Topic),
    Subscription(&'a SubscriptionName),
}

/// The routing key of a delay of `steps`: its bits, the highest first, then whom it is for.
pub(crate) fn delayed_key(steps: u64, due: Due<'_>) -> String {
    let mut key = String::with_capacity(255);
    for level in (0..LEVELS).rev() {
        key.push_str(if steps >> level & 1 == 1 { "1." } else { "0." });
    }
    match due {
        Due::Topic(topic) => key.push_str(&format!("_t.{topic}")),
        Due::Subscription(name) => key.push_str(&format!("_s.{}", name.as_str().replace('.', ":"))),
    }
    key
}

/// What matches the bit of a level.
pub(crate) fn bit(level: usize, bit: u8) -> String {
    format!("{}{bit}.#", "*.".repeat(LEVELS - 1 - level))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> SubscriptionName {
        SubscriptionName::new(name).unwrap()
    }

    #[test]
    fn no_two_things_have_one_name() {
        let (none, a, ab) = (Names::new(""), Names::new("a"), Names::new("a.b"));
        let mut all = Vec::new();
        for names in [&none, &a, &ab] {
            for subscription in ["a", "b", "a.b", "b.c", "c", "a.0"].map(name) {
                all.push(names.queue(&subscription).unwrap());
                all.push(names.slot(&subscription, 0).unwrap());
                all.push(names.dead_letters(&subscription).unwrap());
            }
        }
        let count = all.len();
        all.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        all.dedup();
        assert_eq!(all.len(), count);
    }

    #[test]
    fn a_key_of_any_delay_and_name_fits() {
        let long = "n".repeat(200);
        let topic = Topic::new(long.as_str()).unwrap();
        let key = delayed_key(5, Due::Topic(&topic));
        assert!(key.len() <= 255, "{}", key.len());
        assert!(key.starts_with("0.0.") && key.contains("0.1.0.1._t.nnn"));
        assert_eq!(delayed_key(1, Due::Subscription(&name("crm.orders"))).split("1.").last(), Some("_s.crm:orders"));
        assert_eq!(bit(LEVELS - 1, 1), "1.#");
        assert_eq!(bit(LEVELS - 3, 0), "*.*.0.#");
        assert_eq!(binding(&TopicPattern::new("shop.>").unwrap()), "shop.*.#");
        assert!(Names::new(&long).queue(&name(&long)).is_err());
    }
}
