//! Keys that are worn out: TLS 1.3 changes them, TLS 1.2 ends in order.

use super::*;

/// The same suites, whose keys are worn out after this number of records.
fn with_limited_keys(records: u64) -> CryptoProvider {
    use rustls::crypto::CipherSuiteCommon;
    use rustls::{SupportedCipherSuite, Tls12CipherSuite, Tls13CipherSuite};

    let mut provider = (*provider()).clone();
    for suite in &mut provider.cipher_suites {
        let common = |common: &CipherSuiteCommon| CipherSuiteCommon {
            suite: common.suite,
            hash_provider: common.hash_provider,
            confidentiality_limit: records,
        };
        *suite = match *suite {
            SupportedCipherSuite::Tls12(suite) => {
                SupportedCipherSuite::Tls12(Box::leak(Box::new(Tls12CipherSuite {
                    common: common(&suite.common),
                    prf_provider: suite.prf_provider,
                    kx: suite.kx,
                    sign: suite.sign,
                    aead_alg: suite.aead_alg,
                })))
            }
            SupportedCipherSuite::Tls13(suite) => {
                SupportedCipherSuite::Tls13(Box::leak(Box::new(Tls13CipherSuite {
                    common: common(&suite.common),
                    hkdf_provider: suite.hkdf_provider,
                    aead_alg: suite.aead_alg,
                    quic: suite.quic,
                })))
            }
        };
    }
    provider
}

/// A server whose keys are worn out after 24 records.
fn short_lived(identity: &Identity) -> ServerConfig {
    ServerConfig::builder_with_provider(Arc::new(with_limited_keys(24)))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())
        .expect("server")
}

/// The client has `heard` a part of all output, and its end. The reason is that keys are worn out.
#[track_caller]
fn ends_worn_out(talk: &mut Talk, heard: &[u8], all: &[u8]) {
    assert!(heard.len() < all.len() && all.starts_with(heard));
    assert!(talk.goodbye && talk.rig.fin, "close_notify and FIN");
    talk.rig.receive_fin();
    let closed = talk.rig.machine.take_closed();
    assert_eq!(closed.reason, CloseReason::Tls);
    assert!(closed.to_string().contains("worn out"), "{closed}");
}

/// TLS 1.2 cannot change its keys: once they are worn out the connection closes in order, and says
/// so. TLS 1.3 changes them and goes on.
#[test]
fn worn_out_keys_end_in_order() {
    for version in VERSIONS {
        for closes in [false, true] {
            let identity = Identity::new();
            let server = short_lived(&identity);
            let script = move |turn: &mut Turn<'_>, event: &Seen| {
                echo(turn, event)?;
                if closes && *event == frame("last") {
                    turn.close();
                }
                Ok(())
            };
            let client = identity.client(version);
            let mut talk = Talk::with(server, client, limits(), Box::new(script));
            talk.exchange();
            let mut answered = 0;
            for number in 0..100 {
                let is_last = closes && number == 22;
                talk.say(&packet2(if is_last { "last" } else { "more" }));
                talk.exchange();
                answered += usize::from(!talk.heard().is_empty());
                if talk.goodbye || is_last {
                    break;
                }
            }
            if version == &TLS13 {
                assert_eq!(answered, if closes { 23 } else { 100 });
                continue;
            }
            assert!(answered >= 20, "{answered}");
            assert!(talk.goodbye && talk.rig.fin, "close_notify and FIN");
            if !closes {
                assert!(talk.rig.gone.is_none(), "it lingers");
            }
            talk.rig.receive_fin();
            let closed = talk.rig.machine.take_closed();
            if closes {
                assert_eq!(closed.reason, CloseReason::Closed);
                continue;
            }
            assert_eq!(closed.reason, CloseReason::Tls);
            assert!(closed.to_string().contains("worn out"), "{closed}");
        }
    }
}

