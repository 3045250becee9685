//! The sections of a PEM file (RFC 7468), each found or an error with its line: none is skipped
//! because it is damaged.
//!
//! Reads what OpenSSL reads, and also sections that follow each other without a line break, lines
//! that end in CR alone, indented lines, and UTF-8 byte order marks. No error shows contents.

use crate::escape::is_escaped;

const BEGIN: &[u8] = b"-----BEGIN ";
const END: &[u8] = b"-----END ";
const DASHES: &[u8] = b"-----";
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// One section, from BEGIN to END.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Section<'a> {
    /// As in `CERTIFICATE`.
    pub(super) label: &'a [u8],
    /// The number of its BEGIN line, from 1.
    pub(super) line: usize,
    body: &'a [u8],
}

impl<'a> Section<'a> {
    fn begin(label: &'a [u8], line: usize) -> Self {
        Self {
            label,
            line,
            body: &[],
        }
    }

    /// Returns the section as a file of its own, labelled `label`.
    pub(super) fn to_pem(&self, label: &str) -> Vec<u8> {
        let label = label.as_bytes();
        [
            BEGIN, label, DASHES, b"\n", self.body, b"\n", END, label, DASHES, b"\n",
        ]
        .concat()
    }

    pub(super) fn contains(&self, text: &[u8]) -> bool {
        find(self.body, text).is_some()
    }
}

/// Returns all sections of a file.
///
/// # Errors
///
/// What is wrong with the file, behind its name.
pub(super) fn sections(file: &[u8]) -> Result<Vec<Section<'_>>, String> {
    if file.starts_with(b"\xFF\xFE") || file.starts_with(b"\xFE\xFF") {
        return Err("is UTF-16 text: save it as UTF-8".to_owned());
    }
    let mut found = Vec::new();
    // The section that was begun, and the position of its body.
    let mut open: Option<(Section<'_>, usize)> = None;
    for (number, start, end) in lines(file) {
        let mut line = file.get(start..end).unwrap_or_default();
        loop {
            line = trim_start(line);
            let Some((section, body)) = open.take() else {
                open = begin(line, number)?.map(|section| (section, end));
                break;
            };
            let Some(behind) = line.strip_prefix(END) else {
                if find(line, DASHES).is_some() {
                    return Err(format!(
                        "is cut off, or has lost its line breaks: the PEM section of line {} has \
                         no END line before line {number}",
                        section.line
                    ));
                }
                open = Some((section, body));
                break;
            };
            let tail = behind
                .strip_prefix(section.label)
                .and_then(|behind| behind.strip_prefix(DASHES));
            let Some(tail) = tail else {
                return Err(format!(
                    "is damaged: the END line {number} does not match the BEGIN line {}",
                    section.line
                ));
            };
            let body = file.get(body..end - line.len()).unwrap_or_default();
            found.push(Section { body, ..section });
            // Where files were joined without a line break, the next section begins here.
            line = tail;
        }
    }
    match open {
        Some((section, _)) => Err(format!(
            "is cut off: the PEM section of line {} has no END line",
            section.line
        )),
        None => Ok(found),
    }
}

/// Looks for a BEGIN line; between sections other text is skipped.
fn begin(line: &[u8], number: usize) -> Result<Option<Section<'_>>, String> {
    let Some(label) = line.strip_prefix(BEGIN) else {
        let text = String::from_utf8_lossy(line);
        return match marker(&text) {
            Some("END") => Err(format!(
                "is damaged: the END line {number} has no BEGIN line"
            )),
            Some(_) => Err(format!(
                "is damaged: line {number} is not quite a BEGIN line"
            )),
            None => Ok(None),
        };
    };
    let label = label.trim_ascii_end();
    match label.strip_suffix(DASHES) {
        Some(label) if find(label, DASHES).is_none() && !label.ends_with(b"-") => {
            Ok(Some(Section::begin(label, number)))
        }
        _ if find(label, DASHES).is_some() => {
            Err(format!("has lost its line breaks in line {number}"))
        }
        _ => Err(format!(
            "is damaged: the BEGIN line {number} does not end in five dashes"
        )),
    }
}

