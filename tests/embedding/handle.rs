//! What other threads ask of a server through its handle happens once and in order, or they are told why not.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{mpsc, Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use kit::net::{
    await_end, connect, eventually, hold, local, ping, recv2, send2, spawn, spawn_echo, Echo,
    Running, PATIENCE,
};
use portcullis::{
    CloseReason, Closed, Config, ConnId, Context, Framing, Handle, HandleError, Handler,
    ListenerState, Message, Outcome, Server,
};

/// What the connections of a test have told.
#[derive(Default)]
struct Heard {
    opened: Vec<ConnId>,
    numbers: Vec<u32>,
    closed: Vec<(ConnId, CloseReason)>,
    handle: Option<Handle<Heard>>,
    answers: Vec<HandleError>,
}

/// Echoes frames, sends on the texts it is notified of, and notes the numbers.
struct Member;

impl Handler<Heard> for Member {
    fn on_open(&mut self, cx: &mut Context<'_, Heard>) -> Outcome {
        cx.app.opened.push(cx.conn.id());
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Heard>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }

    fn on_message(&mut self, cx: &mut Context<'_, Heard>, message: Message) -> Outcome {
        match message.downcast::<String>() {
            Ok(text) => cx.conn.send(text.as_bytes())?,
            Err(other) => cx
                .app
                .numbers
                .extend(other.downcast::<u32>().map(|number| *number)),
        }
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Heard>, closed: &Closed) {
        cx.app.closed.push((cx.conn.id(), closed.reason));
    }
}

fn members(config: Config) -> Running<Heard> {
    spawn(|| {
        let mut server = Server::new(config).expect("server");
        server
            .listen(local(), |_: &mut Heard, _| Member)
            .expect("listen");
        (server, Heard::default())
    })
}

/// A client that has been served, and its id.
fn join(server: &Running<Heard>) -> (std::net::TcpStream, ConnId) {
    let mut client = connect(server.addr());
    ping(&mut client, b"join");
    let id = server.ask(|heard, _| *heard.opened.last().expect("it was opened"));
    (client, id)
}

/// A server that this thread runs itself.
fn mine<A: 'static>(config: Config) -> Server<A> {
    let mut server = Server::new(config).expect("server");
    server.listen(local(), |_: &mut A, _| Echo).expect("listen");
    server
}

fn turn<A>(server: &mut Server<A>, app: &mut A) {
    server.poll_once(app, Some(Duration::ZERO)).expect("a turn");
}

#[test]
fn a_frame_is_sent_from_another_thread() {
    let server = members(Config::new());
    let (mut client, id) = join(&server);
    server.handle.send(id, "one").expect("send");
    server.handle.send(id, b"two".to_vec()).expect("send");
    assert_eq!(
        (recv2(&mut client), recv2(&mut client)),
        (b"one".into(), b"two".into())
    );
}

#[test]
fn a_message_reaches_the_handler_as_what_it_is() {
    let server = members(Config::new());
    let (mut client, id) = join(&server);
    server.handle.notify(id, 7_u32).expect("notify");
    server
        .handle
        .notify(id, ["neither", "nor"])
        .expect("notify");
    server
        .handle
        .notify(id, String::from("text"))
        .expect("notify");
    assert_eq!(recv2(&mut client), b"text");
    assert_eq!(server.ask(|heard, _| heard.numbers.clone()), [7]);
}

/// The killed connection ends, and the others live.
#[test]
fn a_kill_ends_one_connection_and_no_other() {
    let server = members(Config::new());
    let ((mut victim, id), (mut other, other_id)) = (join(&server), join(&server));
    assert!(server.handle.is_live(id) && server.handle.is_live(other_id));
    server.handle.kill(id).expect("kill");
    await_end(&mut victim);
    server.until("the kill is counted", |stats| {
        stats.closed(CloseReason::Killed) == 1
    });
    assert!(!server.handle.is_live(id) && server.handle.is_live(other_id));
    ping(&mut other, b"still here");
    assert_eq!(
        server.ask(|heard, _| heard.closed.clone()),
        [(id, CloseReason::Killed)],
        "on_close was called once"
    );
}

#[test]
fn a_connection_that_has_gone_is_an_error_at_once() {
    let server = members(Config::new());
    let (client, id) = join(&server);
    drop(client);
    eventually("it is gone", || !server.handle.is_live(id));
    let gone = Err(HandleError::NoConnection(id));
    assert_eq!(server.handle.send(id, "late"), gone);
    assert_eq!(server.handle.notify(id, 1_u32), gone);
    assert_eq!(server.handle.kill(id), gone);
    let stats = server.ask(|_, control| control.stats());
    assert_eq!(stats.undeliverable, 0, "nothing of it reached the loop");
}

