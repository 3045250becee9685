//! The TLS handshake: pieces of any size, its outcome, its failures, and its limits.

use rustls::server::WebPkiClientVerifier;
use rustls::AlertDescription;

use super::*;

/// Pieces of any size, also single bytes.
#[test]
fn both_versions_in_pieces_of_any_size() {
    for version in VERSIONS {
        for cut in [1, 7, 1000, usize::MAX] {
            let mut talk = Talk::new(version, Box::new(echo));
            talk.cut = cut;
            talk.exchange();
            talk.say(&[packet2("one"), packet2(""), packet2("three")].concat());
            talk.exchange();
            assert_eq!(
                talk.heard(),
                [packet2("one"), packet2(""), packet2("three")].concat()
            );
            assert_eq!(
                talk.rig.events(),
                [Seen::Opened, frame("one"), frame(""), frame("three")],
                "{version:?}, {cut}"
            );
            assert!(!talk.client.is_handshaking());
            assert_eq!(
                talk.rig.machine.buffered(),
                0,
                "an idle session holds nothing"
            );
        }
    }
}

/// The last handshake message, a frame and close_notify in one read.
#[test]
fn everything_at_once() {
    let mut talk = Talk::new(&TLS13, Box::new(echo));
    let hello = talk.client_bytes();
    talk.rig.receive(hello);
    let answer = talk.rig.answers();
    talk.hear(&answer);
    talk.say(&packet2("with the handshake's end"));
    talk.client.send_close_notify();
    let wire = talk.client_bytes();
    talk.rig.receive(wire);
    let mut event = talk.rig.events();
    // The session tickets in front of the answer reach these tests' small watermark.
    event.retain(|event| *event != Seen::Writable);
    assert_eq!(
        event,
        [
            Seen::Opened,
            frame("with the handshake's end"),
            Seen::Finished
        ]
    );
    let answer = talk.rig.answers();
    talk.hear(&answer);
    assert_eq!(talk.heard(), packet2("with the handshake's end"));
    assert!(talk.goodbye);
    assert_eq!(talk.rig.finish(), CloseReason::Finished);
}

#[test]
fn the_outcome_is_reported() {
    for version in VERSIONS {
        let identity = Identity::new();
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&identity.roots), provider())
                .build()
                .expect("a verifier");
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_client_cert_verifier(verifier)
            .with_single_cert(identity.chain.clone(), identity.key.clone_key())
            .expect("server");
        server.alpn_protocols = vec![b"mqtt".to_vec(), b"echo".to_vec()];
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[version])
            .expect("versions")
            .with_root_certificates(Arc::clone(&identity.roots))
            .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())
            .expect("client");
        client.alpn_protocols = vec![b"echo".to_vec()];
        let mut talk = Talk::with(server, client, limits(), Box::new(echo));
        talk.exchange();
        let info = talk.rig.machine.tls().expect("TLS");
        assert_eq!(info.server_name(), Some("localhost"));
        assert_eq!(info.alpn_protocol(), Some(b"echo".as_slice()));
        assert_eq!(info.peer_certificates(), Some(&identity.chain[..]));
        assert_eq!(info.protocol_version(), Some(version.version));
        assert_eq!(
            info.negotiated_cipher_suite(),
            talk.client.negotiated_cipher_suite()
        );
        assert!(format!("{info:?}").contains("localhost"));
        talk.say(&packet2("x"));
        talk.exchange();
        assert_eq!(talk.heard(), packet2("x"));
        let memory = talk.rig.machine.memory().own;
        assert!(
            memory >= identity.chain[0].len(),
            "the chain is kept and counted"
        );
        let over = Closed::new(CloseReason::OverMemory);
        talk.rig.machine.reset(over, &mut talk.rig.pool);
        assert_eq!(
            talk.rig.machine.memory().own,
            0,
            "it stays for `on_close`, and no longer"
        );
    }
}

