//! The chart: a group of bars for each row of the table.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;

use crate::servers::Kind;

const WIDTH: u32 = 860;
const BAR: u32 = 16;
const GROUP: u32 = BAR * Kind::ALL.len() as u32 + 44;
const LEFT: i32 = 150;

fn color(kind: Kind) -> RGBColor {
    if kind == Kind::Portcullis {
        RGBColor(0x1f, 0x6f, 0xb4)
    } else {
        RGBColor(0xa9, 0xb4, 0xbe)
    }
}

/// Writes the chart: how cheap a message is in each row, the reference being 1, and bytes per idle connection.
pub fn draw(
    path: &Path,
    rows: &[(&str, Vec<(Kind, f64)>)],
    idle: &[(Kind, f64)],
) -> Result<(), Box<dyn Error>> {
    let root =
        SVGBackend::new(path, (WIDTH, GROUP * (rows.len() as u32 + 1) + 30)).into_drawing_area();
    root.fill(&WHITE)?;
    let most = idle.iter().map(|(_, bytes)| *bytes).fold(1.0, f64::max);
    for (at, (name, ratios)) in rows.iter().enumerate() {
        let title =
            format!("{name}: messages per processor time, mio by hand = 1 (longer is better)");
        let bars = ratios
            .iter()
            .map(|&(kind, ratio)| (kind, ratio, format!("{ratio:.2}")));
        group(&root, at as i32, &title, bars, 1.3)?;
    }
    let bars = idle
        .iter()
        .map(|&(kind, bytes)| (kind, bytes, format!("{bytes:.0}")));
    let title = "bytes of memory per idle connection (shorter is better)";
    group(&root, rows.len() as i32, title, bars, most * 1.1)?;
    root.present()?;
    Ok(())
}

fn group<B: DrawingBackend>(
    root: &DrawingArea<B, plotters::coord::Shift>,
    at: i32,
    title: &str,
    bars: impl Iterator<Item = (Kind, f64, String)>,
    most: f64,
) -> Result<(), Box<dyn Error>>
where
    B::ErrorType: 'static,
{
    let top = at * GROUP as i32 + 12;
    let text = |size: i32| ("sans-serif", size).into_font().color(&BLACK);
    root.draw(&Text::new(title.to_owned(), (8, top), text(14)))?;
    for (number, (kind, value, label)) in bars.enumerate() {
        let y = top + 22 + number as i32 * BAR as i32;
        let width = (f64::from(WIDTH as i32 - LEFT - 70) * value / most).max(1.0) as i32;
        root.draw(&Text::new(kind.name(), (8, y), text(12)))?;
        let corners = [(LEFT, y), (LEFT + width, y + BAR as i32 - 3)];
        root.draw(&Rectangle::new(corners, color(kind).filled()))?;
        root.draw(&Text::new(label, (LEFT + width + 6, y), text(12)))?;
    }
    Ok(())
}
