//! What handlers may return.

use crate::{Event, HandlerError, Message, MessageId, Result, Text, Topic};

/// What a handler may return: nothing, events to publish, or an error.
///
/// What is returned is published and confirmed before the handled event is acked, all of it checked before the
/// first is published.
#[diagnostic::on_unimplemented(
    message = "a handler cannot return `{Self}`",
    label = "not an outcome",
    note = "return `()`, an event, an `Option`, `Vec` or tuple of these, or a `Result<_, HandlerError>` of any of these"
)]
pub trait IntoOutcome {
    /// Adds what is to be published to `outputs`, or fails.
    ///
    /// # Errors
    /// What the handler failed with; an event that cannot be encoded rejects.
    fn into_outcome(self, outputs: &mut Outputs) -> Result<(), HandlerError>;
}

/// Where the messages of one event of a batch end, and how it ended.
pub(crate) type Ended = (usize, Result<(), HandlerError>);

/// What one run returned, encoded.
#[derive(Debug)]
pub struct Outputs {
    pub(crate) messages: Vec<Message>,
    /// For a batch with a result per event: where the messages of each end, and how it ended.
    pub(crate) each: Option<Vec<Ended>>,
    source: Text,
    content_type: Text,
}

impl Outputs {
    pub(crate) fn new(source: Text, content_type: Text) -> Self {
        Self { messages: Vec::new(), each: None, source, content_type }
    }

    /// As empty as this was at first.
    pub(crate) fn fresh(&self) -> Self {
        Self::new(self.source.clone(), self.content_type.clone())
    }

    /// Encodes an event and adds it.
    ///
    /// # Errors
    /// As [`Event::encode`].
    pub fn push<E: Event>(&mut self, event: &E) -> Result<()> {
        self.messages.push(encode(event, MessageId::NIL, self.source.clone(), &self.content_type)?);
        Ok(())
    }
}

/// The message of an event, complete but for its times and what links it to others.
pub(crate) fn encode<E: Event>(event: &E, id: MessageId, source: Text, content_type: &Text) -> Result<Message> {
    let content_type = E::CONTENT_TYPE.map_or_else(|| content_type.clone(), Text::from_static);
    let payload = event.encode(&content_type)?;
    let topic = Topic::of::<E>()?;
    let mut message = Message::new(id, source, Text::from_static(E::NAME), topic).with_payload(content_type, payload);
    message.version = E::VERSION;
    message.key = event.key();
    Ok(message)
}

/// What a layer let through.
impl IntoOutcome for Outputs {
    fn into_outcome(self, outputs: &mut Outputs) -> Result<(), HandlerError> {
        outputs.messages.extend(self.messages);
        outputs.each = self.each;
        Ok(())
    }
}

impl IntoOutcome for () {
    fn into_outcome(self, _: &mut Outputs) -> Result<(), HandlerError> {
        Ok(())
    }
}

impl<E: Event> IntoOutcome for E {
    fn into_outcome(self, outputs: &mut Outputs) -> Result<(), HandlerError> {
        outputs.push(&self).map_err(HandlerError::reject)
    }
}

impl<T: IntoOutcome> IntoOutcome for Option<T> {
    fn into_outcome(self, outputs: &mut Outputs) -> Result<(), HandlerError> {
        self.map_or(Ok(()), |outcome| outcome.into_outcome(outputs))
    }
}

impl<T: IntoOutcome> IntoOutcome for Vec<T> {
    fn into_outcome(self, outputs: &mut Outputs) -> Result<(), HandlerError> {
        self.into_iter().try_for_each(|outcome| outcome.into_outcome(outputs))
    }
}

impl<T: IntoOutcome, E: Into<HandlerError>> IntoOutcome for Result<T, E> {
    fn into_outcome(self, outputs: &mut Outputs) -> Result<(), HandlerError> {
        self.map_err(Into::into)?.into_outcome(outputs)
    }
}

/// A result for each event of a [`Batch`](crate::Batch), in its order.
///
/// Each ends as its result says. Where one fails for now, the later ones of its key are handled again after it, whatever
/// their results were. Too few or too many results fail the batch, which is then handled one by one.
///
/// # Examples
///
/// ```
/// use tidings_core::handler::Each;
/// use tidings_core::{Batch, Event, HandlerError};
///
/// async fn store<E: Event>(Batch(events): Batch<E>) -> Each<()> {
///     Each(events.into_iter().map(|_event| Err(HandlerError::from("the table is full"))).collect())
/// }
/// ```
#[derive(Debug)]
pub struct Each<T>(pub Vec<Result<T, HandlerError>>);

impl<T: IntoOutcome> IntoOutcome for Each<T> {
    fn into_outcome(self, outputs: &mut Outputs) -> Result<(), HandlerError> {
        let mut each = Vec::with_capacity(self.0.len());
        for result in self.0 {
            let start = outputs.messages.len();
            let ended = result.and_then(|outcome| outcome.into_outcome(outputs));
            if ended.is_err() {
                outputs.messages.truncate(start);
            }
            each.push((outputs.messages.len(), ended));
        }
        outputs.each = Some(each);
        Ok(())
    }
}

macro_rules! tuples { ($($x:ident)*) => {
    impl<$($x: IntoOutcome),*> IntoOutcome for ($($x,)*) {
        #[allow(non_snake_case)] // one name for the type and the value
        fn into_outcome(self, outputs: &mut Outputs) -> Result<(), HandlerError> {
            let ($($x,)*) = self;
            $($x.into_outcome(outputs)?;)*
            Ok(())
        }
    }
} }
tuples!(A);
tuples!(A B);
tuples!(A B C);
tuples!(A B C D);
tuples!(A B C D E);
tuples!(A B C D E F);