/// Behind a PROXY header the service is asked while the handshake timeout runs: the time in which it
/// blocks does not count.
#[test]
fn a_service_that_blocks_takes_nothing_from_the_handshake() {
    let tls = TlsConfig::from(Identity::new().server());
    let mut rig = Rig::accepted(&Framing::Packet2, limits(), Some(&tls), Box::new(echo));
    rig.machine.await_header(true);
    rig.receive(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n");
    assert_eq!(rig.events(), [Seen::Header]);
    rig.now = rig.now.after(secs(9));
    rig.machine.extend_handshake(secs(9));
    rig.machine.handle_admitted(rig.now);
    let left = rig.machine.time_left(rig.now);
    assert_eq!(left.handshake, Some(secs(10)));
}

#[test]
fn other_protocols_are_named() {
    let not_tls: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        &[0; 64],
        b"\x00\x05hello",
        b"SSH-2.0-OpenSSH_9.9\r\n",
    ];
    for bytes in not_tls {
        for cut in [1, bytes.len()] {
            let mut talk = Talk::new(&TLS13, Box::new(echo));
            for piece in bytes.chunks(cut) {
                talk.rig.receive(piece);
            }
            if talk.rig.gone.is_none() && !talk.rig.fin {
                talk.rig.receive_fin();
            }
            assert_eq!(talk.rig.events(), []);
            assert!(!talk.rig.machine.was_open());
            if talk.rig.gone.is_none() {
                talk.rig.receive_fin();
            }
            assert_eq!(talk.rig.ended(), CloseReason::NotTls, "{bytes:?}");
        }
    }
}

/// A byte of another protocol, and then silence.
#[test]
fn another_protocol_that_never_ends_is_named() {
    let mut talk = Talk::new(&TLS13, Box::new(echo));
    talk.rig.receive("G");
    talk.rig.pass(secs(10));
    assert_eq!(talk.rig.ended(), CloseReason::NotTls);
}

/// The alert of a failed handshake is no promised output: losing it is not the reason.
#[test]
fn a_lost_alert_is_not_the_reason() {
    for write_fails in [true, false] {
        let mut talk = Talk::new(&TLS13, Box::new(echo));
        talk.rig.room = 0;
        if write_fails {
            talk.rig.write_error = Some(libc::EPIPE);
        }
        talk.rig.receive("GET / HTTP/1.1\r\n\r\n");
        talk.rig.pass(secs(20));
        assert!(talk.rig.gone.is_some());
        assert_eq!(talk.rig.machine.take_closed().reason, CloseReason::NotTls);
    }
}

#[test]
fn an_alert_or_application_data_first() {
    for record in [
        &[21, 3, 3, 0, 2, 2, 40][..],
        &[23, 3, 3, 0, 2, 1, 2],
        &[24, 3, 3, 0, 2, 1, 2],
    ] {
        let mut talk = Talk::new(&TLS13, Box::new(echo));
        talk.rig.receive(record);
        assert_eq!(talk.rig.events(), []);
        assert_eq!(talk.rig.finish(), CloseReason::TlsHandshake);
    }
}

/// Nothing, half a ClientHello, or half a handshake: the deadline is the same.
#[test]
fn the_handshake_deadline_is_from_accept() {
    for part in 0..3 {
        let mut talk = Talk::new(&TLS13, Box::new(echo));
        let hello = talk.client_bytes();
        talk.rig.pass(secs(9));
        match part {
            0 => {}
            1 => talk.rig.receive(&hello[..hello.len() / 2]),
            _ => talk.rig.receive(&hello),
        }
        assert_eq!(talk.rig.machine.state(), State::Handshaking);
        talk.rig.pass(secs(1));
        assert_eq!(talk.rig.ended(), CloseReason::HandshakeTimeout);
        assert_eq!(talk.rig.machine.buffered(), 0);
    }
}

#[test]
fn the_peer_leaves_during_the_handshake() {
    for part in 0..3 {
        let mut talk = Talk::new(&TLS13, Box::new(echo));
        let hello = talk.client_bytes();
        match part {
            0 => {}
            1 => talk.rig.receive(&hello[..hello.len() / 2]),
            _ => talk.rig.receive(&hello),
        }
        talk.rig.receive_fin();
        assert_eq!(talk.rig.events(), []);
        assert_eq!(talk.rig.ended(), CloseReason::TlsHandshake);
    }
    let mut talk = Talk::new(&TLS13, Box::new(echo));
    let hello = talk.client_bytes();
    talk.rig.receive(&hello);
    talk.rig.inbox.push_back(Input::Error(libc::ECONNRESET));
    talk.rig.turn();
    assert_eq!(talk.rig.ended(), CloseReason::Reset);
}

/// A close during the handshake sends no close_notify, and does not panic.
#[test]
fn closed_by_us_during_the_handshake() {
    for flight in [false, true] {
        let mut talk = Talk::new(&TLS13, Box::new(echo));
        if flight {
            let hello = talk.client_bytes();
            talk.rig.receive(&hello);
        }
        let now = talk.rig.now;
        talk.rig
            .machine
            .close(Closed::new(CloseReason::Killed), now, &mut talk.rig.pool);
        talk.rig.turn();
        assert_eq!(talk.rig.finish(), CloseReason::Killed);
        assert!(!talk.rig.machine.was_open());
    }
}

