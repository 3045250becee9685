//! What a program may get wrong around its server is a typed error or a defined nothing: never a panic, a hang, or another's
//! connection.

use std::cell::Cell;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::rc::Rc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use kit::net::{
    await_end, connect, local, packet2, read_to_end, recv2, send2, turns_until, uninterrupted,
    Echo, PATIENCE,
};
use portcullis::{
    Alarm, CloseReason, Config, ConnId, Context, Error, Handle, HandleError, Handler, Listen,
    Message, Outcome, Quota, SendError, Server, Turn,
};

fn echo(config: Config, listen: Listen) -> (Server, SocketAddr) {
    let mut server = Server::new(config).expect("server");
    server.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let addr = kit::net::tcp(&server.control().listeners()[0].addr);
    (server, addr)
}

/// An id whose connection has gone, and whose slot is another's now.
fn stale(server: &mut Server, addr: SocketAddr) -> (ConnId, TcpStream) {
    let first = connect(addr);
    turns_until(server, &mut (), |server, ()| {
        server.control().stats().open == 1
    });
    let id = server.control().connections()[0].id;
    drop(first);
    turns_until(server, &mut (), |server, ()| {
        server.control().stats().open == 0
    });
    let mut second = connect(addr);
    turns_until(server, &mut (), |server, ()| {
        server.control().stats().open == 1
    });
    assert_ne!(server.control().connections()[0].id, id);
    send2(&mut second, b"mine");
    turns_until(server, &mut (), |server, ()| {
        server.control().stats().traffic.frames_out == 1
    });
    assert_eq!(recv2(&mut second), b"mine");
    (id, second)
}

#[test]
fn a_stale_id_reaches_no_connection() {
    let (mut server, addr) = echo(Config::new(), local());
    let (id, mut tenant) = stale(&mut server, addr);
    let handle = server.handle();
    assert_eq!(
        handle.send(id, *b"for another"),
        Err(HandleError::NoConnection(id))
    );
    assert_eq!(handle.notify(id, ()), Err(HandleError::NoConnection(id)));
    assert_eq!(handle.kill(id), Err(HandleError::NoConnection(id)));
    assert!(!server.control().kill(id));
    assert!(server.control().conn(id).is_none());
    // The slot's new tenant has noticed nothing.
    send2(&mut tenant, b"still mine");
    turns_until(&mut server, &mut (), |server, ()| {
        server.control().stats().traffic.frames_out == 2
    });
    assert_eq!(recv2(&mut tenant), b"still mine");
    assert_eq!(server.control().stats().closed(CloseReason::Killed), 0);
}

/// In the same slot, at the same age: only the server differs. Also when a later server replaces it.
#[test]
fn an_id_of_another_server_reaches_no_connection() {
    let served = || {
        let (mut server, addr) = echo(Config::new(), local());
        let client = connect(addr);
        turns_until(&mut server, &mut (), |server, ()| {
            server.control().stats().opened == 1
        });
        (server, client)
    };
    let (mut first, _client) = served();
    let id = first.control().connections()[0].id;
    let refuses = |server: &mut Server, id: ConnId| {
        let own = server.control().connections()[0].id;
        assert_eq!(own.to_string(), id.to_string(), "the same slot");
        assert_ne!(own, id);
        let handle = server.handle();
        let gone = Err(HandleError::NoConnection(id));
        assert!(handle.is_live(own) && !handle.is_live(id));
        assert_eq!(handle.send(id, *b"for another"), gone);
        assert_eq!(handle.notify(id, ()), gone);
        assert_eq!(handle.kill(id), gone);
        assert!(!server.control().kill(id));
        assert!(server.control().conn(id).is_none());
        assert_eq!(server.control().stats().open, 1);
    };
    let (mut second, _other) = served();
    refuses(&mut second, id);
    drop(first);
    let (mut third, _third) = served();
    refuses(&mut third, id);
}

/// Each server's first listener and first alarm: only the server differs.
#[test]
fn an_id_of_another_server_names_no_listener_and_no_alarm() {
    let served = || {
        let (mut server, _addr) = echo(Config::new(), local());
        let listener = server.control().listeners()[0].id;
        let alarm = Alarm::Connections(Quota::Count(50));
        let alarm = server.control().on_alarm(alarm, PATIENCE, |_, _, _| ());
        (server, listener, alarm.expect("good"))
    };
    let (_first, listener, alarm) = served();
    let (mut second, own, own_alarm) = served();
    assert_eq!(own.to_string(), listener.to_string(), "the same number");
    assert_eq!(own_alarm.to_string(), alarm.to_string(), "the same number");
    let mut control = second.control();
    assert!(control.listener(own).is_ok());
    let unknown = |result: portcullis::Result<()>| {
        assert!(matches!(
            result,
            Err(Error::NoListener { .. } | Error::NoAlarm { .. })
        ));
    };
    unknown(control.listener(listener).map(drop));
    unknown(control.suspend(listener));
    unknown(control.close_listener(listener));
    unknown(control.reconfigure_listener(listener, |_| ()));
    let other = Alarm::Connections(Quota::Count(70));
    unknown(control.set_alarm(alarm, other, PATIENCE));
    assert!(!control.remove_alarm(alarm));
    assert!(control.remove_alarm(own_alarm));
}

