//! Continuous batching: requests are admitted into the rows of one cache, stepped together and retired, each at its own
//! length.

mod pieces;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::ops::Range;

use burn::tensor::{Int, Tensor, TensorData};

use super::decoder::Decoder;
use super::{GenerateError, NonFiniteLogit, Sampler, SamplingConfig, check_prompt, invalid, logits_of};
use crate::{Cache, Gpt};
use base::rng::Rng;
use kernels::BATCH_INVARIANT_ROWS;
use pieces::Reading;

/// Tokens of prompts, padding included, that one forward pass takes at most, unless a single prompt is longer: the
/// activations of a pass must not outgrow the cache.
const PREFILL_TOKENS: usize = 1 << 14;

/// A prompt to continue.
#[derive(Debug, Clone)]
pub struct Request {
    /// The caller's number for it, which its tokens and errors bear.
    pub id: usize,
    /// Token ids.
    pub prompt: Vec<u32>,
    /// How its tokens are chosen and where it ends.
    pub sampling: SamplingConfig,
    /// Its own random stream.
    pub rng: Rng,
    /// How many of the likeliest tokens are told with each token, see [`SampledToken::likeliest`].
    pub n_likeliest: usize,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// With one of the stop tokens, which is its last.
    Stop,
    /// At `max_tokens`, or where the context window ends.
    Length,
    /// The caller broke off.
    Interrupted,
}

/// A new token of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// The request's number.
    pub request: usize,
    /// The token.
    pub id: u32,
    /// Its log-probability in nats, see [`Choice::log_prob`](super::Choice::log_prob).
    pub log_prob: f32,
    /// Why the request ended with this token, if it did.
    pub finish: Option<Finish>,
    /// The [`n_likeliest`](Request::n_likeliest) tokens in its place with their log-probabilities, likeliest first.
    pub likeliest: Vec<(u32, f32)>,
}

/// The number of a request that failed, and why.
pub type Failed = (usize, GenerateError);

/// The bounds of a [`Scheduler`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most rows of the cache, and so most requests that are decoded together.
    pub max_rows: usize,
    /// Positions of a row: the longest prompt with its answer, or the model's context.
    pub capacity: usize,
    /// Whether a request's log-probabilities keep their bits whatever it is decoded together with.
    ///
    /// The fused kernels have loops of their own for up to 3 and for more than 64 rows, whose sums differ in the last
    /// bits. With this, prompts are read one by one or in pieces, and the number of rows stays within
    /// [`BATCH_INVARIANT_ROWS`](kernels::BATCH_INVARIANT_ROWS): spare rows are computed where there are fewer.
    pub batch_invariant: bool,
    /// About how many tokens of prompts are read between two tokens of the running requests, so that a long prompt does not stop
    /// them; where many wait, [`CHUNK`](crate::CHUNK) of each. A prompt is cut at multiples of that alone. `None` reads prompts
    /// whole, several together, as a list of requests is done soonest.
    pub prompt_piece: Option<NonZeroUsize>,
}

/// Decodes requests together, in the order in which they were submitted.
///
/// One [`step`](Self::step) admits requests into rows that are free and gives each its first token, or else gives every
/// running request one more. A request that ends leaves its row to the next one in the queue. Every request draws from
/// its own stream, so its tokens depend neither on its row nor on its neighbours.
///
/// To copy no rows for a single free slot, requests are admitted, and without a queue the cache is cut to the rows in
/// use, when a quarter of the rows is free. With [`Limits::prompt_piece`] a step gives every running request one more token
/// and reads one piece, and who comes is admitted at once.
#[derive(Debug)]
pub struct Scheduler<'m> {
    model: &'m Gpt,
    /// Where steps are one call of the kernels.
    decoder: Option<Decoder>,
    limits: Limits,
    queue: VecDeque<Request>,
    cache: Cache,
    /// The request in each row of the cache; `None` if the row is free.
    rows: Vec<Option<Row>>,
    /// The requests whose prompts are read in pieces.
    reading: VecDeque<Reading>,
}

/// A request that is running.
#[derive(Debug)]
struct Row {
    request: usize,
    sampler: Sampler,
    stop: Vec<u32>,
    last: u32,
    n_generated: usize,
    max_tokens: usize,
    n_likeliest: usize,
}

