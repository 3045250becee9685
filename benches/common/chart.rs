//! The charts: a group of bars for each table, and the caption below.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::spread::Spread;

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

/// Median, least and most of a server, as a bar with a whisker and as text.
pub struct Bar {
    pub name: &'static str,
    /// Whether the server is this crate.
    pub ours: bool,
    pub value: Spread,
    pub median: String,
    /// The least and the most of the rounds.
    pub range: String,
    /// The cost in itself; empty where the bar shows it.
    pub cost: String,
}

/// The servers on the same work.
pub struct Group {
    pub title: String,
    /// Heading of the bars' costs.
    pub cost: &'static str,
    pub bars: Vec<Bar>,
    /// The value at the right end.
    pub most: f64,
    /// A value with a line through all bars.
    pub reference: Option<f64>,
}

/// Groups with a heading.
pub struct Section {
    pub heading: String,
    pub groups: Vec<Group>,
}

/// Writes the chart.
pub fn draw(path: &Path, sections: &[Section], caption: &[String]) -> Result<(), Box<dyn Error>> {
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
    for section in sections {
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
            text(root, self.cost, (COST, top + 3), 11, FAINT)?;
        }
        let top = top + TITLE;
        for (number, bar) in self.bars.iter().enumerate() {
            let y = top + number as i32 * BAR;
            let (color, ink) = if bar.ours {
                (OURS, OURS)
            } else {
                (OTHERS, INK)
            };
            text(root, bar.name, (MARGIN, y + 1), 13, ink)?;
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
