//! Text that a peer may have chosen, as it is printed: one line, visible, of bounded length.
//!
//! A line feed would forge a record of the log, ESC would command the operator's terminal, and a
//! bidirectional control would reorder the line.

use std::fmt::{self, Write as _};

/// The default limit on the printed bytes.
const MAX_BYTES: usize = 1024;
const CUT: &str = "...";

/// Displays another value with its control and format characters escaped as in Rust's literals, up
/// to a limit. A longer text ends in `...`.
///
/// Backslashes and quotes stay as they are: this is for reading, not for parsing.
pub(crate) struct Escaped<T> {
    value: T,
    max: usize,
}

impl<T: fmt::Display> Escaped<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            value,
            max: MAX_BYTES,
        }
    }

    /// With at most `max` bytes.
    pub(crate) fn with_max(value: T, max: usize) -> Self {
        Self { value, max }
    }
}

impl<T: fmt::Display> fmt::Display for Escaped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = Line {
            out: String::new(),
            end: 0,
            max: self.max,
            is_cut: false,
        };
        // It stops at the limit: the text of an error may be endless.
        let result = write!(line, "{}", self.value);
        if line.is_cut {
            line.out.truncate(line.end);
            f.write_str(&line.out)?;
            return f.write_str(CUT);
        }
        f.write_str(&line.out)?;
        result
    }
}

/// True if `character` is printed as an escape: it is invisible, moves the cursor, ends the line,
/// or changes the order of others. These are the controls, the format characters (general category
/// Cf), and what is ignored by default (Default_Ignorable_Code_Point) or drawn blank.
pub(crate) fn is_escaped(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{AD}'
                | '\u{34F}'
                | '\u{600}'..='\u{605}'
                | '\u{61C}'
                | '\u{6DD}'
                | '\u{70F}'
                | '\u{890}'..='\u{891}'
                | '\u{8E2}'
                | '\u{115F}'..='\u{1160}'
                | '\u{17B4}'..='\u{17B5}'
                | '\u{180B}'..='\u{180F}'
                | '\u{200B}'..='\u{200F}'
                | '\u{2028}'..='\u{202E}'
                | '\u{2060}'..='\u{206F}'
                | '\u{2800}'
                | '\u{3164}'
                | '\u{FE00}'..='\u{FE0F}'
                | '\u{FEFF}'
                | '\u{FFA0}'
                | '\u{FFF0}'..='\u{FFFB}'
                | '\u{110BD}'
                | '\u{110CD}'
                | '\u{13430}'..='\u{1345F}'
                | '\u{1BCA0}'..='\u{1BCA3}'
                | '\u{1D173}'..='\u{1D17A}'
                | '\u{E0000}'..='\u{E0FFF}'
        )
}

/// Collects escaped text. Fails at the limit.
struct Line {
    out: String,
    /// Where the text is cut if it becomes too long.
    end: usize,
    max: usize,
    is_cut: bool,
}

impl Line {
    fn push(&mut self, text: &str) -> fmt::Result {
        if self.out.len() + text.len() > self.max {
            self.is_cut = true;
            return Err(fmt::Error);
        }
        self.out.push_str(text);
        if self.out.len() + CUT.len() <= self.max {
            self.end = self.out.len();
        }
        Ok(())
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars()
            .try_for_each(|character| self.write_char(character))
    }

    fn write_char(&mut self, character: char) -> fmt::Result {
        if is_escaped(character) {
            // `\n`, `\0` and their like, else `\u{1b}`: never a backslash or a quote alone.
            let escaped = character.escape_debug();
            return match escaped.len() {
                1 => self.push(&character.escape_unicode().to_string()),
                _ => self.push(&escaped.to_string()),
            };
        }
        self.push(character.encode_utf8(&mut [0; 4]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn escaped(text: &str) -> String {
        Escaped::new(text).to_string()
    }

    #[test]
    fn what_is_visible_stays() {
        for text in [
            "",
            "plain",
            "\"quoted\" 'as' C:\\path",
            "Grüße, 東京, हिन्दी",
        ] {
            assert_eq!(escaped(text), text);
        }
    }

    #[test]
    fn what_is_not_is_escaped() {
        for (text, shown) in [
            ("a\nb\r\tc\0", r"a\nb\r\tc\0"),
            ("\u{1b}[2J\u{7f}\u{9b}", r"\u{1b}[2J\u{7f}\u{9b}"),
            ("\u{85}\u{2028}\u{2029}", r"\u{85}\u{2028}\u{2029}"),
            (
                "\u{202a}\u{202e}\u{2066}\u{2069}",
                r"\u{202a}\u{202e}\u{2066}\u{2069}",
            ),
            (
                "\u{200e}\u{200f}\u{61c}\u{feff}\u{e0041}",
                r"\u{200e}\u{200f}\u{61c}\u{feff}\u{e0041}",
            ),
            (
                "\u{3164}\u{115f}\u{ffa0}\u{fe0f}\u{e0100}\u{2800}\u{34f}\u{1d173}\u{600}",
                r"\u{3164}\u{115f}\u{ffa0}\u{fe0f}\u{e0100}\u{2800}\u{34f}\u{1d173}\u{600}",
            ),
        ] {
            assert_eq!(escaped(text), shown);
        }
    }

    #[test]
    fn every_escaped_character_becomes_visible_ascii() {
        for character in (char::MIN..=char::MAX).filter(|&character| is_escaped(character)) {
            let shown = escaped(&character.to_string());
            assert!(shown.bytes().all(|byte| byte.is_ascii_graphic()), "{shown}");
        }
    }

    /// An endless text.
    struct Endless(&'static str);

    impl fmt::Display for Endless {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            loop {
                f.write_str(self.0)?;
            }
        }
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let cut = |text| Escaped::with_max(Endless(text), 10).to_string();
        assert_eq!(cut("ab"), "abababa...");
        assert_eq!(cut("€"), "€€...");
        assert_eq!(cut("\n"), r"\n\n\n...");
        assert_eq!(cut("\u{1b}"), r"\u{1b}...");
        assert_eq!(
            Escaped::with_max("0123456789", 10).to_string(),
            "0123456789"
        );
        assert_eq!(Escaped::new(Endless("a")).to_string().len(), MAX_BYTES);
    }
}
