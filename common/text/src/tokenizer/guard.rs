//! Panics of the `tokenizers` library, as errors.
//!
//! A file from elsewhere can bring the library to an index out of bounds or a failed `expect`: a charsmap that points
//! past its end, a decoder that strips more than there is, a post-processor that asks for a second text. Such a file is
//! to be refused with its name, not to end the program.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    /// Whether a panic of this thread is caught and told as an error, so that nothing is printed.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Calls `call`; a panic becomes its message.
pub(super) fn guarded<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let print = take_hook();
        set_hook(Box::new(move |info| {
            if !CAUGHT.get() {
                print(info);
            }
        }));
    });
    let outer = CAUGHT.replace(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    CAUGHT.set(outer);
    result.map_err(|panic| message(&*panic))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("the library panicked").to_owned()
}