impl<'m> Scheduler<'m> {
    /// A scheduler without requests. The model should be on a plain device: on an autodiff device every step would be
    /// recorded.
    ///
    /// # Errors
    /// [`GenerateError::InvalidOption`] if there is no row, or the capacity exceeds the model's context.
    pub fn new(model: &'m Gpt, limits: Limits) -> Result<Self, GenerateError> {
        if limits.max_rows == 0 {
            return Err(invalid("max_rows", "at least 1", limits.max_rows));
        }
        if limits.capacity > model.config().max_seq_len {
            return Err(invalid("capacity", "at most the model's context", limits.capacity));
        }
        // In pieces it grows with what is in use.
        let cache = Cache::new(model, 0, if limits.prompt_piece.is_some() { 0 } else { limits.capacity });
        let decoder = model.decoder();
        Ok(Self { model, decoder, limits, queue: VecDeque::new(), cache, rows: Vec::new(), reading: VecDeque::new() })
    }

    /// Queues a request.
    ///
    /// # Errors
    /// For an invalid sampling configuration, and for a prompt that is empty, leaves no room for an answer or holds an
    /// unknown token.
    pub fn submit(&mut self, request: Request) -> Result<(), GenerateError> {
        request.sampling.validate()?;
        check_prompt(self.model, request.id, &request.prompt)?;
        if request.prompt.len() > self.limits.capacity {
            return Err(invalid("capacity", "room for every prompt", self.limits.capacity));
        }
        self.queue.push_back(request);
        Ok(())
    }

    /// Ends a request, queued or running; its row is free for the next one.
    pub fn cancel(&mut self, request: usize) {
        self.queue.retain(|queued| queued.id != request);
        self.reading.retain(|reading| reading.id() != request);
        if let Some(row) = self.rows.iter().position(|row| row.as_ref().is_some_and(|row| row.request == request)) {
            self.retire(row);
        }
    }

