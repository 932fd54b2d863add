//! Every model file of the fixtures, cut and with bytes changed in its header: a clear error or a correct load, never a panic,
//! nor memory that the file does not justify.
#![allow(missing_docs, reason = "tests")]
#![allow(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use quorate_formats::{Checkpoint, GgufFile};
use quorate_residency::Weights;
use tempfile::TempDir;

static NOW: AtomicU64 = AtomicU64::new(0);
static PEAK: AtomicU64 = AtomicU64::new(0);

struct Counting;

// SAFETY: all is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size() as u64, Ordering::Relaxed) + layout.size() as u64;
        PEAK.fetch_max(now, Ordering::Relaxed);
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

/// What a file of any size may take besides twice its bytes: a configuration may name 4096 layers, each of which is
/// specified before its first tensor is missed.
const ALLOWANCE: u64 = 16 << 20;

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
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    match Checkpoint::open(path) {
        Err(error) => {
            assert!(!error.to_string().is_empty());
            outcome.refused += 1;
        }
        Ok(checkpoint) => {
            let layers = checkpoint.spec().moe_layers().len();
            let mut weights = Weights::open(Arc::new(checkpoint), None);
            match weights.load_skeleton().and_then(|()| weights.load_experts(&vec![None; layers])) {
                Ok(()) => outcome.loaded += 1,
                Err(_) => outcome.not_loaded += 1,
            }
        }
    }
    let taken = PEAK.load(Ordering::Relaxed).saturating_sub(before);
    // Weights that are held as f32 may take twice, latent projections four times what they take in the file.
    let most = ALLOWANCE + 4 * file_bytes;
    assert!(taken <= most, "{}: {taken} bytes of memory for a file of {file_bytes}", path.display());
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

#[test]
fn damaged_headers_are_refused_or_loaded() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    let mut folders: Vec<PathBuf> = fs::read_dir(fixtures).unwrap().map(|e| e.unwrap().path()).collect();
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
    assert!(count > 55, "only {count} files");
    // Not all damage is to be seen: a changed byte may lie in a text, or make another number.
    assert!(sum.loaded > 100 && sum.refused > 5000, "{sum:?}");
}
