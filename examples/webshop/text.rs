//! Text from outside, made fit for a terminal, a label and a PDF.

/// Replaces what could steer a terminal or reorder a line (control and bidi characters) by spaces.
pub(crate) fn clean(text: &str) -> String {
    text.chars().map(|c| if is_steering(c) { ' ' } else { c }).collect()
}

/// Whether a character has no place in a name, an address or a description.
pub(crate) fn is_steering(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The columns a text takes on a terminal: East Asian wide characters take two, combining marks none.
pub(crate) fn width(text: &str) -> usize {
    text.chars().map(char_width).sum()
}

fn char_width(c: char) -> usize {
    match c {
        '\u{300}'..='\u{36f}' | '\u{200b}'..='\u{200f}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' => 0,
        '\u{1100}'..='\u{115f}'
        | '\u{2e80}'..='\u{a4cf}'
        | '\u{ac00}'..='\u{d7a3}'
        | '\u{f900}'..='\u{faff}'
        | '\u{ff00}'..='\u{ff60}'
        | '\u{1f300}'..='\u{1faff}'
        | '\u{20000}'..='\u{3fffd}' => 2,
        _ => 1,
    }
}

/// `text`, cleaned, then spaces up to `columns`.
pub(crate) fn left(text: &str, columns: usize) -> String {
    let text = clean(text);
    let spaces = columns.saturating_sub(width(&text));
    format!("{text}{}", " ".repeat(spaces))
}

/// Spaces up to `columns`, then `text`, cleaned.
pub(crate) fn right(text: &str, columns: usize) -> String {
    let text = clean(text);
    let spaces = columns.saturating_sub(width(&text));
    format!("{}{text}", " ".repeat(spaces))
}

/// An amount in cents with thousands separators: `1,234.50`.
pub(crate) fn money(cents: i64) -> String {
    let whole = (cents / 100).unsigned_abs().to_string();
    let mut grouped = String::new();
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    let sign = if cents < 0 { "-" } else { "" };
    format!("{sign}{grouped}.{:02}", (cents % 100).unsigned_abs())
}

/// A hash that is the same on every machine and in every release (FNV-1a, 64 bits).
pub(crate) fn stable_hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The bytes of `text` in the encoding of the PDF standard fonts (WinAnsi, ISO 32000-1 annex D). What it lacks is
/// written in similar letters (`Łukasz` as `Lukasz`, `Иван` as `Ivan`), and as `?` where there are none.
pub(crate) fn win_ansi(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    for c in clean(text).chars().filter(|c| char_width(*c) > 0) {
        match win_ansi_byte(c) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend(similar_letters(c).chars().map(|c| win_ansi_byte(c).unwrap_or(b'?'))),
        }
    }
    bytes
}

fn win_ansi_byte(c: char) -> Option<u8> {
    /// The bytes 0x80 to 0x9f; a space where the encoding has a hole.
    const HIGH: &str = "€ ‚ƒ„…†‡ˆ‰Š‹Œ Ž  ‘’“”•–—˜™š›œ žŸ";
    match c {
        ' '..='~' | '\u{a0}'..='\u{ff}' => u8::try_from(u32::from(c)).ok(),
        _ => HIGH.chars().position(|high| high == c).and_then(|i| u8::try_from(0x80 + i).ok()),
    }
}

/// Each entry is a letter, then what is written in its stead.
const SIMILAR: &str = "āa ăa ąa ćc ċc čc ďd đd ēe ėe ęe ěe ễe ğg ģg ġg ħh īi įi ıi ķk ĺl ļl ľl łl ńn ņn ňn ōo őo ơo ŕr řr \
    śs şs șs ţt țt ťt ūu ůu űu ųu ưu ŵw ŷy źz żz −- ‐- ‑- \
    αa βv γg δd εe ζz ηi θth ιi κk λl μm νn ξx οo πp ρr σs ςs τt υy φf χch ψps ωo άa έe ήi ίi ϊi όo ύy ώo \
    аa бb вv гg дd еe ёyo жzh зz иi йy кk лl мm нn оo пp рr сs тt уu фf хkh цts чch шsh щshch ъ ыy ь эe юyu яya іi їyi єye ґg";

fn similar_letters(c: char) -> String {
    let small = c.to_lowercase().next().unwrap_or(c);
    let found = SIMILAR.split(' ').find_map(|entry| entry.strip_prefix(small));
    let letters = match found {
        Some(letters) => letters.to_owned(),
        None if small.is_ascii() => small.to_string(),
        None => "?".to_owned(),
    };
    if c == small { letters } else { capitalised(&letters) }
}

fn capitalised(letters: &str) -> String {
    let mut chars = letters.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(text: &str) -> String {
        win_ansi(text).into_iter().map(char::from).collect()
    }

    #[test]
    fn pads_by_columns_not_by_bytes() {
        assert_eq!(left("Zürich", 8), "Zürich  ");
        assert_eq!(right("東京", 6), "  東京");
        assert_eq!(left("e\u{301}", 2), "e\u{301} ");
        assert_eq!(left("too long", 3), "too long");
        assert_eq!(left("a\x1b[31m", 2), "a [31m");
    }

    #[test]
    fn groups_thousands() {
        assert_eq!(money(0), "0.00");
        assert_eq!(money(123_450), "1,234.50");
        assert_eq!(money(100_000_005), "1,000,000.05");
        assert_eq!(money(-705), "-7.05");
        assert_eq!(money(i64::MIN), "-92,233,720,368,547,758.08");
    }

    #[test]
    fn keeps_what_the_encoding_has() {
        assert_eq!(win_ansi("5 €, Ø"), [b'5', b' ', 0x80, b',', b' ', 0xd8]);
        assert_eq!(win_ansi("Žižek’s"), [0x8e, b'i', 0x9e, b'e', b'k', 0x92, b's']);
    }

    #[test]
    fn writes_the_rest_in_similar_letters() {
        assert_eq!(printed("Łukasz Dąbrowska"), "Lukasz Dabrowska");
        assert_eq!(printed("İstanbul Işık"), "Istanbul Isik");
        assert_eq!(printed("Δημήτρης Юлия Щука"), "Dimitris Yuliya Shchuka");
        assert_eq!(printed("Jose\u{301}"), "Jose");
        assert_eq!(printed("東京 🦊\n"), "?? ? ");
    }

    #[test]
    fn hashes_as_published() {
        assert_eq!(stable_hash("a"), 0xaf63_dc4c_8601_ec8c);
    }
}