#[test]
fn a_command_for_a_connection_that_has_gone_is_counted() {
    let server = members(Config::new());
    let (_client, id) = join(&server);
    let held = hold(&server.handle);
    server.handle.kill(id).expect("kill");
    server.handle.send(id, "late").expect("it is still live");
    server.handle.notify(id, 1_u32).expect("it is still live");
    drop(held);
    server.until("both are counted", |stats| stats.undeliverable == 2);
    assert!(server.ask(|heard, _| heard.numbers.is_empty()));
}

/// The message's destructor is the user's code, as the handler's is.
#[test]
fn a_message_without_a_receiver_may_panic_when_it_is_dropped() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }
    let server = members(Config::new());
    let ((_victim, id), (mut other, _)) = (join(&server), join(&server));
    let held = hold(&server.handle);
    server.handle.kill(id).expect("kill");
    server.handle.notify(id, Bomb).expect("it is still live");
    drop(held);
    ping(&mut other, b"the loop goes on");
    assert_eq!(
        server
            .until("it is counted", |stats| stats.panics == 1)
            .undeliverable,
        1
    );
}

#[test]
fn a_job_has_the_state_and_the_controls() {
    let server = members(Config::new());
    let (mut client, id) = join(&server);
    let handle = server.handle.clone();
    let job = move |heard: &mut Heard, control: &mut portcullis::Control<'_, Heard>| {
        heard.numbers.push(1);
        control
            .conn(id)
            .expect("it is there")
            .send(b"from a job")
            .expect("send");
        // What a job asks for comes after it, and does not deadlock.
        handle.post(|heard, _| heard.numbers.push(2)).expect("post");
        heard.numbers.push(3);
    };
    server.handle.post(job).expect("post");
    assert_eq!(recv2(&mut client), b"from a job");
    eventually("the second job runs", || {
        server.ask(|heard, _| heard.numbers.clone()) == [1, 3, 2]
    });
}

#[test]
fn a_job_that_panics_is_reported_and_the_loop_goes_on() {
    let server = members(Config::new());
    let (mut client, _) = join(&server);
    server.handle.post(|_, _| panic!("a job")).expect("post");
    let answer = server
        .handle
        .call(PATIENCE, |_, _| -> u32 { panic!("a question") });
    assert_eq!(answer, Err(HandleError::Panicked));
    ping(&mut client, b"goes on");
    assert_eq!(server.ask(|_, control| control.stats().panics), 2);
}

#[test]
fn a_wake_ends_the_poll() {
    let mut server = mine::<()>(Config::new());
    turn(&mut server, &mut ());
    let handle = server.handle();
    // Before the poll, and while it sleeps: it is not lost either way.
    for early in [true, false] {
        let begun = Instant::now();
        let waker = handle.clone();
        let other = thread::spawn(move || waker.wake().expect("wake"));
        if early {
            other.join().expect("woken");
            server.poll_once(&mut (), Some(PATIENCE)).expect("a turn");
        } else {
            server.poll_once(&mut (), Some(PATIENCE)).expect("a turn");
            other.join().expect("woken");
        }
        assert!(begun.elapsed() < PATIENCE, "the poll slept through");
    }
}

#[test]
fn stop_ends_run_and_leaves_everything_as_it_is() {
    let mut server = mine::<()>(Config::new());
    let (handle, addr) = (
        server.handle(),
        kit::net::tcp(&server.control().listeners()[0].addr),
    );
    let client = thread::spawn(move || {
        let mut client = connect(addr);
        ping(&mut client, b"one");
        handle.stop().expect("stop");
        client
    });
    server.run(&mut ()).expect("run");
    let mut client = client.join().expect("served");
    assert_eq!(
        (
            server.control().connections().len(),
            server.control().drain_report()
        ),
        (1, None)
    );
    assert_eq!(
        server.control().listeners()[0].state,
        ListenerState::Listening
    );
    // And it can be run again.
    let handle = server.handle();
    let again = thread::spawn(move || {
        ping(&mut client, b"two");
        handle.stop().expect("stop");
    });
    server.run(&mut ()).expect("run");
    again.join().expect("served again");
}

/// A loop that is not ours sees the stop and goes on as it likes: it must not spin.
#[test]
fn stop_leaves_nothing_to_do_for_another_loop() {
    let mut server = mine::<()>(Config::new());
    server.handle().stop().expect("stop");
    for _ in 0..3 {
        turn(&mut server, &mut ());
    }
    assert_eq!(server.next_timeout(), None);
}

#[test]
fn the_counters_can_be_read_while_the_loop_is_busy() {
    let server = members(Config::new());
    let _client = join(&server);
    server.until("the frame's turn is over", |stats| {
        stats.traffic.frames_in == 1
    });
    let held = hold(&server.handle);
    let stats = server.handle.stats();
    assert_eq!(
        (
            stats.accepted,
            stats.open,
            stats.opened,
            stats.traffic.frames_in
        ),
        (1, 1, 1, 1)
    );
    assert_eq!(server.handle.clone().stats(), stats);
    drop(held);
}

