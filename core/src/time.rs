//! A time limit that costs nothing to what does not wait.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;
use tokio::task::coop::{Unconstrained, unconstrained};
use tokio::time::{Instant, Sleep, sleep_until};

/// What the future ends with, unless `deadline` comes before; that is asked for, and a timer made, only if the future waits.
pub(crate) async fn before<F: Future>(deadline: impl Fn() -> Instant, future: F) -> Option<F::Output> {
    let (mut future, mut timer) = (pin!(future), pin!(None::<Unconstrained<Sleep>>));
    poll_fn(|cx| {
        if let Poll::Ready(output) = future.as_mut().poll(cx) {
            return Poll::Ready(Some(output));
        }
        if timer.is_none() {
            // What uses up its task's budget at each poll must not keep the timer from being asked.
            timer.set(Some(unconstrained(sleep_until(deadline()))));
        }
        timer.as_mut().as_pin_mut().map_or(Poll::Pending, |timer| timer.poll(cx).map(|()| None))
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::{pending, ready};
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn ends_at_the_deadline_even_what_never_yields_by_itself() {
        let start = Instant::now();
        let soon = || start + Duration::from_secs(1);
        assert_eq!(before(soon, ready(1)).await, Some(1));
        assert_eq!(before(soon, pending::<()>()).await, None);
        assert_eq!(start.elapsed(), Duration::from_secs(1));
        let busy = async {
            loop {
                tokio::task::coop::consume_budget().await;
            }
        };
        assert_eq!(before(|| start, busy).await, None);
    }
}
