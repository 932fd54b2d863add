//! SGLang's expert distributions: the recorder's torch files, and the CSV of old versions.

use super::pickle::{Pickle, Value};
use super::torch_file::TorchFile;
use super::traces::{TraceShape, add_counts, add_ids};
use crate::RouterStats;

/// SGLang's number for a forward pass that decodes.
const DECODE: i64 = 2;

/// Reads CSV `layer_id,expert_id,count`, layers numbered as decoder layers.
pub(super) fn read_csv(bytes: &[u8], shape: &TraceShape) -> Result<RouterStats, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is no text")?;
    let mut rows: Vec<Vec<Option<u64>>> = shape.map.experts.iter().map(|&e| vec![None; e]).collect();
    let mut lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
    let header = lines.next().map_or("", |(_, l)| l.trim());
    if header.replace(' ', "") != "layer_id,expert_id,count" {
        return Err(format!("its first line is `{header}`, `layer_id,expert_id,count` is needed"));
    }
    for (number, line) in lines {
        let at = |problem: String| format!("line {}: {problem}", number + 1);
        let fields: Vec<u64> = line.split(',').filter_map(|f| f.trim().parse().ok()).collect();
        let &[layer, expert, count] = fields.as_slice() else {
            return Err(at(format!("`{line}` is not three numbers")));
        };
        let moe = usize::try_from(layer).ok().and_then(|l| shape.map.moe_index(l));
        let moe = moe.ok_or_else(|| at(format!("layer {layer} has no experts in this model")))?;
        let cell = usize::try_from(expert).ok().and_then(|e| rows[moe].get_mut(e));
        let cell = cell.ok_or_else(|| at(format!("layer {layer} has no expert {expert}")))?;
        if cell.replace(count).is_some() {
            let help = "help: give one rank's file at a time, replicas count the same tokens";
            return Err(at(format!("expert {expert} of layer {layer} is counted twice; {help}")));
        }
    }
    if let Some(moe) = rows.iter().position(|row| row.iter().all(Option::is_none)) {
        return Err(format!("layer {} is missing", shape.map.layers[moe]));
    }
    let rows: Vec<Vec<u64>> =
        rows.into_iter().map(|row| row.into_iter().map(Option::unwrap_or_default).collect()).collect();
    let mut stats = RouterStats::new(shape.map.clone());
    add_counts(&mut stats, shape, &rows)?;
    Ok(stats)
}

/// Reads a recorder's file of the modes `stat`, `per_pass` or `per_token`.
pub(super) fn read_recorder(bytes: &[u8], shape: &TraceShape) -> Result<RouterStats, String> {
    let file = TorchFile::open(bytes)?;
    let pickle = file.pickle()?;
    let mut stats = RouterStats::new(shape.map.clone());
    if let Some(count) = pickle.get(pickle.root(), "logical_count") {
        let (dims, values) = file.integers(pickle.tensor(count).ok_or("`logical_count` is no tensor")?)?;
        let &[_, layers, experts] = dims.as_slice() else {
            return Err(format!("`logical_count` has the shape {dims:?}, [steps, layers, experts] is needed"));
        };
        for step in values.chunks_exact(layers.saturating_mul(experts).max(1)) {
            add_counts(&mut stats, shape, &count_rows(step, experts)?)?;
        }
        return Ok(stats);
    }
    let records = pickle.get(pickle.root(), "records").and_then(|r| pickle.list(r));
    let records = records.ok_or("it has neither `logical_count` nor `records`; help: is it of SGLang's recorder?")?;
    let map = pickle.get(pickle.root(), "last_physical_to_logical_map").and_then(|m| pickle.tensor(m));
    let (map_dims, map) = file.integers(map.ok_or("it has no `last_physical_to_logical_map`")?)?;
    let &[layers, physical] = map_dims.as_slice() else {
        return Err(format!("`last_physical_to_logical_map` has the shape {map_dims:?}, two dimensions are needed"));
    };
    let to_logical = Logical { layers, physical, map };
    for (number, &record) in records.iter().enumerate() {
        let at = |problem: String| format!("record {number}: {problem}");
        match pickle.get(record, "topk_ids_of_layer") {
            Some(_) => add_tokens(&mut stats, shape, &file, &pickle, record, &to_logical).map_err(at)?,
            None => {
                let count = pickle.get(record, "global_physical_count").and_then(|c| pickle.tensor(c));
                let count = count.ok_or_else(|| at("it has no `global_physical_count`".into()))?;
                let (dims, values) = file.integers(count).map_err(at)?;
                if dims != [layers, physical] {
                    return Err(at(format!("`global_physical_count` has the shape {dims:?}, not {map_dims:?}")));
                }
                let rows = to_logical.counts(&count_rows(&values, physical).map_err(at)?, shape).map_err(at)?;
                add_counts(&mut stats, shape, &rows).map_err(at)?;
            }
        }
    }
    Ok(stats)
}

