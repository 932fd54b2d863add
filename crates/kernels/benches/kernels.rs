//! Speed of the kernels at typical shapes: `cargo bench -p quorate-kernels [-- WORD]` runs those
//! whose line contains WORD. Each figure is the best of many short runs. QUORATE_ISA names the instructions, as for the program.

#![allow(clippy::print_stdout, reason = "this is what a benchmark is for")]
#![allow(unsafe_code, reason = "the machine's peak is measured with its own instructions")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use quorate_kernels::*;

/// How long each case is repeated.
const TIME: Duration = Duration::from_millis(300);

fn main() {
    let filter: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    if let Ok(name) = std::env::var("QUORATE_ISA") {
        Isa::choose(&name).expect("instructions of this machine");
    }
    println!("instructions: {}", Isa::best().name());
    println!("{:58} {:>7} {:>10} {:>9} {:>9}", "case", "threads", "us", "GFLOP/s", "GB/s");
    let most = std::thread::available_parallelism().map_or(1, usize::from);
    let mut threads = 1;
    while threads <= most {
        let bench = Bench { pool: Pool::new(threads), filter: filter.clone() };
        bench.peak();
        bench.products();
        bench.blocks();
        bench.experts();
        bench.attention();
        bench.attention_of_layers(95);
        bench.attention_of_layers(511);
        bench.rows();
        threads *= 2;
    }
}

struct Bench {
    pool: Pool,
    filter: Vec<String>,
}

impl Bench {
    /// Prints the best time of `f`, which does `flops` operations and reads `bytes`.
    fn case(&self, name: &str, flops: f64, bytes: f64, mut f: impl FnMut(&Pool)) {
        if !self.wants(name) {
            return;
        }
        let (start, mut best) = (Instant::now(), Duration::MAX);
        while start.elapsed() < TIME {
            let start = Instant::now();
            f(&self.pool);
            best = best.min(start.elapsed());
        }
        let seconds = best.as_secs_f64();
        let (us, gflops, gb) = (seconds * 1e6, flops / seconds / 1e9, bytes / seconds / 1e9);
        let threads = self.pool.threads();
        println!("{name:58} {threads:7} {us:10.1} {gflops:9.1} {gb:9.1}");
    }

    fn wants(&self, name: &str) -> bool {
        self.filter.iter().all(|word| name.contains(word.as_str()))
    }

    fn peak(&self) {
        const ROUNDS: usize = 20_000;
        let flops = (ROUNDS * 16 * 32 * self.pool.threads()) as f64;
        self.case("peak of fused multiply-add", flops, 0.0, |pool| {
            pool.run(|_, _| {
                black_box(fma_rounds(black_box(ROUNDS)));
            });
        });
        self.case("a job of nothing", 0.0, 0.0, |pool| {
            for _ in 0..1000 {
                pool.run(|_, _| {});
            }
        });
        for mib in [1, 64, 1024] {
            let name = format!("read bandwidth, {mib} MiB");
            if self.wants(&name) {
                let bytes = vec![1_u8; mib << 20];
                self.case(&name, 0.0, bytes.len() as f64, |pool| {
                    pool.run(|w, n| {
                        black_box(read_through(&bytes[split(bytes.len(), w, n, 4096)]));
                    });
                });
            }
        }
    }

    fn products(&self) {
        let types = [DType::F32, DType::F16, DType::BF16];
        for (rows, cols) in [(1024, 256), (4096, 2048)] {
            for (dtype, n) in types.iter().flat_map(|t| [1, 2, 4, 8, 16, 64, 512].map(|n| (*t, n))) {
                self.product(dtype, n, rows, cols, "");
            }
        }
        for (n, rows, cols) in [(512, 128, 256), (512, 256, 128)] {
            self.product(DType::BF16, n, rows, cols, "");
        }
    }

    /// Weights in blocks: few tokens with 512 MiB of them (which no cache holds), to be compared with reading as much, and many tokens.
    fn blocks(&self) {
        for dtype in DType::ALL.iter().copied().filter(|t| t.is_quantized()) {
            let cols = 2048;
            let many = (512 << 20) / dtype.row_bytes(cols).expect("whole blocks");
            for n in [1, 2, 4] {
                self.product(dtype, n, many, cols, ", 512 MiB");
            }
            for rows in [512, 2048, 8192] {
                self.one_after_another(dtype, rows, cols, many);
            }
            for n in [1, 2, 4, 8, 32, 96] {
                self.product(dtype, n, 128, cols, ", near");
                self.product(dtype, n, 512, cols, ", in cache");
            }
            for n in [32, 512] {
                self.product(dtype, n, 4096, cols, "");
            }
            self.product(dtype, 512, 1536, 8960, "");
        }
    }