#[test]
fn every_snapshot_of_the_counters_adds_up() {
    let server = spawn_echo(Config::max_connections(20), local());
    let addr = server.addr();
    let clients: Vec<_> = (0..4)
        .map(|_| {
            thread::spawn(move || {
                for round in 0..150_u32 {
                    let mut client = connect(addr);
                    if round % 3 > 0 {
                        ping(&mut client, &round.to_be_bytes());
                    }
                }
            })
        })
        .collect();
    let (mut snapshots, mut before) = (0, server.handle.stats());
    while clients.iter().any(|client| !client.is_finished()) {
        let stats = server.handle.stats();
        assert_eq!(
            stats.accepted,
            stats.open as u64 + stats.closed_total(),
            "{stats:?}"
        );
        assert!(stats.open <= stats.peak && stats.peak <= 20 && stats.opened <= stats.accepted);
        assert!(stats.accepted >= before.accepted && stats.iterations >= before.iterations);
        snapshots += 1;
        before = stats;
    }
    assert!(snapshots > 0);
    for client in clients {
        client.join().expect("served");
    }
    let stats = server.until("all have gone", |stats| {
        stats.open == 0 && stats.accepted == 600
    });
    assert_eq!(stats.closed_total(), 600);
}

#[test]
fn a_full_queue_refuses_and_says_so() {
    let server = members(Config::new().with(|config| config.queue_limits.commands = 3));
    let (_client, id) = join(&server);
    let held = hold(&server.handle);
    for _ in 0..3 {
        server.handle.notify(id, 1_u32).expect("there is room");
    }
    let full = Err(HandleError::QueueFull);
    assert_eq!(server.handle.notify(id, 2_u32), full);
    assert_eq!(server.handle.send(id, "frame"), full);
    assert_eq!(server.handle.post(|heard, _| heard.numbers.push(2)), full);
    // A caller that waits is not kept out, and is not let in without end.
    let asked = |number| {
        let asks = move |heard: &mut Heard, _: &mut portcullis::Control<'_, Heard>| {
            heard.numbers.push(number);
        };
        server.handle.call(Duration::ZERO, asks)
    };
    for number in [4, 5, 6] {
        assert_eq!(asked(number), Err(HandleError::Timeout));
    }
    assert_eq!(asked(7), Err(HandleError::QueueFull));
    drop(held);
    // The loop has made room, and nothing of what was refused happened.
    eventually("there is room again", || {
        server.handle.notify(id, 3_u32) != Err(HandleError::QueueFull)
    });
    assert_eq!(
        server.ask(|heard, _| heard.numbers.clone()),
        [1, 1, 1, 4, 5, 6, 3]
    );
}

/// A SIGTERM in the middle of a flood must not be lost.
#[test]
fn a_full_queue_keeps_no_drain_out() {
    let server = members(Config::new().with(|config| config.queue_limits.commands = 1));
    let (mut client, id) = join(&server);
    let held = hold(&server.handle);
    server.handle.notify(id, 1_u32).expect("there is room");
    assert_eq!(server.handle.notify(id, 2_u32), Err(HandleError::QueueFull));
    server
        .handle
        .drain(PATIENCE)
        .expect("never refused for the queue's length");
    drop(held);
    assert_eq!(kit::net::read_to_end(&mut client), b"");
    drop(client);
    assert_eq!(server.finish().0.open, 0);
}

/// What was taken before the drain was asked for is delivered before it.
#[test]
fn a_drain_overtakes_nothing() {
    const FRAMES: usize = 5000;
    let server = members(Config::new());
    let (mut client, id) = join(&server);
    let held = hold(&server.handle);
    for _ in 0..FRAMES {
        server.handle.send(id, *b"x").expect("there is room");
    }
    server
        .handle
        .drain(Duration::from_secs(3600))
        .expect("drain");
    // Another, and a shorter one: the first has not begun yet.
    server.handle.drain(PATIENCE).expect("drain");
    drop(held);
    let bytes = kit::net::read_to_end(&mut client);
    drop(client);
    assert_eq!(bytes.len(), FRAMES * kit::net::packet2(b"x").len());
    assert_eq!(server.finish().0.undeliverable, 0);
}

#[test]
fn waiting_bytes_are_bounded_too() {
    let server = members(Config::new().with(|config| config.queue_limits.bytes = 2000));
    let (mut client, id) = join(&server);
    let held = hold(&server.handle);
    server.handle.send(id, vec![1; 600]).expect("600 bytes");
    server.handle.send(id, vec![2; 1200]).expect("1800 bytes");
    let full = Err(HandleError::QueueFull);
    assert_eq!(server.handle.send(id, vec![3; 100]), full);
    drop(held);
    let lengths = (recv2(&mut client).len(), recv2(&mut client).len());
    assert_eq!(lengths, (600, 1200));
    // A frame that is longer than the limit passes alone.
    let held = hold(&server.handle);
    server.handle.send(id, vec![4; 3000]).expect("alone");
    assert_eq!(server.handle.send(id, vec![5; 1]), full);
    drop(held);
    assert_eq!(recv2(&mut client).len(), 3000);
}

