//! The chart: a group of bars for each table, and the caption below.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::results::{grouped, Memory, Row, Spread};
use crate::servers::Kind;

const WIDTH: i32 = 860;
const MARGIN: i32 = 16;
/// Where bars begin, and where the longest ends. The columns of figures follow.
const LEFT: i32 = 190;
const RIGHT: i32 = WIDTH - 230;
const MEDIAN: i32 = RIGHT + 10;
const RANGE: i32 = MEDIAN + 58;
const COST: i32 = RANGE + 84;
const BAR: i32 = 19;
const GAP: i32 = 5;
const HEADING: i32 = 30;
const TITLE: i32 = 20;
const LINE: i32 = 16;
/// Characters in a line of the caption.
const COLUMNS: usize = 132;

const OURS: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
const OTHERS: RGBColor = RGBColor(0xb4, 0xbe, 0xc8);
const INK: RGBColor = RGBColor(0x1c, 0x22, 0x28);
const FAINT: RGBColor = RGBColor(0x5b, 0x66, 0x70);

struct Bar {
    kind: Kind,
    value: Spread,
    median: String,
    /// The least and the most of the rounds.
    range: String,
    /// The cost in itself.
    cost: String,
}

struct Group {
    title: String,
    bars: Vec<Bar>,
    /// The value at the right end.
    most: f64,
    /// A value with a line through all bars.
    reference: Option<f64>,
}

struct Section {
    heading: String,
    groups: Vec<Group>,
}

