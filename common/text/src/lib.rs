//! From files to rows of token ids: what knows text and no tensors.
//!
//! Modules in reading order: [`tokenizer`], [`conversation`] (messages to ids), [`data`] (records, shards, order, padding).

#![forbid(unsafe_code)]

pub mod conversation;
pub mod data;
pub mod tokenizer;
