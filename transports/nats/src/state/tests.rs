use super::*;
use crate::names::Names;
use std::sync::Weak;

const WAIT: Duration = Duration::from_secs(3);

fn raw(position: u64, delivered: u64, key: &str) -> Raw {
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("ce-partitionkey", key);
    Raw {
        subject: Subject::from_static("a.b"),
        reply: Some(Subject::from(format!("$JS.ACK.a.crm.{delivered}.{position}.{position}.1700000000000000000.0"))),
        payload: position.to_string().into(),
        headers: Some(headers),
        status: None,
        description: None,
        length: 0,
    }
}

struct Bench {
    state: State,
    id: SourceId,
    writer: Writer,
    settle: Arc<NatsSettle>,
}

impl Bench {
    fn new(mode: Mode, max: usize) -> Self {
        let mut state = State::new(mode, max, WAIT);
        let id = state.open(Source::new(Kind::Topic, 0, 0, "a"));
        Self { state, id, writer: Writer::default(), settle: Arc::new(NatsSettle(Weak::new())) }
    }

    fn arrive(&mut self, positions: &[u64], key: &str) {
        positions.iter().for_each(|position| self.state.arrive(self.id, raw(*position, 1, key), None, &self.writer));
    }

    /// What is handed out: positions and tags.
    fn take(&mut self) -> Vec<(u64, Tag)> {
        let mut polled = Polled::default();
        self.state.hand_out(100, &self.settle, &Names::new(""), &mut polled);
        let tags: Vec<_> = self.state.out.keys().copied().collect();
        let tag_of = |position: u64| {
            let seq = *tags.iter().find(|tag| self.state.out[tag].held.position == position).expect("it is out");
            (position, Tag { epoch: 0, seq })
        };
        polled.deliveries.iter().map(|delivery| tag_of(delivery.position)).collect()
    }

    fn settle(&mut self, tag: Tag, settlement: Settlement) {
        self.state.settle(tag, settlement, &self.writer);
    }

    fn positions(&mut self) -> Vec<u64> {
        self.take().into_iter().map(|(position, _)| position).collect()
    }
}

#[test]
fn reply_subjects_are_read_in_both_forms() {
    let short = place("$JS.ACK.shop.crm.2.17.9.1700000000000000000.4").unwrap();
    assert_eq!((short.consumer, short.delivered, short.position, short.number, short.pending), ("crm", 2, 17, 9, 4));
    let long = place("$JS.ACK.hub.ACCHASH.shop.crm.2.17.9.1700000000000000000.4.token").unwrap();
    assert_eq!((long.consumer, long.delivered, long.position, long.number, long.pending), ("crm", 2, 17, 9, 4));
    for broken in ["", "_INBOX.x", "$JS.ACK.a.b.c.d.e.f.g", "$JS.ACK.a.b.1.2.3.99999999999999999999.4"] {
        assert!(place(broken).is_none(), "{broken}");
    }
}

#[test]
fn what_was_acked_can_be_acked_again() {
    for reply in
        ["$JS.ACK.shop.crm.2.17.9.1700000000000000000.4", "$JS.ACK.hub.H.shop.crm.2.17.9.1700000000000000000.4.t"]
    {
        let mut acked = Acked::default();
        acked.note(reply);
        acked.note("nonsense");
        let again: Vec<_> = acked.replies().collect();
        assert_eq!(again.len(), 1);
        let prefix = reply.split_once(".2.17").unwrap().0;
        assert_eq!(again[0].as_str(), format!("{prefix}.2.17.9.1700000000000000000.0"));
    }
    let mut acked = Acked::default();
    (0..REMEMBERED as u64 + 10).for_each(|n| acked.note(&format!("$JS.ACK.a.b.1.{n}.{n}.1.0")));
    assert_eq!((acked.replies.len(), acked.order.front()), (REMEMBERED, Some(&10)));
}