#[test]
fn a_stale_id_from_inside_a_callback_is_none() {
    #[derive(Default)]
    struct App {
        gone: Option<ConnId>,
        found: Option<bool>,
    }
    struct Asks;
    impl Handler<App> for Asks {
        fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
            if let Some(id) = cx.app.gone {
                cx.app.found = Some(cx.conn.peer(id).is_some());
            }
            Ok(())
        }
        fn on_frame(&mut self, _: &mut Context<'_, App>, _: &[u8]) -> Outcome {
            Ok(())
        }
        fn on_close(&mut self, cx: &mut Context<'_, App>, _: &portcullis::Closed) {
            cx.app.gone = Some(cx.conn.id());
            // It is on its way out: asking for anything is an error, or nothing at all.
            assert!(matches!(cx.conn.send("last words"), Err(SendError::Closed)));
            assert!(matches!(cx.conn.detach(|_| ()), Err(Error::ConnState(_))));
            cx.conn.set_timer(0, Duration::ZERO);
            cx.conn.resume();
            cx.conn.close();
        }
    }
    let mut server = Server::new(Config::new()).expect("server");
    server
        .listen(local(), |_: &mut App, _| Asks)
        .expect("listen");
    let addr = kit::net::tcp(&server.control().listeners()[0].addr);
    let mut app = App::default();
    let first = connect(addr);
    turns_until(&mut server, &mut app, |server, _| {
        server.control().stats().opened == 1
    });
    drop(first);
    turns_until(&mut server, &mut app, |_, app| app.gone.is_some());
    let _second = connect(addr);
    turns_until(&mut server, &mut app, |_, app| app.found.is_some());
    assert_eq!(app.found, Some(false));
    assert_eq!(
        (
            server.control().stats().panics,
            server.control().stats().closed(CloseReason::Panicked)
        ),
        (0, 0)
    );
}

#[test]
fn to_detach_twice_is_an_error_and_the_first_stands() {
    struct Leaves(mpsc::Sender<portcullis::Detached>);
    impl Handler<Vec<Result<(), Error>>> for Leaves {
        fn on_frame(
            &mut self,
            cx: &mut Context<'_, Vec<Result<(), Error>>>,
            frame: &[u8],
        ) -> Outcome {
            for _ in 0..2 {
                let to = self.0.clone();
                let outcome = cx.conn.detach(move |stream| drop(to.send(stream)));
                cx.app.push(outcome);
            }
            // It has left: nothing more goes out through the loop.
            assert!(matches!(cx.conn.send(frame), Err(SendError::Closed)));
            Ok(())
        }
    }
    let (sender, received) = mpsc::channel();
    let mut server = Server::new(Config::new()).expect("server");
    server
        .listen(local(), move |_: &mut Vec<_>, _| Leaves(sender.clone()))
        .expect("listen");
    let addr = kit::net::tcp(&server.control().listeners()[0].addr);
    let mut app = Vec::new();
    let mut client = connect(addr);
    send2(&mut client, b"out");
    turns_until(&mut server, &mut app, |_, app| app.len() == 2);
    assert!(matches!(app[..], [Ok(()), Err(Error::ConnState(_))]));
    let mut stream = received.recv_timeout(PATIENCE).expect("the first");
    assert!(received.try_recv().is_err(), "there is one stream");
    // From outside, by its id, which is live until its place is given back.
    let id = stream.id();
    if let Some(mut conn) = server.control().conn(id) {
        assert!(matches!(conn.detach(|_| ()), Err(Error::ConnState(_))));
        assert!(matches!(conn.send("more"), Err(SendError::Closed)));
    }
    stream.write_all(b"from the thread").expect("written");
    drop(stream);
    assert_eq!(read_to_end(&mut client), b"from the thread");
    turns_until(&mut server, &mut app, |server, _| {
        server.control().stats().open == 0
    });
    assert_eq!(server.control().stats().closed(CloseReason::Detached), 1);
}

