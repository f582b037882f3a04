//! What order among blocks costs: instructions that the assembler adds around a release or an acquire
//! whose scope is wider than the block.
//!
//! Read from what ptxas 13.0 makes of each form for sm_90a: a release becomes MEMBAR.ALL.GPU (or .SC,
//! .SYS) before the instruction, which waits for all the warp's writes; an acquire becomes CCTL.IVALL
//! after it, which drops the multiprocessor's first-level cache. Within the block neither is needed.

use serde::Serialize;

/// Costs of one instruction, or summed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct OrderCost {
    /// Memory barriers of the device.
    pub memory_barriers: u64,
    /// Invalidations of the first-level cache.
    pub invalidations: u64,
}

impl std::ops::AddAssign for OrderCost {
    fn add_assign(&mut self, other: Self) {
        self.memory_barriers += other.memory_barriers;
        self.invalidations += other.invalidations;
    }
}

impl OrderCost {
    /// Of one execution of an instruction.
    pub fn of(root: &str, modifiers: &[String]) -> Self {
        let has = |names: &[&str]| modifiers.iter().any(|m| names.contains(&m.as_str()));
        let (releases, acquires) = match root {
            "membar" => (has(&["gl", "sys"]), has(&["gl", "sys"])),
            // Without a state space, and for other blocks' shared memory.
            "fence" if has(&["proxy"]) => {
                (has(&["async"]) && !has(&["global", "shared::cta"]), false)
            }
            "fence" if has(&["mbarrier_init"]) => (false, false),
            "barrier" if has(&["cluster"]) => {
                let ordered = !has(&["relaxed"]);
                (ordered && has(&["arrive"]), ordered && has(&["wait"]))
            }
            "fence" | "mbarrier" | "ld" | "st" | "atom" | "red" => {
                // The scope of an atom or red without one is the device.
                let atomic = matches!(root, "atom" | "red");
                let wide = has(&["cluster", "gpu", "sys"]) || atomic && !has(&["cta"]);
                let both = has(&["acq_rel", "sc"]);
                (wide && (both || has(&["release"])), wide && (both || has(&["acquire"])))
            }
            _ => (false, false),
        };
        Self { memory_barriers: releases.into(), invalidations: acquires.into() }
    }

    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Forms, and how many MEMBAR wider than the block and CCTL.IVALL ptxas 13.0 makes of each.
    const ASSEMBLED: [(&str, u64, u64); 34] = [
        ("mbarrier.arrive.shared::cta.b64", 0, 0),
        ("mbarrier.arrive.release.cta.shared::cta.b64", 0, 0),
        ("mbarrier.arrive.release.cluster.shared::cta.b64", 1, 0),
        ("mbarrier.arrive.shared::cluster.b64", 0, 0),
        ("mbarrier.arrive.release.cluster.shared::cluster.b64", 1, 0),
        ("mbarrier.arrive.relaxed.cluster.shared::cluster.b64", 0, 0),
        ("mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64", 1, 0),
        ("mbarrier.try_wait.parity.shared::cta.b64", 0, 0),
        ("mbarrier.try_wait.parity.acquire.cta.shared::cta.b64", 0, 0),
        ("mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64", 0, 1),
        ("mbarrier.test_wait.parity.acquire.cluster.shared::cta.b64", 0, 1),
        ("barrier.cluster.arrive.aligned", 1, 0),
        ("barrier.cluster.arrive.relaxed.aligned", 0, 0),
        ("barrier.cluster.wait.aligned", 0, 1),
        ("fence.mbarrier_init.release.cluster", 0, 0),
        ("fence.proxy.async", 1, 0),
        ("fence.proxy.async.global", 0, 0),
        ("fence.proxy.async.shared::cta", 0, 0),
        ("fence.proxy.async.shared::cluster", 1, 0),
        ("fence.acq_rel.cta", 0, 0),
        ("fence.acq_rel.cluster", 1, 1),
        ("fence.sc.gpu", 1, 1),
        ("membar.cta", 0, 0),
        ("membar.gl", 1, 1),
        ("ld.acquire.cta.global.u32", 0, 0),
        ("ld.acquire.gpu.global.u32", 0, 1),
        ("ld.relaxed.gpu.global.u32", 0, 0),
        ("st.release.cta.global.u32", 0, 0),
        ("st.release.cluster.shared::cluster.u32", 1, 0),
        ("atom.acq_rel.gpu.global.add.u32", 1, 1),
        ("atom.acq_rel.global.add.u32", 1, 1),
        ("red.release.global.add.u32", 1, 0),
        ("atom.global.add.u32", 0, 0),
        ("red.release.gpu.global.add.u32", 1, 0),
    ];

    #[test]
    fn costs_are_those_of_the_assembler() {
        for (form, memory_barriers, invalidations) in ASSEMBLED {
            let mut parts = form.split('.').map(String::from);
            let root = parts.next().unwrap_or_default();
            let cost = OrderCost::of(&root, &parts.collect::<Vec<_>>());
            assert_eq!(cost, OrderCost { memory_barriers, invalidations }, "{form}");
        }
    }
}