    /// Whether no request is queued or running.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.reading.is_empty() && self.n_running() == 0
    }

    /// How many requests are running, those whose prompts are not read yet left out.
    pub fn n_running(&self) -> usize {
        self.rows.iter().flatten().count()
    }

    /// The keys and values held.
    pub const fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Gives the requests that could be admitted their first token, or every running request one more.
    ///
    /// # Errors
    /// If logits are not finite, of the request with the lowest number; all such requests are ended. If the device
    /// fails.
    pub fn step(&mut self) -> Result<Vec<SampledToken>, GenerateError> {
        let (tokens, failed): (Vec<_>, Vec<_>) = self.step_each()?.into_iter().partition(Result::is_ok);
        match failed.into_iter().filter_map(Result::err).min_by_key(|&(request, _)| request) {
            Some((_, error)) => Err(error),
            None => Ok(tokens.into_iter().flatten().collect()),
        }
    }

    /// [`step`](Self::step), where a request whose logits are not finite ends by itself and the others go on.
    ///
    /// # Errors
    /// If the device fails.
    pub fn step_each(&mut self) -> Result<Vec<Result<SampledToken, Failed>>, GenerateError> {
        if let Some(piece) = self.limits.prompt_piece {
            return self.step_in_pieces(piece.get());
        }
        let n_running = self.n_running();
        if !self.queue.is_empty() && n_running * 4 <= self.max_rows() * 3 {
            return self.admit();
        }
        if n_running == 0 {
            return Ok(Vec::new());
        }
        self.shrink();
        self.decode()
    }

    /// Gives every running request its next token.
    fn decode(&mut self) -> Result<Vec<Result<SampledToken, Failed>>, GenerateError> {
        let ids: Vec<u32> = self.rows.iter().map(|row| row.as_ref().map_or(0, |row| row.last)).collect();
        let logits = match &mut self.decoder {
            Some(decoder) if ids.len() <= Decoder::MAX_ROWS => decoder.logits(&ids, &mut self.cache),
            _ => {
                let shape = [ids.len(), 1];
                let ids = TensorData::new(ids.into_iter().map(|id| id as i32).collect(), shape);
                let ids = Tensor::<2, Int>::from_data(ids, &self.model.device());
                logits_of(self.model, self.model.decode(ids, &mut self.cache))?
            }
        };
        for (row, _) in self.rows.iter().enumerate().filter(|(_, row)| row.is_none()) {
            self.cache.truncate(row, 0);
        }
        let all: Vec<usize> = (0..self.rows.len()).collect();
        Ok(self.choose(&all, logits))
    }

    /// Reads the prompts of as many queued requests as there are free rows, and chooses their first tokens.
    fn admit(&mut self) -> Result<Vec<Result<SampledToken, Failed>>, GenerateError> {
        let slots = self.free_slots();
        let admitted: Vec<Request> = self.queue.drain(..slots.len()).collect();
        let prompts: Vec<&[u32]> = admitted.iter().map(|request| &*request.prompt).collect();
        let mut hidden = Vec::new(); // of each prompt's last token, [n, d_model] for n prompts
        for piece in self.pieces(&prompts) {
            let (prompts, slots) = (&prompts[piece.clone()], &slots[piece]);
            if slots.len() == self.rows.len() {
                hidden.push(prefill(self.model, prompts, &mut self.cache));
                continue;
            }
            let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
            let mut fresh = Cache::new(self.model, prompts.len(), longest);
            hidden.push(prefill(self.model, prompts, &mut fresh));
            self.cache.replace_rows(slots, &fresh);
        }
        for (&slot, request) in slots.iter().zip(&admitted) {
            self.rows[slot] = Some(self.row(request));
        }
        let mut logits = Vec::new();
        if self.limits.batch_invariant {
            for hidden in hidden {
                logits.extend(logits_of(self.model, hidden.unsqueeze_dim(1))?);
            }
        } else {
            logits = logits_of(self.model, Tensor::cat(hidden, 0).unsqueeze_dim(1))?;
        }
        Ok(self.choose(&slots, logits))
    }

    /// A row for a request whose prompt is read.
    fn row(&self, request: &Request) -> Row {
        let Request { id, prompt, sampling, rng, n_likeliest } = request;
        let room = self.model.config().max_seq_len.min(self.limits.capacity + 1) - prompt.len();
        Row {
            request: *id,
            sampler: Sampler::new(sampling, prompt, rng.clone()),
            stop: sampling.stop.clone(),
            last: 0,
            n_generated: 0,
            max_tokens: sampling.max_tokens.min(room),
            n_likeliest: *n_likeliest,
        }
    }

    /// The rows that the next requests go into: free ones, or else new ones.
    fn free_slots(&mut self) -> Vec<usize> {
        if self.n_running() == 0 && !self.rows.is_empty() {
            // All prompts are read into a cache of their own: this one only takes up memory.
            self.rows.clear();
            self.cache = Cache::new(self.model, 0, self.limits.capacity);
        }
        let mut free: Vec<usize> = (0..self.rows.len()).filter(|&row| self.rows[row].is_none()).collect();
        if free.is_empty() {
            let n_new = self.queue.len().min(self.max_rows().saturating_sub(self.rows.len()));
            free = (self.rows.len()..self.rows.len() + n_new).collect();
            let n_rows = (self.rows.len() + n_new).max(self.min_rows());
            let rows = Cache::new(self.model, n_rows - self.rows.len(), self.limits.capacity);
            self.cache.append(rows);
            self.rows.resize_with(n_rows, || None);
        }
        free.truncate(self.queue.len().min(self.max_rows() - self.n_running()));
        free
    }

    /// Cuts prompts into groups that are read in one pass each.
    fn pieces(&self, prompts: &[&[u32]]) -> Vec<Range<usize>> {
        let mut pieces: Vec<Range<usize>> = Vec::new();
        let mut longest = 0;
        for (i, prompt) in prompts.iter().enumerate() {
            longest = longest.max(prompt.len());
            match pieces.last_mut() {
                Some(piece) if !self.limits.batch_invariant && (piece.len() + 1) * longest <= PREFILL_TOKENS => {
                    piece.end = i + 1;
                }
                _ => {
                    longest = prompt.len();
                    pieces.push(i..i + 1);
                }
            }
        }
        pieces
    }

    /// Gives the requests in `slots` their next tokens.
    ///
    /// # Shapes
    /// - `logits`: `slots.len() · vocab_size`, row after row
    fn choose(&mut self, slots: &[usize], mut logits: Vec<f32>) -> Vec<Result<SampledToken, Failed>> {
        let vocab_size = logits.len() / slots.len();
        let mut rows: Vec<Option<&mut Row>> = self.rows.iter_mut().map(Option::as_mut).collect();
        let mut tasks: Vec<_> = slots
            .iter()
            .zip(logits.chunks_mut(vocab_size))
            .filter_map(|(&slot, logits)| Some((slot, rows[slot].take()?, logits, None)))
            .collect();
        kernels::for_each_of(&mut tasks, |(_, row, logits, chosen)| *chosen = Some(row.choose(logits)));
        let chosen: Vec<_> = tasks.into_iter().filter_map(|(slot, .., chosen)| Some((slot, chosen?))).collect();
        for (slot, chosen) in &chosen {
            if chosen.is_err() {
                // Where masked weights are multiplied like others, what is not finite would reach the row's next request.
                self.cache.clear_row(*slot);
            }
            if !chosen.as_ref().is_ok_and(|token| token.finish.is_none()) {
                self.retire(*slot);
            }
        }
        chosen.into_iter().map(|(_, chosen)| chosen).collect()
    }

    fn retire(&mut self, row: usize) {
        self.rows[row] = None;
        self.cache.truncate(row, 0);
    }

    /// Cuts the cache to the rows in use, if that pays.
    fn shrink(&mut self) {
        let n_running = self.n_running();
        if n_running * 4 > self.rows.len() * 3 || self.rows.len() <= self.min_rows() {
            return;
        }
        let (running, free): (Vec<_>, Vec<_>) = (0..self.rows.len()).partition(|&row| self.rows[row].is_some());
        let n_spare = self.min_rows().saturating_sub(n_running);
        let kept: Vec<usize> = running.into_iter().chain(free.into_iter().take(n_spare)).collect();
        self.cache.keep_rows(&kept);
        self.rows = kept.into_iter().map(|row| self.rows[row].take()).collect();
    }

    /// The fewest rows that are computed together.
    fn min_rows(&self) -> usize {
        if self.limits.batch_invariant { *BATCH_INVARIANT_ROWS.start() } else { 1 }
    }

    /// The most rows that are computed together.
    fn max_rows(&self) -> usize {
        let most = if self.limits.batch_invariant { *BATCH_INVARIANT_ROWS.end() } else { usize::MAX };
        self.limits.max_rows.min(most)
    }
}