/// What a line between sections was meant to be, which is none: `BEGIN` or `END`. A word processor
/// changes dashes, and a hand adds blanks.
fn marker(line: &str) -> Option<&'static str> {
    let frame = |c: char| is_dash(c) || c.is_whitespace() || is_escaped(c);
    let inner = line.trim_matches(frame);
    // Prose between sections is rarely in capital letters, and rarely within dashes.
    let label = match inner == line.trim() {
        true => inner.to_owned(),
        false => inner.to_ascii_uppercase(),
    };
    let word = ["BEGIN", "END"].into_iter().find(|word| {
        // Directly behind dashes, whatever follows.
        let follows_dashes = word_positions(line, word).any(|at| {
            let before = line.get(..at).unwrap_or_default();
            before.ends_with("---") || before.ends_with(|c| is_dash(c) && c != '-')
        });
        // Or first in the line, before what is kept in such a file.
        let is_first = inner
            .get(..word.len())
            .is_some_and(|first| first.eq_ignore_ascii_case(word));
        follows_dashes || is_first && has_label(&label)
    });
    // Neither word, but the dashes and the label of one of the lines.
    let is_framed = || line.starts_with("-----") && line.trim_end().ends_with("-----");
    word.or_else(|| (is_framed() && has_label(inner)).then_some("BEGIN"))
}

fn has_label(text: &str) -> bool {
    text.contains("CERTIFICATE") || text.contains("PRIVATE KEY")
}

fn word_positions<'a>(line: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    (0..line.len()).filter(move |&at| {
        let here = line.get(at..at + word.len());
        here.is_some_and(|here| here.eq_ignore_ascii_case(word))
    })
}

/// A hyphen, a dash or a minus sign.
fn is_dash(c: char) -> bool {
    matches!(
        c,
        '-' | '\u{2010}'..='\u{2015}' | '\u{2212}' | '\u{FE58}' | '\u{FE63}' | '\u{FF0D}'
    )
}

/// Returns the number of each line, from 1, and where it starts and ends. Lines end in LF, CR LF or
/// CR.
fn lines(file: &[u8]) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
    let mut next = 0;
    (1..).map_while(move |number| {
        let start = next;
        let rest = file.get(start..).filter(|rest| !rest.is_empty())?;
        let length = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
        let end = start + length.unwrap_or(rest.len());
        let is_pair = file.get(end..end + 2) == Some(b"\r\n");
        next = end + 1 + usize::from(is_pair);
        Some((number, start, end))
    })
}

fn trim_start(mut line: &[u8]) -> &[u8] {
    loop {
        line = line.trim_ascii_start();
        match line.strip_prefix(BYTE_ORDER_MARK) {
            Some(behind) => line = behind,
            None => return line,
        }
    }
}