/// At most 64 KiB and a record are buffered, for any claimed length.
#[test]
fn handshake_messages_are_bounded() {
    for claimed in [0xFF_FFFF_u32, 0xFFFF] {
        let mut talk = Talk::new(&TLS13, Box::new(echo));
        let mut message = vec![1];
        message.extend_from_slice(&claimed.to_be_bytes()[1..]);
        message.resize(256 * 1024, 0);
        let mut fed = 0;
        for fragment in message.chunks(16 * 1024) {
            let mut record = vec![22, 3, 1];
            record.extend_from_slice(&u16::try_from(fragment.len()).expect("fits").to_be_bytes());
            record.extend_from_slice(fragment);
            for piece in record.chunks(1000) {
                talk.rig.receive(piece);
                if talk.rig.machine.state() == State::Closing {
                    break;
                }
                fed += piece.len();
                assert!(talk.rig.machine.buffered() <= 0x1_0000 + 0x4800, "{fed}");
            }
        }
        assert!(fed <= 0x1_0000 + 2 * 0x4800, "{fed}");
        talk.rig.turn();
        talk.rig.pass(secs(2));
        assert_eq!(talk.rig.ended(), CloseReason::TlsHandshake);
        assert_eq!(talk.rig.machine.buffered(), 0);
    }
}

/// A client without a common version is refused with an alert, which arrives.
#[test]
fn nothing_in_common_is_refused_with_an_alert() {
    let identity = Identity::new();
    let server = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())
        .expect("server");
    let mut talk = Talk::with(server, identity.client(&TLS12), limits(), Box::new(echo));
    let hello = talk.client_bytes();
    talk.rig.receive(hello);
    let alert = talk.rig.answers();
    talk.client.read_tls(&mut alert.as_slice()).expect("memory");
    match talk.client.process_new_packets() {
        Err(rustls::Error::AlertReceived(AlertDescription::ProtocolVersion)) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(talk.rig.finish(), CloseReason::TlsHandshake);
}

/// The first message is no ClientHello: rustls' own server sends `unexpected_message`.
#[test]
fn a_first_message_that_is_no_client_hello_is_answered_by_an_alert() {
    let finished = [&[22, 3, 3, 0, 16, 20, 0, 0, 12][..], &[0; 12]].concat();
    for (wire, alert) in [
        (finished, &[21, 3, 3, 0, 2, 2, 10][..]),
        (
            [&[23, 3, 3, 0, 5][..], b"hello"].concat(),
            &[21, 3, 3, 0, 2, 2, 10],
        ),
        (vec![20, 3, 3, 0, 1, 1], &[21, 3, 3, 0, 2, 2, 10]),
        // A ClientHello that is none, and a record that is none.
        (vec![22, 3, 3, 0, 4, 1, 0, 0, 0], &[21, 3, 3, 0, 2, 2, 50]),
        // An alert is not answered.
        (vec![21, 3, 3, 0, 2, 2, 40], &[]),
    ] {
        let mut talk = Talk::new(&TLS13, Box::new(echo));
        talk.rig.receive(&wire);
        assert_eq!(talk.rig.answers(), alert, "{wire:?}");
        talk.rig.receive_fin();
        assert_eq!(talk.rig.ended(), CloseReason::TlsHandshake);
    }
}

/// Behind the ClientHello too, where the headers of short records count.
#[test]
fn handshake_messages_in_short_records_are_bounded() {
    let mut talk = Talk::new(&TLS12, Box::new(echo));
    let hello = talk.client_bytes();
    talk.rig.receive(hello);
    // A ClientKeyExchange.
    let mut message = vec![16, 0, 0xFF, 0xFF];
    message.resize(4 + 0xFFFF, 0);
    for fragments in message.chunks(500) {
        let records = fragments.chunks(5).flat_map(|fragment| {
            let length = u8::try_from(fragment.len()).expect("short");
            [&[22, 3, 3, 0, length], fragment].concat()
        });
        talk.rig.receive(records.collect::<Vec<_>>());
        assert!(talk.rig.machine.buffered() <= 0x1_0000 + 0x4800);
        if talk.rig.machine.state() == State::Closing {
            break;
        }
    }
    talk.rig.receive_fin();
    let closed = talk.rig.machine.take_closed();
    assert_eq!(closed.reason, CloseReason::TlsHandshake);
    assert!(closed.to_string().contains("is too large"), "{closed}");
}

/// The simulator cannot copy a session.
#[test]
fn a_connection_over_tls_is_not_copied() {
    let talk = Talk::open(&TLS13, Box::new(echo));
    assert!(talk.rig.machine.fork().is_none());
}