impl Row {
    /// Takes the next token.
    fn choose(&mut self, logits: &mut [f32]) -> Result<SampledToken, Failed> {
        let (prompt_idx, n_generated) = (self.request, self.n_generated);
        let not_finite = |NonFiniteLogit { id, logit }| {
            (prompt_idx, GenerateError::NonFinite { prompt_idx, n_generated, id, logit })
        };
        let likeliest = self.sampler.likeliest(logits, self.n_likeliest).map_err(not_finite)?;
        let choice = self.sampler.choose(logits).map_err(not_finite)?;
        self.last = choice.id;
        self.n_generated += 1;
        let finish = if self.stop.contains(&choice.id) {
            Some(Finish::Stop)
        } else {
            (self.n_generated == self.max_tokens).then_some(Finish::Length)
        };
        Ok(SampledToken { request: self.request, id: choice.id, log_prob: choice.log_prob, finish, likeliest })
    }
}

/// Reads one prompt into each row of an empty cache; returns the hidden states of their last tokens, `[n, d_model]`.
///
/// Shorter prompts are padded behind: no token of theirs sees the padding, and what follows overwrites it.
fn prefill(model: &Gpt, prompts: &[&[u32]], cache: &mut Cache) -> Tensor<2> {
    let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
    let mut ids: Vec<i32> = Vec::with_capacity(prompts.len() * longest);
    for prompt in prompts {
        ids.extend(prompt.iter().map(|&id| id as i32));
        ids.resize(ids.len() + longest - prompt.len(), 0);
    }
    let device = model.device();
    let input = Tensor::<2, Int>::from_data(TensorData::new(ids, [prompts.len(), longest]), &device);
    let hidden = model.decode(input, cache); // [n, longest, d_model]
    prompts.iter().enumerate().for_each(|(row, prompt)| cache.truncate(row, prompt.len()));
    let last: Vec<i64> =
        prompts.iter().enumerate().map(|(i, prompt)| (i * longest + prompt.len() - 1) as i64).collect();
    let [n, _, d_model] = hidden.dims();
    hidden.reshape([n * longest, d_model]).select(0, Tensor::from_data(TensorData::new(last, [n]), &device))
}