/// Rows of counts, none negative.
fn count_rows(values: &[i64], experts: usize) -> Result<Vec<Vec<u64>>, String> {
    let row =
        |row: &[i64]| row.iter().map(|&c| u64::try_from(c).map_err(|_| format!("the count {c} is negative"))).collect();
    values.chunks_exact(experts.max(1)).map(row).collect()
}

/// Which expert each place of a layer holds: some are held twice.
struct Logical {
    layers: usize,
    physical: usize,
    map: Vec<i64>,
}

impl Logical {
    fn of(&self, layer: usize, id: i64) -> Result<i64, String> {
        let place = usize::try_from(id).ok().filter(|&p| p < self.physical);
        let place = place.ok_or_else(|| format!("there is no place {id}, only {}", self.physical))?;
        Ok(self.map[layer * self.physical + place])
    }

    /// Counts of experts from counts of places.
    fn counts(&self, rows: &[Vec<u64>], shape: &TraceShape) -> Result<Vec<Vec<u64>>, String> {
        let experts = |moe: Option<usize>| moe.map_or(0, |m| shape.map.experts[m]);
        let mut logical: Vec<Vec<u64>> =
            shape.rows(self.layers)?.into_iter().map(|moe| vec![0; experts(moe)]).collect();
        for (layer, (row, cells)) in rows.iter().zip(&mut logical).enumerate().filter(|(_, (_, c))| !c.is_empty()) {
            let known = cells.len();
            for (place, &count) in row.iter().enumerate() {
                let id = self.map[layer * self.physical + place];
                let cell = usize::try_from(id).ok().and_then(|e| cells.get_mut(e));
                let cell =
                    cell.ok_or_else(|| format!("a place of layer {layer} holds expert {id}, there are {known}"))?;
                *cell = cell.checked_add(count).ok_or("the counts are too large")?;
            }
        }
        Ok(logical)
    }
}

/// Adds the tokens of a record of the mode `per_token`. Tokens of passes that decode are of answers.
fn add_tokens(
    stats: &mut RouterStats,
    shape: &TraceShape,
    file: &TorchFile<'_>,
    pickle: &Pickle,
    record: usize,
    to_logical: &Logical,
) -> Result<(), String> {
    let ids = pickle.get(record, "topk_ids_of_layer").and_then(|i| pickle.tensor(i));
    let (dims, ids) = file.integers(ids.ok_or("`topk_ids_of_layer` is no tensor")?)?;
    let &[layers, tokens, k] = dims.as_slice() else {
        return Err(format!("`topk_ids_of_layer` has the shape {dims:?}, [layers, tokens, experts] is needed"));
    };
    if ids.is_empty() {
        return Ok(()); // a pass without tokens
    }
    if layers != to_logical.layers {
        return Err(format!("it has {layers} layers, its map of experts {}", to_logical.layers));
    }
    let decodes = pickle.get(record, "forward_mode").is_some_and(|m| matches!(pickle.value(m), Value::Int(DECODE)));
    let starts = pickle.get(record, "positions").and_then(|p| pickle.list(p)).unwrap_or_default();
    stats.items += starts.iter().filter(|&&p| matches!(pickle.value(p), Value::Int(0))).count() as u64;
    let phase = if decodes { &mut stats.answer } else { &mut stats.prompt };
    let mut counted: Option<u64> = None;
    for (layer, moe) in shape.rows(layers)?.into_iter().enumerate() {
        let Some(moe) = moe else { continue };
        let mut seen = 0;
        for t in 0..tokens {
            let slots = &ids[(layer * tokens + t) * k..(layer * tokens + t + 1) * k];
            let mut logical = Vec::with_capacity(k);
            for &id in slots.iter().filter(|&&id| id >= 0) {
                logical.push(to_logical.of(layer, id)?);
            }
            seen += u64::from(add_ids(phase, shape, moe, logical.into_iter())?);
        }
        if *counted.get_or_insert(seen) != seen {
            return Err(format!("layer {layer} has experts for {seen} tokens, the first for {}", counted.unwrap_or(0)));
        }
    }
    phase.tokens += counted.unwrap_or(0);
    Ok(())
}
