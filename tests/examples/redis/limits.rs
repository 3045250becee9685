//! The limits of the Redis example: whatever clients send, and however much, others are served.

use std::io::{Read, Write};
use std::net::Shutdown;

use kit::net::{await_end, connect, eventually, read_to_end};

use super::{command, start, terminate, Client};

#[test]
fn a_protocol_error_is_answered_and_harms_no_other_client() {
    let (server, addr) = start(&["--max-command", "1000000"]);
    let mut other = Client::new(addr);
    other.expect(&[("SET k v", "+OK")]);
    let long = "x".repeat(70_000);
    for (bytes, error) in [
        ("*x\r\n", "invalid multibulk length"),
        ("*1048577\r\n", "invalid multibulk length"),
        (
            "*11111111111111111111111111111111111",
            "too big mbulk count string",
        ),
        ("*1\r\nPING\r\n", "expected '$', got 'P'"),
        ("*1\r\n$-1\r\n", "invalid bulk length"),
        ("*1\r\n$+4\r\nPING\r\n", "invalid bulk length"),
        ("*1\r\n$99999999999999999999\r\n", "invalid bulk length"),
        ("*2\r\n$4\r\nECHO\r\n$1000000\r\n", "invalid bulk length"),
        (
            "*1\r\n$44444444444444444444444444444444444",
            "too big bulk count string",
        ),
        (&long, "too big inline request"),
    ] {
        let mut client = Client::new(addr);
        // The command before the error is answered.
        client.send([b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n", bytes.as_bytes()].concat());
        assert_eq!(client.reply(), "v");
        assert_eq!(client.reply(), format!("-ERR Protocol error: {error}"));
        await_end(&mut client.0);
        other.expect(&[("GET k", "v")]);
    }
    drop(other);
    terminate(server);
}

/// However the commands are cut into segments, the replies are the same.
#[test]
fn commands_may_arrive_in_any_pieces() {
    let (server, addr) = start(&[]);
    let wire = [
        &command(&["RPUSH", "l", "a\r\nb", ""])[..],
        b"*0\r\nLLEN l\r\n\r\n*-1\r\n",
        &command(&["LRANGE", "l", "0", "-1"]),
        b"DEL l\nINFO",
        b"\x00 x\r\nQUIT\r\n",
    ]
    .concat();
    let replies = |pieces: &mut dyn Iterator<Item = &[u8]>| {
        let mut client = Client::new(addr);
        pieces.for_each(|piece| client.send(piece));
        String::from_utf8_lossy(&read_to_end(&mut client.0)).into_owned()
    };
    let whole = replies(&mut [&wire[..]].into_iter());
    assert!(
        whole.starts_with(":2\r\n:2\r\n*2\r\n$4\r\na\r\nb\r\n$0\r\n\r\n:1\r\n-ERR"),
        "{whole}"
    );
    for size in [1, 2, 3, 7, 20] {
        assert_eq!(replies(&mut wire.chunks(size)), whole, "pieces of {size}");
    }
    terminate(server);
}

/// Short commands that come together run in one step: each has its reply, in order, up to a command
/// that is broken or ends the connection.
#[test]
fn a_pipeline_is_answered_in_order() {
    let (server, addr) = start(&[]);
    let long: Vec<String> = (0..20).map(|number| format!("k{number}")).collect();
    let long: Vec<&str> = ["MGET"]
        .into_iter()
        .chain(long.iter().map(|key| &**key))
        .collect();
    let value = "v".repeat(20_000);
    for (end, last) in [
        (&b"*1\r\n$4\r\nQUIT\r\n"[..], "+OK\r\n"),
        (
            b"*1\r\n$-4\r\n",
            "-ERR Protocol error: invalid bulk length\r\n",
        ),
    ] {
        let (mut wire, mut expected) = (command(&["FLUSHALL"]), "+OK\r\n".to_owned());
        for number in 1..=300 {
            wire.extend(command(&["INCR", "n"]));
            expected += &format!(":{number}\r\n");
            if number % 70 == 0 {
                wire.extend(command(&["INCR"]));
                expected += "-ERR wrong number of arguments for 'incr' command\r\n";
                wire.extend(command(&long));
                expected += &format!("*20\r\n{}", "$-1\r\n".repeat(20));
                wire.extend(command(&["SET", "large", &value]));
                expected += "+OK\r\n";
                wire.extend(command(&["GET", "large"]));
                expected += &format!("$20000\r\n{value}\r\n");
            }
        }
        wire.extend_from_slice(end);
        expected += last;
        wire.extend(command(&["INCR", "n"]));
        for size in [7, 4096, 16_000, wire.len()] {
            let mut client = Client::new(addr);
            wire.chunks(size).for_each(|piece| client.send(piece));
            let replies = String::from_utf8_lossy(&read_to_end(&mut client.0)).into_owned();
            assert!(replies == expected, "pieces of {size}: {replies}");
            assert_eq!(Client::new(addr).ask("GET n"), "300");
        }
    }
    terminate(server);
}

/// Broken commands and random bytes on 200 connections.
#[test]
fn garbage_harms_no_other_client() {
    let (server, addr) = start(&["--max-command", "100000", "--maxmemory", "1000000"]);
    let mut other = Client::new(addr);
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let names = [
        "SET",
        "LPUSH",
        "MSET",
        "SUBSCRIBE",
        "PSUBSCRIBE",
        "EXPIRE",
        "KEYS",
        "PUBLISH",
    ];
    for round in 0..200 {
        let mut wire = Vec::new();
        for _ in 0..20 {
            let words: Vec<Vec<u8>> = (0..random(4))
                .map(|_| (0..random(40)).map(|_| random(256) as u8).collect())
                .collect();
            let name = names[random(names.len())].as_bytes().to_vec();
            wire.extend(command(&[vec![name], words].concat()));
        }
        for _ in 0..random(4) {
            let at = random(wire.len());
            wire[at] = random(256) as u8;
        }
        let mut stream = connect(addr);
        // The server may have closed the connection already.
        let _ = stream.write_all(&wire);
        let _ = stream.shutdown(Shutdown::Write);
        await_end(&mut stream);
        let words = format!("SET other {round}");
        assert_eq!(other.ask(&words), "+OK");
    }
    eventually("the others have gone", || {
        other.info("connected_clients") == 1
    });
    other.expect(&[
        ("GET other", "199"),
        ("PUBSUB NUMPAT", ":0"),
        ("FLUSHALL", "+OK"),
    ]);
    assert_eq!(other.info("used_memory"), 0);
    drop(other);
    terminate(server);
}

/// A subscriber that does not read is closed and counted. The other one loses nothing.
#[test]
fn a_slow_subscriber_is_closed_at_its_limit() {
    let (server, addr) = start(&["--subscriber-limit", "1000000"]);
    let mut publisher = Client::new(addr);
    let mut slow = Client::new(addr);
    let mut quick = Client::new(addr);
    for subscriber in [&mut slow, &mut quick] {
        assert_eq!(subscriber.ask("SUBSCRIBE news"), "[subscribe news :1]");
    }
    let message = "x".repeat(100_000);
    let publish = format!("PUBLISH news {message}");
    let mut messages = 0;
    while publisher.info("client_output_buffer_limit_disconnections") == 0 {
        assert!(messages < 1000, "the slow subscriber is never closed");
        publisher.ask(&publish);
        assert_eq!(quick.reply(), format!("[message news {message}]"));
        messages += 1;
    }
    assert!(messages > 10, "not below the limit");
    await_end(&mut slow.0);
    eventually("one is left", || publisher.ask("PUBLISH news x") == ":1");
    drop((publisher, slow, quick));
    terminate(server);
}

/// All requests are written before a reply is read, as redis-py does.
#[test]
fn a_pipeline_of_600_000_gets_is_answered() {
    const GETS: usize = 600_000;
    let (server, addr) = start(&[]);
    let mut client = Client::new(addr);
    client.expect(&[("SET k v", "+OK")]);
    client.send(command(&["GET", "k"]).repeat(GETS));
    let mut replies = vec![0; "$1\r\nv\r\n".len() * GETS];
    client.0.read_exact(&mut replies).expect("all replies");
    assert!(replies == b"$1\r\nv\r\n".repeat(GETS));
    client.expect(&[("GET k", "v")]);
    drop(client);
    terminate(server);
}

/// A pipeline with more replies than the limit, and a command that asks for too much at once.
#[test]
fn a_client_is_closed_at_its_output_limit() {
    let (server, addr) = start(&["--output-limit", "1000000"]);
    let mut other = Client::new(addr);
    let value = "v".repeat(100_000);
    assert_eq!(other.ask(&format!("SET k {value}")), "+OK");
    let pipeline = command(&["GET", "k"]).repeat(1000);
    let many = command(&[&["MGET"][..], &["k"; 100_000]].concat());
    for (count, wire) in [(1, pipeline), (2, many)] {
        let mut client = Client::new(addr);
        client.send(wire);
        eventually("the client is closed", || {
            other.info("client_output_buffer_limit_disconnections") == count
        });
        await_end(&mut client.0);
    }
    other.expect(&[("STRLEN k", ":100000")]);
    drop(other);
    terminate(server);
}

#[test]
fn a_client_above_the_limit_is_refused() {
    let (server, addr) = start(&["--max-clients", "1"]);
    let mut client = Client::new(addr);
    client.expect(&[("PING", "+PONG")]);
    let mut refused = Client::new(addr);
    assert_eq!(refused.line(), "-ERR max number of clients reached");
    await_end(&mut refused.0);
    client.expect(&[("PING", "+PONG")]);
    drop(client);
    terminate(server);
}

#[test]
fn stored_bytes_have_a_limit() {
    let (server, addr) = start(&["--maxmemory", "1000000"]);
    let mut client = Client::new(addr);
    let oom = "-OOM command not allowed when used memory > 'maxmemory'.";
    let value = "v".repeat(10_000);
    let mut keys = 0;
    while keys < 100 && client.ask(&format!("SET {keys} {value}")) == "+OK" {
        keys += 1;
    }
    assert!((90..100).contains(&keys), "{keys} keys");
    for words in ["APPEND 0", "LPUSH l", "SUBSCRIBE", "MSET k", "SETNX k"] {
        assert_eq!(client.ask(&format!("{words} {value}")), oom);
    }
    assert!(client.info("used_memory") <= 1_000_000);
    client.expect(&[("STRLEN 0", ":10000"), ("DEL 0 1", ":2"), ("INCR k", ":1")]);
    drop(client);
    terminate(server);
}

/// Neither the room of removed elements, nor what surrounds the names of subscriptions, escapes the
/// account.
#[cfg(target_os = "linux")]
#[test]
fn stored_bytes_are_what_is_counted() {
    let (server, addr) = start(&["--maxmemory", "50000000"]);
    let mut client = Client::new(addr);
    let before = server.peak_memory();
    let items = [""; 50_000];
    for key in 0..10 {
        let key = key.to_string();
        let push = command(&[&["RPUSH", &key][..], &items].concat());
        for round in 1..=7 {
            client.send(&push);
            assert_eq!(client.reply(), format!(":{}", round * items.len()));
        }
        client.expect(&[(&format!("LTRIM {key} 0 0"), "+OK")]);
    }
    client.expect(&[("DBSIZE", ":10")]);
    let grown = server.peak_memory().saturating_sub(before);
    assert!(grown < 75_000_000, "{grown} bytes");

    let (mut subscriber, before) = (Client::new(addr), server.peak_memory());
    client.expect(&[("FLUSHALL", "+OK")]);
    let channels: Vec<_> = (0..1000)
        .map(|number| format!("channel {number:04}"))
        .collect();
    let mut refused = None;
    for round in 0..1000 {
        let names = channels.iter().map(|name| format!("{name} {round:03}"));
        let words: Vec<_> = ["SUBSCRIBE".to_owned()].into_iter().chain(names).collect();
        subscriber.send(command(&words));
        if subscriber.reply().starts_with("-OOM") {
            refused = Some(round);
            break;
        }
        (1..channels.len()).for_each(|_| drop(subscriber.reply()));
    }
    assert!(
        (50..200).contains(&refused.expect("a limit")),
        "{refused:?}"
    );
    let grown = server.peak_memory().saturating_sub(before);
    assert!(grown < 60_000_000, "{grown} bytes");
    drop(subscriber);
    eventually("no subscription counts", || client.info("used_memory") == 0);
    drop(client);
    terminate(server);
}

/// The room of removed keys does not escape the account either.
#[cfg(target_os = "linux")]
#[test]
fn removed_keys_leave_room_for_others() {
    let (server, addr) = start(&["--maxmemory", "50000000"]);
    let mut client = Client::new(addr);
    let before = server.peak_memory();
    let names: Vec<_> = (0..1000).map(|number| format!("{number:03}")).collect();
    let mut fill = |words: &dyn Fn(usize) -> Vec<String>| {
        let commands = (0..).map(|round| command(&words(round)));
        let stored = commands.take_while(|command| {
            client.send(command);
            !client.reply().starts_with("-OOM")
        });
        let stored = stored.count();
        let keys = |round| names.iter().map(move |name| format!("{name} {round}"));
        for round in 0..stored {
            let words = ["DEL".to_owned()].into_iter().chain(keys(round));
            client.send(command(&words.collect::<Vec<_>>()));
            client.reply();
        }
        stored
    };
    let value = |name: &String, round| [format!("{name} {round}"), String::new()];
    let pairs = |round| names.iter().flat_map(move |name| value(name, round));
    let with_keys = |round| {
        ["MSET".to_owned()]
            .into_iter()
            .chain(pairs(round))
            .collect()
    };
    assert!((100..300).contains(&fill(&with_keys)));
    let items = vec![String::new(); 1000];
    let with_items = |_| [&["RPUSH".to_owned(), "list".to_owned()], &items[..]].concat();
    assert!(fill(&with_items) > 500);
    let grown = server.peak_memory().saturating_sub(before);
    assert!(grown < 55_000_000, "{grown} bytes");
    drop(client);
    terminate(server);
}

/// Commands of a million empty arguments are no more memory than their bytes, once they are run.
#[cfg(target_os = "linux")]
#[test]
fn many_arguments_leave_nothing_behind() {
    let (server, addr) = start(&[]);
    let arguments = [&["DEL"][..], &[""; 1_000_000]].concat();
    let (arguments, before) = (command(&arguments), server.peak_memory());
    let mut clients = [(); 20].map(|()| Client::new(addr));
    for client in &mut clients {
        client.send(&arguments);
        assert_eq!(client.reply(), ":0");
    }
    let grown = server.peak_memory().saturating_sub(before);
    assert!(grown < 100_000_000, "{grown} bytes");
    // None of them was lost.
    let words: Vec<_> = (0..5000).map(|number| number.to_string()).collect();
    let inline = format!("RPUSH inline {}\r\n", words.join(" "));
    let [client, ..] = &mut clients;
    client.send(inline);
    assert_eq!(client.reply(), ":5000");
    client.send(command(
        &[&["RPUSH".to_owned(), "list".to_owned()], &words[..]].concat(),
    ));
    assert_eq!(client.reply(), ":5000");
    for list in ["inline", "list"] {
        let all = format!("[{}]", words.join(" "));
        assert_eq!(client.ask(&format!("LRANGE {list} 0 -1")), all);
    }
    drop(clients);
    terminate(server);
}

#[test]
fn a_value_of_200_megabytes_comes_back() {
    let (server, addr) = start(&[]);
    let mut client = Client::new(addr);
    let value = b"0123456789".repeat(20_000_000);
    client.send("*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$200000000\r\n");
    client.send(&value);
    client.send("\r\n");
    assert_eq!(client.reply(), "+OK");
    // The peak counts from here: the reply is no copy.
    #[cfg(target_os = "linux")]
    std::fs::write(format!("/proc/{}/clear_refs", server.process()), "5").expect("proc");
    client.send(command(&["GET", "k"]));
    assert_eq!(client.line(), "$200000000");
    let mut back = vec![0; value.len()];
    client.0.read_exact(&mut back).expect("the value");
    assert!(back == value, "another value");
    assert_eq!(client.line(), "");
    #[cfg(target_os = "linux")]
    {
        let above = server.peak_memory() - value.len();
        assert!(above < 64 * 1024 * 1024, "{above} bytes above the value");
    }
    client.expect(&[("STRLEN k", ":200000000"), ("APPEND k 0", ":200000001")]);
    drop(client);
    terminate(server);
}