/// Writes the chart.
pub fn draw(
    path: &Path,
    rows: &[Row],
    memory: &[Memory],
    caption: &[String],
) -> Result<(), Box<dyn Error>> {
    let sections = [costs(rows, false), costs(rows, true), bytes(memory)];
    let lines: Vec<Vec<String>> = caption.iter().map(|text| wrapped(text)).collect();
    let height = sections.iter().map(Section::height).sum::<i32>()
        + lines
            .iter()
            .map(|lines| lines.len() as i32 * LINE + GAP)
            .sum::<i32>()
        + 3 * MARGIN;
    let root = SVGBackend::new(path, (WIDTH as u32, height as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut top = MARGIN;
    for section in &sections {
        section.draw(&root, top)?;
        top += section.height();
    }
    let rule = [(MARGIN, top), (WIDTH - MARGIN, top)];
    root.draw(&PathElement::new(rule, OTHERS.stroke_width(1)))?;
    top += MARGIN;
    for lines in lines {
        for line in lines {
            text(&root, line, (MARGIN, top), 12, FAINT)?;
            top += LINE;
        }
        top += GAP;
    }
    root.present()?;
    Ok(())
}

/// Ratios of the rows with or without TLS. All rows have one scale, so that bars compare.
fn costs(rows: &[Row], tls: bool) -> Section {
    let all = rows.iter().flat_map(|row| &row.costs);
    let most = all.map(|cost| cost.ratio.most).fold(1.0, f64::max);
    let rows: Vec<&Row> = rows.iter().filter(|row| row.tls == tls).collect();
    let reference = rows.first().map_or("", |row| row.costs[0].kind.name());
    let over = if tls { "TLS 1.3" } else { "Plain TCP" };
    let group = |row: &Row| Group {
        title: row.name.to_owned(),
        bars: row
            .costs
            .iter()
            .map(|cost| Bar {
                kind: cost.kind,
                value: cost.ratio,
                median: format!("{:.2}", cost.ratio.median),
                range: format!("{:.2}–{:.2}", cost.ratio.least, cost.ratio.most),
                cost: format!("{:.2} µs", cost.microseconds),
            })
            .collect(),
        most,
        reference: Some(1.0),
    };
    Section {
        heading: format!("{over}: messages per processor time, {reference} = 1; longer is better"),
        groups: rows.into_iter().map(group).collect(),
    }
}

fn bytes(memory: &[Memory]) -> Section {
    let group = |memory: &Memory| {
        let most = memory.bytes.iter().map(|(_, bytes)| bytes.most);
        let over = if memory.tls { "TLS 1.3" } else { "Plain TCP" };
        Group {
            title: format!("{over}, {} connections", grouped(memory.connections as f64)),
            most: most.fold(1.0, f64::max),
            bars: memory
                .bytes
                .iter()
                .map(|&(kind, value)| Bar {
                    kind,
                    value,
                    median: grouped(value.median),
                    range: format!("{}–{}", grouped(value.least), grouped(value.most)),
                    cost: String::new(),
                })
                .collect(),
            reference: None,
        }
    };
    Section {
        heading: "Bytes of memory for each idle connection; shorter is better".to_owned(),
        groups: memory.iter().map(group).collect(),
    }
}

impl Section {
    fn height(&self) -> i32 {
        HEADING + self.groups.iter().map(Group::height).sum::<i32>() + MARGIN
    }

    fn draw<B: DrawingBackend>(&self, root: &Root<B>, mut top: i32) -> Result<(), Box<dyn Error>>
    where
        B::ErrorType: 'static,
    {
        text(root, &self.heading, (MARGIN, top), 16, INK)?;
        top += HEADING;
        for group in &self.groups {
            group.draw(root, top)?;
            top += group.height();
        }
        Ok(())
    }
}

impl Group {
    fn height(&self) -> i32 {
        TITLE + self.bars.len() as i32 * BAR + 2 * GAP
    }

    fn draw<B: DrawingBackend>(&self, root: &Root<B>, top: i32) -> Result<(), Box<dyn Error>>
    where
        B::ErrorType: 'static,
    {
        let at = |value: f64| LEFT + (f64::from(RIGHT - LEFT) * value / self.most) as i32;
        text(root, &self.title, (LEFT, top), 14, INK)?;
        text(root, "median", (MEDIAN, top + 3), 11, FAINT)?;
        text(root, "least–most", (RANGE, top + 3), 11, FAINT)?;
        if self.bars.iter().any(|bar| !bar.cost.is_empty()) {
            text(root, "per message", (COST, top + 3), 11, FAINT)?;
        }
        let top = top + TITLE;
        for (number, bar) in self.bars.iter().enumerate() {
            let y = top + number as i32 * BAR;
            let ours = bar.kind.is_portcullis();
            let (color, ink) = if ours { (OURS, OURS) } else { (OTHERS, INK) };
            text(root, bar.kind.name(), (MARGIN, y + 1), 13, ink)?;
            let corners = [(LEFT, y), (at(bar.value.median).max(LEFT + 1), y + BAR - 5)];
            root.draw(&Rectangle::new(corners, color.filled()))?;
            let (least, most) = (at(bar.value.least), at(bar.value.most));
            let middle = y + (BAR - 5) / 2;
            for line in [
                [(least, middle), (most, middle)],
                [(least, middle - 3), (least, middle + 3)],
                [(most, middle - 3), (most, middle + 3)],
            ] {
                root.draw(&PathElement::new(line, INK.stroke_width(1)))?;
            }
            text(root, &bar.median, (MEDIAN, y + 1), 13, ink)?;
            text(root, &bar.range, (RANGE, y + 2), 11, FAINT)?;
            text(root, &bar.cost, (COST, y + 2), 11, FAINT)?;
        }
        if let Some(value) = self.reference {
            let bottom = top + self.bars.len() as i32 * BAR - 2;
            let line = [(at(value), top - 3), (at(value), bottom)];
            root.draw(&PathElement::new(line, FAINT.stroke_width(1)))?;
        }
        Ok(())
    }
}

type Root<B> = DrawingArea<B, Shift>;

/// Draws text of `pixels` height.
fn text<B: DrawingBackend>(
    root: &Root<B>,
    words: impl Into<String>,
    at: (i32, i32),
    pixels: u32,
    color: RGBColor,
) -> Result<(), Box<dyn Error>>
where
    B::ErrorType: 'static,
{
    // plotters divides by this factor.
    let size = f64::from(pixels) * 1.24;
    let style = ("sans-serif", size).into_font().color(&color);
    root.draw(&Text::new(words.into(), at, style))?;
    Ok(())
}

fn wrapped(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("one");
        if line.chars().count() + word.chars().count() >= COLUMNS {
            lines.push(word.to_owned());
        } else {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}
