//! What the running stage has measured so far, kept for a view of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value};

use super::{Recorder, Sample, keep_numbers};

/// A running stage.
#[derive(Debug, Clone, Default)]
pub struct Live {
    /// Where it writes to.
    pub out: PathBuf,
    /// Steps done.
    pub step: u64,
    /// Steps in all.
    pub total_steps: u64,
    /// Tokens a second, between the last two lines of metrics.
    pub tokens_per_second: Option<f64>,
    /// Wall time it has taken, in seconds.
    pub seconds: f64,
    /// Seconds until the last step; `None` before the first one.
    pub seconds_left: Option<f64>,
    /// `(step, value)` of each metric.
    pub series: BTreeMap<String, Vec<(f64, f64)>>,
    /// What was sampled at the last step that sampled anything.
    pub samples: Vec<Sample>,
    /// Tokens and seconds of the last line of metrics.
    pub last: (f64, f64),
}

/// `None` where nobody looks.
static LIVE: Mutex<Option<Live>> = Mutex::new(None);

fn live() -> MutexGuard<'static, Option<Live>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps what stages measure from now on.
pub fn watch() {
    *live() = Some(Live::default());
}

/// The stage that runs or ran last; `None` where nothing is kept.
pub fn look<T>(at: impl FnOnce(&Live) -> T) -> Option<T> {
    live().as_ref().map(at)
}

/// A stage begins, with the `rows` that it has already.
pub(super) fn begin(out: &Path, total_steps: u64, rows: &[Map<String, Value>]) {
    if let Some(live) = live().as_mut() {
        *live = Live { out: out.to_owned(), total_steps, ..Live::default() };
        for row in rows {
            live.add(row);
        }
    }
}

/// A line of metrics was written.
pub(super) fn record(row: &Map<String, Value>) {
    if let Some(live) = live().as_mut() {
        live.add(row);
    }
}

/// Something was sampled.
pub(super) fn sample(sample: Sample) {
    if let Some(live) = live().as_mut() {
        live.samples.retain(|earlier| earlier.step == sample.step);
        live.samples.push(sample);
    }
}

/// A step was made.
pub(super) fn advance(recorder: &Recorder, step: u64) {
    if let Some(live) = live().as_mut() {
        (live.step, live.seconds, live.seconds_left) = (step, recorder.seconds(), recorder.seconds_left(step));
    }
}

impl Live {
    fn add(&mut self, row: &Map<String, Value>) {
        let number = |name: &str| row.get(name).and_then(Value::as_f64).unwrap_or(0.0);
        let (tokens, seconds) = (number("tokens"), number("seconds"));
        let (tokens_before, seconds_before) = std::mem::replace(&mut self.last, (tokens, seconds));
        if tokens > tokens_before && seconds > seconds_before {
            self.tokens_per_second = Some((tokens - tokens_before) / (seconds - seconds_before));
        }
        (self.step, self.seconds) = (number("step") as u64, seconds);
        let mut values = BTreeMap::new();
        keep_numbers(&mut values, row);
        for (name, value) in values {
            self.series.entry(name).or_default().push((number("step"), value));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rows_become_series_and_their_distance_the_speed() {
        let mut live = Live::default();
        for (step, seconds) in [(1, 2.0), (2, 4.0), (3, 5.0)] {
            let row = json!({ "step": step, "seconds": seconds, "tokens": step * 100, "train/loss": 0.5 });
            live.add(row.as_object().expect("an object"));
            // What every step tells in between does not count.
            live.seconds = seconds + 0.9;
        }
        assert_eq!((live.step, live.tokens_per_second), (3, Some(100.0)));
        assert_eq!(live.series["train/loss"], [(1.0, 0.5), (2.0, 0.5), (3.0, 0.5)]);
        assert_eq!(live.series.len(), 1);
    }
}
