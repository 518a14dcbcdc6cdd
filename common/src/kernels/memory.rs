//! What becomes of memory between two steps.

/// The number of `mi_option_purge_delay` in mimalloc's list of options, the same in its versions 2 and 3.
const PURGE_DELAY: i32 = 15;

/// Tells the allocator to keep freed memory instead of giving it back to the system.
///
/// Every training step frees and asks for the same large tensors; clearing pages that were given back took a quarter of
/// the time of a step of GPT-2's size. For the start of a program whose allocator is mimalloc, before it has threads;
/// with another allocator it does nothing.
pub fn keep_freed() {
    // SAFETY: sets a number in mimalloc's table of options. It must not race with other calls that set options, and
    // nothing else here sets any; -1 is a value the option is documented to take.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}