fn find(within: &[u8], wanted: &[u8]) -> Option<usize> {
    within
        .windows(wanted.len())
        .position(|window| window == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The labels with their lines, or the error.
    fn found(file: &str) -> Result<Vec<(String, usize)>, String> {
        let sections = sections(file.as_bytes())?;
        let named = |section: &Section<'_>| {
            assert_eq!(section.body.trim_ascii(), b"AAAA", "{file:?}");
            (
                String::from_utf8_lossy(section.label).into_owned(),
                section.line,
            )
        };
        Ok(sections.iter().map(named).collect())
    }

    const ONE: &str = "-----BEGIN A-----\nAAAA\n-----END A-----";

    #[test]
    fn each_begin_line_is_a_section() {
        let mark = '\u{FEFF}';
        for (file, lines) in [
            (String::new(), vec![]),
            ("only text\n".to_owned(), vec![]),
            (ONE.to_owned(), vec![1]),
            (format!("{ONE}\n{ONE}\n"), vec![1, 4]),
            (format!("{ONE}{ONE}"), vec![1, 3]),
            (format!("{ONE} \t{ONE}"), vec![1, 3]),
            (
                format!("{mark}{ONE}\n{mark}{ONE}{mark}{ONE}"),
                vec![1, 4, 6],
            ),
            (format!("{ONE}\n{ONE}").replace('\n', "\r\n"), vec![1, 4]),
            (format!("{ONE}\n{ONE}").replace('\n', "\r"), vec![1, 4]),
            (format!("{ONE}\n{ONE}").replace('\n', " \n\t"), vec![1, 4]),
            (format!("subject=x\n\n{ONE} and so on\n{ONE}"), vec![3, 6]),
        ] {
            let expected = lines.iter().map(|&line| ("A".to_owned(), line));
            assert_eq!(found(&file), Ok(expected.collect()), "{file:?}");
        }
    }

    /// Damaged alike, both lines of a section could be taken for text between sections.
    #[test]
    fn a_section_whose_lines_are_both_damaged_is_an_error() {
        for label in ["CERTIFICATE", "X509 CERTIFICATE", "EC PRIVATE KEY"] {
            for (begin, end) in [
                ("----- BEGIN L-----", "----- END L-----"),
                ("-----\tBEGIN L-----", "-----\tEND L-----"),
                ("-----\u{A0}BEGIN L-----", "-----\u{A0}END L-----"),
                ("--BEGIN L--", "--END L--"),
                ("- BEGIN L -", "- END L -"),
                ("\u{2014} BEGIN L \u{2014}", "\u{2014} END L \u{2014}"),
                ("BEGIN L", "END L"),
                ("begin L-----", "end L-----"),
                ("\u{AD}-BEGIN L-----", "\u{AD}-END L-----"),
                ("-----BEGlN L-----", "-----EMD L-----"),
                ("-----L-----", "-----L-----"),
            ] {
                let file = format!("{ONE}\n{begin}\nAAAA\n{end}\n{ONE}").replace('L', label);
                let error = found(&file).expect_err(&file);
                assert!(error.contains("line 4"), "{file:?}: {error}");
            }
        }
    }

    #[test]
    fn text_between_sections_is_skipped() {
        for text in [
            "---",
            "Certificate chain",
            " 0 s:CN = begin certificates, the end",
            "# The certificate begins here",
            "Bag Attributes: <No Attributes>",
            "key: the END",
            "--- intermediate certificate ---",
            "end-entity certificate",
        ] {
            let file = format!("{text}\n{ONE}\n{text}\n");
            let expected = vec![("A".to_owned(), 2)];
            assert_eq!(found(&file), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_damaged_is_an_error_with_its_line() {
        let after = |file: &str| format!("{ONE}\n{file}");
        for (file, line) in [
            // Cut off, in every place.
            ("-----BEGIN A-----\nAAAA\n".to_owned(), "line 4"),
            ("-----BEGIN A-----\nAAAA\n-----END A--".to_owned(), "line 6"),
            ("-----BEGIN A-----\nAAAA\n-----EN".to_owned(), "line 6"),
            (format!("-----BEGIN A-----\nAAAA\n{ONE}"), "line 4"),
            ("AAAA\n-----END A-----".to_owned(), "line 5"),
            // Lost line breaks.
            (ONE.replace('\n', ""), "line 4"),
            (ONE.replace('\n', " "), "line 4"),
            (ONE.replace("\n-----END", "-----END"), "line 5"),
            (ONE.replacen('\n', "", 1), "line 4"),
            // Labels.
            (ONE.replace("END A", "END B"), "line 6"),
            (ONE.replace("END A", "END A B"), "line 6"),
            // Almost a BEGIN line.
            (ONE.replace("-----BEGIN", "----BEGIN"), "line 4"),
            (ONE.replace("-----BEGIN", "------BEGIN"), "line 4"),
            (ONE.replace("-----BEGIN", "\u{2013}BEGIN"), "line 4"),
            (ONE.replace("-----BEGIN", "x-----BEGIN"), "line 4"),
            (ONE.replace("BEGIN A", "begin A"), "line 4"),
            (ONE.replace("BEGIN A", "BEGINA"), "line 4"),
            (ONE.replace("BEGIN A-----", "BEGIN A----"), "line 4"),
            (ONE.replace("BEGIN A-----", "BEGIN A------"), "line 4"),
            (ONE.replace("BEGIN A-----", "BEGIN A----- x"), "line 4"),
            (ONE.replace("-----BEGIN", "\u{FF0D}BEGIN"), "line 4"),
        ] {
            let error = found(&after(&file)).expect_err(&file);
            let is_named = error
                .split([':', ','])
                .any(|part| part.ends_with(line) || part.contains(&format!("{line} ")));
            assert!(is_named, "{file:?}: {error}");
        }
        assert!(sections(b"\xFF\xFE-\0-\0").is_err());
    }
}
