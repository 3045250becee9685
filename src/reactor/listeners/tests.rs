use super::*;

fn listener(id: ListenerId) -> Listener<()> {
    let listen = Listen::tcp("127.0.0.1:0", crate::Framing::Packet2);
    let (name, addr) = (String::new(), Addr::unspecified());
    let mut listener = Listener::new(id, name, addr, 0, listen, Time::ZERO);
    listener.readable = false;
    listener
}

#[test]
fn an_event_finds_its_listener() {
    let mut listeners = Listeners::<()>::default();
    let mut find = |number: u32| {
        let id = ListenerId::new(ServerNumber::NONE, number);
        listeners.all.push(listener(id));
        listeners.next_id = number + 1;
        for listener in &mut listeners.all {
            listener.readable = false;
        }
        listeners.handle_event(Token::of_listener(id));
        let found = listeners.iter().filter(|listener| listener.readable);
        found
            .map(|listener| listener.id.number())
            .collect::<Vec<_>>()
    };
    for number in [0, 1, 7, Token::LISTENERS - 1] {
        assert_eq!(find(number), [number]);
    }
    assert_eq!(find(Token::LISTENERS), [0, Token::LISTENERS]);
    assert_eq!(find(Token::LISTENERS + 3), [Token::LISTENERS + 3]);
}

#[test]
fn an_id_names_one_listener_when_the_numbers_repeat() {
    let mut listeners = Listeners::<()>::default();
    let mut add = |next_id| {
        listeners.next_id = next_id;
        let id = listeners.vacant_id(ServerNumber::NONE);
        listeners.all.push(listener(id));
        id.number()
    };
    let repeat = 1 << 22;
    let numbers = [0, 1, repeat - 2, repeat - 1, repeat - 1].map(&mut add);
    assert_eq!(numbers, [0, 1, repeat - 2, 2, 3]);
    for listener in listeners.iter() {
        let same = listeners.iter().filter(|other| other.id == listener.id);
        assert_eq!(same.count(), 1);
    }
}
