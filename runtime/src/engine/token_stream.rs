//! The tokens of one request, as they come.

use super::TokenEvent;
use super::shared::Shared;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use tokio::sync::mpsc::UnboundedReceiver;

/// Dropping it cancels the request and frees its blocks before the next step.
///
/// Events wait here for a slow reader, never in the engine: at most `max_tokens` and the last one.
#[derive(Debug)]
pub struct TokenStream {
    events: UnboundedReceiver<TokenEvent>,
    text_is_complete: Arc<AtomicBool>,
    shared: Arc<Shared>,
    ended: bool,
}

impl TokenStream {
    pub(super) fn new(
        events: UnboundedReceiver<TokenEvent>,
        text_is_complete: Arc<AtomicBool>,
        shared: Arc<Shared>,
    ) -> Self {
        Self { events, text_is_complete, shared, ended: false }
    }

    /// The next event; `None` after `Finished` or `Failed`, one of which always comes.
    pub async fn next(&mut self) -> Option<TokenEvent> {
        if self.ended {
            return None;
        }
        let event = self.events.recv().await;
        Some(self.note(event))
    }

    /// As [`TokenStream::next`], for callers without an async runtime.
    ///
    /// # Panics
    /// Inside an async runtime, where it would block a thread of it.
    pub fn blocking_next(&mut self) -> Option<TokenEvent> {
        if self.ended {
            return None;
        }
        let event = self.events.blocking_recv();
        Some(self.note(event))
    }

    /// Leave because the text is complete (a stop string was met): the metrics count a stop, not an abort.
    pub fn stop(self) {
        self.text_is_complete.store(true, Relaxed);
    }

    fn note(&mut self, event: Option<TokenEvent>) -> TokenEvent {
        // A sender that went away in silence is an engine that ended with the request still in its queue.
        let event = event.unwrap_or_else(|| TokenEvent::Failed(self.shared.abandoned()));
        self.ended = !matches!(event, TokenEvent::Token(_));
        event
    }
}
