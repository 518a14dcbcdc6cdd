//! Worker threads that wait awake for many short pieces of work in a row.
//!
//! Decoding is thousands of products of microseconds each. Handing one to the thread pool and waiting for it takes as
//! long as computing it, so for the length of a [`with_workers`] worker threads of its own watch one shared word instead. (Threads
//! of the pool could not be had: should two pairs of owner and workers hold all of them, the owners could wait for the pool for ever.) What is
//! computed is cut into the same pieces either way, and by one thread alone, so results do not depend on any of it.

use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use rayon::prelude::*;

/// How often a waiting thread looks again before it lets others run: some tens of microseconds.
const SPINS: u32 = 1_000;

/// How often before it sleeps, if it is a worker: some hundred microseconds.
const LOOKS: u32 = 1_400;

/// The low half of [`Workers::open`].
const PIECES: u64 = 0xFFFF_FFFF;

thread_local! {
    /// The workers of the [`with_workers`] this thread is in, or null.
    static WORKERS: Cell<*const Workers> = const { Cell::new(ptr::null()) };
}

/// Runs `body`, during which this thread's calls of [`for_each`] are shared with worker threads.
///
/// For many short operations in a row. There is one thread less than in the pool: the caller works too.
pub fn with_workers<R>(body: impl FnOnce() -> R) -> R {
    if !WORKERS.get().is_null() {
        return body();
    }
    let n_workers = rayon::current_num_threads() - 1;
    let workers = Workers::new(n_workers);
    std::thread::scope(|scope| {
        for _ in 0..n_workers {
            // A worker that the system refuses is not missed: the others take the pieces.
            let _ = std::thread::Builder::new().name("kernels".into()).spawn_scoped(scope, || workers.work());
        }
        // However the body ends, the workers end: the scope waits for them.
        let _end = End(&workers);
        WORKERS.set(&raw const workers);
        body()
    })
}

/// Calls `task` with every number below `n`, in any order and on several threads.
pub fn for_each(n: usize, task: impl Fn(usize) + Sync) {
    if n <= 1 {
        return (0..n).for_each(task);
    }
    let workers = WORKERS.replace(ptr::null()); // a task's own calls go elsewhere: the workers are busy with this one
    if workers.is_null() {
        return (0..n).into_par_iter().for_each(&task);
    }
    // SAFETY: the pointer was set by `with_workers` on this thread, which clears it before the workers are dropped.
    let shared = unsafe { &*workers };
    let panic = catch_unwind(AssertUnwindSafe(|| shared.run(n, &task)));
    WORKERS.set(workers);
    panic.unwrap_or_else(|panic| resume_unwind(panic));
}

/// Calls `task` with each of `items`, as [`for_each`] does.
pub fn for_each_of<T: Send>(items: &mut [T], task: impl Fn(&mut T) + Sync) {
    /// A pointer to the items that the threads share, each its own.
    struct Items<T>(*mut T);
    // SAFETY: items may be sent to other threads, and no two tasks touch the same one.
    unsafe impl<T: Send> Sync for Items<T> {}
    impl<T> Items<T> {
        fn item(&self, i: usize) -> *mut T {
            self.0.wrapping_add(i)
        }
    }
    let shared = Items(items.as_mut_ptr());
    // SAFETY: each number below the length comes once, so this is the only reference to that item.
    for_each(items.len(), |i| task(unsafe { &mut *shared.item(i) }));
}

/// Ends the workers when it is dropped.
struct End<'a>(&'a Workers);

impl Drop for End<'_> {
    fn drop(&mut self) {
        WORKERS.set(ptr::null());
        self.0.over.store(true, Ordering::SeqCst);
        self.0.wake();
    }
}

/// State shared by the threads. One of them, the owner, posts jobs.
struct Workers {
    count: usize,
    /// The number of the job, and in the low half how many of its pieces nobody has taken yet.
    open: AtomicU64,
    job: UnsafeCell<Job>,
    n_done: AtomicUsize,
    panicked: AtomicBool,
    over: AtomicBool,
    n_asleep: AtomicUsize,
    sleep: Mutex<()>,
    wake_up: Condvar,
}

// SAFETY: everything but `job` is made for sharing. `job` is written by the owner while no piece is open or being worked
// on, and read by those who took a piece, which they can only after the write (`open` is released and acquired).
unsafe impl Sync for Workers {}

/// A closure without its type, and the number of its pieces.
#[derive(Clone, Copy)]
struct Job {
    task: *const (),
    call: unsafe fn(*const (), usize),
    n: usize,
}

/// Calls the `F` behind `task`.
///
/// # Safety
/// `task` points to an `F` that lives and may be shared.
unsafe fn call<F: Fn(usize) + Sync>(task: *const (), piece: usize) {
    // SAFETY: promised by the caller.
    unsafe { (*task.cast::<F>())(piece) }
}

impl Workers {
    fn new(count: usize) -> Self {
        let job = Job { task: ptr::null(), call: call::<fn(usize)>, n: 0 };
        Self {
            count,
            open: AtomicU64::new(0),
            job: UnsafeCell::new(job),
            n_done: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            over: AtomicBool::new(false),
            n_asleep: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake_up: Condvar::new(),
        }
    }

