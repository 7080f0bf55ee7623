//! What things are called on the server: injective, and apart by namespace.

use tidings_core::{SubscriptionName, Topic};

/// The first token, after the namespace, of everything that is internal.
const INTERNAL: &str = "_tidings";

/// Names in one namespace.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    /// `prod.`, or empty.
    prefix: String,
    /// `prod__`, or empty: no name has two `_` in a row.
    flat: String,
}

/// `.` does not occur in the names of streams and consumers, nor `_` in those of topics and subscriptions.
fn flat(name: &str) -> String {
    name.replace('.', "_")
}

impl Names {
    pub(crate) fn new(namespace: &str) -> Self {
        if namespace.is_empty() {
            return Self { prefix: String::new(), flat: String::new() };
        }
        Self { prefix: format!("{namespace}."), flat: format!("{namespace}__") }
    }

    /// The subject of a topic, or of a pattern of topics.
    pub(crate) fn topic(&self, topic: &str) -> String {
        format!("{}{topic}", self.prefix)
    }

    /// The subject of one slot (a number, or `*`) of a topic or pattern. The slot stands before the topic, so that a pattern with a
    /// final `>` can be read slot by slot too.
    pub(crate) fn slot(&self, slot: &str, topic: &str) -> String {
        format!("{}{INTERNAL}.slot.{slot}.{topic}", self.prefix)
    }

    /// Where retries and redriven dead letters of a subscription go, by slot (a number, or `*`).
    pub(crate) fn address(&self, name: &SubscriptionName, slot: &str) -> String {
        format!("{}{INTERNAL}.to.{}.{slot}", self.prefix, flat(name.as_str()))
    }

    /// All addresses.
    pub(crate) fn addresses(&self) -> String {
        format!("{}{INTERNAL}.to.>", self.prefix)
    }

    pub(crate) fn dead(&self, name: &SubscriptionName) -> String {
        format!("{}{INTERNAL}.dead.{}", self.prefix, flat(name.as_str()))
    }

    pub(crate) fn all_dead(&self) -> String {
        format!("{}{INTERNAL}.dead.>", self.prefix)
    }

    /// The topic, of a subject of a topic or of one of its slots.
    pub(crate) fn topic_of(&self, subject: &str) -> Option<Topic> {
        let rest = subject.strip_prefix(&self.prefix)?;
        let slotted = rest.strip_prefix(INTERNAL).and_then(|rest| rest.strip_prefix(".slot."));
        let topic = match slotted {
            Some(slotted) => slotted.split_once('.')?.1,
            None => rest,
        };
        Topic::new(topic).ok()
    }

    /// The stream of all topics that begin with this token.
    pub(crate) fn stream(&self, token: &str) -> String {
        format!("{}{token}", self.flat)
    }

    /// What that stream holds.
    pub(crate) fn stream_subjects(&self, token: &str) -> [String; 4] {
        let rest = format!("{token}.>");
        [self.topic(token), self.topic(&rest), self.slot("*", token), self.slot("*", &rest)]
    }

    pub(crate) fn address_stream(&self) -> String {
        format!("{}{INTERNAL}_to", self.flat)
    }

    pub(crate) fn dead_stream(&self) -> String {
        format!("{}{INTERNAL}_dead", self.flat)
    }

    /// The consumer of a subscription, by slot. Nothing else has a capital letter in its name.
    pub(crate) fn consumer(&self, name: &SubscriptionName, slot: u32) -> String {
        let flat = format!("{}{}", self.flat, flat(name.as_str()));
        if slot == 0 { flat } else { format!("{flat}_S{slot}") }
    }

    /// The bucket for what is kept beside messages: properties of topics, and who takes part in a subscription.
    pub(crate) fn bucket(&self) -> String {
        format!("{}{INTERNAL}", self.flat)
    }

    pub(crate) fn bucket_stream(&self) -> String {
        format!("KV_{}", self.bucket())
    }

    /// The subject of a key in the bucket.
    pub(crate) fn key(&self, key: &str) -> String {
        format!("$KV.{}.{key}", self.bucket())
    }

    pub(crate) fn topic_key(&self, topic: &str) -> String {
        self.key(&format!("topic.{topic}"))
    }

    pub(crate) fn member_key(&self, name: &SubscriptionName, instance: &str) -> String {
        self.key(&format!("member.{}.{instance}", flat(name.as_str())))
    }

    /// Up to where a consumer is known to have been read.
    pub(crate) fn read_key(&self, stream: &str, consumer: &str) -> String {
        self.key(&format!("read.{stream}.{consumer}"))
    }

    pub(crate) fn claim_key(&self, name: &SubscriptionName, slot: &str) -> String {
        self.key(&format!("owner.{}.{slot}", flat(name.as_str())))
    }
}

/// Whether all subjects that `inner` matches are matched by `outer`.
pub(crate) fn covers(outer: &str, inner: &str) -> bool {
    let (mut outer, mut inner) = (outer.split('.'), inner.split('.'));
    loop {
        match (outer.next(), inner.next()) {
            (Some(">"), Some(_)) | (None, None) => return true,
            (Some("*"), Some(token)) if token != ">" => {}
            (Some(want), Some(have)) if want == have => {}
            _ => return false,
        }
    }
}

/// Whether some subject is matched by both.
pub(crate) fn overlap(one: &str, other: &str) -> bool {
    let (mut one, mut other) = (one.split('.'), other.split('.'));
    loop {
        match (one.next(), other.next()) {
            (None, None) | (Some(">"), Some(_)) | (Some(_), Some(">")) => return true,
            (Some(a), Some(b)) if a == b || a == "*" || b == "*" => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_injective() {
        let names = Names::new("prod");
        let name = |name: &str| SubscriptionName::new(name).unwrap();
        assert_eq!(names.topic("shop.order"), "prod.shop.order");
        assert_eq!(names.consumer(&name("a.b"), 0), "prod__a_b");
        assert_ne!(names.consumer(&name("a"), 3), names.consumer(&name("a.s3"), 0));
        assert_ne!(Names::new("").consumer(&name("prod.a.b"), 0), names.consumer(&name("a.b"), 0));
        assert_ne!(Names::new("").stream("prod"), names.stream("shop"));
        let topic = Topic::new("shop.order").unwrap();
        assert_eq!(names.topic_of("prod.shop.order"), Some(topic.clone()));
        assert_eq!(names.topic_of(&names.slot("17", "shop.order")), Some(topic));
        assert_eq!(names.topic_of("shop.order"), None);
        assert_eq!(names.topic_of(&names.address(&name("a"), "0")), None);
    }

    #[test]
    fn covering_and_overlapping() {
        for (outer, inner, covered) in [
            ("a.>", "a.b", true),
            ("a.>", "a.>", true),
            ("a.>", "a.*.c", true),
            ("a.>", "a", false),
            ("a.*", "a.b", true),
            ("a.*", "a.>", false),
            ("a.b", "a.*", false),
            (">", "a.b", true),
        ] {
            assert_eq!(covers(outer, inner), covered, "{outer} {inner}");
        }
        assert!(overlap("a.*.c", "a.b.*") && overlap("a.>", "a.b") && overlap("a.b", "a.b"));
        assert!(!overlap("a.b", "a.c") && !overlap("a.>", "a") && !overlap("a.b", "a.b.c"));
    }
}
