//! Memory between two steps, and the use of memory and processors.

/// `mi_option_purge_delay` in mimalloc's list of options, the same number in its versions 2 and 3. `libmimalloc-sys` has
/// names for its neighbours, and none for this one.
const PURGE_DELAY: i32 = 15;

/// Freed memory is never given back.
const NEVER: std::ffi::c_long = -1;

/// Tells the allocator to keep freed memory instead of giving it back to the system.
///
/// Every training step frees and asks for the same large tensors; clearing pages that were given back took a third of
/// the time of a step. Kept only for a time, it must be a longer one than the longest step, and what that saves is small:
/// six percent of the peak of a large model. For the start of a program whose allocator is mimalloc; with another allocator
/// it does nothing.
pub fn keep_freed() {
    // SAFETY: sets a number in mimalloc's table of options, in one store; nothing else here sets any. The option is
    // documented to take a number of milliseconds.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, NEVER) };
}

/// Resources used by the process since it began.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// Processor time of all threads, in seconds, to the millisecond.
    pub cpu_seconds: f64,
    /// The most memory that was resident at a time, in bytes.
    pub peak_bytes: usize,
    /// What is resident now, in bytes.
    pub resident_bytes: usize,
}

/// Asks the system.
///
/// Peak and present size are those of `/proc` where there is one: the other source counts on Linux what the parent held
/// when it started this process.
pub fn usage() -> Usage {
    let [mut elapsed, mut user, mut system, mut rss, mut peak, mut commit, mut peak_commit, mut faults] = [0; 8];
    // SAFETY: eight valid pointers, each written once.
    unsafe {
        libmimalloc_sys::mi_process_info(
            &raw mut elapsed,
            &raw mut user,
            &raw mut system,
            &raw mut rss,
            &raw mut peak,
            &raw mut commit,
            &raw mut peak_commit,
            &raw mut faults,
        );
    }
    Usage {
        cpu_seconds: (user + system) as f64 / 1e3,
        peak_bytes: of_proc("VmHWM:").unwrap_or(peak),
        resident_bytes: of_proc("VmRSS:").unwrap_or(rss),
    }
}

/// A size in `/proc/self/status`, in bytes.
fn of_proc(name: &str) -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_only_grows() {
        let before = usage();
        let block = vec![1u8; 64 << 20];
        assert_eq!(block.iter().map(|&x| usize::from(x)).sum::<usize>(), 64 << 20);
        let after = usage();
        assert!(after.peak_bytes >= 64 << 20, "{after:?}");
        assert!(after.resident_bytes >= 64 << 20 && after.resident_bytes <= after.peak_bytes, "{after:?}");
        assert!(after.peak_bytes >= before.peak_bytes && after.cpu_seconds >= before.cpu_seconds);
    }
}
