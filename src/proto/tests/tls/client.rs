//! Handshakes that fail on the client's side: the end of the connection, and the words of the error.

use rustls::crypto::{GetRandomFailed, SecureRandom};
use rustls::AlertDescription;

use super::*;
use crate::proto::tls::ClientTls;

/// A random generator that is out of order: no handshake can begin.
#[derive(Debug)]
struct NoRandom;

impl SecureRandom for NoRandom {
    fn fill(&self, _: &mut [u8]) -> Result<(), GetRandomFailed> {
        Err(GetRandomFailed)
    }
}

fn without_random() -> ClientTls {
    let mut provider = CryptoProvider::clone(&provider());
    provider.secure_random = &NoRandom;
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(Identity::new().roots)
        .with_no_client_auth();
    ClientTls::new(Arc::new(config), "localhost")
}

fn wanting(name: &str) -> ClientTls {
    ClientTls::new(Arc::new(Identity::new().client(&TLS13)), name)
}

/// An attempt to connect that has succeeded, with output queued before.
fn connected(tls: &ClientTls) -> Rig {
    let mut rig = Rig::accepted(&Framing::Packet2, limits(), None, Box::new(echo));
    rig.machine = Machine::connecting(&Framing::Packet2, Rc::new(limits()), rig.now);
    rig.act(|turn| turn.send(b"secret").expect("queued"));
    rig.machine
        .handle_connected(Some(tls), rig.now, &mut rig.pool);
    rig.turn();
    rig
}

#[test]
fn an_outgoing_connection_ends_if_no_handshake_can_begin() {
    let mut rig = connected(&without_random());
    assert_eq!(rig.answers(), [0; 0], "nothing in the clear");
    assert_eq!(rig.gone, Some(false));
    let closed = rig.machine.take_closed();
    assert_eq!(closed.reason, CloseReason::TlsHandshake);
    let error = closed.error.expect("the error of TLS");
    let error = error.downcast_ref::<rustls::Error>();
    assert_eq!(error, Some(&rustls::Error::FailedToGetRandomBytes));
}

#[test]
fn an_upgrade_ends_the_connection_if_no_handshake_can_begin() {
    let tls = without_random();
    let mut rig = Rig::open(echo);
    rig.act(|turn| {
        let started = turn.machine.start_tls_client(&tls, turn.now, turn.pool);
        assert!(started.is_ok(), "it is open");
        assert!(matches!(turn.send(b"secret"), Err(SendError::Closed)));
    });
    assert_eq!(rig.answers(), [0; 0], "nothing in the clear");
    assert_eq!(rig.ended(), CloseReason::TlsHandshake);
}

#[test]
fn a_name_that_no_certificate_can_be_for_ends_the_handshake() {
    let tls = wanting("no name");
    assert_eq!(format!("{tls:?}"), "for no name");
    let mut rig = connected(&tls);
    assert_eq!(rig.answers(), [0; 0]);
    let closed = rig.machine.take_closed();
    assert_eq!(closed.reason, CloseReason::TlsHandshake);
    let words = "\"no name\" is no name that a certificate can be for";
    assert!(closed.to_string().contains(words), "{closed}");
}

/// The words name the server, and the error of TLS can be matched.
#[test]
fn the_error_of_tls_is_the_source_of_a_failed_handshake() {
    let mut rig = connected(&wanting("localhost"));
    rig.receive([21, 3, 3, 0, 2, 2, 40]);
    rig.receive_fin();
    let closed = rig.machine.take_closed();
    assert_eq!(closed.reason, CloseReason::TlsHandshake);
    let error = closed.error.expect("the error of TLS");
    let words = "(the server wanted was localhost)";
    assert!(error.to_string().ends_with(words), "{error}");
    let source = error.source().and_then(|error| error.downcast_ref());
    let alert = rustls::Error::AlertReceived(AlertDescription::HandshakeFailure);
    assert_eq!(source, Some(&alert));
}