/// What a command occupies counts: its place in the queue, and its job or message.
#[test]
fn every_command_takes_bytes_of_the_queue() {
    let server = members(Config::new().with(|config| config.queue_limits.bytes = 100_000));
    let (_client, id) = join(&server);
    let handle = &server.handle;
    let most = |push: &dyn Fn() -> Result<(), HandleError>| {
        let held = hold(handle);
        let taken = (0..100_000).take_while(|_| push().is_ok()).count();
        drop(held);
        server.ask(|_, _| ());
        taken
    };
    let frames = most(&|| handle.send(id, Vec::new()));
    assert!((500..5000).contains(&frames), "{frames}");
    let large = [0_u8; 1000];
    let messages = most(&|| handle.notify(id, large));
    assert!((50..=100).contains(&messages), "{messages}");
    let jobs = most(&|| {
        handle.post(move |_, _| {
            std::hint::black_box(large);
        })
    });
    assert!((50..=100).contains(&jobs), "{jobs}");
}

/// A caller that waits is not kept out by other commands, and is not let in without end: its job
/// stays queued when it waits no longer.
#[test]
fn calls_take_bytes_of_the_queue_too() {
    let server = members(Config::new().with(|config| config.queue_limits.bytes = 100_000));
    let handle = &server.handle;
    let large = [0_u8; 1000];
    let call = || {
        handle.call(Duration::ZERO, move |_, _| {
            std::hint::black_box(large);
        })
    };
    let held = hold(handle);
    let post = || {
        handle.post(move |_, _| {
            std::hint::black_box(large);
        })
    };
    let posted = (0..1000).take_while(|_| post().is_ok()).count();
    assert!((50..=100).contains(&posted), "{posted}");
    let called = (0..1000)
        .take_while(|_| call() == Err(HandleError::Timeout))
        .count();
    assert!((50..=100).contains(&called), "{called}");
    assert_eq!(call(), Err(HandleError::QueueFull));
    drop(held);
    server.ask(|_, _| ());
}

/// A short frame in a large buffer does not keep the buffer.
#[test]
fn a_frame_takes_no_more_memory_than_it_needs() {
    let server = members(Config::new().with(|config| config.queue_limits.bytes = 1_000_000));
    let (mut client, id) = join(&server);
    let held = hold(&server.handle);
    for _ in 0..1000 {
        let mut frame = Vec::with_capacity(64 * 1024);
        frame.extend_from_slice(b"0123456789");
        server.handle.send(id, frame).expect("there is room");
    }
    // Less than twice its length: that is kept, and counts.
    let mut frame = vec![0; 600_000];
    frame.reserve_exact(400_000);
    let refused = server.handle.send(id, frame);
    assert_eq!(refused, Err(HandleError::QueueFull));
    drop(held);
    for _ in 0..1000 {
        assert_eq!(recv2(&mut client), b"0123456789");
    }
}

/// Stays until it is cut off, and sends on the texts it is notified of.
struct Stays;

impl Handler<Heard> for Stays {
    fn on_frame(&mut self, cx: &mut Context<'_, Heard>, frame: &[u8]) -> Outcome {
        cx.app.opened.push(cx.conn.id());
        cx.conn.send(frame)?;
        Ok(())
    }

    fn on_message(&mut self, cx: &mut Context<'_, Heard>, message: Message) -> Outcome {
        if let Ok(text) = message.downcast::<String>() {
            cx.conn.send(text.as_bytes())?;
        }
        Ok(())
    }

    fn on_drain(&mut self, _: &mut Context<'_, Heard>) -> Outcome {
        Ok(())
    }
}

fn stayers(config: Config) -> Running<Heard> {
    spawn(|| {
        let mut server = Server::new(config).expect("server");
        server
            .listen(local(), |_: &mut Heard, _| Stays)
            .expect("listen");
        (server, Heard::default())
    })
}

/// A later drain has its own place: frames that were queued before it are sent before it.
#[test]
fn a_second_drain_does_not_take_the_first_ones_place() {
    const FRAMES: usize = 5000;
    for grace in [Duration::ZERO, Duration::from_nanos(1)] {
        let server = stayers(Config::new());
        let (mut client, id) = join(&server);
        let held = hold(&server.handle);
        let hour = Duration::from_secs(3600);
        server.handle.drain(hour).expect("drain");
        for _ in 0..FRAMES {
            server.handle.send(id, *b"x").expect("there is room");
        }
        server.handle.drain(grace).expect("drain");
        drop(held);
        let mut bytes = Vec::new();
        // It ends with a reset.
        let _ = std::io::Read::read_to_end(&mut client, &mut bytes);
        assert_eq!(bytes.len(), FRAMES * kit::net::packet2(b"x").len());
        let stats = server.finish().0;
        assert_eq!(
            (stats.undeliverable, stats.closed(CloseReason::DrainForced)),
            (0, 1)
        );
    }
}

