//! Whether a model can be trained in the memory of this machine, asked before any of it is allocated.

use crate::model::GptConfig;

/// Bytes of a trained parameter: weight, gradient and AdamW's two moments, in f32.
const BYTES_PER_PARAM: f64 = 16.0;

/// Refuses a model and a batch of `rows` sequences of `seq_len` tokens that cannot fit into memory.
///
/// The estimate is a lower bound: parameters, and the residual stream that each block keeps for the backward pass. A
/// refusal is certain, an acceptance is not.
///
/// # Errors
/// If they do not fit.
pub fn check_training(model: &GptConfig, rows: usize, seq_len: usize) -> Result<(), TooLarge> {
    let tokens = rows as f64 * seq_len as f64;
    let kept = 4.0 * tokens * model.d_model as f64 * (model.n_layers as f64 + 1.0);
    let n_params = model.n_numbers() as f64;
    let needed = BYTES_PER_PARAM * n_params + kept;
    match memory() {
        Some(available) if needed > available => {
            Err(TooLarge { n_params, tokens, needed: needed / GIB, available: available / GIB })
        }
        _ => Ok(()),
    }
}

const GIB: f64 = (1_u64 << 30) as f64;

/// A model or a batch too large for this machine.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "training {n_params:.2e} parameters on {tokens:.2e} tokens at once needs more than {needed:.0} GiB of memory, but this process may use only \
     {available:.0} GiB\nhint: lower `model.d_model`, `n_layers`, `d_ff` or `max_seq_len`, or `train.micro_batch_size`"
)]
pub struct TooLarge {
    n_params: f64,
    tokens: f64,
    needed: f64,
    available: f64,
}

/// Bytes that this process may use: all memory of the machine, or the limit set for it; `None` where neither is known.
fn memory() -> Option<f64> {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Resource, getrlimit};
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let total: f64 = text.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok()?;
        let limit = getrlimit(Resource::As).current.map_or(f64::INFINITY, |bytes| bytes as f64);
        Some((total * 1024.0).min(limit))
    }
    #[cfg(not(target_os = "linux"))]
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_fit_is_refused() {
        let small = GptConfig::gpt2(1000);
        assert_eq!(check_training(&small, 16, 256), Ok(()));
        let wide = GptConfig { d_model: 1_000_000, ..small.clone() };
        let refused = check_training(&wide, 1, 1).expect_err("more than 100 TiB").to_string();
        assert!(refused.contains("GiB") && refused.contains("hint: lower `model.d_model`"), "{refused}");
        assert!(check_training(&small, usize::MAX, usize::MAX).is_err());
    }
}