    fn product(&self, dtype: DType, n: usize, rows: usize, cols: usize, note: &str) {
        let name = format!("matmul {} [{n}, {cols}] x [{cols}, {rows}]{note}", dtype.name());
        if !self.wants(&name) {
            return;
        }
        let data = matrix(dtype, rows, cols);
        let w = MatRef::new(dtype, rows, cols, &data).expect("a matrix");
        let (x, mut y) = (noise(n * cols), vec![0.0; n * rows]);
        let flops = 2.0 * (n * rows * cols) as f64;
        self.case(&name, flops, data.len() as f64, |pool| matmul(pool, Pack::BySize, w, &x, n, None, &mut y));
    }

    /// Matrices of `rows` rows, `many` rows in all, as the layers of a model have them: what it costs to begin and to end each.
    fn one_after_another(&self, dtype: DType, rows: usize, cols: usize, many: usize) {
        let name = format!("matmul {} [1, {cols}] x [{cols}, {rows}], one after another, 512 MiB", dtype.name());
        if !self.wants(&name) {
            return;
        }
        let each = rows * dtype.row_bytes(cols).expect("whole blocks");
        let many = many / rows * rows;
        let data = matrix(dtype, many, cols);
        let (x, mut y) = (noise(cols), vec![0.0; rows]);
        self.case(&name, 2.0 * (many * cols) as f64, data.len() as f64, |pool| {
            for data in data.chunks_exact(each) {
                let w = MatRef::new(dtype, rows, cols, data).expect("a matrix");
                matmul(pool, Pack::BySize, w, &x, 1, None, &mut y);
            }
        });
    }

    fn experts(&self) {
        for (dtype, e, k, d, i) in [
            (DType::BF16, 32, 4, 256, 128),
            (DType::Q8_0, 32, 4, 256, 128),
            (DType::BF16, 64, 8, 2048, 1024),
            (DType::Q4_K, 64, 8, 2048, 1024),
        ] {
            let of = format!("{} of {e}, d {d}, I {i}, k {k}", dtype.name());
            let names = ["expert_hidden", "expert_down", "experts", "combine", "expert_ffn"];
            let sizes = [1, 8, 32, 128, 512];
            let wanted = |f: &&str| sizes.iter().any(|n| self.wants(&format!("{f} {of}, n {n}")));
            if !names.iter().any(wanted) {
                continue;
            }
            let sets: Vec<_> =
                (0..e).map(|_| (matrix(dtype, i, d), matrix(dtype, i, d), matrix(dtype, d, i))).collect();
            let experts: Vec<_> = sets
                .iter()
                .map(|(gate, up, down)| {
                    Some(ExpertRef {
                        gate: MatRef::new(dtype, i, d, gate).expect("a matrix"),
                        up: MatRef::new(dtype, i, d, up).expect("a matrix"),
                        down: MatRef::new(dtype, d, i, down).expect("a matrix"),
                    })
                })
                .collect();
            for n in sizes {
                self.expert_cases(&experts, n, k, &format!("{of}, n {n}"));
            }
        }
    }