/// A wait for the loop on the loop's own thread would never end.
#[test]
fn a_blocking_question_on_the_loops_own_thread_is_an_error() {
    struct Asks(Handle<Vec<HandleError>>);
    impl Handler<Vec<HandleError>> for Asks {
        fn on_frame(&mut self, cx: &mut Context<'_, Vec<HandleError>>, frame: &[u8]) -> Outcome {
            let handle = &self.0;
            let asked = [
                handle.call(Duration::MAX, |_, _| ()).err(),
                handle.metrics(Duration::MAX).err(),
                handle.call_each(Duration::MAX, |_, _, _| ()).err(),
                handle.listeners(Duration::MAX).err(),
                handle.listener("any", Duration::MAX).err(),
                handle
                    .change(Duration::MAX, |control| control.reconfigure(|_| ()))
                    .err(),
                handle
                    .change(Duration::MAX, |control| {
                        control.reconfigure_listener("any", |_| ())
                    })
                    .err(),
            ];
            cx.app.extend(asked.into_iter().flatten());
            // What does not wait is as good here as anywhere: it is done in a later turn.
            handle.send(cx.conn.id(), frame)?;
            Ok(())
        }
    }
    let mut server = Server::new(Config::new()).expect("server");
    let handle = server.handle();
    server
        .listen(local(), move |_: &mut Vec<_>, _| Asks(handle.clone()))
        .expect("listen");
    let addr = kit::net::tcp(&server.control().listeners()[0].addr);
    let mut app = Vec::new();
    let mut client = connect(addr);
    send2(&mut client, b"sent to itself");
    turns_until(&mut server, &mut app, |server, _| {
        server.control().stats().traffic.frames_out == 1
    });
    assert_eq!(recv2(&mut client), b"sent to itself");
    assert_eq!(
        app,
        vec![HandleError::OwnThread; 7],
        "seven questions, and none of them waits"
    );
}

/// A loop that has not polled for longer than every timeout: no peer that has sent meanwhile times
/// out.
#[test]
fn a_loop_that_forgets_to_poll_harms_no_client() {
    let limit = Duration::from_millis(50);
    let listen = local().with(|listen| {
        listen.conn.idle_timeout = limit;
        listen.conn.frame_timeout = limit;
        listen.conn.handshake_timeout = limit;
    });
    let (mut server, addr) = echo(Config::new(), listen);
    let (mut talks, silent) = (connect(addr), connect(addr));
    for client in [&talks, &silent] {
        send2(&mut &*client, b"here");
    }
    turns_until(&mut server, &mut (), |server, ()| {
        server.control().stats().traffic.frames_out == 2
    });
    assert_eq!(recv2(&mut talks), b"here");
    // Clients connect and send without a poll: as long as the timeouts are, and longer.
    let late = connect(addr);
    let begun = Instant::now();
    while begun.elapsed() < 2 * limit {
        thread::park_timeout(limit);
    }
    send2(&mut talks, b"while nobody looked");
    send2(&mut &late, b"I too");
    // The very first turns find both what has come and what is overdue. The first is judged first.
    turns_until(&mut server, &mut (), |server, ()| {
        server.control().stats().traffic.frames_out == 4
    });
    assert_eq!(recv2(&mut talks), b"while nobody looked");
    drop(silent);
}

/// A loop that ignores the descriptor's events loses none: what was there is there at the next turn.
#[test]
fn a_loop_that_ignores_an_event_finds_it_later() {
    let (mut server, addr) = echo(
        Config::new(),
        local().with(|listen| listen.conn.idle_timeout = Duration::MAX),
    );
    let mut client = connect(addr);
    turns_until(&mut server, &mut (), |server, ()| {
        server.control().stats().open == 1
    });
    for _ in 0..100 {
        send2(&mut client, b"unheard");
    }
    let mut poll = mio::Poll::new().expect("poll");
    let fd = server.as_fd().as_raw_fd();
    let mut source = mio::unix::SourceFd(&fd);
    poll.registry()
        .register(&mut source, mio::Token(0), mio::Interest::READABLE)
        .expect("register");
    let mut events = mio::Events::with_capacity(4);
    // Told, and not acted upon; edge-triggered, it is not told again.
    uninterrupted(|| poll.poll(&mut events, Some(PATIENCE))).expect("poll");
    assert!(!events.is_empty());
    turns_until(&mut server, &mut (), |server, ()| {
        server.control().stats().traffic.frames_out == 100
    });
    for _ in 0..100 {
        assert_eq!(recv2(&mut client), b"unheard");
    }
}

