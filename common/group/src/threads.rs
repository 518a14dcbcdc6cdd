//! A group of threads of one process: the same exchanges without a launcher, for tests.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::{Group, GroupError, Transport};

/// One end of the channels between all threads.
struct Thread {
    rank: usize,
    /// To each rank.
    to: Vec<Mutex<Sender<Message>>>,
    /// From each rank.
    from: Vec<Mutex<Receiver<Message>>>,
}

enum Message {
    Bytes(Vec<u8>),
    Floats(Vec<f32>),
}

/// Runs `work` as a group of `n` threads and gives their results in the order of the ranks.
///
/// A rank whose `work` has returned is gone: another that waits for it gets [`GroupError::Gone`].
///
/// # Panics
/// If `work` panics on a rank.
pub fn threads<T: Send>(n: usize, work: impl Fn(Group) -> T + Sync) -> Vec<T> {
    let mut to: Vec<Vec<Mutex<Sender<Message>>>> = (0..n).map(|_| Vec::new()).collect();
    let mut from: Vec<Vec<Mutex<Receiver<Message>>>> = (0..n).map(|_| Vec::new()).collect();
    for senders in &mut to {
        for receivers in &mut from {
            let (sender, receiver) = channel();
            senders.push(Mutex::new(sender));
            receivers.push(Mutex::new(receiver));
        }
    }
    let members = to.into_iter().zip(from).enumerate().map(|(rank, (to, from))| Thread { rank, to, from });
    let work = &work;
    std::thread::scope(|scope| {
        let running: Vec<_> = members.map(|member| scope.spawn(move || work(Group::over(member)))).collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

impl Thread {
    fn send(&self, to: usize, message: Message) -> Result<(), GroupError> {
        let sender = self.to[to].lock().unwrap_or_else(PoisonError::into_inner);
        sender.send(message).map_err(|_| GroupError::Gone { rank: to })
    }

    fn receive(&self, from: usize) -> Result<Message, GroupError> {
        let receiver = self.from[from].lock().unwrap_or_else(PoisonError::into_inner);
        receiver.recv().map_err(|_| GroupError::Gone { rank: from })
    }
}

impl Transport for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn send_bytes(&self, to: usize, bytes: &[u8], _what: &'static str) -> Result<(), GroupError> {
        self.send(to, Message::Bytes(bytes.to_vec()))
    }

    fn receive_bytes(&self, from: usize, _what: &'static str) -> Result<Vec<u8>, GroupError> {
        match self.receive(from)? {
            Message::Bytes(bytes) => Ok(bytes),
            Message::Floats(_) => Err(GroupError::Message { reason: "expected bytes, found numbers".to_owned() }),
        }
    }

    fn send_floats(&self, to: usize, numbers: &[f32], _what: &'static str) -> Result<(), GroupError> {
        self.send(to, Message::Floats(numbers.to_vec()))
    }

    fn receive_floats(&self, from: usize, numbers: &mut [f32], _what: &'static str) -> Result<(), GroupError> {
        match self.receive(from)? {
            Message::Floats(sent) if sent.len() == numbers.len() => {
                numbers.copy_from_slice(&sent);
                Ok(())
            }
            _ => Err(GroupError::Message { reason: format!("expected {} numbers", numbers.len()) }),
        }
    }

    fn exchange_floats(
        &self,
        to: usize,
        sent: &[f32],
        from: usize,
        received: &mut [f32],
        what: &'static str,
    ) -> Result<(), GroupError> {
        // A channel holds any number of messages. Nothing is no message.
        if !sent.is_empty() {
            self.send_floats(to, sent, what)?;
        }
        if received.is_empty() { Ok(()) } else { self.receive_floats(from, received, what) }
    }

    /// Whoever waits for this thread learns of its end when it returns.
    fn abort(&self, _code: u8) {}
}
