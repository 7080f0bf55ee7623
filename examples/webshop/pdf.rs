//! Pages of text, rules and boxes, written as PDF in its standard fonts. Lengths are in points, from the lower left.

use pdf_writer::{Content, Name, Pdf, Rect, Ref, Str, TextStr};

use crate::text::win_ansi;

/// A4.
pub(crate) const PAGE: (f32, f32) = (595.0, 842.0);

pub(crate) type Colour = [f32; 3];

/// How a text looks.
#[derive(Clone, Copy)]
pub(crate) struct Style {
    pub(crate) size: f32,
    pub(crate) is_bold: bool,
    pub(crate) colour: Colour,
}

/// One page while it is drawn.
pub(crate) struct Page(Content);

impl Page {
    pub(crate) fn new() -> Self {
        Page(Content::new())
    }

    /// Writes `text` with its left end at `x`.
    pub(crate) fn left(&mut self, style: Style, x: f32, y: f32, text: &str) {
        let font = if style.is_bold { Name(b"Bold") } else { Name(b"Text") };
        self.fill_colour(style.colour);
        self.0.begin_text().set_font(font, style.size).next_line(x, y);
        self.0.show(Str(&win_ansi(text))).end_text();
    }

    /// Writes `text` with its right end at `x`.
    pub(crate) fn right(&mut self, style: Style, x: f32, y: f32, text: &str) {
        self.left(style, x - width(text, style.size), y, text);
    }

    /// Fills a box with its lower left corner at (`x`, `y`).
    pub(crate) fn fill(&mut self, colour: Colour, (x, y): (f32, f32), (width, height): (f32, f32)) {
        self.fill_colour(colour);
        self.0.rect(x, y, width, height).fill_nonzero();
    }

    fn fill_colour(&mut self, [r, g, b]: Colour) {
        self.0.set_fill_rgb(r, g, b);
    }
}

/// Makes a document of pages.
pub(crate) fn document(title: &str, pages: Vec<Page>) -> Vec<u8> {
    let mut next = 1..;
    let mut id = || Ref::new(next.next().unwrap_or(i32::MAX));
    let (catalog, tree, info, regular, bold) = (id(), id(), id(), id(), id());
    let pages: Vec<(Ref, Ref, Page)> = pages.into_iter().map(|page| (id(), id(), page)).collect();

    let mut pdf = Pdf::new();
    pdf.catalog(catalog).pages(tree);
    pdf.document_info(info).title(TextStr(title)).producer(TextStr("Tidings webshop"));
    let count = i32::try_from(pages.len()).unwrap_or(i32::MAX);
    pdf.pages(tree).kids(pages.iter().map(|(page, _, _)| *page)).count(count);
    for (font, name) in [(regular, &b"Helvetica"[..]), (bold, b"Helvetica-Bold")] {
        pdf.type1_font(font).base_font(Name(name)).encoding_predefined(Name(b"WinAnsiEncoding"));
    }
    for (page, content, drawn) in pages {
        let mut page = pdf.page(page);
        page.parent(tree).media_box(Rect::new(0.0, 0.0, PAGE.0, PAGE.1)).contents(content);
        page.resources().fonts().pair(Name(b"Text"), regular).pair(Name(b"Bold"), bold);
        drop(page);
        pdf.stream(content, &drawn.0.finish());
    }
    pdf.finish()
}

/// Breaks a text into at most `max_lines` lines of at most `max_width`; what does not fit ends in an ellipsis.
pub(crate) fn wrap(text: &str, size: f32, max_width: f32, max_lines: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() && lines.len() < max_lines {
        let fits = fitting(rest, size, max_width);
        let is_last = fits == rest.len() || lines.len() + 1 == max_lines;
        let cut = if is_last { fits } else { rest[..fits].rfind(' ').unwrap_or(fits) };
        lines.push(rest[..cut].trim_end().to_owned());
        rest = rest[cut..].trim_start();
    }
    if let Some(last) = lines.last_mut().filter(|_| !rest.is_empty()) {
        while last.chars().count() > 1 && width(last, size) + width("…", size) > max_width {
            last.pop();
        }
        last.push('…');
    }
    lines
}

/// The length in bytes of what fits, at least one character.
fn fitting(text: &str, size: f32, max_width: f32) -> usize {
    let mut used = 0.0;
    for (at, c) in text.char_indices() {
        used += width(c.encode_utf8(&mut [0; 4]), size);
        if used > max_width && at > 0 {
            return at;
        }
    }
    text.len()
}

fn width(text: &str, size: f32) -> f32 {
    win_ansi(text).into_iter().map(|byte| f32::from(advance(byte))).sum::<f32>() * size / 1000.0
}

/// The advance width of a character of Helvetica, in thousandths of its size; about right for what is not ASCII and
/// for bold, exact for digits in both.
fn advance(byte: u8) -> u16 {
    #[rustfmt::skip]
    const ASCII: [u16; 95] = [
        278, 278, 355, 556, 556, 889, 667, 191, 333, 333, 389, 584, 278, 333, 278, 278,
        556, 556, 556, 556, 556, 556, 556, 556, 556, 556, 278, 278, 584, 584, 584, 556,
        1015, 667, 667, 722, 722, 667, 611, 778, 722, 278, 500, 667, 556, 833, 722, 778,
        667, 778, 722, 667, 611, 722, 667, 944, 667, 667, 611, 278, 278, 278, 469, 556,
        333, 556, 556, 500, 556, 556, 278, 556, 556, 222, 222, 500, 222, 833, 556, 556,
        556, 556, 333, 500, 278, 556, 500, 722, 500, 500, 500, 334, 260, 334, 584,
    ];
    match byte {
        b' '..=b'~' => ASCII[usize::from(byte - b' ')],
        0x85 => 1000, // the ellipsis
        _ => 600,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wraps_at_spaces_and_ends_in_an_ellipsis() {
        assert_eq!(wrap("one two", 10.0, 500.0, 2), ["one two"]);
        assert_eq!(wrap("one two three four", 10.0, 40.0, 9), ["one two", "three", "four"]);
        assert_eq!(wrap("one two three four", 10.0, 40.0, 1), ["one tw…"]);
        assert!(wrap("  ", 10.0, 40.0, 3).is_empty());
    }

    #[test]
    fn wraps_what_has_no_spaces_or_no_room() {
        let lines = wrap(&"ü".repeat(1_000_000), 10.0, 60.0, 2);
        assert!(lines.len() == 2 && lines[1].ends_with('…'));
        assert_eq!(wrap("漢字", 10.0, 0.0, 5), ["漢", "字"]);
    }

    #[test]
    fn measures_digits_exactly() {
        assert!((width("1234", 10.0) - 22.24).abs() < 0.001);
    }
}