/// Turns without any reason, and with the longest and the shortest timeouts, are turns in which nothing happens.
#[test]
fn a_loop_that_polls_too_often_does_nothing() {
    let (mut server, addr) = echo(Config::new(), local());
    let client = connect(addr);
    turns_until(&mut server, &mut (), |server, ()| {
        server.control().stats().open == 1
    });
    let before = server.control().stats();
    for _ in 0..1000 {
        let turn = server
            .poll_once(&mut (), Some(Duration::ZERO))
            .expect("a turn");
        assert_eq!(turn, Turn::Continue);
    }
    let after = server.control().stats();
    assert_eq!(
        (after.traffic.bytes_in, after.open, after.iterations),
        (before.traffic.bytes_in, 1, before.iterations + 1000)
    );
    drop(client);
}

/// A worker whose answer comes when the drain is over, or the server gone: an error for the worker, and nothing else.
#[test]
fn a_workers_answer_after_the_drain_is_an_error() {
    struct Asks {
        jobs: mpsc::Sender<ConnId>,
        told: Rc<Cell<u32>>,
    }
    impl Handler for Asks {
        fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
            cx.conn.hold();
            self.jobs.send(cx.conn.id())?;
            Ok(())
        }
        fn on_message(&mut self, _: &mut Context<'_>, _: Message) -> Outcome {
            self.told.set(self.told.get() + 1);
            Ok(())
        }
    }
    let (jobs, queue) = mpsc::channel();
    let told = Rc::new(Cell::new(0));
    let heard = Rc::clone(&told);
    let mut server = Server::new(Config::new()).expect("server");
    let service = move |_: &mut (), _| Asks {
        jobs: jobs.clone(),
        told: Rc::clone(&heard),
    };
    server.listen(local(), service).expect("listen");
    let addr = kit::net::tcp(&server.control().listeners()[0].addr);
    let (handle, mut client) = (server.handle(), connect(addr));
    send2(&mut client, b"a long job");
    turns_until(&mut server, &mut (), |server, ()| {
        server.control().stats().traffic.frames_in == 1
    });
    let id = queue.recv_timeout(PATIENCE).expect("a job");
    // The grace is over before the worker is done.
    server.control().drain(Duration::from_millis(1));
    turns_until(&mut server, &mut (), |server, ()| {
        server.control().drain_report().is_some()
    });
    assert_eq!(
        server.control().drain_report().map(|report| report.forced),
        Some(1)
    );
    assert_eq!(
        handle.notify(id, "the answer"),
        Err(HandleError::NoConnection(id))
    );
    assert_eq!(
        handle.send(id, *b"the answer"),
        Err(HandleError::NoConnection(id))
    );
    assert_eq!(
        server.poll_once(&mut (), None).expect("a turn"),
        Turn::Drained,
        "it does not wait"
    );
    drop(server);
    assert_eq!(
        handle.notify(id, "the answer"),
        Err(HandleError::ServerGone)
    );
    assert_eq!(handle.post(|(), _| ()), Err(HandleError::ServerGone));
    assert_eq!(
        handle.call(PATIENCE, |(), _| ()),
        Err(HandleError::ServerGone)
    );
    assert_eq!(handle.drain(Duration::ZERO), Err(HandleError::ServerGone));
    assert_eq!(told.get(), 0);
    await_end(&mut client);
}

#[test]
fn a_server_that_has_drained_takes_nothing_new() {
    let (mut server, addr) = echo(Config::new(), local());
    server.control().drain(Duration::ZERO);
    turns_until(&mut server, &mut (), |server, ()| {
        server.control().drain_report().is_some()
    });
    let again = server.listen(local(), |_: &mut (), _| Echo);
    assert!(matches!(again, Err(Error::Draining)), "{again:?}");
    server.control().drain(Duration::from_secs(60));
    server.run(&mut ()).expect("it returns at once");
    TcpStream::connect_timeout(&addr, PATIENCE).expect_err("the port is closed");
}

/// The state that is lent may be another one each time: the server keeps none of it.
#[test]
fn each_turn_may_lend_another_state() {
    struct Count;
    impl Handler<u32> for Count {
        fn on_frame(&mut self, cx: &mut Context<'_, u32>, _: &[u8]) -> Outcome {
            *cx.app += 1;
            Ok(())
        }
    }
    let mut server = Server::new(Config::new()).expect("server");
    server
        .listen(local(), |_: &mut u32, _| Count)
        .expect("listen");
    let addr = kit::net::tcp(&server.control().listeners()[0].addr);
    let mut client = connect(addr);
    let mut counts = [0; 2];
    for (number, count) in counts.iter_mut().enumerate() {
        client.write_all(&packet2(b"one")).expect("sent");
        turns_until(&mut server, count, |server, _| {
            server.control().stats().traffic.frames_in == number as u64 + 1
        });
    }
    assert_eq!(counts, [1, 1]);
}
