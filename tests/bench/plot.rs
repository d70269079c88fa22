//! The picture: each rate as a dot beside its competitors', on one line per
//! workload, with the spread of the rounds as a thin line through it.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::runner::{Kind, Row};
use super::systems::System;

type Failed = Box<dyn std::error::Error>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const LINE: i32 = 34;
const TOP: i32 = 78;
const BOTTOM: i32 = 46;
const LEFT: i32 = 540;
const WIDTH: i32 = 1110;
const RIGHT: i32 = 40;
/// What is further right is an arrow at the edge.
const MOST: f64 = 1.4;

fn colour(system: System) -> RGBColor {
    match system {
        System::Ours => RGBColor(0xd5, 0x5e, 0x00),
        System::NoFilter => RGBColor(0x55, 0x55, 0x55),
        System::CDefault => RGBColor(0x00, 0x72, 0xb2),
        System::C4K => RGBColor(0x56, 0xb4, 0xe9),
        System::Qemu => RGBColor(0x00, 0x9e, 0x73),
        System::Kept => RGBColor(0xcc, 0x79, 0xa7),
        System::QemuKept => RGBColor(0x44, 0xaa, 0x11),
    }
}

/// In the order of the legend.
fn drawn() -> impl Iterator<Item = System> {
    [
        System::COMPARED.as_slice(),
        &[System::Kept, System::QemuKept],
    ]
    .concat()
    .into_iter()
}

fn x(ratio: f64) -> i32 {
    let room = f64::from(WIDTH - LEFT - RIGHT);
    LEFT + (ratio.clamp(0.0, MOST) / MOST * room).round() as i32
}

fn text(size: i32, horizontal: HPos) -> TextStyle<'static> {
    TextStyle::from(("sans-serif", size).into_font())
        .color(&RGBColor(0x22, 0x22, 0x22))
        .pos(Pos::new(horizontal, VPos::Center))
}

/// Writes the rates of `rows`.
pub fn draw(rows: &[Row], path: &Path) -> Result<(), Failed> {
    let rates = |row: &&Row| matches!(row.kind, Kind::Rate | Kind::OfLimit(_));
    let rows: Vec<_> = rows.iter().filter(rates).collect();
    let height = TOP + rows.len() as i32 * LINE + BOTTOM;
    let area = SVGBackend::new(path, (WIDTH as u32, height as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    legend(&area)?;
    axis(&area, height)?;
    for (index, row) in rows.iter().enumerate() {
        line(&area, row, TOP + index as i32 * LINE + LINE / 2)?;
    }
    area.present()?;
    Ok(())
}

fn legend(area: &Area<'_>) -> Result<(), Failed> {
    let title = "Requests a second, 1 = no filter (rows with *: 1 = what the 5 ms delay allows)";
    area.draw_text(title, &text(22, HPos::Left), (16, 22))?;
    let mut at = 16;
    for system in drawn() {
        area.draw(&Circle::new((at + 6, 52), 6, colour(system).filled()))?;
        area.draw_text(system.name(), &text(18, HPos::Left), (at + 18, 52))?;
        at += 36 + 9 * system.name().len() as i32;
    }
    Ok(())
}

fn axis(area: &Area<'_>, height: i32) -> Result<(), Failed> {
    let end = height - BOTTOM;
    for tenths in (0..=14).step_by(2) {
        let ratio = f64::from(tenths) / 10.0;
        let style = if tenths == 10 {
            BLACK.stroke_width(2)
        } else {
            RGBColor(0xdd, 0xdd, 0xdd).stroke_width(1)
        };
        area.draw(&PathElement::new([(x(ratio), TOP), (x(ratio), end)], style))?;
        let label = format!("{ratio:.1}");
        area.draw_text(&label, &text(17, HPos::Center), (x(ratio), end + 18))?;
    }
    let cut = format!("Cut at {MOST}: an arrow stands for more.");
    area.draw_text(&cut, &text(15, HPos::Left), (16, end + 18))?;
    Ok(())
}

fn line(area: &Area<'_>, row: &Row, y: i32) -> Result<(), Failed> {
    let limited = matches!(row.kind, Kind::OfLimit(_));
    let title = format!("{}{}", row.title, if limited { " *" } else { "" });
    area.draw_text(&title, &text(16, HPos::Right), (LEFT - 12, y))?;
    let shown = drawn().filter_map(|system| Some((system, row.shown(system)?)));
    // What the row is about comes last: what matters most is on top.
    let mut shown: Vec<_> = shown.collect();
    shown.sort_by_key(|(system, _)| *system != row.subject);
    for (index, (system, spread)) in shown.into_iter().enumerate().rev() {
        // A little apart, so that equal ones don't hide each other.
        let y = y + (index as i32 - 1) * 6 - 3;
        let colour = colour(system);
        let ends = [(x(spread.least), y), (x(spread.most), y)];
        area.draw(&PathElement::new(ends, colour.stroke_width(2)))?;
        let radius = if system == row.subject { 6 } else { 4 };
        if spread.median > MOST {
            area.draw(&arrow((x(MOST), y), radius + 2, colour))?;
        } else {
            area.draw(&Circle::new((x(spread.median), y), radius, colour.filled()))?;
        }
    }
    Ok(())
}

/// A triangle that points to the right.
fn arrow((x, y): (i32, i32), size: i32, colour: RGBColor) -> Polygon<(i32, i32)> {
    let corners = [(x - size, y - size), (x - size, y + size), (x + size, y)];
    Polygon::new(corners, colour.filled())
}