/// Posts jobs that take 20 ms each until the first result is dropped. The second counts those that
/// have run.
fn slow_jobs(server: &Running<Heard>, count: usize) -> (mpsc::Sender<()>, Arc<AtomicUsize>) {
    let (finish, finished) = mpsc::channel::<()>();
    let finished = Arc::new(Mutex::new(finished));
    let runs = Arc::new(AtomicUsize::new(0));
    for _ in 0..count {
        let (finished, runs) = (Arc::clone(&finished), Arc::clone(&runs));
        let job = move |_: &mut Heard, _: &mut portcullis::Control<'_, Heard>| {
            let finished = finished.lock().expect("no panic");
            let _ = finished.recv_timeout(Duration::from_millis(20));
            runs.fetch_add(1, Ordering::SeqCst);
        };
        server.handle.post(job).expect("there is room");
    }
    (finish, runs)
}

#[test]
fn an_end_passes_jobs() {
    const JOBS: usize = 5000;
    for ends in ["kill", "stop", "drain"] {
        let server = stayers(Config::new());
        let (mut client, id) = join(&server);
        let held = hold(&server.handle);
        let (jobs, runs) = slow_jobs(&server, JOBS);
        server.handle.send(id, "last words").expect("room");
        let handle = server.handle.clone();
        match ends {
            "kill" => handle.kill(id),
            "stop" => handle.stop(),
            _ => handle.drain(Duration::ZERO),
        }
        .expect("it passes");
        drop(held);
        if ends != "kill" {
            assert_eq!(recv2(&mut client), b"last words", "{ends}");
        }
        if ends != "stop" {
            await_end(&mut client);
        }
        assert!(runs.load(Ordering::SeqCst) < JOBS / 2, "{ends}");
        drop(jobs);
        let (stats, _) = server.finish();
        // None is lost without a trace.
        if ends == "kill" {
            assert_eq!(stats.undeliverable, 1, "the frame behind the jobs");
        }
    }
}

/// A short queue is carried out in order before the kill, and answers are sent.
#[test]
fn a_kill_leaves_time_for_what_was_asked_before() {
    for round in 0..20_u32 {
        let server = members(Config::new());
        let (mut client, id) = join(&server);
        let held = (round % 2 == 0).then(|| hold(&server.handle));
        let text = String::from("an answer");
        server.handle.notify(id, text).expect("notify");
        server.handle.send(id, "a frame").expect("send");
        // It may have ended by itself only if it was killed.
        server.handle.kill(id).expect("kill");
        drop(held);
        assert_eq!(recv2(&mut client), b"an answer");
        assert_eq!(recv2(&mut client), b"a frame");
        await_end(&mut client);
        let stats = server.finish().0;
        assert_eq!(
            (stats.undeliverable, stats.closed(CloseReason::Killed)),
            (0, 1)
        );
    }
}

/// It does not wait until the jobs behind it are done.
#[test]
fn a_kill_is_done_before_the_next_job() {
    let server = members(Config::new());
    let (mut client, id) = join(&server);
    let held = hold(&server.handle);
    server.handle.kill(id).expect("kill");
    let (entered, release) = (mpsc::channel(), mpsc::channel::<()>());
    let job = move |heard: &mut Heard, _: &mut portcullis::Control<'_, Heard>| {
        entered
            .0
            .send(heard.closed.clone())
            .expect("the test waits");
        let _ = release.1.recv_timeout(2 * PATIENCE);
    };
    server.handle.post(job).expect("post");
    drop(held);
    let closed = entered.1.recv_timeout(PATIENCE).expect("the job runs");
    assert_eq!(closed, [(id, CloseReason::Killed)]);
    await_end(&mut client);
    release.0.send(()).expect("it waits");
}

/// A job that posts itself again runs once in each iteration.
#[test]
fn a_job_that_posts_itself_runs_once_in_an_iteration() {
    fn again(handle: &Handle<u32>) {
        let next = handle.clone();
        let posted = handle.post(move |runs, _| {
            *runs += 1;
            again(&next);
        });
        posted.expect("there is room");
    }
    let mut server = mine::<u32>(Config::new());
    again(&server.handle());
    let mut runs = 0;
    for expected in 1..20 {
        turn(&mut server, &mut runs);
        assert_eq!(runs, expected);
        assert_eq!(server.next_timeout(), Some(Duration::ZERO));
    }
}

