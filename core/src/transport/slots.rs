//! Which slot takes a key, and which instance takes a slot: the same answer for the same question, always, on any broker.

use crate::Key;

/// The slot of a key; what has no key is in slot 0.
#[must_use]
pub fn slot_of(key: Option<&Key>, slots: u32) -> u32 {
    match key {
        Some(key) if slots > 1 => (mix(fnv(key.as_bytes())) % u64::from(slots)) as u32,
        _ => 0,
    }
}

/// FNV-1a, 64 bits: stable, and short for the short keys it is used on.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Shares `slots` among `instances` (ascending ids): for each slot the index of its instance.
///
/// One slot stays with the oldest instance. More are shared by rendezvous hash of instance and slot, the
/// best matches first, and no instance takes more than its share: so each has as many as any other, give
/// or take one, and few move when an instance comes or goes.
#[must_use]
pub fn share_slots(slots: usize, instances: &[u64]) -> Vec<Option<usize>> {
    let mut shares = vec![None; slots];
    if slots <= 1 || instances.len() <= 1 {
        shares.fill((!instances.is_empty()).then_some(0));
        return shares;
    }
    let (least, mut more) = (slots / instances.len(), slots % instances.len());
    let mut taken = vec![0; instances.len()];
    for (slot, instance) in best_matches(slots, instances) {
        let full = taken[instance] > least || (taken[instance] == least && more == 0);
        if shares[slot].is_none() && !full {
            more -= usize::from(taken[instance] == least);
            taken[instance] += 1;
            shares[slot] = Some(instance);
        }
    }
    shares
}

fn best_matches(slots: usize, instances: &[u64]) -> Vec<(usize, usize)> {
    let weight = |&(slot, instance): &(usize, usize)| mix(instances[instance].rotate_left(32) ^ slot as u64);
    let mut pairs: Vec<_> = (0..slots).flat_map(|slot| (0..instances.len()).map(move |i| (slot, i))).collect();
    pairs.sort_by_key(|pair| std::cmp::Reverse(weight(pair)));
    pairs
}

/// The finalizer of `SplitMix64`: every bit of the input changes about half of the output's.
fn mix(hash: u64) -> u64 {
    let hash = hash.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(shares: &[Option<usize>], instances: usize) -> Vec<usize> {
        (0..instances).map(|i| shares.iter().filter(|s| **s == Some(i)).count()).collect()
    }

    #[test]
    fn every_slot_has_an_instance_and_none_more_than_its_share_slots() {
        for slots in 1..40 {
            for instances in 1..10 {
                let ids: Vec<u64> = (1..=instances as u64).map(|i| i * 7).collect();
                let counts = counts(&share_slots(slots, &ids), instances);
                assert_eq!(counts.iter().sum::<usize>(), slots);
                let (least, most) = (counts.iter().min(), counts.iter().max());
                assert!(most <= least.map(|l| l + 1).as_ref(), "{slots} slots: {counts:?}");
            }
        }
        assert_eq!(share_slots(3, &[]), [None; 3]);
    }

    #[test]
    fn few_slots_move_when_an_instance_joins() {
        let (before, after) = (share_slots(64, &[1, 2, 3]), share_slots(64, &[1, 2, 3, 4]));
        let moved = before.iter().zip(&after).filter(|(b, a)| b != a).count();
        assert!((16..=32).contains(&moved), "{moved} of 64 moved, 16 must");
    }

    #[test]
    fn keys_spread_and_stay() {
        let mut counts = [0; 8];
        let slot = |key: &str, slots| slot_of((!key.is_empty()).then(|| Key::from(key)).as_ref(), slots);
        (0..8000).for_each(|i| counts[slot(&format!("order-{i}"), 8) as usize] += 1);
        assert!(counts.iter().all(|c| (850..1150).contains(c)), "{counts:?}");
        assert_eq!(fnv(b"a"), 0xaf63_dc4c_8601_ec8c, "the published value of FNV-1a");
        assert_eq!((slot("", 8), slot("x", 1), slot("x", 8)), (0, 0, slot("x", 8)));
    }
}
