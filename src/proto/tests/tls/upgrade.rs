//! An open connection goes on behind TLS: which bytes are in the clear, and which are no frame.

use super::*;
use crate::error::{Error, Result};

/// The handler's answer to the command.
const READY: &[u8] = b"ready";

/// Sends [`READY`] and upgrades at the frame `starttls`; else an echo.
fn upgrading(config: ServerConfig) -> Script {
    let config = TlsConfig::from(config);
    Box::new(move |turn, event| match event {
        Seen::Frame(payload) if payload == b"starttls" => {
            turn.send(READY)?;
            Ok(start_tls(turn, &config)?)
        }
        event => echo(turn, event),
    })
}

fn start_tls(turn: &mut Turn<'_>, config: &TlsConfig) -> Result<()> {
    turn.machine
        .start_tls(config, turn.now, turn.pool)
        .map(drop)
}

impl Talk {
    /// A connection that is open in the clear.
    fn plain(version: &'static SupportedProtocolVersion, limits: ConnConfig) -> Self {
        let identity = Identity::new();
        Self::plain_with(
            identity.client(version),
            limits,
            upgrading(identity.server()),
        )
    }

    fn plain_with(client: ClientConfig, limits: ConnConfig, script: Script) -> Self {
        let name = ServerName::try_from("localhost").expect("a name");
        Self {
            client: ClientConnection::new(Arc::new(client), name).expect("client"),
            rig: Rig::open_with(&Framing::Packet2, limits, script),
            cut: usize::MAX,
            heard: Vec::new(),
            goodbye: false,
        }
    }

    /// Sends the command, which is answered: the handshake may begin.
    fn ask(&mut self) {
        self.rig.receive(packet2("starttls"));
        assert_eq!(self.rig.events(), [frame("starttls")]);
        assert_eq!(self.rig.answers(), packet2(READY), "in the clear");
        assert_eq!(self.rig.machine.state(), State::Handshaking);
    }
}

#[test]
fn frames_before_in_the_clear_and_after_it_behind_tls() {
    for version in VERSIONS {
        for cut in [1, usize::MAX] {
            let mut talk = Talk::plain(version, limits());
            talk.cut = cut;
            talk.rig.receive(packet2("before"));
            assert_eq!(talk.rig.answers(), packet2("before"));
            assert_eq!(talk.rig.events(), [frame("before")]);
            talk.ask();
            assert!(talk.rig.machine.tls().is_none(), "nothing is agreed on yet");
            talk.exchange();
            let mut event = talk.rig.events();
            event.retain(|event| *event != Seen::Writable);
            assert_eq!(event, [Seen::Secured]);
            assert_eq!(talk.rig.machine.state(), State::Open);
            let info = talk.rig.machine.tls().expect("TLS");
            assert_eq!(info.protocol_version(), Some(version.version));
            talk.say(&packet2("after"));
            talk.exchange();
            assert_eq!(talk.rig.events(), [frame("after")]);
            assert_eq!(talk.heard(), packet2("after"));
            talk.client.send_close_notify();
            talk.exchange();
            assert!(talk.goodbye);
            assert_eq!(talk.rig.events(), [Seen::Finished]);
            assert_eq!(talk.rig.finish(), CloseReason::Finished);
        }
    }
}

/// CVE-2011-0411: a command injected behind STARTTLS in the same segment is not executed behind
/// TLS.
#[test]
fn bytes_behind_the_command_are_no_frame() {
    for cut in 0..packet2("injected").len() {
        let mut talk = Talk::plain(&TLS13, limits());
        let mut bytes = [packet2("starttls"), packet2("injected")].concat();
        let rest = bytes.split_off(bytes.len() - cut);
        talk.rig.receive(bytes);
        talk.rig.receive(rest);
        assert_eq!(
            talk.rig.events(),
            [frame("starttls")],
            "cut {cut} from the end"
        );
        assert_eq!(talk.rig.machine.state(), State::Closing);
        assert!(talk.rig.answers().starts_with(&packet2(READY)));
        assert_eq!(talk.rig.finish(), CloseReason::NotTls);
        assert!(talk.rig.machine.was_open(), "on_close is due");
    }
}

