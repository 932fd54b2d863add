//! Arithmetic on slices of `f32` and on weights as files keep them, with the vector instructions
//! chosen at run time.
//!
//! This crate knows shapes, element types and threads. It must never know a model, a token or a
//! file. It is the only room with `unsafe` code: kernels are `unsafe` functions over raw pointers
//! behind safe functions that check every length.
//!
//! - [`Pool`]: the threads, which all functions that are worth it share.
//! - [`DType`], [`MatRef`], [`encode`], [`dequantize`]: weights, plain or in the blocks of ggml's files.
//! - [`matmul`], [`matmul_each`], [`gated_hidden`], [`expert_hidden`], [`expert_down`], [`combine`], [`expert_ffn`]: products.
//! - [`matmul_transposed`], [`slot_products`]: what gradients need besides.
//! - [`KvPages`]: keys and values, as [`attention`] reads them.
//! - [`attention`], [`attention_of_next`], [`rms_norm`], [`rope`], [`softmax_rows`], [`act_inplace`], [`add`]: the rest.
//!
//! Results depend neither on the number of threads nor on timing. A length that does not fit its
//! shape is a mistake of the caller and panics. Where results go into a `Vec`, it is made as long as their shape says;
//! what it held is gone, its memory is used again.

#![allow(unsafe_code)]
#![allow(unsafe_op_in_unsafe_fn, reason = "a kernel is unsafe as a whole: its contract stands on the function")]

#[cfg(not(target_endian = "little"))]
compile_error!("weights are read in place, as little endian");

mod attention;
mod dtype;
mod encode;
mod error;
mod experts;
mod heap;
mod kv_pages;
mod math;
mod pool;
mod product;
mod quant;
mod results;
mod rows;
mod scratch;
mod simd;
#[cfg(test)]
mod tests;
mod tile;
mod weight;

pub use attention::{AttnSegment, AttnShape, Turn, attention, attention_of_next};
pub use dtype::{DType, MatRef};
pub use encode::encode;
pub use error::KernelError;
pub use experts::{ExpertRef, NO_EXPERT, Side, combine, expert_down, expert_ffn, expert_hidden, slot_products};
pub use heap::{give_back_freed_memory, keep_freed_memory};
pub use kv_pages::KvPages;
pub use math::{Act, act_inplace};
pub use pool::{Pool, split};
pub use product::{Pack, gated_hidden, matmul, matmul_each, matmul_transposed};
pub use rows::{add, add_inplace, dot, norm_sq, read_through, rms_norm, rope, softmax_rows};
pub use simd::Isa;
pub use weight::{dequantize, quantize};
