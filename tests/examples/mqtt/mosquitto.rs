//! With the clients of mosquitto.

use std::io::Write;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use kit::net::{have, ChildProcess};

use super::raw::{publish_packet, Broker, Raw};

fn have_clients() -> bool {
    have("mosquitto_pub", "--help") && have("mosquitto_sub", "--help")
}

/// A mosquitto_sub, which has a topic of its own too.
struct Subscriber {
    child: ChildProcess,
    own: String,
}

impl Subscriber {
    /// One that is about to subscribe.
    fn start(broker: &Broker, options: &[&str]) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let own = format!("own {}", NEXT.fetch_add(1, Ordering::Relaxed));
        let mut command = Command::new("mosquitto_sub");
        command.args(["-p", &broker.port(), "-V", "mqttv311", "-t", &own]);
        let child = ChildProcess::start(command.args(options));
        Self { child, own }
    }

    /// One that has subscribed.
    #[track_caller]
    fn ready(broker: &Broker, options: &[&str]) -> Self {
        let subscriber = Self::start(broker, options);
        // It is printed when it has come, and that is after SUBACK.
        broker.client("").publish(&subscriber.own, "ready", true);
        assert!(subscriber.line().contains("ready"));
        subscriber
    }

    #[track_caller]
    fn line(&self) -> String {
        self.child.line()
    }

    /// Nothing else has come.
    #[track_caller]
    fn finish(self, broker: &Broker) {
        broker.client("").publish(&self.own, "end", false);
        let line = self.line();
        assert!(line.contains("end"), "{line}");
    }
}

#[track_caller]
fn publish(broker: &Broker, options: &[&str]) {
    let mut command = Command::new("mosquitto_pub");
    command
        .args(["-p", &broker.port(), "-V", "mqttv311"])
        .args(options);
    let (status, out, err) = ChildProcess::start(&mut command).finish();
    assert!(status.success(), "{options:?}: {out}{err}");
}

#[test]
fn messages_of_each_qos_reach_subscribers() {
    if !have_clients() {
        return;
    }
    let broker = Broker::start(&[]);
    for qos in ["0", "1", "2"] {
        let all = Subscriber::ready(&broker, &["-t", "house/#", "-q", qos, "-F", "%t %q %p"]);
        let some = Subscriber::ready(&broker, &["-t", "house/+/light", "-q", qos]);
        for sent in ["0", "1", "2"] {
            let most = qos.min(sent).min("1");
            publish(&broker, &["-t", "house/hall/light", "-m", "on", "-q", sent]);
            assert_eq!(all.line(), format!("house/hall/light {most} on"));
            assert_eq!(some.line(), "on");
            publish(&broker, &["-t", "house/hall", "-m", "open", "-q", sent]);
            assert_eq!(all.line(), format!("house/hall {most} open"));
        }
        publish(&broker, &["-t", "house/hall", "-n", "-q", "1"]);
        assert_eq!(all.line(), format!("house/hall {} ", qos.min("1")));
        some.finish(&broker);
        all.finish(&broker);
    }
    broker.finish("published");
}

#[test]
fn retained_messages_reach_later_subscribers() {
    if !have_clients() {
        return;
    }
    let broker = Broker::start(&[]);
    publish(&broker, &["-t", "a", "-m", "one", "-r", "-q", "1"]);
    publish(&broker, &["-t", "b", "-m", "two", "-r", "-q", "1"]);
    let subscriber = Subscriber::start(&broker, &["-t", "+", "-q", "1", "-F", "%t %r %p"]);
    assert_eq!(
        [subscriber.line(), subscriber.line()],
        ["a 1 one", "b 1 two"]
    );
    publish(&broker, &["-t", "a", "-m", "three", "-r"]);
    assert_eq!(subscriber.line(), "a 0 three");
    publish(&broker, &["-t", "a", "-r", "-n"]);
    assert_eq!(subscriber.line(), "a 0 ");
    subscriber.finish(&broker);
    broker.finish("published");
}

/// A process that is killed has said no goodbye.
#[test]
fn a_killed_client_has_a_will() {
    if !have_clients() {
        return;
    }
    let broker = Broker::start(&[]);
    let watcher = Subscriber::ready(&broker, &["-t", "will", "-q", "1"]);
    let will = [
        "--will-topic",
        "will",
        "--will-payload",
        "killed",
        "--will-qos",
        "1",
    ];
    let client = Subscriber::ready(&broker, &will);
    client.child.signal("KILL");
    assert_eq!(watcher.line(), "killed");
    // This one says goodbye after its first message.
    let polite = Subscriber::ready(&broker, &[&will[..], &["-C", "1"]].concat());
    assert!(polite.child.finish().0.success());
    watcher.finish(&broker);
    broker.finish("published");
}

