//! Memory between two steps, and the use of memory and processors.

use std::ffi::c_long;
use std::time::Duration;

/// `mi_option_purge_delay` in mimalloc's list of options, the same number in its versions 2 and 3. `libmimalloc-sys` has
/// names for its neighbours, and none for this one.
const PURGE_DELAY: i32 = 15;

/// Freed memory is never given back.
const NEVER: c_long = -1;

/// Tells the allocator to keep freed memory instead of giving it back to the system.
///
/// Every training step frees and asks for the same large tensors; clearing pages that were given back took a third of
/// the time of a step. Kept only for a time, it must be a longer one than the longest step, and what that saves is small:
/// six percent of the peak of a large model. For the start of a program whose allocator is mimalloc; with another allocator
/// it does nothing.
pub fn keep_freed() {
    set_purge_delay(NEVER);
}

/// Tells the allocator to give freed memory back to the system, about once in every `interval` all that is free by then.
///
/// It looks whether the time has come when a thread has freed a whole page of its own, and then at the memory of all of
/// them: a program that does nothing gives nothing back.
///
/// For a server, which asks for blocks of ever other sizes: each leaves a gap in another place, and with [`keep_freed`]
/// every page that was ever in use stays resident. The resident memory then wanders upwards, a huge page at a time, although
/// the allocated memory does not grow.
pub fn give_back_freed(interval: Duration) {
    set_purge_delay(interval.as_millis().try_into().unwrap_or(c_long::MAX));
}

fn set_purge_delay(milliseconds: c_long) {
    // SAFETY: sets a number in mimalloc's table of options, in one store; nothing else sets any. The option is documented
    // to take a number of milliseconds, and -1 for never.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, milliseconds) };
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
    // Read once: the peak of a moment before may be less than what is resident now.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    Usage {
        cpu_seconds: (user + system) as f64 / 1e3,
        peak_bytes: size_in(&status, "VmHWM:").unwrap_or(peak),
        resident_bytes: size_in(&status, "VmRSS:").unwrap_or(rss),
    }
}

/// A size in the text of `/proc/self/status`, in bytes.
fn size_in(status: &str, name: &str) -> Option<usize> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use super::*;

    /// Held by a test that looks at the memory of the process.
    static PROCESS: Mutex<()> = Mutex::new(());

    #[test]
    fn freed_memory_is_kept_or_given_back_as_the_program_asks() {
        const SIZE: usize = 256 << 20;
        /// A test elsewhere in this process may take or free so much meanwhile.
        const OTHERS: usize = 64 << 20;
        let _alone = PROCESS.lock().unwrap_or_else(PoisonError::into_inner);
        // What stays resident of a block that was written and freed.
        let left_of_block = || {
            let before = usage().resident_bytes;
            // SAFETY: the block is written within its size, and freed once.
            unsafe {
                let block = libmimalloc_sys::mi_malloc(SIZE);
                std::ptr::write_bytes(block.cast::<u8>(), 1, SIZE);
                libmimalloc_sys::mi_free(block);
            }
            std::thread::sleep(Duration::from_millis(20));
            // SAFETY: looks for memory to give back, as every allocation may.
            unsafe { libmimalloc_sys::mi_collect(false) };
            usage().resident_bytes.saturating_sub(before)
        };
        give_back_freed(Duration::from_millis(1));
        assert!(left_of_block() < OTHERS);
        keep_freed();
        assert!(left_of_block() > SIZE - OTHERS);
    }

    #[test]
    fn what_was_used_only_grows() {
        let _alone = PROCESS.lock().unwrap_or_else(PoisonError::into_inner);
        let before = usage();
        let block = vec![1u8; 64 << 20];
        assert_eq!(block.iter().map(|&x| usize::from(x)).sum::<usize>(), 64 << 20);
        let after = usage();
        assert!(after.peak_bytes >= 64 << 20, "{after:?}");
        assert!(after.resident_bytes >= 64 << 20 && after.resident_bytes <= after.peak_bytes, "{after:?}");
        assert!(after.peak_bytes >= before.peak_bytes && after.cpu_seconds >= before.cpu_seconds);
    }
}
