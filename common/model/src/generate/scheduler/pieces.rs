//! Prompts read in pieces between the tokens of the running requests, as a server needs it.
//!
//! A prompt is read into a cache of its own, always in the same pieces, and moves into a row of the shared cache when its
//! first token is chosen. Prompts take turns, so that a short one does not wait for the whole of a long one before it. The
//! shared cache has room for the rows and positions in use, within a factor of two: a model's whole context for every row
//! could exceed the memory.
//!
//! # Source
//! Agrawal et al., "Sarathi-Serve", arXiv:2403.02310, section 4.1: chunked prefills beside decodes.

use super::{Failed, Request, SampledToken, Scheduler};
use crate::Cache;
use crate::generate::{GenerateError, logits_of};

use burn::tensor::{Int, Tensor, TensorData, s};

/// Positions of a cache at first.
const MIN_POSITIONS: usize = 64;

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

impl Scheduler<'_> {
    /// Gives every running request one more token and reads pieces of prompts, of about `piece` tokens together; those that
    /// are read to their ends get their first tokens.
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
        let mut n_read = 0;
        while n_read < piece
            && let Some(Reading { request, mut cache }) = self.reading.pop_front()
        {
            let start = cache.lens()[0];
            let end = request.prompt.len().min(start + piece);
            n_read += end - start;
            let ids: Vec<i32> = request.prompt[start..end].iter().map(|&id| id as i32).collect();
            let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, end - start]), &self.model.device());
            let hidden = self.model.decode(ids, &mut cache); // [1, end − start, d_model]
            if end < request.prompt.len() {
                self.reading.push_back(Reading { request, cache });
                continue;
            }
            let logits = logits_of(self.model, hidden.slice(s![.., end - start - 1..]))?;
            let slot = self.place(&request, &cache);
            chosen.extend(self.choose(&[slot], logits));
        }
        if self.n_running() == 0 {
            self.rows.clear();
            self.cache = Cache::new(self.model, 0, 0);
        }
        Ok(chosen)
    }

    /// Moves a request whose prompt is in `read` into a row of the shared cache.
    fn place(&mut self, request: &Request, read: &Cache) -> usize {
        self.fit(self.n_running() + 1, request.prompt.len());
        let slot = self.rows.iter().position(Option::is_none).expect("room was made for one row more");
        self.cache.replace_rows(&[slot], read);
        self.rows[slot] = Some(self.row(request));
        slot
    }

    /// Gives the shared cache room for `n_rows` requests, a prompt of `n_positions` and the next token of each row; takes
    /// away rows of which less than half is in use.
    fn fit(&mut self, n_rows: usize, n_positions: usize) {
        let wanted = n_rows.next_power_of_two().max(self.min_rows()).min(self.max_rows().max(self.min_rows()));
        let longest = self.cache.lens().iter().max().copied().unwrap_or(0) + 1;
        let positions = longest.max(n_positions).min(self.limits.capacity);
        let has_rows = (wanted..2 * wanted).contains(&self.rows.len());
        if has_rows && self.cache.capacity() >= positions {
            return;
        }
        let grown = positions.next_power_of_two().max(MIN_POSITIONS).min(self.limits.capacity);
        let kept: Vec<usize> = (0..self.rows.len()).filter(|&row| self.rows[row].is_some()).collect();
        let mut cache = Cache::new(self.model, wanted, grown.max(self.cache.capacity()));
        self.cache.keep_rows(&kept);
        cache.replace_rows(&(0..kept.len()).collect::<Vec<_>>(), &self.cache);
        self.cache = cache;
        self.rows = kept.into_iter().map(|row| self.rows[row].take()).collect();
        self.rows.resize_with(wanted, || None);
    }
}
