#[test]
fn a_printed_test_prints_itself() {
    use portcullis::sim::{Op, Script};

    let script = Script {
        ops: vec![
            Op::Connect,
            Op::Send {
                client: 0,
                bytes: b"a\"\n\xff".to_vec(),
            },
            Op::Read {
                client: 0,
                on: false,
            },
            Op::Push {
                connection: 0,
                frame: b"frame".to_vec(),
            },
            Op::Advance { millis: 5 },
            Op::Suspend { on: true },
        ],
    };
    let text = print(&script);
    assert_eq!(text, include_str!("every_op.rs"));
}
