//! The primitives of loom, and how a model is run.
//!
//! Loom treats a sequentially consistent access as one that acquires and releases. Two threads that
//! each write one variable and then read the other's may then both miss the write. Loom does know
//! sequentially consistent fences. So each such access here stands between two of them.
//!
//! Fences are stronger than the access, because they order the relaxed accesses around it too. A
//! part that needs no sequential consistency is therefore checked without them: [`check_weakly`].
//!
//! `Arc`, `OnceLock` and `mpsc` stay those of the standard library: their steps are not reordered.
//! So does `handle::Liveness`, one atomic for each slot, whose test runs under Miri.

use std::cell::Cell;
use std::env;
use std::io;
use std::process::Command;
use std::sync::atomic::{AtomicUsize as Count, Ordering as StdOrdering};
use std::sync::{Arc, LockResult, PoisonError};
use std::time::Duration;

pub(crate) use loom::sync::{Mutex, MutexGuard};
pub(crate) use loom::thread::{JoinHandle, ThreadId};

use crate::handle::Wake;

thread_local! {
    /// All threads of a model run on one thread of the system.
    static FENCES: Cell<bool> = const { Cell::new(false) };
}

pub(crate) fn current() -> loom::thread::Thread {
    loom::thread::current()
}

pub(crate) mod atomic {
    pub(crate) use std::sync::atomic::Ordering;

    use loom::sync::atomic::fence;

    fn fenced<T>(order: Ordering, access: impl FnOnce() -> T) -> T {
        let has_fences = order == Ordering::SeqCst && super::FENCES.get();
        if has_fences {
            fence(Ordering::SeqCst);
        }
        let result = access();
        if has_fences {
            fence(Ordering::SeqCst);
        }
        result
    }

    macro_rules! atomic {
        ($name:ident, $value:ty) => {
            #[derive(Debug)]
            pub(crate) struct $name(loom::sync::atomic::$name);

            #[allow(dead_code, reason = "each type has the same methods")]
            impl $name {
                pub(crate) fn new(value: $value) -> Self {
                    Self(loom::sync::atomic::$name::new(value))
                }

                pub(crate) fn load(&self, order: Ordering) -> $value {
                    fenced(order, || self.0.load(order))
                }

                pub(crate) fn store(&self, value: $value, order: Ordering) {
                    fenced(order, || self.0.store(value, order));
                }

                pub(crate) fn swap(&self, value: $value, order: Ordering) -> $value {
                    fenced(order, || self.0.swap(value, order))
                }

                pub(crate) fn compare_exchange(
                    &self,
                    current: $value,
                    new: $value,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$value, $value> {
                    fenced(success, || {
                        self.0.compare_exchange(current, new, success, failure)
                    })
                }
            }

            impl Default for $name {
                fn default() -> Self {
                    Self::new(<$value>::default())
                }
            }
        };
    }

    atomic!(AtomicBool, bool);
    atomic!(AtomicU8, u8);
    atomic!(AtomicU32, u32);
    atomic!(AtomicUsize, usize);

    impl AtomicUsize {
        pub(crate) fn fetch_add(&self, value: usize, order: Ordering) -> usize {
            fenced(order, || self.0.fetch_add(value, order))
        }

        pub(crate) fn fetch_sub(&self, value: usize, order: Ordering) -> usize {
            fenced(order, || self.0.fetch_sub(value, order))
        }

        pub(crate) fn fetch_update(
            &self,
            set: Ordering,
            fetch: Ordering,
            change: impl FnMut(usize) -> Option<usize>,
        ) -> Result<usize, usize> {
            fenced(set, || self.0.fetch_update(set, fetch, change))
        }
    }
}

/// Loom's, with the one method that is used. No time passes in a model.
pub(crate) struct Condvar(loom::sync::Condvar);

impl Condvar {
    pub(crate) fn new() -> Self {
        Self(loom::sync::Condvar::new())
    }

    pub(crate) fn notify_one(&self) {
        self.0.notify_one();
    }

