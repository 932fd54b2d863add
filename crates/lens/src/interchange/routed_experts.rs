//! Ids of the chosen experts of every token and layer, `[T][L][k]` or `[items][T][L][k]`: JSON (also several arrays one after
//! the other, an item each) or numpy's `.npy`. The layers are those with experts, or all. Negative ids are empty slots.

use serde_json::Value;

use super::npy;
use super::traces::{TraceShape, add_ids};
use crate::RouterStats;

/// One text's ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoutedExperts {
    /// Tokens, layers, slots.
    pub shape: [usize; 3],
    /// `[T, L, k]`.
    pub ids: Vec<i64>,
}

impl RoutedExperts {
    /// Adds the text's choices; tokens from `answer_from` on are of the answer.
    ///
    /// # Errors
    /// A shape or ids that do not fit the model.
    pub fn add_to(&self, stats: &mut RouterStats, shape: &TraceShape, answer_from: usize) -> Result<(), String> {
        let [tokens, layers, k] = self.shape;
        let rows = shape.rows(layers)?;
        for t in 0..tokens {
            let stats = if t < answer_from { &mut stats.prompt } else { &mut stats.answer };
            let mut any = None;
            for (l, moe) in rows.iter().enumerate() {
                let Some(moe) = *moe else { continue };
                let slots = &self.ids[(t * layers + l) * k..(t * layers + l + 1) * k];
                let found = add_ids(stats, shape, moe, slots.iter().copied()).map_err(|e| format!("token {t}: {e}"))?;
                if *any.get_or_insert(found) != found {
                    return Err(format!("token {t} has experts in some layers only"));
                }
            }
            stats.tokens += u64::from(any == Some(true));
        }
        stats.items += 1;
        Ok(())
    }

    /// From nested JSON arrays.
    ///
    /// # Errors
    /// Anything but `[T][L][k]` integers with all rows alike.
    pub fn from_json(value: &Value) -> Result<RoutedExperts, String> {
        let mut shape = [0; 3];
        let mut ids = Vec::new();
        let mut first = true;
        let tokens = array(value)?;
        for token in tokens {
            let layers = array(token)?;
            for layer in layers {
                let slots = array(layer)?;
                let found = [tokens.len(), layers.len(), slots.len()];
                if std::mem::take(&mut first) {
                    shape = found;
                }
                if shape != found {
                    return Err(format!("its rows differ: {shape:?} and {found:?} (tokens, layers, experts)"));
                }
                for slot in slots {
                    ids.push(slot.as_i64().ok_or_else(|| format!("`{slot}` is no expert's number"))?);
                }
            }
        }
        if shape.contains(&0) || shape.iter().product::<usize>() != ids.len() {
            return Err("it has no [tokens][layers][experts] in it, or rows of different lengths".into());
        }
        Ok(RoutedExperts { shape, ids })
    }

    /// From the bytes of a `.npy` file; several if it has four dimensions.
    ///
    /// # Errors
    /// A damaged file, or one that is not an integer array of three or four dimensions.
    pub fn from_npy(bytes: &[u8]) -> Result<Vec<RoutedExperts>, String> {
        let npy::IntArray { shape, values } = npy::read_integers(bytes)?;
        let inner = match shape.as_slice() {
            &[t, l, k] | &[_, t, l, k] => [t, l, k],
            _ => return Err(format!("its shape is {shape:?}, [tokens, layers, experts] is needed")),
        };
        let len: usize = inner.iter().product();
        if len == 0 {
            return Err(format!("its shape is {shape:?}: it is empty"));
        }
        Ok(values.chunks_exact(len).map(|ids| RoutedExperts { shape: inner, ids: ids.to_vec() }).collect())
    }
}

fn array(value: &Value) -> Result<&Vec<Value>, String> {
    value.as_array().ok_or_else(|| "it is no [tokens][layers][experts] array".to_string())
}

/// Nested arrays that a value begins with.
fn depth(value: &Value) -> usize {
    let first = value.as_array().map(|a| a.first().map_or(0, depth));
    first.map_or(0, |inner| inner + 1)
}

/// Reads a file of either kind.
pub(super) fn read(bytes: &[u8], shape: &TraceShape) -> Result<RouterStats, String> {
    let mut stats = RouterStats::new(shape.map.clone());
    let mut add = |item: &RoutedExperts| {
        let number = stats.items;
        item.add_to(&mut stats, shape, usize::MAX).map_err(|e| format!("item {number}, {e}"))
    };
    if bytes.starts_with(npy::MAGIC) {
        RoutedExperts::from_npy(bytes)?.iter().try_for_each(&mut add)?;
    } else {
        for value in serde_json::Deserializer::from_slice(bytes).into_iter::<Value>() {
            let value = value.map_err(|e| e.to_string())?;
            match depth(&value) {
                4 => array(&value)?.iter().try_for_each(|item| add(&RoutedExperts::from_json(item)?))?,
                _ => add(&RoutedExperts::from_json(&value)?)?,
            }
        }
    }
    Ok(stats)
}