/// The same for a frame in the clear that a pause held back.
#[test]
fn bytes_behind_a_pause_are_no_frame() {
    let identity = Identity::new();
    let config = TlsConfig::from(identity.server());
    let mut rig = Rig::open(one_at_a_time);
    rig.receive([packet2("first"), packet2("second")].concat());
    assert_eq!(rig.events(), [frame("first")]);
    rig.act(|turn| start_tls(turn, &config).expect("an open connection"));
    assert_eq!(rig.machine.state(), State::Closing);
    assert_eq!(rig.events(), []);
    assert_eq!(rig.finish(), CloseReason::NotTls);
}

#[test]
fn the_hello_may_come_with_the_command() {
    for version in VERSIONS {
        for cut in [0, 1, 5, 50] {
            let mut talk = Talk::plain(version, limits());
            let mut bytes = [packet2("starttls"), talk.client_bytes()].concat();
            let rest = bytes.split_off(packet2("starttls").len() + cut);
            talk.rig.receive(bytes);
            talk.rig.receive(rest);
            let answers = talk.rig.answers();
            let clear = packet2(READY);
            assert!(answers.starts_with(&clear), "the answer goes in front");
            talk.hear(&answers[clear.len()..]);
            talk.exchange();
            let mut event = talk.rig.events();
            event.retain(|event| *event != Seen::Writable);
            assert_eq!(event, [frame("starttls"), Seen::Secured]);
        }
    }
}

#[test]
fn output_during_the_handshake_is_never_in_the_clear() {
    let mut talk = Talk::plain(&TLS13, limits());
    talk.ask();
    talk.rig.act(|turn| turn.send(b"secret").expect("taken"));
    assert_eq!(talk.rig.answers(), [0; 0], "it waits");
    assert_eq!(
        talk.rig.machine.sendable(),
        0,
        "and no write timeout runs for it"
    );
    assert!(talk.rig.machine.queued() > 0);
    talk.exchange();
    assert_eq!(talk.heard(), packet2("secret"));
}

/// Pending output for a slow reader is sent in the clear, in order, in front of the handshake.
#[test]
fn pending_output_is_sent_first() {
    let mut talk = Talk::plain(&TLS13, limits());
    talk.rig.room = 0;
    talk.rig.receive(packet2("waits"));
    let hello = talk.client_bytes();
    talk.rig.receive([packet2("starttls"), hello].concat());
    assert_eq!(
        talk.rig.machine.unsent_app_bytes(),
        packet2("waits").len() + packet2(READY).len()
    );
    let clear = [packet2("waits"), packet2(READY)].concat();
    for _ in 0..clear.len() {
        talk.rig.drain_to_peer(1);
    }
    assert_eq!(talk.rig.answers(), clear);
    assert_eq!(
        talk.rig.machine.unsent_app_bytes(),
        0,
        "the handshake is not the handler's"
    );
    talk.rig.drain_to_peer(1_000_000);
    let answers = talk.rig.answers();
    talk.hear(&answers);
    talk.exchange();
    assert!(talk.rig.events().contains(&Seen::Secured));
}

#[test]
fn the_handshake_has_a_clock_of_its_own() {
    let mut talk = Talk::plain(&TLS13, limits());
    talk.rig.pass(secs(100));
    talk.ask();
    talk.rig
        .act(|turn| turn.send(b"waits for it").expect("taken"));
    talk.rig.pass(secs(9));
    assert_eq!(talk.rig.machine.state(), State::Handshaking);
    talk.rig.pass(secs(1));
    assert_eq!(talk.rig.ended(), CloseReason::HandshakeTimeout);
    assert!(talk.rig.machine.was_open(), "on_close is due");
}

/// Neither the idle nor the write timeout runs for a peer that has nothing to read.
#[test]
fn no_other_clock_runs_in_the_handshake() {
    let limits = ConnConfig {
        handshake_timeout: Duration::MAX,
        ..limits()
    };
    let mut talk = Talk::plain(&TLS13, limits);
    talk.ask();
    talk.rig
        .act(|turn| turn.send(b"waits for it").expect("taken"));
    talk.rig.pass(secs(10_000));
    assert_eq!(talk.rig.machine.state(), State::Handshaking);
    talk.exchange();
    assert_eq!(talk.heard(), packet2("waits for it"));
    talk.rig.events();
    talk.rig.pass(secs(119));
    assert!(talk.rig.is_open());
    talk.rig.pass(secs(2));
    talk.rig.receive_fin();
    assert_eq!(talk.rig.ended(), CloseReason::IdleTimeout);
}