    fn expert_cases(&self, experts: &[Option<ExpertRef<'_>>], n: usize, k: usize, of: &str) {
        let gate = experts[0].as_ref().expect("all experts are there").gate;
        let (i, d) = (gate.rows, gate.cols);
        let ids: Vec<u32> = (0..n).flat_map(|t| choices(t, k, experts.len())).collect();
        let (x, gates) = (noise(n * d), vec![0.25; n * k]);
        let (mut hidden, mut out) = (vec![0.0; n * k * i], vec![0.0; n * k * d]);
        let mut y = vec![0.0; n * d];
        let used = (0..experts.len()).filter(|e| ids.contains(&(*e as u32))).count();
        let (flops, bytes) = (2.0 * (n * k * i * d) as f64, (used * gate.data.len()) as f64);
        self.case(&format!("expert_hidden {of}"), 2.0 * flops, 2.0 * bytes, |pool| {
            expert_hidden(pool, Pack::BySize, experts, &x, n, k, &ids, Act::Silu, i, &mut hidden)
                .expect("all experts are there");
        });
        self.case(&format!("expert_down {of}"), flops, bytes, |pool| {
            expert_down(pool, Pack::BySize, experts, &hidden, n, k, &ids, d, &mut out).expect("all experts are there");
        });
        self.case(&format!("experts {of}"), 3.0 * flops, 3.0 * bytes, |pool| {
            expert_hidden(pool, Pack::BySize, experts, &x, n, k, &ids, Act::Silu, i, &mut hidden)
                .expect("all experts are there");
            expert_down(pool, Pack::BySize, experts, &hidden, n, k, &ids, d, &mut out).expect("all experts are there");
        });
        self.case(&format!("combine {of}"), 0.0, 4.0 * out.len() as f64, |pool| {
            combine(pool, &out, &gates, &ids, n, k, d, &mut y);
        });
        if n == 1 {
            let chosen: Vec<_> = ids.iter().filter_map(|&id| experts[id as usize]).collect();
            self.case(&format!("expert_ffn {of}"), 3.0 * flops, 3.0 * bytes, |pool| {
                expert_ffn(pool, &chosen, &gates, &x, Act::Silu, &mut y);
            });
        }
    }

    fn attention(&self) {
        for (n_heads, n_kv_heads, head_dim) in [(8, 8, 32), (16, 16, 128), (32, 4, 128)] {
            let scale = 1.0 / (head_dim as f32).sqrt();
            let shape = AttnShape { n_heads, n_kv_heads, head_dim, scale, window: None };
            for (len, pos0) in [(512, 0), (1, 128), (1, 2048)] {
                let (width, cache) = (n_heads * head_dim, (pos0 + len) * n_kv_heads * head_dim);
                let q = noise(len * width);
                let mut z = vec![0.0; len * width];
                let pairs = (1..=len).map(|i| pos0 + i).sum::<usize>() * width;
                for dtype in [DType::F32, DType::F16] {
                    let mut k = KvPages::new(dtype, n_kv_heads, head_dim);
                    k.extend(&noise(cache));
                    let name =
                        format!("attention {n_heads}/{n_kv_heads} x {head_dim}, {len} after {pos0}, {}", dtype.name());
                    let bytes = 2 * cache * dtype.block_bytes();
                    self.case(&name, 4.0 * pairs as f64, bytes as f64, |pool| {
                        let segment = AttnSegment { row0: 0, len, pos0, k: &k, v: &k };
                        attention(pool, &shape, &q, &[segment], &mut z);
                    });
                }
            }
        }
    }

    /// Attention of one token after `pos0` others over many caches, one after another, as the layers of a model have them: keys and
    /// values come from memory.
    fn attention_of_layers(&self, pos0: usize) {
        const LAYERS: usize = 128;
        let shape = AttnShape { n_heads: 16, n_kv_heads: 16, head_dim: 128, scale: 0.1, window: None };
        let name = format!("attention 16/16 x 128, 1 after {pos0}, F16, one after another");
        if !self.wants(&name) {
            return;
        }
        let width = shape.n_kv_heads * shape.head_dim;
        let pages = || {
            let mut pages = KvPages::new(DType::F16, shape.n_kv_heads, shape.head_dim);
            pages.extend(&noise((pos0 + 1) * width));
            pages
        };
        let mut caches: Vec<_> = (0..LAYERS).map(|_| [pages(), pages()]).collect();
        let (q, mut z) = (noise(width), Vec::new());
        let bytes = LAYERS * 4 * (pos0 + 1) * width;
        self.case(&name, 0.0, bytes as f64, |pool| {
            for [k, v] in &caches {
                attention(pool, &shape, &q, &[AttnSegment { row0: 0, len: 1, pos0, k, v }], &mut z);
            }
        });
        let (cos, sin) = (noise(shape.head_dim / 2), noise(shape.head_dim / 2));
        let turn = Turn { norms: None, eps: 1e-5, cos: &cos, sin: &sin };
        self.case(&format!("{name}, at once"), 0.0, bytes as f64, |pool| {
            for caches in &mut caches {
                caches.iter_mut().for_each(|pages| pages.truncate(pos0));
                let [k, v] = caches;
                attention_of_next(pool, &shape, &turn, [&q; 3], [k, v], &mut z);
            }
        });
    }

    fn rows(&self) {
        for n in [1, 512] {
            let d = 256;
            let (x, w, mut y) = (noise(n * d), noise(d), vec![0.0; n * d]);
            let bytes = 8.0 * (n * d) as f64;
            self.case(&format!("rms_norm [{n}, {d}]"), 0.0, bytes, |pool| {
                rms_norm(pool, &x, d, &w, 1e-5, &mut y);
            });
            self.case(&format!("add [{n}, {d}]"), 0.0, 1.5 * bytes, |pool| {
                add(pool, &x, &x, &mut y);
            });
            let (cos, sin) = (noise(n * 16), noise(n * 16));
            self.case(&format!("rope [{n}, 8, 32]"), 0.0, bytes, |pool| {
                rope(pool, &x, n, 8, 32, 32, &cos, &sin, &mut y);
            });
            let mut logits = noise(n * 32);
            self.case(&format!("softmax_rows [{n}, 32]"), 0.0, bytes / 8.0, |pool| {
                softmax_rows(pool, &mut logits, 32);
            });
            self.case(&format!("copy, act_inplace Silu [{n}, {d}]"), 0.0, bytes, |pool| {
                y.copy_from_slice(&x);
                act_inplace(pool, Act::Silu, &mut y);
            });
        }
        let src = noise(1 << 18);
        for dtype in [DType::F16, DType::BF16, DType::Q8_0] {
            let mut bytes = vec![0; dtype.row_bytes(src.len()).expect("whole blocks")];
            let mut back = vec![0.0; src.len()];
            let len = bytes.len() as f64;
            self.case(&format!("quantize {}", dtype.name()), 0.0, len, |_| {
                quantize(dtype, &src, &mut bytes);
            });
            self.case(&format!("dequantize {}", dtype.name()), 0.0, len, |_| {
                dequantize(dtype, &bytes, &mut back);
            });
        }
    }
}

/// Values in -1..1, the same each time.
fn noise(n: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn matrix(dtype: DType, rows: usize, cols: usize) -> Vec<u8> {
    let mut data = vec![0; rows * dtype.row_bytes(cols).expect("whole blocks")];
    if dtype.is_quantized() {
        let some: Vec<_> = (0..61).map(|i| ordinary_block(dtype, i)).collect();
        for (i, block) in data.chunks_exact_mut(dtype.block_bytes()).enumerate() {
            block.copy_from_slice(&some[i % some.len()]);
        }
        return data;
    }
    quantize(dtype, &noise(rows * cols), &mut data);
    data
}

/// A block of any bits whose values are of ordinary size.
fn ordinary_block(dtype: DType, seed: u64) -> Vec<u8> {
    let mut state = seed + 0x9e37_79b9_7f4a_7c15;
    let (mut block, mut values) = (vec![0; dtype.block_bytes()], vec![0.0; dtype.block_len()]);
    loop {
        block.fill_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as u8
        });
        dequantize(dtype, &block, &mut values);
        let most = values.iter().fold(0.0_f32, |most, v| if v.is_nan() { f32::INFINITY } else { most.max(v.abs()) });
        if (1e-3..1e3).contains(&most) {
            return block;
        }
    }
}

