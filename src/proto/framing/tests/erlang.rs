//! The same streams through `erlang:decode_packet/3`, in one Erlang process.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use super::*;

/// Reads lines `TYPE SIZE HEX`, and answers each with its frames in hex and its end.
const ORACLE: &str = r#"
    Hex = fun(Frame) -> string:lowercase(binary:encode_hex(Frame)) end,
    Decode = fun Decode(Type, Options, Stream, Frames) ->
        case erlang:decode_packet(Type, Stream, Options) of
            {ok, Frame, Rest} -> Decode(Type, Options, Rest, [[Hex(Frame), ","] | Frames]);
            {more, _} -> [lists:reverse(Frames), "rest ", integer_to_list(byte_size(Stream))];
            {error, invalid} -> [lists:reverse(Frames), "invalid"]
        end
    end,
    Loop = fun Loop() ->
        case io:get_line("") of
            eof -> ok;
            Line ->
                [Name, Size, "x" ++ Digits] = string:tokens(string:trim(Line), " "),
                Type = case Name of "raw" -> raw; "line" -> line; _ -> list_to_integer(Name) end,
                Options = case list_to_integer(Size) of -1 -> []; Max -> [{packet_size, Max}] end,
                Stream = binary:decode_hex(list_to_binary(Digits)),
                io:put_chars([Decode(Type, Options, Stream, []), "\n"]),
                Loop()
        end
    end,
    Loop(),
    halt(0).
"#;

/// Reports skipped tests; under CI a missing Erlang is a failure.
fn have_erlang() -> bool {
    let found = Command::new("erl")
        .args(["-noshell", "-eval", "halt()."])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok();
    if !found {
        assert!(
            std::env::var_os("CI").is_none(),
            "CI needs erl for this test"
        );
        eprintln!("SKIPPED: erl is not installed, this test did not run");
    }
    found
}

/// Pseudo-random numbers, the same each time (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).expect("31 bits") % bound
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Valid frames, invalid headers, line ends, and noise.
    fn stream(&mut self, width: usize) -> Vec<u8> {
        let mut stream = Vec::new();
        for _ in 0..self.below(6) {
            match self.below(5) {
                0 => stream.extend((0..self.below(8)).map(|_| self.pick(&[0, 1, 2, 9, 255]))),
                1 => stream.extend_from_slice(b"line\r\n"),
                2 => {
                    let length = self.pick(&[
                        0x7FFF_FFFB_u32,
                        0x7FFF_FFFC,
                        0x8000_0000,
                        u32::MAX,
                        65_535,
                        256,
                    ]);
                    stream.extend_from_slice(&length.to_be_bytes()[4 - width..]);
                }
                _ => {
                    let length = self.below(9);
                    let header = (length as u32).to_be_bytes();
                    stream.extend_from_slice(&header[4 - width..]);
                    stream.extend((0..length).map(|_| self.pick(b"ab\n\0\xFF")));
                }
            }
        }
        stream
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[test]
fn agrees_with_decode_packet() {
    if !have_erlang() {
        return;
    }
    let kinds = [
        ("raw", Framing::Raw, 0),
        ("1", Framing::Packet1, 1),
        ("2", Framing::Packet2, 2),
        ("4", Framing::Packet4, 4),
        ("line", Framing::Line, 0),
    ];
    let mut numbers = Numbers(0x9E37_79B9_7F4A_7C15);
    let mut cases = String::new();
    let mut ours = Vec::new();
    for round in 0..4000 {
        let (name, framing, width) = &kinds[round % kinds.len()];
        // A maximum, or none: 0 in Erlang.
        let max = (round % 3 > 0).then(|| 1 + numbers.below(8));
        let stream = numbers.stream(*width);
        let size = max.map_or("-1".to_owned(), |max| max.to_string());
        writeln!(cases, "{name} {size} x{}", hex(&stream)).expect("into memory");
        // Cut anywhere: Erlang gets the stream in one piece.
        let cut = 1 + numbers.below(stream.len() + 1);
        let pieces: Vec<&[u8]> = match framing {
            Framing::Raw => vec![&stream],
            _ => stream.chunks(cut).collect(),
        };
        let (frames, end) = decode(framing, max.unwrap_or(usize::MAX), pieces);
        let mut line: String = frames.iter().map(|frame| hex(frame) + ",").collect();
        match end {
            End::Rest(rest) => write!(line, "rest {rest}").expect("into memory"),
            End::TooLarge => line.push_str("invalid"),
        }
        ours.push(line);
    }
    let mut child = Command::new("erl")
        .args(["-noshell", "-eval", ORACLE])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("erl");
    let mut stdin = child.stdin.take().expect("piped");
    let streams = cases.clone();
    let writer = std::thread::spawn(move || stdin.write_all(streams.as_bytes()));
    let output = child.wait_with_output().expect("erl ends");
    writer.join().expect("no panic").expect("erl reads");
    assert!(output.status.success(), "{}", output.status);
    let theirs = String::from_utf8(output.stdout).expect("text");
    let theirs: Vec<&str> = theirs.lines().collect();
    assert_eq!(theirs.len(), ours.len());
    for ((case, ours), theirs) in cases.lines().zip(&ours).zip(theirs) {
        assert_eq!(ours, theirs, "ours and theirs of {case}");
    }
}