/// What waits behind a stop, and is dropped with the server, is counted.
#[test]
fn commands_that_a_server_leaves_behind_are_counted() {
    let mut heard = Heard::default();
    let mut server = Server::new(Config::new()).expect("server");
    server
        .listen(local(), |_: &mut Heard, _| Member)
        .expect("listen");
    let mut client = connect(kit::net::tcp(&server.control().listeners()[0].addr));
    while heard.opened.is_empty() {
        turn(&mut server, &mut heard);
    }
    let (handle, id) = (server.handle(), heard.opened[0]);
    for _ in 0..100 {
        handle.post(|_, _| ()).expect("post");
        handle.send(id, "frame").expect("send");
        handle.notify(id, 1_u32).expect("notify");
    }
    handle.kill(id).expect("kill");
    let waiting = handle.clone();
    let asks = thread::spawn(move || waiting.call(PATIENCE, |_, _| ()));
    handle.stop().expect("stop");
    drop(server);
    assert!(matches!(
        asks.join().expect("no panic"),
        Err(HandleError::ServerGone)
    ));
    let stats = handle.stats();
    assert_eq!(stats.undeliverable, 301);
    // Its connections have ended with it.
    assert_eq!((stats.open, stats.accepted), (0, stats.closed_total()));
    await_end(&mut client);
}

#[test]
fn a_handle_outlives_its_server() {
    let mut heard = Heard::default();
    let mut server = Server::new(Config::new()).expect("server");
    server
        .listen(local(), |_: &mut Heard, _| Member)
        .expect("listen");
    let _client = connect(kit::net::tcp(&server.control().listeners()[0].addr));
    while heard.opened.is_empty() {
        server
            .poll_once(&mut heard, Some(PATIENCE))
            .expect("a turn");
    }
    let (handle, id) = (server.handle(), heard.opened[0]);
    assert!(handle.is_live(id));
    drop(server);
    assert!(!handle.is_live(id));
    assert_eq!(handle.send(id, "frame"), Err(HandleError::ServerGone));
    assert_eq!(handle.notify(id, 1_u32), Err(HandleError::ServerGone));
    assert_eq!(handle.kill(id), Err(HandleError::ServerGone));
    assert_eq!(handle.post(|_, _| ()), Err(HandleError::ServerGone));
    assert_eq!(handle.wake(), Err(HandleError::ServerGone));
    assert_eq!(handle.stop(), Err(HandleError::ServerGone));
    assert_eq!(handle.drain(PATIENCE), Err(HandleError::ServerGone));
    assert_eq!(handle.stats().accepted, 1, "the last counters stay");
    // Also on the thread that was the loop's: nothing there would wait for itself any more.
    assert_eq!(
        handle.call(PATIENCE, |_, _| ()),
        Err(HandleError::ServerGone)
    );
    assert_eq!(handle.listener(80, PATIENCE), Err(HandleError::ServerGone));
    let other = thread::spawn(move || handle.call(PATIENCE, |_, _| ()));
    assert_eq!(
        other.join().expect("no panic"),
        Err(HandleError::ServerGone)
    );
}

#[test]
fn a_handle_whose_server_is_gone_says_so_of_the_ids_of_others() {
    let server = mine::<()>(Config::new());
    let handle = server.handle();
    let foreign: ConnId = "7.3.1".parse().expect("an id");
    let unknown = Err(HandleError::NoConnection(foreign));
    assert_eq!(handle.send(foreign, "frame"), unknown);
    drop(server);
    let gone = Err(HandleError::ServerGone);
    assert_eq!(handle.send(foreign, "frame"), gone);
    assert_eq!(handle.notify(foreign, 1_u32), gone);
    assert_eq!(handle.kill(foreign), gone);
}

#[test]
fn a_question_to_all_that_waits_when_the_server_goes_is_an_error() {
    let server = mine::<()>(Config::new());
    let handle = server.handle();
    let asker = thread::spawn(move || handle.call_each(PATIENCE, |_, (), _| ()));
    eventually("the question waits", || readable(&server));
    drop(server);
    let answer = asker.join().expect("no panic");
    assert_eq!(answer, Err(HandleError::ServerGone));
}

#[test]
fn what_waits_when_the_server_goes_is_dropped_and_callers_get_an_error() {
    let server = mine::<()>(Config::new());
    let (handle, kept) = (server.handle(), Arc::new(()));
    let asking = handle.clone();
    let asker = thread::spawn(move || {
        let begun = Instant::now();
        (asking.call(PATIENCE, |(), _| ()), begun.elapsed())
    });
    eventually("the question waits", || readable(&server));
    let (mine, inside) = (Arc::clone(&kept), handle.clone());
    // It owns a handle, too: dropping it under the queue's lock would deadlock.
    let job = move |(): &mut (), _: &mut portcullis::Control<'_, ()>| drop((mine, inside));
    handle.post(job).expect("post");
    drop(server);
    let (answer, took) = asker.join().expect("no panic");
    assert_eq!(answer, Err(HandleError::ServerGone));
    assert!(
        took < PATIENCE,
        "it was told, and did not wait for the timeout"
    );
    assert_eq!(Arc::strong_count(&kept), 1);
}

