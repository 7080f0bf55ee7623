//! The ratios as a picture, which is read on light and on dark pages.

use crate::report::ratios;
use crate::scenario::{Loop, Row, Table};
use std::fmt::{Result, Write};

/// Where the scale begins, and how wide it is.
const LEFT: f64 = 260.0;
const WIDTH: f64 = 440.0;
const LINE: f64 = 18.0;
const TOP: f64 = 70.0;
/// Where the scale ends at the latest: what is more stands at its end, with its number beside it.
const MOST: f64 = 2.0;

const STYLE: &str = "text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-weight:600}.quiet{fill:#59636e}\
    line{stroke:#d1d9e0}.one{stroke:#59636e;stroke-dasharray:3 3}rect{fill:#54aeff}circle{fill:#0969da}\
    @media(prefers-color-scheme:dark){text{fill:#f0f6fc}.quiet{fill:#9198a1}line{stroke:#3d444d}.one{stroke:#9198a1}\
    rect{fill:#1f6feb}circle{fill:#79c0ff}}";

/// For each scenario that has a raw loop how fast the transport and the SDK are, compared with it.
pub fn svg(broker: &str, tables: &[Table]) -> String {
    let tables: Vec<_> = tables.iter().filter_map(compared).collect();
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = draw(&mut text, broker, &tables);
    text
}

/// One scenario: names of loops, and the ratios' first quarter, median and third.
struct Compared<'a> {
    name: &'a str,
    rows: Vec<(String, [f64; 3])>,
}

fn compared(table: &Table) -> Option<Compared<'_>> {
    let base = table.rows.first().filter(|base| matches!(base.of, Loop::Raw(_)))?;
    if base.rounds.iter().any(|round| round.latency.is_some()) {
        return None;
    }
    let of = |row: &Row| {
        let ratios = ratios(row, base);
        (row.of.name().replace('`', ""), [0.25, 0.5, 0.75].map(|share| ratios.at(share)))
    };
    let rows = table.rows.iter().filter(|row| !matches!(row.of, Loop::Raw(_))).map(of).collect();
    Some(Compared { name: table.name, rows })
}

fn draw(text: &mut String, broker: &str, tables: &[Compared<'_>]) -> Result {
    let lines = tables.iter().map(|table| table.rows.len() + 1).sum::<usize>() as f64;
    let (right, bottom) = (LEFT + WIDTH, TOP + lines * LINE);
    let most = tables.iter().flat_map(|table| &table.rows).map(|(_, [.., high])| *high).fold(1.25, f64::max).min(MOST);
    let x = |ratio: f64| LEFT + WIDTH * ratio.min(most) / most;
    writeln!(
        text,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {:.0} {:.0}" role="img">"#,
        right + 60.0,
        bottom + 30.0
    )?;
    let title = format!("{broker}: messages per second, compared with the raw client");
    writeln!(text, "<title>{title}</title><style>{STYLE}</style>")?;
    writeln!(text, r#"<text class="title" x="0" y="16">{title}</text>"#)?;
    writeln!(
        text,
        r#"<text class="quiet" x="0" y="36">1 is as fast; bar: the middle half of all rounds, dot: the median</text>"#
    )?;
    for tick in (0..).map(|tick| f64::from(tick) * 0.25).take_while(|tick| *tick <= most) {
        let (x, class) = (x(tick), if tick == 1.0 { r#" class="one""# } else { "" });
        writeln!(text, r#"<line{class} x1="{x:.1}" x2="{x:.1}" y1="{TOP}" y2="{bottom}"/>"#)?;
        writeln!(text, r#"<text class="quiet" x="{x:.1}" y="{:.0}" text-anchor="middle">{tick}</text>"#, TOP - 6.0)?;
    }
    let mut y = TOP;
    for table in tables {
        y += LINE;
        writeln!(text, r#"<text class="title" x="0" y="{y:.0}">{}</text>"#, table.name)?;
        for (name, [low, median, high]) in &table.rows {
            y += LINE;
            let (from, middle, wide) = (x(*low), y - 4.0, x(*high) - x(*low));
            writeln!(text, r#"<text class="quiet" x="16" y="{y:.0}">{name}</text>"#)?;
            writeln!(text, r#"<rect x="{from:.1}" y="{:.1}" width="{wide:.1}" height="8" rx="2"/>"#, middle - 4.0)?;
            writeln!(text, r#"<circle cx="{:.1}" cy="{middle:.1}" r="4"/>"#, x(*median))?;
            writeln!(text, r#"<text x="{:.0}" y="{y:.0}">{median:.2}</text>"#, right + 16.0)?;
        }
    }
    writeln!(text, "</svg>")
}
