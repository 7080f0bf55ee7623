//! What a commit says beside its offset: what is settled beyond it, and how far events may have been handed out. Written into
//! the metadata of the commit, so that both are told at once, by whoever owns the partition.
//!
//! There is little room, and what finds none is in flight: numbers are written in as many bits as they need (exponential Golomb codes).

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;

/// The brokers' default limit is 4,096 bytes of text.
const MAX_BITS: usize = 24_000;
/// What two numbers need at most.
const TWO_NUMBERS: usize = 2 * 128;
/// What is of another version, or not ours, begins otherwise.
const VERSION: &str = "t2:";

/// What the former owner of a partition has told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Marks {
    /// What is before this may have been handed out.
    pub(crate) handed: u64,
    /// Runs of settled offsets beyond the committed one: first, and one after the last. Ascending.
    settled: Vec<(u64, u64)>,
}

impl Marks {
    /// Everything before this may have been handed out, and nothing is known to be settled.
    pub(crate) fn handed_out(before: u64) -> Self {
        Self { handed: before, settled: Vec::new() }
    }

    pub(crate) fn is_settled(&self, offset: u64) -> bool {
        let after = self.settled.partition_point(|(first, _)| *first <= offset);
        after.checked_sub(1).is_some_and(|at| offset < self.settled[at].1)
    }
}

/// The metadata of a commit of `offset`; and how many of `beyond` (ascending, none of them `offset`) found no room.
pub(crate) fn encode(offset: u64, handed: u64, beyond: impl Iterator<Item = u64>) -> (String, usize) {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let mut count = 0;
    for settled in beyond {
        count += 1;
        match runs.last_mut() {
            Some((_, next)) if *next == settled => *next += 1,
            _ => runs.push((settled, settled + 1)),
        }
    }
    // So many low bits are written as they are: about as many as a run is long.
    let low = (count / runs.len().max(1)).max(1).ilog2();
    let mut bits = Bits::default();
    bits.put_number(handed.saturating_sub(offset), 0);
    bits.put(u64::from(low), 6);
    let (mut end, mut left) = (offset, 0);
    for (first, next) in runs {
        match first.checked_sub(end + 1) {
            Some(gap) if left == 0 && bits.count + TWO_NUMBERS <= MAX_BITS => {
                bits.put_number(gap, 0);
                bits.put_number(next - first - 1, low);
                end = next;
            }
            _ => left += usize::try_from(next - first).unwrap_or(usize::MAX),
        }
    }
    (format!("{VERSION}{}", STANDARD_NO_PAD.encode(bits.bytes)), left)
}

/// What the metadata of a commit of `offset` says. Who wrote what cannot be read may have handed out anything.
pub(crate) fn decode(offset: u64, metadata: &str) -> Marks {
    if metadata.is_empty() {
        return Marks::handed_out(offset);
    }
    let Some(bytes) = metadata.strip_prefix(VERSION).and_then(|text| STANDARD_NO_PAD.decode(text).ok()) else {
        return Marks::handed_out(u64::MAX);
    };
    let mut bits = bytes.iter().flat_map(|byte| (0..8).rev().map(move |at| u64::from(byte >> at & 1)));
    let bits = &mut bits;
    let mut marks = Marks { handed: offset.saturating_add(take_number(bits, 0).unwrap_or(0)), settled: Vec::new() };
    let low = take(bits, 6).and_then(|low| u32::try_from(low).ok()).unwrap_or(0);
    let mut end = offset;
    while let (Some(gap), Some(more)) = (take_number(bits, 0), take_number(bits, low)) {
        let first = end.saturating_add(gap).saturating_add(1);
        end = first.saturating_add(more).saturating_add(1);
        marks.settled.push((first, end));
    }
    marks
}

/// Bits in a row, the highest first; what is left of the last byte is zeros, which begin a number and end none.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    count: usize,
}

impl Bits {
    /// Writes the lowest `count` bits.
    fn put(&mut self, bits: u64, count: u32) {
        for at in (0..count).rev() {
            if self.count.is_multiple_of(8) {
                self.bytes.push(0);
            }
            if let Some(last) = self.bytes.last_mut() {
                *last |= ((bits >> at & 1) as u8) << (7 - self.count % 8);
            }
            self.count += 1;
        }
    }