    pub(crate) fn wait_timeout_while<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
        _: Duration,
        mut is_waiting: impl FnMut(&mut T) -> bool,
    ) -> LockResult<(MutexGuard<'a, T>, ())> {
        while is_waiting(&mut guard) {
            guard = self.0.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        Ok((guard, ()))
    }
}

impl Default for Condvar {
    fn default() -> Self {
        Self::new()
    }
}

/// The waker of a loop, and the poll in which the loop sleeps. As with an eventfd, any number of
/// wake-ups before a poll are one.
#[derive(Default)]
pub(crate) struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    /// Sleeps until the loop is woken. For ever is a deadlock, which ends the model.
    pub(crate) fn wait(&self) {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .changed
            .wait_timeout_while(rung, Duration::MAX, |rung| !*rung);
        let (mut rung, ()) = waited.unwrap_or_else(PoisonError::into_inner);
        *rung = false;
    }

    pub(crate) fn ring(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_one();
    }

    /// Whether the loop was woken and has not noticed yet.
    pub(crate) fn has_rung(&self) -> bool {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for Arc<Bell> {
    fn wake(&self) -> io::Result<()> {
        self.ring();
        Ok(())
    }
}

/// A thread preempts another at most so often, unless LOOM_MAX_PREEMPTIONS says otherwise. Almost
/// all faults show with two (Musuvathi and Qadeer, PLDI 2007).
const PREEMPTIONS: usize = 3;

/// Words of stack that a thread of a model has: a server needs more than loom gives.
const STACK: usize = 0x2_0000;

/// Starts a thread of a model.
pub(crate) fn spawn<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let thread = loom::thread::Builder::new().stack_size(STACK).spawn(run);
    thread.expect("a thread of a model needs no system")
}

/// Runs a model in every order of its steps, within the bound.
pub(crate) fn check(name: &str, model: impl Fn() + Send + Sync + 'static) {
    run(name, PREEMPTIONS, true, model);
}

/// As [`check`], with another bound than three preemptions.
pub(crate) fn check_within(
    preemptions: usize,
    name: &str,
    model: impl Fn() + Send + Sync + 'static,
) {
    run(name, preemptions, true, model);
}

/// As [`check`], and sequentially consistent accesses acquire and release alone.
pub(crate) fn check_weakly(name: &str, model: impl Fn() + Send + Sync + 'static) {
    run(name, PREEMPTIONS, false, model);
}

/// A control: the model has an order, without sequential consistency, in which all threads sleep.
/// `test` is the whole name of the test that calls this.
///
/// The model runs in a process of its own. Loom ends the threads of a failed model by unwinding
/// them, and destructors that use a primitive then abort.
pub(crate) fn check_deadlock(test: &str, model: impl Fn() + Send + Sync + 'static) {
    const WITHIN: &str = "PORTCULLIS_MODEL_FAILS";
    if env::var_os(WITHIN).is_some() {
        return check_weakly(test, model);
    }
    let (_, test) = test.split_once("::").expect("a path");
    let program = env::current_exe().expect("this test");
    let mut command = Command::new(program);
    command.args(["--exact", test, "--nocapture"]);
    command.env(WITHIN, "1").env("RUST_BACKTRACE", "0");
    let output = command.output().expect("it runs");
    let words = String::from_utf8_lossy(&output.stderr);
    let is_found = words.lines().any(|line| line.starts_with("deadlock;"));
    assert!(
        is_found && !output.status.success(),
        "no lost wake-up was found: {}",
        output.status
    );
}

fn run(name: &str, preemptions: usize, fences: bool, model: impl Fn() + Send + Sync + 'static) {
    FENCES.set(fences);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(preemptions));
    builder.max_branches = builder.max_branches.max(20_000);
    let orders = Arc::new(Count::new(0));
    let (count, model) = (Arc::clone(&orders), Arc::new(model));
    builder.check(move || {
        count.fetch_add(1, StdOrdering::Relaxed);
        let model = Arc::clone(&model);
        spawn(move || model()).join().expect("no panic");
    });
    let orders = orders.load(StdOrdering::Relaxed);
    assert!(orders > 1, "{name} has one order only");
    println!("{name}: {orders} orders");
}
