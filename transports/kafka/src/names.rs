//! What things are called in the cluster: injective, and apart by namespace.

use tidings_core::{SubscriptionName, Topic, TopicPattern};

/// The longest namespace with which every name of the contract fits into the 249 bytes that Kafka allows.
pub(crate) const MAX_NAMESPACE: usize = 30;

/// Names in one namespace. No token of a topic or subscription holds a `_`, so what is internal is nobody's topic.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    /// `prod.`, or empty.
    prefix: String,
}

impl Names {
    pub(crate) fn new(namespace: &str) -> Self {
        Self { prefix: if namespace.is_empty() { String::new() } else { format!("{namespace}.") } }
    }

    pub(crate) fn topic(&self, topic: &Topic) -> String {
        format!("{}{topic}", self.prefix)
    }

    /// What the consumer subscribes to: a topic, or a regular expression of the client.
    pub(crate) fn subscribed(&self, pattern: &TopicPattern) -> String {
        if let Some(topic) = pattern.as_topic() {
            return self.topic(&topic);
        }
        let token = |token: &str| match token {
            "*" => "[a-z0-9-]+".to_owned(),
            ">" => "[a-z0-9.-]+".to_owned(),
            literal => literal.to_owned(),
        };
        let tokens: Vec<_> = pattern.as_str().split('.').map(token).collect();
        format!("^{}{}$", self.prefix.replace('.', "\\."), tokens.join("\\."))
    }

    /// The topic that is called so, if it is one of this namespace and not internal.
    pub(crate) fn topic_of(&self, name: &str) -> Option<Topic> {
        Topic::new(name.strip_prefix(&self.prefix)?).ok()
    }

    /// Where retries and redriven dead letters of a subscription go.
    pub(crate) fn address(&self, name: &SubscriptionName) -> String {
        format!("{}_tidings.to.{name}", self.prefix)
    }

    /// Where what is sent to a subscription waits until it is due.
    pub(crate) fn later(&self, name: &SubscriptionName) -> String {
        format!("{}_tidings.later.{name}", self.prefix)
    }

    pub(crate) fn dead(&self, name: &SubscriptionName) -> String {
        format!("{}_tidings.dead.{name}", self.prefix)
    }

    pub(crate) fn group(&self, name: &SubscriptionName) -> String {
        format!("{}{name}", self.prefix)
    }

    /// The group that reads without being one: nothing is committed and nobody joins.
    pub(crate) fn reader(&self) -> String {
        format!("{}_tidings.read", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_stay_apart() {
        let names = Names::new(&"n".repeat(MAX_NAMESPACE));
        let longest = SubscriptionName::new("s".repeat(200)).unwrap();
        assert!(names.later(&longest).len() <= 249);
        let (a, b) = (Names::new("a"), Names::new(""));
        let topic = Topic::new("shop.order").unwrap();
        assert_eq!((a.topic(&topic).as_str(), b.topic(&topic).as_str()), ("a.shop.order", "shop.order"));
        assert_eq!(a.topic_of("a.shop.order"), Some(topic));
        assert_eq!(a.topic_of("a._tidings.to.x"), None);
        assert_eq!(a.topic_of("b.shop.order"), None);
    }

    #[test]
    fn patterns_become_expressions() {
        let subscribed = |pattern: &str| Names::new("prod").subscribed(&TopicPattern::new(pattern).unwrap());
        assert_eq!(subscribed("shop.order"), "prod.shop.order");
        assert_eq!(subscribed("shop.*.placed"), "^prod\\.shop\\.[a-z0-9-]+\\.placed$");
        assert_eq!(subscribed("shop.>"), "^prod\\.shop\\.[a-z0-9.-]+$");
    }
}