#[test]
fn the_end_in_the_handshake_is_a_failure() {
    let mut talk = Talk::plain(&TLS13, limits());
    talk.ask();
    let hello = talk.client_bytes();
    talk.rig.receive(&hello[..20]);
    talk.rig
        .act(|turn| turn.send(b"waits for it").expect("taken"));
    talk.rig.receive_fin();
    assert_eq!(talk.rig.ended(), CloseReason::TlsHandshake);
}

/// A graceful end loses no output, or the reason reports it.
#[test]
fn a_close_in_the_handshake_reports_lost_output() {
    for sends in [false, true] {
        let mut talk = Talk::plain(&TLS13, limits());
        talk.ask();
        talk.rig.act(|turn| {
            if sends {
                turn.send(b"secret").expect("taken");
            }
            turn.close();
            assert!(matches!(turn.send(b"too late"), Err(SendError::Closed)));
        });
        assert_eq!(talk.rig.answers(), [0; 0], "nothing in the clear");
        let reason = if sends {
            CloseReason::TlsHandshake
        } else {
            CloseReason::Closed
        };
        assert_eq!(talk.rig.finish(), reason);
    }
}

#[test]
fn an_alert_is_sent_for_a_bad_handshake() {
    let mut talk = Talk::plain(&TLS13, limits());
    talk.ask();
    talk.rig.receive([22, 3, 1, 0, 5, 1, 0, 0, 1, 0]);
    assert_eq!(talk.rig.answers()[..5], [21, 3, 3, 0, 2], "an alert");
    assert_eq!(talk.rig.finish(), CloseReason::TlsHandshake);
}

/// The failure of the handshake is the reason, and output that waits for it is never sent.
#[test]
fn garbage_is_the_reason_despite_pending_output() {
    let mut talk = Talk::plain(&TLS13, limits());
    talk.ask();
    talk.rig.act(|turn| turn.send(b"secret").expect("taken"));
    talk.rig.receive(packet2("garbage"));
    assert!(talk.rig.answers().len() <= 7, "an alert at most");
    assert_eq!(talk.rig.finish(), CloseReason::NotTls);
}

#[test]
fn a_lost_alert_is_not_the_reason_here_either() {
    let mut talk = Talk::plain(&TLS13, limits());
    talk.ask();
    talk.rig.room = 0;
    talk.rig.receive(packet2("garbage"));
    assert!(talk.rig.machine.queued() > 0, "an alert waits");
    talk.rig.inbox.push_back(Input::Error(libc::ECONNRESET));
    talk.rig.turn();
    assert_eq!(talk.rig.ended(), CloseReason::NotTls);
}

fn is_tls_already(outcome: Result<()>) -> bool {
    outcome.is_err_and(|error| error.to_string() == "the connection speaks TLS already")
}

#[test]
fn a_second_upgrade_is_an_error() {
    let identity = Identity::new();
    let config = TlsConfig::from(identity.server());
    let again = config.clone();
    let mut talk = Talk::plain(&TLS13, limits());
    talk.ask();
    talk.rig
        .act(|turn| assert!(is_tls_already(start_tls(turn, &config))));
    talk.exchange();
    talk.rig
        .act(|turn| assert!(is_tls_already(start_tls(turn, &again))));
    let mut direct = Talk::open(&TLS13, Box::new(echo));
    direct
        .rig
        .act(|turn| assert!(is_tls_already(start_tls(turn, &again))));
    direct.say(&packet2("unharmed"));
    direct.exchange();
    assert_eq!(direct.heard(), packet2("unharmed"));
}

#[test]
fn no_upgrade_of_a_closing_or_unopened_connection() {
    let config = TlsConfig::from(Identity::new().server());
    let refuses = |rig: &mut Rig| {
        let mut turn = Turn {
            machine: &mut rig.machine,
            pool: &mut rig.pool,
            now: rig.now,
        };
        let refused = start_tls(&mut turn, &config);
        assert!(matches!(refused, Err(Error::ConnState(_))) && !is_tls_already(refused));
    };
    let mut new = Rig::accepted(&Framing::Packet2, limits(), None, Box::new(echo));
    refuses(&mut new);
    new.machine.handle_admitted(new.now);
    refuses(&mut new);
    let mut closing = Rig::open(echo);
    closing
        .machine
        .close_by_handler(closing.now, &mut closing.pool);
    refuses(&mut closing);
    let mut finished = Rig::open(silent);
    finished.receive_fin();
    assert_eq!(finished.events(), [Seen::Finished]);
    refuses(&mut finished);
    let mut dead = Rig::open(silent);
    dead.write_error = Some(libc::EPIPE);
    dead.machine
        .send(b"x", dead.now, &mut dead.pool)
        .expect("taken");
    dead.flush();
    refuses(&mut dead);
}

