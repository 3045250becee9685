//! The answer to a question that was put to the loop: to wait for, or to await.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::error::HandleError;
use crate::catch::catch;
use crate::sync::{Condvar, Mutex, MutexGuard};

/// The result of a job on the loop, to be awaited: from [`Handle::ask`](crate::Handle::ask).
///
/// Works under every executor, and needs none of its own. A thread without an executor waits with
/// [`Handle::call`](crate::Handle::call). Dropping this value does not keep the job from running.
/// Do not poll it again once it was ready: it stays pending.
#[must_use = "the answer comes to this value alone"]
pub struct Answer<R>(Arc<Slot<R>>);

/// The job's side. Dropped without an answer it is the error of a job that panicked, or was never
/// run.
pub(super) struct AnswerSender<R> {
    slot: Arc<Slot<R>>,
    has_begun: bool,
}

struct Slot<R> {
    state: Mutex<State<R>>,
    changed: Condvar,
}

enum State<R> {
    /// With the task that waits.
    Waiting(Option<Waker>),
    Answered(Result<R, HandleError>),
    Taken,
}

/// Makes both sides of one answer.
pub(super) fn answer_channel<R>() -> (AnswerSender<R>, Answer<R>) {
    let slot = Arc::new(Slot {
        state: Mutex::new(State::Waiting(None)),
        changed: Condvar::new(),
    });
    let sender = AnswerSender {
        slot: Arc::clone(&slot),
        has_begun: false,
    };
    (sender, Answer(slot))
}

impl<R> Slot<R> {
    /// Ignores poison: each critical section is one assignment.
    fn lock(&self) -> MutexGuard<'_, State<R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first answer counts.
    fn answer(&self, answer: Result<R, HandleError>) {
        let mut state = self.lock();
        let State::Waiting(waker) = &mut *state else {
            return;
        };
        let waker = waker.take();
        *state = State::Answered(answer);
        // Outside of the lock: a waker is foreign code.
        drop(state);
        self.changed.notify_one();
        if let Some(waker) = waker {
            // A second panic, while that of a job unwinds, would abort.
            let _ = catch(|| waker.wake());
        }
    }

    fn take(state: &mut State<R>) -> Option<Result<R, HandleError>> {
        match std::mem::replace(state, State::Taken) {
            State::Answered(answer) => Some(answer),
            other => {
                *state = other;
                None
            }
        }
    }
}

impl<R> AnswerSender<R> {
    /// Runs the job that answers.
    pub(super) fn answer_with(mut self, job: impl FnOnce() -> R) {
        self.has_begun = true;
        self.slot.answer(Ok(job()));
    }
}

impl<R> Drop for AnswerSender<R> {
    fn drop(&mut self) {
        let error = match self.has_begun {
            true => HandleError::Panicked,
            false => HandleError::ServerGone,
        };
        // Without effect behind an answer.
        self.slot.answer(Err(error));
    }
}

impl<R> Answer<R> {
    /// The job was not queued.
    pub(super) fn refused(error: HandleError) -> Self {
        let (sender, answer) = answer_channel();
        sender.slot.answer(Err(error));
        answer
    }

    /// Waits for the answer, at most `timeout`.
    pub(super) fn wait(self, timeout: Duration) -> Result<R, HandleError> {
        let state = self.0.lock();
        let waited = self
            .0
            .changed
            .wait_timeout_while(state, timeout, |state| matches!(state, State::Waiting(_)));
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        Slot::take(&mut state).unwrap_or(Err(HandleError::Timeout))
    }
}

impl<R> Future for Answer<R> {
    type Output = Result<R, HandleError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.0.lock();
        if let Some(answer) = Slot::take(&mut state) {
            return Poll::Ready(answer);
        }
        if let State::Waiting(waker) = &mut *state {
            match waker {
                Some(known) => known.clone_from(context.waker()),
                None => *waker = Some(context.waker().clone()),
            }
        }
        Poll::Pending
    }
}

impl<R> fmt::Debug for Answer<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer").finish_non_exhaustive()
    }
}

#[cfg(all(test, loom))]
mod models;
