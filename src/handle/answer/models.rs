//! An answer in every order of its steps: the thread or task that waits for it is woken.

use std::task;

use super::*;
use crate::sync::models::{check_weakly, spawn, Bell};

/// An executor of one task: it sleeps until its waker is called.
struct Executor(Bell);

impl task::Wake for Executor {
    fn wake(self: Arc<Self>) {
        self.0.ring();
    }
}

fn await_it<R>(mut answer: Answer<R>) -> Result<R, HandleError> {
    let executor = Arc::new(Executor(Bell::default()));
    let waker = Waker::from(Arc::clone(&executor));
    loop {
        let mut context = Context::from_waker(&waker);
        if let Poll::Ready(result) = Pin::new(&mut answer).poll(&mut context) {
            return result;
        }
        executor.0.wait();
    }
}

#[test]
fn a_task_is_woken_for_its_answer() {
    check_weakly("answer, a task", || {
        let (sender, answer) = answer_channel();
        let loops = spawn(move || sender.answer_with(|| 7));
        assert_eq!(await_it(answer), Ok(7));
        loops.join().expect("no panic");
    });
}

/// As at the end of a server, which drops the jobs that it has not run.
#[test]
fn a_task_is_woken_when_its_job_is_dropped() {
    check_weakly("answer, dropped", || {
        let (sender, answer) = answer_channel::<u8>();
        let loops = spawn(move || drop(sender));
        assert_eq!(await_it(answer), Err(HandleError::ServerGone));
        loops.join().expect("no panic");
    });
}

#[test]
fn a_thread_is_woken_for_its_answer() {
    check_weakly("answer, a thread", || {
        let (sender, answer) = answer_channel();
        let loops = spawn(move || sender.answer_with(|| 7));
        // No time passes in a model, so that a lost wake-up is a deadlock.
        assert_eq!(answer.wait(Duration::MAX), Ok(7));
        loops.join().expect("no panic");
    });
}