    /// Writes one more than what is above the `low` bits, behind a zero for each of its bits but one; then those.
    fn put_number(&mut self, number: u64, low: u32) {
        let high = (number >> low).saturating_add(1);
        self.put(0, high.ilog2());
        self.put(high, high.ilog2() + 1);
        self.put(number, low);
    }
}

fn take(bits: &mut impl Iterator<Item = u64>, count: u32) -> Option<u64> {
    (0..count).try_fold(0, |number, _| Some(number << 1 | bits.next()?))
}

fn take_number(bits: &mut impl Iterator<Item = u64>, low: u32) -> Option<u64> {
    let mut zeros = 0;
    while bits.next()? == 0 {
        zeros += 1;
    }
    if zeros > 63 {
        return None;
    }
    let high = (1 << zeros | take(bits, zeros)?) - 1;
    Some(high.checked_shl(low)? | take(bits, low)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn come_back_as_they_were() {
        for seed in 0..200 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let offset = rng.u64(0..1 << 50);
            let handed = offset + rng.u64(0..10_000);
            let mut beyond: Vec<u64> = (0..rng.usize(0..300)).map(|_| offset + rng.u64(1..2_000)).collect();
            beyond.sort_unstable();
            beyond.dedup();
            let (metadata, left) = encode(offset, handed, beyond.iter().copied());
            let marks = decode(offset, &metadata);
            assert_eq!((left, marks.handed), (0, handed));
            for o in offset..offset + 2_000 {
                assert_eq!(marks.is_settled(o), beyond.contains(&o), "seed {seed}: {o}");
            }
        }
    }

    #[test]
    fn what_finds_no_room_is_counted_and_never_taken_as_settled() {
        let beyond: Vec<u64> = (0..10_000).map(|n| 1_000_000 + n * 3).collect();
        let (metadata, left) = encode(5, 2_000_000, beyond.iter().copied());
        let marks = decode(5, &metadata);
        assert!(metadata.len() <= 4_096 && left > 0, "{} bytes, {left} left", metadata.len());
        let told = beyond.iter().filter(|offset| marks.is_settled(**offset)).count();
        assert_eq!(told + left, beyond.len());
    }

    /// One in a hundred is open: that many are what a window may have behind it while some events are repeated.
    #[test]
    fn one_hole_in_a_hundred_finds_room_for_a_quarter_of_a_million() {
        let mut rng = fastrand::Rng::with_seed(1);
        let beyond = (1..300_000_u64).filter(|_| rng.u8(0..100) > 0);
        let (metadata, _) = encode(0, 300_000, beyond);
        let reached = decode(0, &metadata).settled.last().unwrap().1;
        assert!(metadata.len() <= 4_096 && reached > 250_000, "{} bytes reach {reached}", metadata.len());
    }

    #[test]
    fn any_number_comes_back_with_any_low_bits() {
        for number in (0..64).flat_map(|shift| [(1_u64 << shift) - 1, 1 << shift]) {
            for low in 0..64 {
                let mut bits = Bits::default();
                bits.put_number(number, low);
                bits.put_number(7, 0);
                assert!(bits.count <= TWO_NUMBERS);
                let mut written =
                    bits.bytes.iter().flat_map(|byte| (0..8).rev().map(move |at| u64::from(byte >> at & 1)));
                let written = &mut written;
                assert_eq!((take_number(written, low), take_number(written, 0)), (Some(number), Some(7)), "{low}");
            }
        }
    }

    #[test]
    fn what_cannot_be_read_may_mean_anything_but_settled() {
        for (metadata, handed) in [
            ("", 7),
            ("t2:", 7),
            ("t2:AAAAAAAAAAAAAAAAAAAA", 7),
            ("t2:!!", u64::MAX),
            ("t1:gAAA", u64::MAX),
            ("?", u64::MAX),
        ] {
            assert_eq!(decode(7, metadata), Marks { handed, settled: Vec::new() }, "{metadata}");
        }
    }
}