/// `k` different experts of `e` for token `t`, all about equally often.
fn choices(t: usize, k: usize, e: usize) -> impl Iterator<Item = u32> {
    let start = t.wrapping_mul(0x9e37_79b9).wrapping_add(t / 3) % e;
    (0..k).map(move |j| ((start + j * (e / k)) % e) as u32)
}

/// 16 times 16 fused multiply-adds of one lane each round, in independent chains.
#[cfg(target_arch = "x86_64")]
fn fma_rounds(rounds: usize) -> f32 {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    fn avx512(rounds: usize) -> f32 {
        let (a, b) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(0.5)));
        let mut sums = [_mm512_set1_ps(1.0); 16];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        sums.into_iter().fold(0.0, |all, sum| all + _mm512_reduce_add_ps(sum))
    }
    #[target_feature(enable = "avx2,fma")]
    fn avx2(rounds: usize) -> f32 {
        let (a, b) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(0.5)));
        let mut sums = [_mm256_set1_ps(1.0); 8];
        for _ in 0..4 * rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        sums.into_iter().fold(0.0, |all, sum| all + _mm256_cvtss_f32(sum))
    }
    // SAFETY: the instructions were found on this machine.
    unsafe {
        match Isa::best() {
            Isa::Amx | Isa::Avx512 => avx512(rounds),
            Isa::Avx2 => avx2(rounds),
            _ => 0.0,
        }
    }
}

/// Not measured on other machines.
#[cfg(not(target_arch = "x86_64"))]
fn fma_rounds(_: usize) -> f32 {
    0.0
}