/// Whether the server's descriptor is readable now.
fn readable<A>(server: &Server<A>) -> bool {
    let mut poll = mio::Poll::new().expect("poll");
    let fd = server.as_fd().as_raw_fd();
    poll.registry()
        .register(
            &mut mio::unix::SourceFd(&fd),
            mio::Token(0),
            mio::Interest::READABLE,
        )
        .expect("register");
    let mut events = mio::Events::with_capacity(4);
    poll.poll(&mut events, Some(Duration::ZERO)).expect("poll");
    !events.is_empty()
}

#[test]
fn a_question_on_the_loops_own_thread_is_an_error() {
    /// Asks from inside a callback.
    struct Asker;
    impl Handler<Heard> for Asker {
        fn on_frame(&mut self, cx: &mut Context<'_, Heard>, frame: &[u8]) -> Outcome {
            let handle = cx.app.handle.clone().expect("given");
            cx.app
                .answers
                .extend(handle.call(PATIENCE, |_, _| ()).err());
            cx.app.answers.extend(handle.listener(80, PATIENCE).err());
            cx.conn.send(frame)?;
            Ok(())
        }
    }
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(local(), |_: &mut Heard, _| Asker)
            .expect("listen");
        let heard = Heard {
            handle: Some(server.handle()),
            ..Heard::default()
        };
        (server, heard)
    });
    ping(&mut connect(server.addr()), b"ask");
    // And from a job.
    let answers = server.ask(|heard, _| {
        let handle = heard.handle.clone().expect("given");
        heard.answers.extend(handle.call(PATIENCE, |_, _| ()).err());
        heard.answers.extend(handle.listener(80, PATIENCE).err());
        std::mem::take(&mut heard.answers)
    });
    assert_eq!(answers, vec![HandleError::OwnThread; 4]);
}

#[test]
fn so_is_one_between_two_turns_or_before_the_first() {
    let mut server = mine::<u32>(Config::new());
    let (handle, mut runs) = (server.handle(), 0);
    for _ in 0..2 {
        let answer = handle.call(Duration::from_secs(1), |runs, _| *runs += 1);
        assert_eq!(answer, Err(HandleError::OwnThread));
        turn(&mut server, &mut runs);
    }
    assert_eq!(runs, 0, "nothing was queued");
}

/// Wake-ups of a flood are coalesced, and the queue is bounded.
#[test]
fn a_flood_from_eight_threads_arrives_once_and_in_order() {
    const THREADS: usize = 8;
    const EACH: u32 = 12_500;
    let server: Running<Vec<Vec<u32>>> = spawn(|| {
        (
            mine(Config::new().with(|config| config.queue_limits.commands = 1000)),
            vec![Vec::new(); THREADS],
        )
    });
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| {
            let handle = server.handle.clone();
            thread::spawn(move || {
                let mut refused = 0_u32;
                for number in 0..EACH {
                    while let Err(error) = handle.post(move |seen, _| seen[thread].push(number)) {
                        assert_eq!(error, HandleError::QueueFull);
                        refused += 1;
                        thread::yield_now();
                    }
                }
                refused
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("all were taken");
    }
    // The queue is first come, first served: this question comes last.
    let seen = server.ask(|seen, _| std::mem::take(seen));
    for numbers in seen {
        assert!(numbers.iter().copied().eq(0..EACH), "each once, in order");
    }
}

#[test]
fn a_turn_carries_out_no_more_than_its_budget() {
    let mut server = mine::<u32>(Config::new().with(|config| config.budgets.commands = 10));
    let mut runs = 0;
    // The listener's first look for clients is over.
    turn(&mut server, &mut runs);
    for _ in 0..25 {
        server.handle().post(|runs, _| *runs += 1).expect("post");
    }
    for (after, left) in [(10, true), (20, true), (25, false)] {
        turn(&mut server, &mut runs);
        assert_eq!(runs, after);
        assert_eq!(server.next_timeout() == Some(Duration::ZERO), left);
    }
}

#[test]
fn clients_are_served_under_a_flood_of_commands() {
    let server = spawn_echo(
        Config::new().with(|config| config.budgets.commands = 64),
        local(),
    );
    let mut client = connect(server.addr());
    ping(&mut client, b"before");
    let done = Arc::new(AtomicBool::new(false));
    let (begin, begun) = mpsc::channel();
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let (handle, done, begin) = (server.handle.clone(), Arc::clone(&done), begin.clone());
            thread::spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let begin = begin.clone();
                    if let Err(error) = handle.post(move |(), _| begin.send(()).unwrap_or_default())
                    {
                        assert_eq!(error, HandleError::QueueFull);
                        thread::yield_now();
                    }
                }
            })
        })
        .collect();
    begun.recv_timeout(PATIENCE).expect("the flood begins");
    drop(begun);
    for round in 0..200_u32 {
        ping(&mut client, &round.to_be_bytes());
    }
    let mut late = connect(server.addr());
    ping(&mut late, b"a new client too");
    done.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().expect("flooded");
    }
}