/// A pause before or during the handshake does not stop it, and holds frames back behind it.
#[test]
fn a_pause_holds_behind_the_handshake() {
    for early in [true, false] {
        let mut talk = Talk::plain(&TLS13, limits());
        if early {
            let identity = Identity::new();
            let config = TlsConfig::from(identity.server());
            talk = Talk::plain_with(identity.client(&TLS13), limits(), Box::new(echo));
            talk.rig.pause();
            talk.rig.act(|turn| start_tls(turn, &config).expect("open"));
        } else {
            talk.ask();
            talk.rig.pause();
        }
        talk.say(&packet2("hello"));
        talk.exchange();
        let mut event = talk.rig.events();
        event.retain(|event| *event != Seen::Writable);
        assert_eq!(event, [Seen::Secured]);
        talk.rig.pass(secs(1000));
        assert!(talk.rig.is_open(), "the peer's clocks stand");
        talk.rig.resume();
        talk.exchange();
        assert_eq!(talk.rig.events(), [frame("hello")]);
        assert_eq!(talk.heard(), packet2("hello"));
        talk.rig.pass(secs(119));
        assert!(talk.rig.is_open(), "and the whole idle timeout is left");
        talk.rig.pass(secs(1));
        assert_eq!(talk.rig.machine.state(), State::Closing);
    }
}

#[test]
fn timers_run_in_the_handshake() {
    let mut talk = Talk::plain(&TLS13, limits());
    talk.rig.act(|turn| turn.set_timer(1, secs(3)));
    talk.ask();
    talk.rig.act(|turn| turn.set_timer(2, secs(4)));
    talk.rig.pass(secs(5));
    assert_eq!(talk.rig.events(), [Seen::Timer(1), Seen::Timer(2)]);
    assert_eq!(talk.rig.machine.state(), State::Handshaking);
    talk.exchange();
    assert_eq!(talk.rig.machine.state(), State::Open);
}

/// A drain is reported at once, and waits briefly for the end of the handshake.
#[test]
fn a_drain_in_the_handshake() {
    for goes_on in [true, false] {
        let mut talk = Talk::plain(&TLS13, limits());
        talk.ask();
        talk.rig.machine.drain(talk.rig.now.after(secs(1)));
        talk.rig.turn();
        assert_eq!(talk.rig.events(), [Seen::Drain]);
        if goes_on {
            talk.say(&packet2("last"));
            talk.exchange();
            assert_eq!(
                talk.heard(),
                packet2("last"),
                "what has arrived is answered"
            );
            assert!(talk.goodbye);
            assert_eq!(talk.rig.finish(), CloseReason::Drained);
        } else {
            talk.rig.pass(secs(1));
            assert_eq!(talk.rig.ended(), CloseReason::HandshakeTimeout);
        }
    }
}

/// An empty kernel buffer counts only behind the handshake.
#[test]
fn frames_behind_the_handshake_are_answered_before_the_end() {
    let mut talk = Talk::plain(&TLS13, limits());
    talk.ask();
    talk.rig.machine.close_after_input();
    talk.rig.turn();
    let hello = talk.client_bytes();
    talk.rig.receive(hello);
    let answers = talk.rig.answers();
    talk.hear(&answers);
    let finished = talk.client_bytes();
    talk.say(&packet2("last"));
    let last = talk.client_bytes();
    talk.rig.inbox.extend([finished, last].map(Input::Bytes));
    talk.exchange();
    assert_eq!(talk.heard(), packet2("last"));
    assert_eq!(talk.rig.finish(), CloseReason::Closed);
}

