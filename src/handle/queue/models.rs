//! The queue and its waker in every order of their steps: no command and no wake-up is lost.
//!
//! The producers run the code of a handle. The loop's side is `Reactor::run_commands`, without what
//! the commands do: `tests/embedding/handle.rs` tests it with both sides real.
//!
//! None of it needs sequential consistency, so accesses acquire and release alone.

use super::*;
use crate::sync::models::{check_deadlock, check_weakly, spawn, Bell, JoinHandle};

fn queue() -> (Arc<Shared<()>>, Arc<Bell>) {
    let bell = Arc::new(Bell::default());
    let published = Arc::new(Published::new(QueueLimits::default()));
    let shared = Shared::new(Box::new(Arc::clone(&bell)), published);
    (Arc::new(shared), bell)
}

fn id(index: u32) -> ConnId {
    ConnId::new(crate::id::ServerNumber::NONE, index, 1)
}

fn send(index: u32) -> Command<()> {
    Command::Send(id(index), Chunk::Borrowed(&[]))
}

fn index(command: &Command<()>) -> u32 {
    match command {
        Command::Send(id, _) | Command::Kill(id) => id.index(),
        _ => u32::MAX,
    }
}

/// Pushes the commands, one after the other, on a thread of their own.
fn push(shared: &Arc<Shared<()>>, commands: Vec<Command<()>>) -> JoinHandle<usize> {
    let shared = Arc::clone(shared);
    spawn(move || {
        let mut queued = 0;
        for command in commands {
            queued += usize::from(shared.push(command).is_ok());
        }
        queued
    })
}

/// The loop takes `count` commands, of which it knows by its waker alone.
fn serve(shared: &Shared<()>, bell: &Bell, count: usize) -> Vec<u32> {
    let mut served = Vec::new();
    while served.len() < count {
        bell.wait();
        if !shared.take_pending() {
            continue;
        }
        for _ in 0..shared.len() {
            served.extend(shared.take().as_ref().map(index));
        }
        // What is left keeps the real poll from sleeping.
        while shared.len() > 0 {
            served.extend(shared.take().as_ref().map(index));
        }
    }
    served
}

#[test]
fn no_wake_up_is_lost_and_each_thread_keeps_its_order() {
    check_weakly("queue, two producers", || {
        let (shared, bell) = queue();
        let producers = [
            push(&shared, vec![send(1), send(2)]),
            push(&shared, vec![send(3)]),
        ];
        let served = serve(&shared, &bell, 3);
        let at = |index| served.iter().position(|&other| other == index);
        assert!(at(1) < at(2) && at(3).is_some(), "{served:?}");
        for producer in producers {
            producer.join().expect("no panic");
        }
        assert!(!shared.has_urgent() && shared.queued().is_none());
    });
}

/// The loop looks for urgent commands by a count that it reads without the lock.
#[test]
fn a_kill_is_seen_by_the_loop_that_it_wakes() {
    check_weakly("queue, a kill", || {
        let (shared, bell) = queue();
        let producers = [
            push(&shared, vec![send(1)]),
            push(&shared, vec![Command::Kill(id(2))]),
        ];
        let (mut killed, mut sent) = (false, false);
        while !killed {
            bell.wait();
            if !shared.take_pending() {
                continue;
            }
            // The wake-up of a kill may be that of the frame before it.
            if shared.has_urgent() {
                let urgent = shared.take_urgent().expect("one is counted");
                assert_eq!(index(&urgent), 2);
                killed = true;
            } else if shared.len() > 0 {
                let command = shared.take().expect("one is queued");
                sent |= index(&command) == 1;
                // The kill may have come between the two looks.
                killed |= index(&command) == 2;
            }
        }
        for producer in producers {
            producer.join().expect("no panic");
        }
        assert!(sent != (shared.take().as_ref().map(index) == Some(1)));
        assert!(!shared.has_urgent() && shared.len() == 0);
    });
}

/// A handle that has been told `Ok` finds its command carried out, or among those that are counted
/// as left behind.
#[test]
fn a_command_that_was_accepted_is_taken_or_left_behind() {
    check_weakly("queue, its end", || {
        let (shared, bell) = queue();
        let producers = [
            push(&shared, vec![send(1), send(2)]),
            push(&shared, vec![Command::Kill(id(3))]),
        ];
        let served = serve(&shared, &bell, 1).len();
        let left = shared.close();
        let queued: usize = producers
            .into_iter()
            .map(|producer| producer.join().expect("no panic"))
            .sum();
        assert_eq!(served + left.len(), queued);
        assert!(matches!(shared.push(send(4)), Err(HandleError::ServerGone)));
    });
}

/// The control: a loop that clears the mark behind the queue sleeps beside a command.
#[test]
fn a_loop_that_clears_the_mark_last_sleeps_beside_a_command() {
    let test = concat!(
        module_path!(),
        "::a_loop_that_clears_the_mark_last_sleeps_beside_a_command"
    );
    check_deadlock(test, || {
        let (shared, bell) = queue();
        let producer = push(&shared, vec![send(1), send(2)]);
        let mut served = 0;
        while served < 2 {
            bell.wait();
            while shared.take().is_some() {
                served += 1;
            }
            shared.take_pending();
        }
        producer.join().expect("no panic");
    });
}
