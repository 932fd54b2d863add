//! Every model file of the fixtures, cut and with bytes changed in its header: a clear error or a correct load, never a panic,
//! nor more memory than twice the file.
#![allow(missing_docs, reason = "tests")]
#![allow(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use quorate_formats::{Checkpoint, GgufFile, Recipe, SafetensorsFile};
use quorate_residency::Weights;
use serde_json::{Value, json};
use tempfile::TempDir;

static NOW: AtomicU64 = AtomicU64::new(0);
static PEAK: AtomicU64 = AtomicU64::new(0);
static LARGEST: AtomicU64 = AtomicU64::new(0);

struct Counting;

// SAFETY: all is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size() as u64, Ordering::Relaxed) + layout.size() as u64;
        PEAK.fetch_max(now, Ordering::Relaxed);
        LARGEST.fetch_max(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Bytes that loading may take at its height besides twice the file's: what is read at once of a GGUF header (64 KiB), the
/// configuration beside safetensors, threads and the channel between them.
const ALLOWANCE: u64 = 128 << 10;
/// Bytes that one allocation may have besides: paths and messages about very short files.
const LITTLE: u64 = 4 << 10;

/// One test at a time: they count the same memory.
static ALONE: Mutex<()> = Mutex::new(());

/// Forgets what was counted; returns what is in use.
fn count_anew() -> u64 {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    LARGEST.store(0, Ordering::Relaxed);
    before
}

/// Checks what was allocated since: together and in one piece. `widened` may come on top of the former.
fn check_counted(before: u64, path: &Path, file_bytes: u64, widened: u64) {
    let (peak, largest) = (PEAK.load(Ordering::Relaxed).saturating_sub(before), LARGEST.load(Ordering::Relaxed));
    let path = path.display();
    let most = 2 * file_bytes + widened + ALLOWANCE;
    assert!(peak <= most, "{path}: {peak} bytes of memory for a file of {file_bytes}, at most {most} expected");
    let most = 2 * file_bytes + LITTLE;
    assert!(largest <= most, "{path}: {largest} bytes at once for a file of {file_bytes}, at most {most} expected");
}

/// What weights take in memory beyond what they take in the file, of those that are packed with scales apart: bytes (FP8, INT8)
/// are held as their products with the scales, in F32, and 4-bit numbers with zero points in the scales' F16, since no type of
/// the kernels has both. They alone may need more than twice the file; it is known before they are read, and is in the sum that a
/// budget is compared with.
fn widened(checkpoint: &Checkpoint) -> u64 {
    let of = |role| match checkpoint.recipe(role)? {
        recipe @ (Recipe::Scaled { .. } | Recipe::Int4(_)) => {
            let stored: u64 = recipe.stored().iter().map(|loc| loc.len).sum();
            Some(checkpoint.tensor(role).ok()?.len.saturating_sub(stored))
        }
        _ => None,
    };
    checkpoint.roles().filter_map(of).sum()
}

/// Knuth's generator; the upper bits are the good ones.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// What became of the damaged files.
#[derive(Debug, Default)]
struct Outcome {
    refused: usize,
    /// Opened, and a weight is no number.
    not_loaded: usize,
    loaded: usize,
}

/// Opens a model and loads all of it.
fn try_load(path: &Path, file_bytes: u64, outcome: &mut Outcome) {
    let before = count_anew();
    let mut more = 0;
    match Checkpoint::open(path) {
        Err(error) => {
            assert!(!error.to_string().is_empty());
            outcome.refused += 1;
        }
        Ok(checkpoint) => {
            more = widened(&checkpoint);
            let layers = checkpoint.spec().moe_layers().len();
            let mut weights = Weights::open(Arc::new(checkpoint), None);
            match weights.load_skeleton().and_then(|()| weights.load_experts(&vec![None; layers])) {
                Ok(()) => outcome.loaded += 1,
                Err(_) => outcome.not_loaded += 1,
            }
        }
    }
    check_counted(before, path, file_bytes, more);
}

/// Damages a model's file in every way and loads the model each time.
fn damage(model: &Path, file: &Path, header: u64, random: &mut Random) -> Outcome {
    let bytes = fs::read(file).unwrap();
    let size = bytes.len() as u64;
    let mut outcome = Outcome::default();
    // Half of the cuts lie in the header. The longest file first, so that each is cut out of the one before.
    let mut cuts: Vec<u64> = (0..50).map(|i| random.below(if i % 2 == 0 { header } else { size })).collect();
    cuts.sort_unstable_by(|a, b| b.cmp(a));
    let open = fs::OpenOptions::new().write(true).open(file).unwrap();
    for cut in cuts {
        open.set_len(cut).unwrap();
        try_load(model, cut, &mut outcome);
    }
    // A file that ends in padding may lose some of it.
    assert!(outcome.refused >= 48, "{}: cut files were not refused: {outcome:?}", file.display());
    fs::write(file, &bytes).unwrap();
    let mut open = fs::OpenOptions::new().write(true).open(file).unwrap();
    let mut set = |at: u64, byte: u8| {
        open.seek(SeekFrom::Start(at)).unwrap();
        open.write_all(&[byte]).unwrap();
    };
    for _ in 0..200 {
        let at = random.below(header);
        set(at, random.below(256) as u8);
        try_load(model, size, &mut outcome);
        set(at, bytes[at as usize]);
    }
    let mut whole = Outcome::default();
    try_load(model, size, &mut whole);
    assert_eq!(whole.loaded, 1, "{}: it is whole again", file.display());
    outcome
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().map(|e| e.unwrap().path());
    let mut files: Vec<PathBuf> = entries.filter(|p| p.extension().is_some_and(|e| e == extension)).collect();
    files.sort();
    files
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

#[test]
fn damaged_headers_are_refused_or_loaded() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let fixtures = fixtures();
    let inside = |folder: &Path| fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();
    let mut folders = [inside(&fixtures), inside(&fixtures.join("packed"))].concat();
    folders.sort();
    let (mut random, dir) = (Random(7), TempDir::new().unwrap());
    let mut sum = Outcome::default();
    let mut count = 0;
    let mut add = |outcome: Outcome| {
        sum.refused += outcome.refused;
        sum.not_loaded += outcome.not_loaded;
        sum.loaded += outcome.loaded;
        count += 1;
    };
    for folder in &folders {
        for file in files(&folder.join("gguf"), "gguf") {
            let header = GgufFile::open(&file).unwrap().tensors().map(|t| t.offset).min().unwrap();
            let copy = dir.path().join("m.gguf");
            fs::copy(&file, &copy).unwrap();
            add(damage(&copy, &copy, header, &mut random));
        }
        let weights = folder.join("model.safetensors");
        if weights.is_file() && folder.join("config.json").is_file() {
            let copy = dir.path().join("folder");
            fs::create_dir_all(&copy).unwrap();
            for name in ["config.json", "model.safetensors"] {
                fs::copy(folder.join(name), copy.join(name)).unwrap();
            }
            let length = fs::read(&weights).unwrap()[..8].try_into().unwrap();
            add(damage(&copy, &copy.join("model.safetensors"), 8 + u64::from_le_bytes(length), &mut random));
        }
    }
    assert!(count > 62, "only {count} files");
    // Not all damage is to be seen: a changed byte may lie in a text, or make another number.
    assert!(sum.loaded > 100 && sum.refused > 5000, "{sum:?}");
}

/// A header that is true to itself, but has more of something than a model has: it costs no more than its bytes.
#[test]
fn long_headers_cost_what_they_hold() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.gguf");
    let (text, number) = (|t: &str| [&(t.len() as u64).to_le_bytes()[..], t.as_bytes()].concat(), u32::to_le_bytes);
    let head = |tensors: u64, pairs: u64| {
        [b"GGUF".to_vec(), number(3).to_vec(), tensors.to_le_bytes().to_vec(), pairs.to_le_bytes().to_vec()].concat()
    };
    let array = |kind: u32, count: u64, bytes: Vec<u8>| {
        [head(0, 1), text("k"), number(9).to_vec(), number(kind).to_vec(), count.to_le_bytes().to_vec(), bytes].concat()
    };
    let many = 1_000_000;
    for (bytes, what) in [
        (array(0, many, vec![1; 1_000_000]), "bytes"),
        (array(7, many, vec![1; 1_000_000]), "truth values"),
        (array(5, many, vec![1; 4_000_000]), "numbers"),
        (array(8, many, vec![0; 8_000_000]), "empty texts"),
        (array(8, many, text("ab").repeat(1_000_000)), "texts"),
    ] {
        fs::write(&path, &bytes).unwrap();
        let before = count_anew();
        let file = GgufFile::open(&path).unwrap_or_else(|error| panic!("{what}: {error}"));
        check_counted(before, &path, bytes.len() as u64, 0);
        drop(file);
    }

    // Lists of the smallest tensors: in one piece only, since each is in several lists.
    let tensor = |i: u64| {
        let place = [0u32.to_le_bytes().to_vec(), (32 * i).to_le_bytes().to_vec()].concat();
        [text(&format!("{i:04x}")), number(0).to_vec(), place].concat()
    };
    let infos: Vec<u8> = (0..50_000).flat_map(tensor).collect();
    let bytes = [head(50_000, 0), infos, vec![0; 32 * 50_001]].concat();
    fs::write(&path, &bytes).unwrap();
    count_anew();
    assert_eq!(GgufFile::open(&path).unwrap().tensors().count(), 50_000);
    assert!(LARGEST.load(Ordering::Relaxed) <= 2 * bytes.len() as u64 + LITTLE);

    let entries: Vec<String> =
        (0..50_000).map(|i| format!("\"{i:x}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}")).collect();
    let header = format!("{{{}}}", entries.join(","));
    let path = dir.path().join("x.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    count_anew();
    assert_eq!(SafetensorsFile::open(&path).unwrap().tensors().len(), 50_000);
    assert!(LARGEST.load(Ordering::Relaxed) <= 2 * header.len() as u64 + LITTLE);
}

/// Numbers of a configuration that the tensors do not bear out are refused before anything is made of them.
#[test]
fn a_configuration_makes_nothing_that_the_tensors_do_not_have() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (dir, source) = (TempDir::new().unwrap(), fixtures().join("qwen3_moe"));
    fs::copy(source.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let config: Value = serde_json::from_slice(&fs::read(source.join("config.json")).unwrap()).unwrap();
    let size = fs::metadata(source.join("model.safetensors")).unwrap().len();
    for changes in [
        json!({ "num_hidden_layers": 4096 }),
        json!({ "num_hidden_layers": 4096, "head_dim": 4096 }),
        json!({ "num_hidden_layers": 60, "head_dim": 4096 }),
        json!({ "num_experts": 65536, "num_experts_per_tok": 65536 }),
        json!({ "vocab_size": 1 << 24, "hidden_size": 1 << 20, "moe_intermediate_size": 1 << 20 }),
        json!({ "num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14, "max_position_embeddings": 1u64 << 31 }),
    ] {
        let mut config = config.clone();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let before = count_anew();
        assert!(Checkpoint::open(dir.path()).is_err(), "{changes}");
        check_counted(before, dir.path(), size, 0);
    }
}