/// Of a frame during which the keys wear out, nothing stays in the queue of a closing connection.
#[test]
fn worn_out_keys_under_a_large_frame_end_in_order() {
    for version in VERSIONS {
        let identity = Identity::new();
        let (server, client) = (short_lived(&identity), identity.client(version));
        let mut talk = Talk::with(server, client, limits(), Box::new(echo));
        talk.exchange();
        let (mut sent, mut heard) = (0, Vec::new());
        while sent < 10 && talk.rig.is_open() {
            let rig = &mut talk.rig;
            let chunks = &mut [Chunk::Borrowed(&[7; 60_000])];
            let frame = rig.machine.frame(chunks, 8, rig.now, &mut rig.pool);
            let mut frame = frame.expect("it is open");
            frame.taken = rig.machine.encrypt_frame(&frame, rig.now, &mut rig.pool);
            assert_eq!(frame.taken > 0, rig.is_open());
            rig.machine.queue_frame(frame, rig.now, &mut rig.pool);
            sent += 1;
            talk.exchange();
            heard.extend(talk.heard());
        }
        let all = packet2([7; 60_000]).repeat(sent);
        if version == &TLS13 {
            assert!(sent == 10 && heard == all);
            continue;
        }
        assert!((3..7).contains(&sent), "{sent}");
        assert_eq!(talk.rig.machine.queued(), 0);
        ends_worn_out(&mut talk, &heard, &all);
    }
}

/// A close promises that pending output is sent. Where the keys wear out before, the reason says
/// that output is lost.
#[test]
fn worn_out_keys_behind_a_close_are_the_reason() {
    let identity = Identity::new();
    let (server, client) = (short_lived(&identity), identity.client(&TLS12));
    let mut talk = Talk::with(server, client, no_limits(), Box::new(silent));
    talk.exchange();
    let all = packet2([7; 60_000]).repeat(10);
    talk.rig.act(|turn| {
        for _ in 0..10 {
            turn.send(&[7; 60_000]).expect("room");
        }
        turn.close();
    });
    talk.exchange();
    let heard = talk.heard();
    ends_worn_out(&mut talk, &heard, &all);
}

/// Plaintext of one full record.
const RECORD: usize = 16 * 1024;

/// A detached connection says that its output is lost, each time, and still sends close_notify.
#[test]
fn worn_out_keys_of_a_detached_connection() {
    let identity = Identity::new();
    let server = short_lived(&identity);
    let client = identity.client(&TLS12);
    let mut talk = Talk::with(server, client, limits(), Box::new(silent));
    talk.exchange();
    assert!(talk.rig.machine.begin_detach());
    let mut detached = talk.rig.machine.detach(&mut talk.rig.pool);
    let mut write = |bytes: &[u8]| {
        detached.send(bytes);
        let wire = detached.transmit().to_vec();
        detached.sent(wire.len());
        talk.hear(&wire);
        detached.has_lost_output()
    };
    let written = (0..100).take_while(|_| !write(b"more")).count();
    assert!((20..24).contains(&written), "{written}");
    assert!(write(b"again") && write(b"and again"));
    assert_eq!(talk.heard().len(), written * 4);
    assert!(talk.goodbye);

    // Of output of four records at once those are sent that the keys allow.
    for left in 0..4 {
        let client = identity.client(&TLS12);
        let mut talk = Talk::with(short_lived(&identity), client, limits(), Box::new(silent));
        talk.exchange();
        assert!(talk.rig.machine.begin_detach());
        let mut detached = talk.rig.machine.detach(&mut talk.rig.pool);
        let short = vec![&b"more"[..]; written - left];
        for bytes in short.into_iter().chain([&[7; 4 * RECORD][..]]) {
            detached.send(bytes);
            let wire = detached.transmit().to_vec();
            detached.sent(wire.len());
            talk.hear(&wire);
        }
        assert!(detached.has_lost_output());
        assert_eq!(talk.heard().len(), (written - left) * 4 + left * RECORD);
        assert!(talk.goodbye);
    }
}