#[tokio::test(start_paused = true)]
async fn what_is_given_back_holds_its_lane_and_nothing_else() {
    let mut bench = Bench::new(Mode::Keyed, 10);
    bench.arrive(&[1, 3], "ada");
    bench.arrive(&[2, 4], "bob");
    let out = bench.take();
    assert_eq!(out.iter().map(|(position, _)| *position).collect::<Vec<_>>(), [1, 2, 3, 4]);
    bench.settle(out[0].1, Settlement::Release { after: Duration::from_secs(1) });
    bench.settle(out[1].1, Settlement::Release { after: Duration::ZERO });
    bench.settle(out[2].1, Settlement::Release { after: Duration::ZERO });
    assert_eq!(bench.positions(), [2], "3 waits behind 1");
    assert!(bench.state.next_due().is_some());
    tokio::time::advance(Duration::from_millis(1001)).await;
    assert_eq!(bench.positions(), [1, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_takeover_hands_out_nothing_until_all_is_here_and_then_in_order() {
    let mut bench = Bench::new(Mode::Keyed, 10);
    let since = Instant::now();
    bench.state.sources.get_mut(&bench.id).unwrap().recovery = Some(Recovery { after: 5, missing: 2, since });
    bench.arrive(&[6, 5], "ada");
    assert_eq!(bench.positions(), [0; 0]);
    bench.arrive(&[3], "bob");
    assert_eq!(bench.positions(), [3, 5, 6]);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_not_extended_is_lost_and_settles_nothing() {
    let mut bench = Bench::new(Mode::Shared, 10);
    bench.arrive(&[1], "ada");
    let (_, tag) = bench.take()[0];
    assert_eq!(bench.state.lease(tag), Lease::Live);
    tokio::time::advance(WAIT).await;
    assert_eq!(bench.state.lease(tag), Lease::Lost);
    bench.state.extend(&bench.writer);
    assert!(matches!(bench.state.notices.last(), Some(Notice::Leases)));
    bench.settle(tag, Settlement::Ack);
    assert_eq!((bench.state.flushed.stale, bench.state.flushed.applied), (1, 0));
    bench.arrive(&[1], "ada");
    assert_eq!(bench.positions(), [1], "it comes again");
}

#[tokio::test(start_paused = true)]
async fn a_copy_of_what_is_out_is_not_handed_out() {
    let mut bench = Bench::new(Mode::Shared, 10);
    bench.arrive(&[1], "ada");
    assert_eq!(bench.positions(), [1]);
    bench.arrive(&[1], "ada");
    assert_eq!(bench.positions(), [0; 0]);
}

#[tokio::test(start_paused = true)]
async fn the_window_is_never_exceeded_and_filled_by_what_is_asked_for() {
    let mut bench = Bench::new(Mode::Keyed, 4);
    assert_eq!(bench.state.wants(bench.id, 0), 4);
    bench.arrive(&[1, 2, 3, 4, 5], "ada");
    assert_eq!(bench.positions(), [1, 2, 3, 4]);
    assert_eq!(bench.state.wants(bench.id, 0), 0);
    assert_eq!(bench.positions(), [0; 0]);
}

#[tokio::test(start_paused = true)]
async fn what_was_acked_is_acked_again_when_its_consumer_begins_again_and_nothing_else_is() {
    let mut bench = Bench::new(Mode::Shared, 10);
    bench.arrive(&[1, 2], "ada");
    let taken = bench.take();
    for (position, tag) in taken.into_iter().filter(|(position, _)| *position == 1) {
        bench.settle(tag, Settlement::Ack);
        bench.state.applied(&Op::settle(bench.id, raw(position, 1, "ada").reply.unwrap(), b"+ACK", tag.seq));
    }
    bench.state.begun_again(bench.id, 3);
    bench.arrive(&[1, 2, 3, 4], "ada");
    let mut polled = Polled::default();
    bench.state.hand_out(100, &bench.settle, &Names::new(""), &mut polled);
    let handed: Vec<_> = polled.deliveries.iter().map(|delivery| (delivery.position, delivery.redelivered)).collect();
    assert_eq!(handed, [(3, true), (4, false)], "1 is acked, 2 is out, and 3 may have been handed to others");
    let mut stranger = raw(1, 1, "ada");
    stranger.reply = Some("$JS.ACK.a.crm.1.1.1.1800000000000000000.0".into());
    bench.state.arrive(bench.id, stranger, None, &bench.writer);
    assert_eq!(bench.positions(), [1], "another message at the position of what was acked");
}