#[test]
fn a_kept_session_waits_for_its_client() {
    if !have_clients() {
        return;
    }
    let broker = Broker::start(&[]);
    let kept = ["-t", "kept", "-q", "1", "-c", "-i", "sleeper"];
    // It leaves after its first message.
    let client = Subscriber::ready(&broker, &[&kept[..], &["-C", "1"]].concat());
    let (status, _, _) = client.child.finish();
    assert!(status.success());
    let mut publisher = broker.client("publisher");
    for number in 0..500 {
        publisher.publish("kept", &number.to_string(), false);
    }
    let client = Subscriber::start(&broker, &kept);
    for number in 0..500 {
        assert_eq!(client.line(), number.to_string());
    }
    client.finish(&broker);
    broker.finish("published");
}

/// A publisher that sends each line of its standard input, as fast as it can. It may not end by
/// itself: mosquitto_pub 2.0.11 sometimes waits for its own thread until the keep alive.
fn flood(broker: &Broker, topic: &str, qos: &str, lines: &str) -> ChildProcess {
    let mut command = Command::new("mosquitto_pub");
    command.args(["-p", &broker.port(), "-t", topic, "-q", qos, "-l"]);
    let (child, mut input) = ChildProcess::interactive(&mut command);
    // Short enough for the pipe.
    input.write_all(lines.as_bytes()).expect("written");
    child
}

/// All at once, to one subscriber.
#[test]
fn no_message_of_many_publishers_is_lost() {
    if !have_clients() {
        return;
    }
    const MESSAGES: usize = 4800;
    for qos in ["0", "1"] {
        let broker = Broker::start(&[]);
        for publishers in [1, 20, 80] {
            let subscriber = Subscriber::ready(&broker, &["-t", "from/#", "-q", qos]);
            let running: Vec<_> = (0..publishers)
                .map(|publisher| {
                    let numbers = 0..MESSAGES / publishers;
                    let lines: String = numbers
                        .map(|number| format!("{publisher} {number}\n"))
                        .collect();
                    flood(&broker, &format!("from/{publisher}"), qos, &lines)
                })
                .collect();
            // In the order of each publisher.
            let mut next = vec![0; publishers];
            for _ in 0..MESSAGES {
                let line = subscriber.line();
                let (publisher, number) = line.split_once(' ').expect("two numbers");
                let next = &mut next[publisher.parse::<usize>().expect("a number")];
                assert_eq!(number, next.to_string(), "of {publisher}");
                *next += 1;
            }
            subscriber.finish(&broker);
            drop(running);
        }
        assert_eq!(broker.finish("congested"), 0);
    }
}

/// Four megabytes, which is more than may be pending for a connection.
#[test]
fn a_new_subscriber_gets_4000_retained_messages() {
    if !have_clients() {
        return;
    }
    const MESSAGES: usize = 4000;
    let broker = Broker::start(&[]);
    let mut publisher: Raw = broker.client("publisher");
    let filler = "x".repeat(1000);
    for number in 0..MESSAGES {
        let (topic, payload) = (format!("kept/{number:04}"), format!("{number} {filler}"));
        publisher.send(&publish_packet(3, &topic, 1, payload.as_bytes()));
    }
    for _ in 0..MESSAGES {
        publisher.expect(&[0x40, 2, 0, 1]);
    }
    for qos in ["0", "1"] {
        let subscriber = Subscriber::start(&broker, &["-t", "kept/#", "-q", qos]);
        for number in 0..MESSAGES {
            assert_eq!(subscriber.line(), format!("{number} {filler}"), "QoS {qos}");
        }
        subscriber.finish(&broker);
    }
    assert_eq!(broker.finish("overflowed"), 0);
}

#[cfg(all(feature = "tls", any(feature = "ring", feature = "aws-lc-rs")))]
#[test]
fn clients_are_served_over_tls() {
    use kit::tls::{Folder, Site};
    if !have_clients() {
        return;
    }
    let (site, folder) = (Site::new(), Folder::new());
    let file = |name: &str, text: &str| {
        let path = folder.file(name, text);
        path.to_str().expect("text").to_owned()
    };
    let chain = file("chain.pem", &site.identity.chain_pem);
    let key = file("key.pem", &site.identity.key_pem);
    let authority = file("ca.pem", &site.authority.certificate.pem());
    let broker = Broker::start(&["--tls-cert", &chain, "--tls-key", &key]);
    // The certificate's name is not that of the address.
    let tls = ["--cafile", &authority, "--insecure"];
    publish(
        &broker,
        &[&tls[..], &["-t", "secret", "-m", "hi", "-r", "-q", "1"]].concat(),
    );
    let once = ["-t", "secret", "-q", "1", "-C", "1"];
    let subscriber = Subscriber::start(&broker, &[&tls[..], &once].concat());
    let (status, out, err) = subscriber.child.finish();
    assert!(status.success(), "{err}");
    assert_eq!(out, "hi\n");
    broker.finish("published");
}
