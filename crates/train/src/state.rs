//! What a training needs to go on exactly where it was: random numbers that are a function of seed and epoch, and the file
//! with the optimizer's state.

use std::path::Path;

use quorate_formats::{SafetensorsFile, TensorOut, write_safetensors};

use crate::trainer::{Best, Place};
use crate::{AdamW, Parameters, TrainError};

/// SplitMix64 (Steele, Lea and Flood 2014).
pub(crate) struct Random(u64);

impl Random {
    pub fn new(seed: u64, stream: u64) -> Random {
        let mut mixed = Random(seed);
        Random(mixed.next() ^ stream.wrapping_mul(0xd1b5_4a32_d192_ed03))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In 0..1.
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }

    /// The numbers below `n` in random order (Fisher and Yates).
    pub fn order(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, (self.next() % (i as u64 + 1)) as usize);
        }
        order
    }
}

const KIND: &str = "quorate training";
const VERSION: &str = "1";

/// Everything that changes while training.
pub(crate) struct Saved {
    pub place: Place,
    pub values: Vec<Vec<f32>>,
    pub states: Vec<AdamW>,
    pub best: Option<Best>,
}

/// What a checkpoint must belong to.
pub(crate) struct Identity<'a> {
    pub fingerprint: &'a str,
    pub seed: u64,
}

/// Writes a checkpoint under a temporary name and renames it.
pub(crate) fn save(
    path: &Path,
    identity: &Identity<'_>,
    parameters: &Parameters,
    saved: &Saved,
) -> Result<(), TrainError> {
    let metadata = [
        ("kind", KIND.to_string()),
        ("version", VERSION.to_string()),
        ("fingerprint", identity.fingerprint.to_string()),
        ("seed", identity.seed.to_string()),
    ];
    let metadata = metadata.into_iter().map(|(k, v)| (k.to_string(), v)).collect();
    let place = [saved.place.step, saved.place.epoch, saved.place.position].map(|n| n as i64);
    let steps: Vec<i64> = saved.states.iter().map(|s| s.steps as i64).collect();
    let mut tensors =
        vec![TensorOut::i64("place", &[3], place.to_vec()), TensorOut::i64("steps", &[steps.len()], steps)];
    for (i, parameter) in parameters.all().iter().enumerate() {
        let (shape, state) = (parameter.var.dims(), &saved.states[i]);
        tensors.push(TensorOut::f32(format!("value {}", parameter.name), shape, saved.values[i].as_slice()));
        tensors.push(TensorOut::f32(format!("mean {}", parameter.name), shape, state.mean.as_slice()));
        tensors.push(TensorOut::f32(format!("square {}", parameter.name), shape, state.square.as_slice()));
        if let Some(best) = &saved.best {
            tensors.push(TensorOut::f32(format!("best {}", parameter.name), shape, best.values[i].as_slice()));
        }
    }
    if let Some(best) = &saved.best {
        tensors.push(TensorOut::f64("best score", &[1], vec![best.score]));
        tensors.push(TensorOut::i64("best step", &[1], vec![best.step as i64]));
    }
    Ok(write_safetensors(path, Some(metadata), tensors)?)
}

/// Reads a checkpoint of just these parameters.
pub(crate) fn load(path: &Path, identity: &Identity<'_>, parameters: &Parameters) -> Result<Saved, TrainError> {
    let refuse = |problem: String| TrainError::Checkpoint { path: path.to_owned(), problem };
    let file = SafetensorsFile::open(path)?;
    let of = |key: &str| file.metadata().get(key).map_or("", String::as_str);
    let wanted = [
        ("kind", KIND, "it is no training checkpoint"),
        ("version", VERSION, "it is of another version of the format"),
        ("fingerprint", identity.fingerprint, "it is of another model"),
    ];
    if let Some((.., problem)) = wanted.iter().find(|(key, value, _)| of(key) != *value) {
        return Err(refuse((*problem).to_string()));
    }
    if of("seed") != identity.seed.to_string() {
        return Err(refuse(format!("its seed is {}, not {}", of("seed"), identity.seed)));
    }
    let names: Vec<&str> = file.tensors().iter().filter_map(|t| t.name.strip_prefix("value ")).collect();
    let other = names.iter().find(|name| !parameters.all().iter().any(|p| p.name == **name));
    if let Some(name) = other {
        return Err(refuse(format!("it trains {name}, too")));
    }
    let read = |what: &str, i: usize| -> Result<Vec<f32>, TrainError> {
        let parameter = &parameters.all()[i];
        let name = format!("{what} {}", parameter.name);
        let loc = file.tensors().iter().find(|t| t.name == name);
        if loc.is_none_or(|loc| loc.shape != parameter.var.dims()) {
            return Err(refuse(format!("{name} is not in it, or has another shape")));
        }
        Ok(file.read_f32(&name)?)
    };
    let all = 0..parameters.all().len();
    let whole = |name: &str, n: usize| -> Result<Vec<u64>, TrainError> {
        let numbers: Vec<u64> = file.read_i64(name)?.iter().filter_map(|&n| u64::try_from(n).ok()).collect();
        if numbers.len() == n { Ok(numbers) } else { Err(refuse(format!("{name} is broken"))) }
    };
    let (place, steps) = (whole("place", 3)?, whole("steps", all.len())?);
    let states = all.clone().map(|i| Ok(AdamW { steps: steps[i], mean: read("mean", i)?, square: read("square", i)? }));
    let states = states.collect::<Result<_, TrainError>>()?;
    let values = all.clone().map(|i| read("value", i)).collect::<Result<_, _>>()?;
    let best = match file.tensors().iter().any(|t| t.name == "best score") {
        false => None,
        true => {
            let score = file.read_f64("best score")?.first().copied().ok_or_else(|| refuse("it is broken".into()))?;
            let values = all.map(|i| read("best", i)).collect::<Result<_, _>>()?;
            Some(Best { step: whole("best step", 1)?[0], score, values })
        }
    };
    Ok(Saved { place: Place { step: place[0], epoch: place[1], position: place[2] }, values, states, best })
}