/// An incomplete frame does not go on in the new stream, and the framing may change.
#[test]
fn the_framing_begins_anew() {
    let identity = Identity::new();
    let config = TlsConfig::from(identity.server());
    let script: Script = Box::new(move |turn, event| match event {
        Seen::Frame(payload) if payload == b"starttls" => {
            turn.machine.set_framing(&Framing::Line);
            Ok(start_tls(turn, &config)?)
        }
        event => echo(turn, event),
    });
    let mut talk = Talk::plain_with(identity.client(&TLS12), limits(), script);
    talk.rig.receive(packet2("starttls"));
    talk.say(b"a line\n");
    talk.exchange();
    assert_eq!(
        talk.rig.events()[..3],
        [frame("starttls"), Seen::Secured, frame("a line\n")]
    );
    assert_eq!(talk.heard(), b"a line\n");
}

/// What no handshake contains by chance.
const END: &[u8] = b"<the end>";

/// Frames that end with [`END`]. Notes how far it has scanned the input.
#[derive(Default)]
struct Scanning {
    scanned: usize,
}

impl Framer for Scanning {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        let new = input.get(self.scanned..).expect("as long as before");
        let Some(at) = new.windows(END.len()).position(|piece| piece == END) else {
            self.scanned = (input.len() + 1).saturating_sub(END.len());
            return Ok(Decoded::More);
        };
        let end = std::mem::take(&mut self.scanned) + at;
        Ok(Decoded::Frame {
            payload: 0..end,
            consumed: end + END.len(),
        })
    }

    fn trailer(&mut self, out: &mut FrameBuf<'_>) {
        out.put(END);
    }
}

/// RFC 3207: knowledge from before the handshake is discarded, a framer's too.
#[test]
fn a_framer_does_not_outlive_the_clear_text() {
    for version in VERSIONS {
        let identity = Identity::new();
        let config = TlsConfig::from(identity.server());
        let mut talk = Talk::plain_with(identity.client(version), limits(), Box::new(echo));
        talk.rig = Rig::open_with(&Framing::custom(Scanning::default), limits(), echo);
        // The handshake's first bytes are scanned before the handler upgrades.
        let hello = talk.client_bytes();
        talk.rig.receive(hello);
        talk.rig.act(|turn| start_tls(turn, &config).expect("open"));
        talk.exchange();
        let words = [b"one", END, b"two", END].concat();
        talk.say(&words);
        talk.exchange();
        let mut events = talk.rig.events();
        events.retain(|event| *event != Seen::Writable);
        assert_eq!(events, [Seen::Secured, frame("one"), frame("two")]);
        assert_eq!(talk.heard(), words);
    }
}

#[test]
fn no_buffer_is_left() {
    let mut talk = Talk::plain(&TLS13, limits());
    let hello = talk.client_bytes();
    talk.rig.receive([packet2("starttls"), hello].concat());
    let answers = talk.rig.answers();
    talk.hear(&answers[packet2(READY).len()..]);
    talk.exchange();
    assert_eq!(talk.rig.machine.buffered(), 0);
    assert!(!talk.rig.machine.has_stash());
}

/// A ClientHello that comes before the handler upgrades is searched for the end of a line. The
/// lines behind the handshake are searched from their beginning all the same.
#[test]
fn the_framing_begins_anew_behind_the_handshake() {
    let identity = Identity::new();
    let config = TlsConfig::from(identity.server());
    for version in VERSIONS {
        let mut talk = Talk::plain_with(identity.client(version), no_limits(), Box::new(echo));
        talk.rig.machine.set_framing(&Framing::Delimited(0xFE));
        let hello = loop {
            // By chance it contains the delimiter.
            let hello = talk.client_bytes();
            if !hello.contains(&0xFE) {
                break hello;
            }
            talk = Talk::plain_with(identity.client(version), no_limits(), Box::new(echo));
            talk.rig.machine.set_framing(&Framing::Delimited(0xFE));
        };
        talk.rig.receive(hello);
        assert_eq!(talk.rig.events(), []);
        talk.rig
            .act(|turn| start_tls(turn, &config).expect("it is open"));
        let answer = talk.rig.answers();
        talk.hear(&answer);
        talk.exchange();
        assert_eq!(talk.rig.events(), [Seen::Secured]);
        talk.say(b"short\xFE");
        talk.exchange();
        assert_eq!(talk.rig.events(), [frame(b"short\xFE")]);
    }
}
