//! What a commit says beside its offset: what is settled beyond it, and how far events may have been handed out. Written into
//! the metadata of the commit, so that both are told at once, by whoever owns the partition.

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;

/// The brokers' default limit is 4,096 bytes.
const MAX_BYTES: usize = 3_000;
/// What is not ours, or of another version, begins otherwise.
const VERSION: &str = "t1:";

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

/// The metadata of a commit of `offset`; and how many of `beyond` (ascending) found no room.
pub(crate) fn encode(offset: u64, handed: u64, beyond: impl Iterator<Item = u64>) -> (String, usize) {
    let mut bytes = Vec::new();
    put(&mut bytes, handed.saturating_sub(offset));
    let (mut end, mut run, mut left) = (offset, None::<(u64, u64)>, 0);
    for settled in beyond {
        match &mut run {
            Some((_, next)) if *next == settled => *next += 1,
            _ if bytes.len() > MAX_BYTES - 40 => left += 1,
            _ => {
                end = put_run(&mut bytes, end, run.take());
                run = Some((settled, settled + 1));
            }
        }
    }
    put_run(&mut bytes, end, run);
    (format!("{VERSION}{}", STANDARD_NO_PAD.encode(bytes)), left)
}

fn put_run(bytes: &mut Vec<u8>, end: u64, run: Option<(u64, u64)>) -> u64 {
    let Some((first, next)) = run else { return end };
    put(bytes, first - end);
    put(bytes, next - first);
    next
}

/// What the metadata of a commit of `offset` says; nothing if it is not ours.
pub(crate) fn decode(offset: u64, metadata: &str) -> Marks {
    let bytes = metadata.strip_prefix(VERSION).and_then(|text| STANDARD_NO_PAD.decode(text).ok()).unwrap_or_default();
    let mut bytes = bytes.into_iter();
    let mut marks = Marks { handed: offset.saturating_add(take(&mut bytes).unwrap_or(0)), settled: Vec::new() };
    let mut end = offset;
    while let (Some(gap), Some(len)) = (take(&mut bytes), take(&mut bytes)) {
        let first = end.saturating_add(gap);
        end = first.saturating_add(len);
        marks.settled.push((first, end));
    }
    marks
}

fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take(bytes: &mut impl Iterator<Item = u8>) -> Option<u64> {
    let mut number = 0_u64;
    for shift in (0..64).step_by(7) {
        let byte = bytes.next()?;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
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

    #[test]
    fn what_is_not_ours_says_nothing() {
        for metadata in ["", "t1:", "t1:!!", "somebody else's", "t1:gICAgICAgICAgICAgIA", "t2:AAAA"] {
            assert_eq!(decode(7, metadata), Marks { handed: 7, settled: Vec::new() }, "{metadata}");
        }
    }
}
