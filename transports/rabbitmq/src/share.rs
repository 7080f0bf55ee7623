//! Which instance takes which slot: the same answer for the same question, always.

/// Shares `slots` among `instances` (ascending ids): for each slot the index of its instance.
///
/// By rendezvous hash of instance and slot, the best matches first, and no instance takes more than its share: each has as
/// many as any other, give or take one, and few move when an instance comes or goes.
pub(crate) fn share(slots: usize, instances: &[u64]) -> Vec<Option<usize>> {
    let mut shares = vec![None; slots];
    if instances.is_empty() {
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

    #[test]
    fn every_slot_has_an_instance_and_none_more_than_its_share() {
        for slots in 1..40 {
            for count in 1..10 {
                let ids: Vec<u64> = (1..=count).map(|i| i * 7).collect();
                let shares = share(slots, &ids);
                let of = |i: usize| shares.iter().filter(|share| **share == Some(i)).count();
                let counts: Vec<_> = (0..ids.len()).map(of).collect();
                assert_eq!(counts.iter().sum::<usize>(), slots);
                assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{slots} slots: {counts:?}");
            }
        }
        assert_eq!(share(2, &[]), [None; 2]);
    }
}