/// A stopped asker does not stop the loop: the late answer is dropped where it is made.
#[test]
fn a_query_without_a_reader_does_not_disturb_the_loop() {
    let server = members(Config::new());
    let (mut client, _) = join(&server);
    let held = hold(&server.handle);
    let (tell, told) = mpsc::channel();
    let answer = server.handle.call(Duration::ZERO, move |_, _| {
        tell.send(()).expect("the test waits");
        vec![0_u8; 1000]
    });
    assert_eq!(answer, Err(HandleError::Timeout));
    drop(held);
    told.recv_timeout(PATIENCE)
        .expect("the job runs all the same");
    send2(&mut client, b"served");
    assert_eq!(recv2(&mut client), b"served");
}

/// A service knows the id already: what it gives the handle waits until the connection is open.
#[cfg(any(feature = "ring", feature = "aws-lc-rs"))]
#[test]
fn a_service_may_pass_its_peers_id_on() {
    let site = kit::tls::Site::new();
    for secure in [false, true] {
        let tls = secure.then(|| Arc::new(site.server()));
        let server = spawn(move || {
            let mut server = Server::new(Config::new()).expect("server");
            let listen = match tls {
                Some(tls) => local().tls(tls),
                None => local(),
            };
            let service = |heard: &mut Heard, peer: portcullis::Peer| {
                let handle = heard.handle.as_ref().expect("given");
                let id = peer.id.expect("it was not refused");
                assert!(handle.is_live(id));
                handle.notify(id, String::from("first")).expect("it waits");
                handle.send(id, "second").expect("it waits");
                handle.notify(id, String::from("third")).expect("it waits");
                Member
            };
            server.listen(listen, service).expect("listen");
            let handle = Some(server.handle());
            let heard = Heard {
                handle,
                ..Heard::default()
            };
            (server, heard)
        });
        let mut words = Vec::new();
        if secure {
            let config = site.client(&portcullis::tls::rustls::version::TLS13);
            let mut client = kit::tls::handshake(server.addr(), &config).expect("a handshake");
            words.extend((0..3).map(|_| recv2(&mut client)));
        } else {
            let mut client = connect(server.addr());
            words.extend((0..3).map(|_| recv2(&mut client)));
        }
        assert_eq!(words, [&b"first"[..], b"second", b"third"]);
        let stats = server.finish().0;
        assert_eq!((stats.undeliverable, stats.panics), (0, 0));
    }
}

/// The id of a peer that the service refuses leads nowhere, and that is counted.
#[test]
fn nothing_is_sent_to_a_refused_peer() {
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        let service = portcullis::try_accept(|heard: &mut Heard, peer: portcullis::Peer| {
            let handle = heard.handle.as_ref().expect("given");
            let id = peer.id.expect("it is not at the cap");
            heard.opened.push(id);
            handle.notify(id, 1_u32).expect("it is not known yet");
            Err::<Member, _>(portcullis::Refuse::silently())
        });
        server.listen_with(local(), service).expect("listen");
        let handle = Some(server.handle());
        let heard = Heard {
            handle,
            ..Heard::default()
        };
        (server, heard)
    });
    await_end(&mut connect(server.addr()));
    server.until("it is counted", |stats| stats.undeliverable == 1);
    let id = server.ask(|heard, _| heard.opened[0]);
    assert!(!server.handle.is_live(id));
}

/// An outgoing connection gets what was given to the handle before it was connected.
#[test]
fn a_message_waits_for_an_outgoing_connection() {
    let elsewhere = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let to = elsewhere.local_addr().expect("bound");
    let server = members(Config::new());
    let handle = server.handle.clone();
    let connects = move |_: &mut Heard, control: &mut portcullis::Control<'_, Heard>| {
        let id = control.connect(to, portcullis::Connect::new(Framing::Packet2), Member);
        let id = id.expect("begun");
        handle.notify(id, String::from("one")).expect("it is live");
        handle.send(id, "two").expect("it is live");
        id
    };
    let id = server.ask(connects);
    let (mut peer, _) = elsewhere.accept().expect("it comes");
    peer.set_read_timeout(Some(PATIENCE)).expect("timeout");
    assert_eq!(recv2(&mut peer), b"one");
    assert_eq!(recv2(&mut peer), b"two");
    server.handle.send(id, "three").expect("it is live");
    assert_eq!(recv2(&mut peer), b"three");
    // One that never connects: each is counted.
    drop((peer, elsewhere));
    let handle = server.handle.clone();
    let fails = move |_: &mut Heard, control: &mut portcullis::Control<'_, Heard>| {
        let id = control.connect(to, portcullis::Connect::new(Framing::Packet2), Member);
        let id = id.expect("begun");
        handle.notify(id, String::from("one")).expect("it is live");
        handle.send(id, "two").expect("it is live");
    };
    server.ask(fails);
    server.until("both are counted", |stats| stats.undeliverable == 2);
}
