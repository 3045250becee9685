//! With the client of Eclipse Paho for Python.

use std::process::{Command, Stdio};

use kit::net::{ChildProcess, PATIENCE};

use super::raw::Broker;

const PRELUDE: &str = r##"
import queue, sys, time
import paho.mqtt.client as mqtt
port, patience = int(sys.argv[1]), float(sys.argv[2])
class Client(mqtt.Client):
    """A client on a thread of its own, whose events are waited for."""
    def __init__(self, name, clean=True, will=None, keepalive=60, connect=True):
        super().__init__(name, clean_session=clean)
        self.messages, self.connected, self.gone, self.done = (queue.Queue() for _ in range(4))
        self.on_message = lambda _, __, message: self.messages.put(message)
        self.on_connect = lambda _, __, flags, code: self.connected.put((flags["session present"], code))
        self.on_disconnect = lambda _, __, code: self.gone.put(code)
        self.on_subscribe = lambda _, __, ___, granted: self.done.put(granted)
        if will:
            self.will_set(*will)
        self.connect("127.0.0.1", port, keepalive)
        self.loop_start()
        self.present, code = self.connected.get(timeout=patience)
        assert code == 0, code
    def ask(self, *filters):
        self.subscribe(list(filters))
        return self.done.get(timeout=patience)
    def tell(self, topic, payload, qos=1, retain=False):
        info = self.publish(topic, payload, qos, retain)
        info.wait_for_publish(patience)
        assert info.is_published()
    def hear(self):
        message = self.messages.get(timeout=patience)
        return message.topic, message.payload.decode(), message.qos, bool(message.retain)
    def leave(self):
        self.disconnect()
        self.gone.get(timeout=patience)
        self.loop_stop()
def equal(left, right):
    assert left == right, (left, right)
"##;

/// The Python that has paho: Debian's, if another one comes first.
fn python() -> Option<&'static str> {
    let has_paho = |python: &&str| {
        let mut command = Command::new(python);
        command
            .args(["-c", "import paho.mqtt.client"])
            .stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let found = ["python3", "/usr/bin/python3"].into_iter().find(has_paho);
    if found.is_none() {
        assert!(
            std::env::var_os("CI").is_none(),
            "CI needs python3-paho-mqtt for this test"
        );
        eprintln!("SKIPPED: python3-paho-mqtt is not installed, this test did not run");
    }
    found
}

#[track_caller]
fn run(script: &str) {
    let Some(python) = python() else { return };
    let broker = Broker::start(&[]);
    let mut command = Command::new(python);
    command
        .args(["-c", &format!("{PRELUDE}{script}")])
        .args([broker.port(), PATIENCE.as_secs().to_string()]);
    let (status, out, err) = ChildProcess::start(&mut command).finish();
    assert!(status.success(), "{out}{err}");
    broker.finish("published");
}

#[test]
fn messages_retained_and_live_match_filters() {
    run(r##"
publisher = Client("publisher")
publisher.tell("a/b", "kept", qos=1, retain=True)
publisher.tell("$internal", "hidden", qos=1, retain=True)
client = Client("client")
equal(client.ask(("a/+", 0), ("#", 1), ("b/#", 2)), (0, 1, 1))
# From both filters that match it.
retained = sorted([client.hear(), client.hear()])
equal(retained, [("a/b", "kept", 0, True), ("a/b", "kept", 1, True)])
for sent, expected in [(0, 0), (1, 1), (2, 1)]:
    publisher.tell("b", f"with {sent}", qos=sent)
    equal(client.hear(), ("b", f"with {sent}", expected, False))
    publisher.tell("a/b", "", qos=sent, retain=True)
    equal(client.hear(), ("a/b", "", expected, False))
client.unsubscribe("#")
publisher.tell("c", "unheard")
publisher.tell("b/c", "heard")
while client.hear()[1] != "heard":
    pass
large = "x" * 200000
publisher.tell("b", large)
equal(client.hear()[1], large)
for number in range(1000):
    publisher.publish("b", str(number), 1)
for number in range(1000):
    equal(client.hear()[1], str(number))
client.leave()
publisher.leave()
"##);
}

#[test]
fn sessions_are_kept_and_taken_over() {
    run(r##"
publisher = Client("publisher")
client = Client("client", clean=False)
assert not client.present
client.ask(("t", 1))
client.leave()
for number in range(40):
    publisher.tell("t", str(number), qos=1 + number % 2)
    publisher.tell("t", "not kept", qos=0)
client = Client("client", clean=False)
assert client.present
for number in range(40):
    equal(client.hear(), ("t", str(number), 1, False))
# The earlier connection hears no goodbye, and must not connect again by itself.
client.reconnect_delay_set(1000, 1000)
later = Client("client", clean=False)
assert later.present
assert client.gone.get(timeout=patience) != 0
publisher.tell("t", "for the later")
# What was not acknowledged comes again.
while later.hear()[1] != "for the later":
    pass
assert client.messages.empty()
later.leave()
fresh = Client("client")
assert not fresh.present
publisher.tell("t", "not subscribed")
fresh.ask(("u", 1))
publisher.tell("u", "subscribed")
equal(fresh.hear()[1], "subscribed")
fresh.leave()
publisher.leave()
"##);
}

/// A client that is silent for longer than it has announced; another one that pings in time.
#[test]
fn wills_and_keep_alive() {
    run(r##"
watcher = Client("watcher")
watcher.ask(("will/#", 1))
pings = Client("pings", will=("will/pings", "never", 1), keepalive=2)
cut = Client("cut", will=("will/cut", "cut", 1, True))
cut.loop_stop()
cut.socket().close()
equal(watcher.hear(), ("will/cut", "cut", 1, False))
silent = Client("silent", will=("will/silent", "silent", 0), keepalive=1)
# Its loop sends the pings.
silent.loop_stop()
equal(watcher.hear(), ("will/silent", "silent", 0, False))
pings.tell("will/live", "still there")
equal(watcher.hear()[1], "still there")
pings.leave()
late = Client("late")
late.ask(("will/#", 1))
equal(late.hear(), ("will/cut", "cut", 1, True))
late.leave()
watcher.tell("will/last", "last")
equal(watcher.hear()[1], "last")
watcher.leave()
"##);
}