    /// The owner's part: posts the job, takes pieces too, and waits until all are done.
    fn run<F: Fn(usize) + Sync>(&self, n: usize, task: &F) {
        if self.count == 0 {
            return (0..n).for_each(task);
        }
        let n_pieces = u64::from(u32::try_from(n).expect("fewer pieces than 2³²"));
        // SAFETY: the last job is over, all its pieces are done and none is open, so nobody reads this.
        unsafe { *self.job.get() = Job { task: ptr::from_ref(task).cast(), call: call::<F>, n } };
        self.n_done.store(0, Ordering::Relaxed);
        self.panicked.store(false, Ordering::Relaxed);
        let number = (self.open.load(Ordering::Relaxed) >> 32).wrapping_add(1) << 32;
        self.open.store(number | n_pieces, Ordering::SeqCst);
        if self.n_asleep.load(Ordering::SeqCst) > 0 {
            self.wake();
        }
        while self.take_pieces() {}
        // `task` is borrowed: nothing returns, and nothing unwinds, before the last piece is done.
        let mut looks = 0;
        while self.n_done.load(Ordering::Acquire) < n {
            wait_a_little(&mut looks);
        }
        assert!(!self.panicked.load(Ordering::Relaxed), "a task panicked");
    }

    /// A worker's part: takes pieces until the end.
    fn work(&self) {
        let mut looks = 0;
        while !self.over.load(Ordering::Acquire) {
            if self.take_pieces() {
                looks = 0;
            } else if looks < LOOKS {
                wait_a_little(&mut looks);
            } else {
                self.sleep();
                looks = 0;
            }
        }
    }

    /// Does its share of the pieces that are left, if there are any.
    ///
    /// The word from which they are taken travels between the threads each time, which can take as long as a small piece: a
    /// thread takes several at a time, and fewer the fewer are left, so that all end together.
    fn take_pieces(&self) -> bool {
        let open = self.open.load(Ordering::Acquire);
        let n_left = open & PIECES;
        if n_left == 0 {
            return false;
        }
        let n_taken = n_left.div_ceil(self.count as u64 + 1);
        // A failure means that somebody was faster: look again.
        if self.open.compare_exchange(open, open - n_taken, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            // SAFETY: these pieces are taken and not done, so the owner waits in `run`: the job is the one posted with them,
            // and what it borrows lives.
            let job = unsafe { *self.job.get() };
            let first = job.n - n_left as usize;
            for piece in first..first + n_taken as usize {
                // SAFETY: as above.
                if catch_unwind(AssertUnwindSafe(|| unsafe { (job.call)(job.task, piece) })).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
            }
            self.n_done.fetch_add(n_taken as usize, Ordering::Release);
        }
        true
    }

    /// Waits until there is something to do.
    fn sleep(&self) {
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        // Counted before looking, as the owner posts before counting: one of the two sees the other.
        self.n_asleep.fetch_add(1, Ordering::SeqCst);
        while self.open.load(Ordering::SeqCst) & PIECES == 0 && !self.over.load(Ordering::SeqCst) {
            guard = self.wake_up.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.n_asleep.fetch_sub(1, Ordering::SeqCst);
    }

    fn wake(&self) {
        let _guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.wake_up.notify_all();
    }
}

/// Lets a moment pass; counts in `looks`.
fn wait_a_little(looks: &mut u32) {
    *looks = looks.saturating_add(1);
    if *looks < SPINS {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_pool<R: Send>(n_threads: usize, body: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().expect("a thread pool").install(body)
    }

    /// Counts how often each piece of `n` was done.
    fn counts(n: usize) -> Vec<usize> {
        let counts: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
        for_each(n, |i| {
            counts[i].fetch_add(1, Ordering::Relaxed);
        });
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_piece_of_every_job_is_done_once() {
        for n_threads in [1, 2, 3, 8] {
            in_pool(n_threads, || {
                with_workers(|| {
                    for job in 0..3_000 {
                        let n = job % 17;
                        assert_eq!(counts(n), vec![1; n], "job {job} on {n_threads} threads");
                        if job % 500 == 0 {
                            std::thread::sleep(std::time::Duration::from_millis(2)); // the helpers fall asleep
                        }
                    }
                });
                assert_eq!(counts(9), [1; 9]);
            });
        }
    }

    #[test]
    fn each_item_is_changed_once() {
        let mut items: Vec<String> = (0..50).map(|i| i.to_string()).collect();
        in_pool(3, || with_workers(|| for_each_of(&mut items, |item| item.push('!'))));
        assert!(items.iter().enumerate().all(|(i, item)| *item == format!("{i}!")));
    }

    #[test]
    fn from_outside_the_pool_too() {
        with_workers(|| assert_eq!(counts(100), [1; 100]));
        assert_eq!(counts(100), [1; 100]);
    }

    #[test]
    fn jobs_within_jobs_and_workers_within_workers_are_done() {
        in_pool(2, || {
            with_workers(|| {
                for_each(4, |_| assert_eq!(counts(5), [1; 5]));
                with_workers(|| assert_eq!(counts(7), [1; 7]));
                assert_eq!(counts(8), [1; 8]);
            });
        });
    }

    #[test]
    fn a_panic_reaches_the_owner_and_the_workers_go_on() {
        in_pool(2, || {
            with_workers(|| {
                for bad in 0..6 {
                    let job = || for_each(6, |i| assert_ne!(i, bad));
                    assert!(catch_unwind(AssertUnwindSafe(job)).is_err());
                    assert_eq!(counts(6), [1; 6]);
                }
            });
            let stop = catch_unwind(|| with_workers(|| panic!("in the body")));
            assert!(stop.is_err());
            assert_eq!(counts(6), [1; 6]);
        });
    }
}
