//! Prompts read in pieces between the tokens of the running requests, as a server needs it.
//!
//! A prompt is read into a cache of its own and moves into a row of the shared cache when its first token is chosen. Pieces of
//! several prompts go through the model in one pass, which reads the weights once for all of them; prompts take turns, so that
//! a short one does not wait for the whole of a long one before it. The shared cache has room for the rows and positions in use, within a factor of two: a model's whole context for every row
//! could exceed the memory.
//!
//! # Source
//! Agrawal et al., "Sarathi-Serve", arXiv:2403.02310, section 4.1: chunked prefills beside decodes.

use super::{Failed, Request, SampledToken, Scheduler};
use crate::generate::{GenerateError, logits_of};
use crate::{CHUNK, Cache};

use burn::tensor::{Tensor, TensorData};
use kernels::BATCH_INVARIANT_ROWS;

/// Positions of a cache at first.
const MIN_POSITIONS: usize = 64;

/// Tokens of an answer for which there is room from the start, so that the cache need not be made anew while it is given.
const EXPECTED_ANSWER: usize = 128;

/// A request whose prompt is read in part.
#[derive(Debug)]
pub(super) struct Reading {
    request: Request,
    /// One row with room for the prompt.
    cache: Cache,
}

impl Reading {
    /// The request's number.
    pub(super) fn id(&self) -> usize {
        self.request.id
    }
}

/// Positions that a request will fill, those of a long answer not counted whole, of which most end sooner.
fn expected(request: &Request) -> usize {
    request.prompt.len() + request.sampling.max_tokens.min(EXPECTED_ANSWER)
}

impl Scheduler<'_> {
    /// Gives every running request one more token and reads pieces of prompts, of about `piece` tokens together or, where many
    /// wait, a chunk for each; those that are read to their ends get their first tokens.
    pub(super) fn step_in_pieces(&mut self, piece: usize) -> Result<Vec<Result<SampledToken, Failed>>, GenerateError> {
        let mut chosen = Vec::new();
        if self.n_running() > 0 {
            self.fit(self.n_running(), 0);
            chosen = self.decode()?;
        }
        while self.n_running() + self.reading.len() < self.max_rows()
            && let Some(request) = self.queue.pop_front()
        {
            let cache = Cache::new(self.model, 1, request.prompt.len());
            self.reading.push_back(Reading { request, cache });
        }
        let mut n_left = piece.max(CHUNK * self.reading.len());
        while n_left > 0 && !self.reading.is_empty() {
            let n_read = self.read_pass(n_left, &mut chosen)?;
            n_left = n_left.saturating_sub(n_read);
        }
        if self.n_running() == 0 {
            self.rows.clear();
            self.cache = Cache::new(self.model, 0, 0);
        }
        Ok(chosen)
    }

    /// One pass over pieces of prompts of at least `n_wanted` tokens together, if there are as many and one pass can take them,
    /// from the first in turn on; returns the number of tokens read.
    fn read_pass(
        &mut self,
        n_wanted: usize,
        chosen: &mut Vec<Result<SampledToken, Failed>>,
    ) -> Result<usize, GenerateError> {
        let mut room = n_wanted.next_multiple_of(CHUNK).min(*BATCH_INVARIANT_ROWS.end());
        let mut pass: Vec<(Reading, usize)> = Vec::new();
        while let Some(reading) = self.reading.front() {
            let n_left = reading.request.prompt.len() - reading.cache.lens()[0];
            // Each part but the last ends at a multiple of the chunk.
            let n = if n_left <= room { n_left } else { room / CHUNK * CHUNK };
            if n == 0 {
                break;
            }
            room -= n;
            pass.extend(self.reading.pop_front().map(|reading| (reading, n)));
        }
        let mut parts: Vec<(&[u32], &mut Cache)> = pass
            .iter_mut()
            .map(|(Reading { request, cache }, n)| {
                let start = cache.lens()[0];
                (&request.prompt[start..start + *n], cache)
            })
            .collect();
        let hidden = self.model.decode_parts(&mut parts, *BATCH_INVARIANT_ROWS.start());
        let (mut end, mut done, mut last) = (0, Vec::new(), Vec::new());
        for (reading, n) in pass {
            end += n;
            if reading.cache.lens()[0] < reading.request.prompt.len() {
                self.reading.push_back(reading);
            } else {
                last.push(end as i64 - 1);
                done.push(reading);
            }
        }
        if done.is_empty() {
            return Ok(end);
        }
        // Spare rows, so that the logits do not depend on how many prompts end together.
        last.resize(last.len().max(*BATCH_INVARIANT_ROWS.start()), last[0]);
        let last = Tensor::from_data(TensorData::new(last.clone(), [last.len()]), &self.model.device());
        let mut logits = logits_of(self.model, hidden.select(0, last).unsqueeze_dim(1))?;
        logits.truncate(done.len() * self.model.config().vocab_size);
        let longest = done.iter().map(|Reading { request, .. }| expected(request)).max().unwrap_or(0);
        self.fit(self.n_running() + done.len(), longest);
        let slots: Vec<usize> = done.iter().map(|Reading { request, cache }| self.place(request, cache)).collect();
        chosen.extend(self.choose(&slots, logits));
        Ok(end)
    }

    /// Moves a request whose prompt is in `read` into a free row of the shared cache.
    fn place(&mut self, request: &Request, read: &Cache) -> usize {
        let slot = self.rows.iter().position(Option::is_none).expect("room was made for these rows");
        self.cache.replace_rows(&[slot], read);
        self.rows[slot] = Some(self.row(request));
        slot
    }

    /// Gives the shared cache room for `n_rows` requests, so many positions and the next token of each row; takes away rows of
    /// which less than half is in use, counting the prompts that are being read: what is taken away would soon be made again.
    fn fit(&mut self, n_rows: usize, n_positions: usize) {
        let most = self.max_rows().max(self.min_rows());
        let power = |n: usize| n.next_power_of_two().max(self.min_rows()).min(most);
        let (wanted, soon) = (power(n_rows), power(n_rows + self.reading.len()));
        let longest = self.cache.lens().iter().max().copied().unwrap_or(0) + 1;
        let positions = longest.max(n_positions).min(self.limits.capacity);
        let has_rows = (wanted..2 * soon).contains(&self.rows.len());
        if has_rows && self.cache.capacity() >= positions {
            return;
        }
        let grown = positions.next_power_of_two().max(MIN_POSITIONS).min(self.limits.capacity);
        let kept: Vec<usize> = (0..self.rows.len()).filter(|&row| self.rows[row].is_some()).collect();
        let wanted = if has_rows { self.rows.len() } else { wanted };
        let mut cache = Cache::new(self.model, wanted, grown.max(self.cache.capacity()));
        self.cache.keep_rows(&kept);
        cache.replace_rows(&(0..kept.len()).collect::<Vec<_>>(), &self.cache);
        self.cache = cache;
        self.rows = kept.into_iter().map(|row| self.rows[row].take()).collect();
        self.rows.resize_with(wanted, || None);
    }
}
