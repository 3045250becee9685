//! A question to the loop can be awaited, under any executor.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use kit::net::{local, spawn, spawn_echo, turns_until, Echo, PATIENCE};
use portcullis::{Config, Control, Handle, HandleError, Server, Shards};

fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().build().expect("a runtime")
}

/// As a service of an async program would: with its own timeout.
fn block_on<R>(future: impl Future<Output = Result<R, HandleError>>) -> Result<R, HandleError> {
    runtime().block_on(async {
        let answer = tokio::time::timeout(PATIENCE, future).await;
        answer.unwrap_or(Err(HandleError::Timeout))
    })
}

#[test]
fn answers_are_awaited() {
    let server = spawn_echo(Config::new(), local());
    let handle = &server.handle;
    let count = block_on(handle.ask(|(), control| control.listeners().len()));
    assert_eq!(count, Ok(1));
    // Many at once, each with its own answer.
    let all = block_on(async {
        let asked: Vec<_> = (0..100).map(|n| handle.ask(move |(), _| n)).collect();
        let mut answers = Vec::new();
        for answer in asked {
            answers.push(answer.await?);
        }
        Ok(answers)
    });
    assert_eq!(all, Ok((0..100).collect::<Vec<_>>()));
}

#[test]
fn a_task_can_move_between_threads() {
    fn is_sent<T: Send + 'static>(future: T) -> T {
        future
    }
    let server = spawn_echo(Config::new(), local());
    let handle: Handle = server.handle.clone();
    let task = is_sent(async move { handle.ask(|(), _| "answer").await });
    let thread = std::thread::spawn(|| block_on(task));
    assert_eq!(thread.join().expect("it ended"), Ok("answer"));
}

#[test]
fn a_job_that_panics_is_an_error() {
    let server = spawn_echo(Config::new(), local());
    let asked = server
        .handle
        .ask(|(), _| -> u8 { std::panic::resume_unwind(Box::new("planned")) });
    assert_eq!(block_on(asked), Err(HandleError::Panicked));
    assert_eq!(block_on(server.handle.ask(|(), _| 7)), Ok(7));
}

#[test]
fn a_server_that_ends_is_an_error() {
    let mut server: Server = Server::new(Config::new()).expect("a server");
    let handle = server.handle();
    let unanswered = handle.ask(|(), _| ());
    let full = server
        .control()
        .reconfigure(|config| config.queue_limits.commands = 1);
    full.expect("an option");
    let queued = handle.ask(|(), _| ());
    let refused = handle.ask(|(), _| ());
    assert_eq!(block_on(refused), Err(HandleError::QueueFull));
    drop(server);
    assert_eq!(block_on(unanswered), Err(HandleError::ServerGone));
    assert_eq!(block_on(queued), Err(HandleError::ServerGone));
    assert_eq!(
        block_on(handle.ask(|(), _| ())),
        Err(HandleError::ServerGone)
    );
}

#[test]
fn one_of_several_shards_is_asked_by_its_own_handle() {
    let shards = Shards::new(Config::new()).threads(2).spawn(|_, server| {
        server.listen(local().name("echo"), |(): &mut (), _| Echo)?;
        Ok(())
    });
    let shards = shards.expect("two shards");
    let asked = block_on(shards.handle.ask(|(), _| ()));
    assert_eq!(asked, Err(HandleError::ManyShards));
    for handle in shards.handle.shards() {
        assert_eq!(block_on(handle.ask(|(), _| 1)), Ok(1));
    }
    shards.handle.stop().expect("it runs");
    shards.join().expect("it stopped");
}

/// Counts its wake-ups.
#[derive(Default)]
struct Counts(AtomicUsize);

impl Wake for Counts {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// On the loop's own thread nothing may wait, but a future may be there.
#[test]
fn the_loop_s_own_thread_may_ask() {
    let mut server: Server<u32> = Server::new(Config::new()).expect("a server");
    let handle = server.handle();
    let mut answer = pin!(handle.ask(|count: &mut u32, _: &mut Control<'_, u32>| {
        *count += 1;
        *count
    }));
    assert_eq!(
        handle.call(PATIENCE, |count, _| *count),
        Err(HandleError::OwnThread)
    );
    let (first, second) = (Arc::<Counts>::default(), Arc::<Counts>::default());
    for waker in [&first, &second, &second] {
        let waker = Waker::from(Arc::clone(waker));
        let polled = answer.as_mut().poll(&mut Context::from_waker(&waker));
        assert_eq!(polled, Poll::Pending);
    }
    turns_until(&mut server, &mut 41, |_, count| *count == 42);
    let woken = [&first, &second].map(|counts| counts.0.load(Ordering::SeqCst));
    assert_eq!(woken, [0, 1], "the last one that has polled, once");
    let polled = answer
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()));
    assert_eq!(polled, Poll::Ready(Ok(42)));
}

#[test]
fn an_answer_that_nobody_waits_for_harms_nothing() {
    let server = spawn(|| (Server::new(Config::new()).expect("a server"), 0_u32));
    drop(server.handle.ask(|count, _| *count += 1));
    assert_eq!(server.ask(|count, _| *count), 1);
    let late = server.handle.call(Duration::ZERO, |count, _| *count += 1);
    assert!(matches!(late, Ok(()) | Err(HandleError::Timeout)));
    assert_eq!(server.ask(|count, _| *count), 2);
}
