//! Every family computes what transformers computed: each inner value, the logits and the greedy tokens, however the
//! tokens are fed.

mod support;

use std::collections::BTreeSet;
use std::fs;

use quorate_formats::SafetensorsFile;
use quorate_formats::spec::RouterScore;
use quorate_model::{GenerateOptions, Generation, KvCache, Lens, Model, NoLens, Segment, Site};
use support::{Capture, Kept, difference, fixture, logits, logits_in_turn, open, open_gguf, prompts, rows};

/// Largest absolute error of any value.
const TOLERANCE: f32 = 1e-4;
/// Tokens of a prompt, and of a greedy continuation.
const PROMPT: usize = 24;
const ANSWER: usize = 16;

/// One test for each folder of fixtures.
macro_rules! agree_with_transformers {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            Fixture::open(stringify!($name)).check();
        })*

        #[test]
        fn no_fixture_is_forgotten() {
            let tested = BTreeSet::from([$(stringify!($name).to_string()),*]);
            let folders = fs::read_dir(fixture("")).unwrap().map(|entry| entry.unwrap());
            let there = folders.filter(|folder| folder.path().join("reference.safetensors").exists());
            assert_eq!(there.map(|folder| folder.file_name().into_string().unwrap()).collect::<BTreeSet<_>>(), tested);
        }
    };
}

agree_with_transformers! {
    olmoe olmoe_256 olmoe_norm_clip qwen3_moe qwen3_moe_nonorm qwen2_moe qwen2_moe_mixed mixtral mixtral_swa_bf16
    llama mistral qwen2 qwen3
    deepseek_moe deepseek_v2 deepseek_v2_greedy deepseek_v2_lite deepseek_v3 deepseek_v3_flat_mtp deepseek_v3_fp8 ernie4_5_moe
    gemma2 gemma3_text gemma3_text_softcap glm4_moe gpt2 gpt_oss gpt_oss_mxfp4 granitemoe granitemoeshared hunyuan_v1_moe
    llama4_nested llama4_text olmo2 pangu_pro_moe phi3_long phi3_short_partial phimoe phimoe_long qwen3_next qwen3_5_moe
}

/// The same weights as GGUF, converted by llama.cpp: the test of the folder with the file's weights.
macro_rules! agree_from_gguf {
    ($($name:ident $types:literal)*) => {
        mod from_gguf {
            $(#[test]
            fn $name() {
                for kind in $types.split(' ') {
                    super::Fixture::from_gguf(stringify!($name), kind).check();
                }
            })*
        }
    };
}

agree_from_gguf! {
    olmoe "f16 bf16" mixtral "f16" llama "f16" qwen2 "f16" qwen3 "f16" qwen2_moe "f16" qwen3_moe "f16" olmo2 "f16" gpt2 "f16"
    gemma3_text "f16" granitemoe "f16" glm4_moe "f16" ernie4_5_moe "f16" gpt_oss "f16" deepseek_v2_greedy "f16"
    deepseek_v3 "f16" deepseek_v2_lite "f32" deepseek_v3_flat_mtp "f32" granitemoeshared "f32" phi3_long "f32"
    phi3_short_partial "f32" qwen3_next "f32" gemma2 "f32" qwen3_5_moe "f32" deepseek_moe "f32"
}

struct Fixture {
    name: &'static str,
    model: Model,
    reference: SafetensorsFile,
    prompts: [Vec<u32>; 2],
}

impl Fixture {
    fn open(name: &'static str) -> Self {
        let reference = SafetensorsFile::open(&fixture(name).join("reference.safetensors")).unwrap();
        Self { name, model: open(&fixture(name)), reference, prompts: prompts(name) }
    }

    fn from_gguf(name: &'static str, kind: &str) -> Self {
        Self { model: open_gguf(name, kind), ..Self::open(name) }
    }

    fn check(&self) {
        let kernel_sites: Vec<Site> =
            (Site::ALL.iter().copied()).filter(|site| !matches!(site, Site::AttnScores | Site::AttnPattern)).collect();
        for i in 0..2 {
            self.check_logits("no lens", i, &logits(&self.model, &self.prompts[i], &mut NoLens));
            self.check_values("all sites but attention scores", i, &kernel_sites);
            self.check_values("all sites", i, Site::ALL);
            self.check_feeding(i);
            self.check_greedy("no lens", i, &mut NoLens);
            self.check_greedy("all sites", i, &mut Capture::new(Site::ALL));
        }
        self.check_batches();
    }

    /// One sequence's part of a reference tensor `[2, ..]`.
    fn expected(&self, tensor: &str, i: usize) -> Vec<f32> {
        let all = self.reference.read_f32(tensor).unwrap();
        all[i * all.len() / 2..(i + 1) * all.len() / 2].to_vec()
    }

    #[track_caller]
    fn compare(&self, way: &str, i: usize, tensor: &str, found: &[f32], expected: &[f32]) {
        // Relative where values are large: a norm with large weights enlarges the rounding of what it norms. And a recurrent
        // state carries the rounding of every step.
        let largest = expected.iter().fold(0f32, |most, v| most.max(v.abs()));
        let recurrent = self.model.spec().layers.iter().any(|l| l.delta.is_some());
        let tolerance = TOLERANCE * (largest / 10.0).max(1.0) * if recurrent { 4.0 } else { 1.0 };
        if let Some(difference) = difference(found, expected, tolerance) {
            panic!("{}, {way}, prompt {i}: the first wrong tensor is {tensor}: {difference}", self.name);
        }
    }

    #[track_caller]
    fn check_logits(&self, way: &str, i: usize, found: &[f32]) {
        self.compare(way, i, "logits", found, &self.expected("logits", i));
    }

    /// All that the reference has, in the order of the forward pass.
    fn check_values(&self, way: &str, i: usize, sites: &[Site]) {
        let mut capture = Capture::new(sites);
        let found_logits = logits(&self.model, &self.prompts[i], &mut capture);
        let layers = self.model.spec().layers.len();
        for l in 0..layers {
            let check = |site: Site, tensor: String| {
                if self.reference.tensor(&tensor).is_ok() && sites.contains(&site) {
                    let found = &capture.get(l, site).values;
                    self.compare(way, i, &tensor, found, &self.expected(&tensor, i));
                }
            };
            check(Site::ResidPre, format!("hidden_states.{l}"));
            let linear = self.model.spec().layers[l].delta.is_some();
            if sites.contains(&Site::AttnPattern) && !linear {
                self.check_pattern(way, i, l, capture.get(l, Site::AttnPattern));
            }
            check(Site::AttnOut, format!("attn_out.{l}"));
            check(Site::RouterLogits, format!("router_logits.{l}"));
            if self.reference.tensor(&format!("topk_ids.{l}")).is_ok() {
                self.check_routing(way, i, l, capture.get(l, Site::Routing));
            }
            check(Site::MlpOut, format!("mlp_out.{l}"));
            check(Site::ResidPost, format!("hidden_states.{}", l + 1));
        }
        let norm = &capture.get(layers, Site::FinalNorm).values;
        self.compare(way, i, "final_norm", norm, &self.expected("final_norm", i));
        self.check_logits(way, i, &found_logits);
        self.compare(way, i, "logits as a site", &capture.get(layers, Site::Logits).values, &found_logits);
    }

    /// The reference is `[H, T, T]`, the site `[T, H, S]`.
    fn check_pattern(&self, way: &str, i: usize, l: usize, found: &Kept) {
        let tensor = format!("attn_pattern.{l}");
        let Ok(loc) = self.reference.tensor(&tensor) else { return };
        let heads = loc.shape[1];
        assert_eq!(found.shape, [PROMPT, heads, PROMPT]);
        let expected = self.expected(&tensor, i);
        let row = |t: usize, h: usize| &expected[(h * PROMPT + t) * PROMPT..][..PROMPT];
        let turned: Vec<f32> = (0..PROMPT * heads).flat_map(|r| row(r / heads, r % heads).to_vec()).collect();
        self.compare(way, i, &tensor, &found.values, &turned);
    }

    /// Chosen experts as sets, and the gate of each.
    fn check_routing(&self, way: &str, i: usize, l: usize, found: &Kept) {
        let (ids, gates) = (format!("topk_ids.{l}"), format!("topk_weights.{l}"));
        let k = self.reference.tensor(&ids).unwrap().shape[2];
        let all_ids = self.reference.read_i64(&ids).unwrap();
        let by_id = |ids: &[u32], gates: &[f32]| {
            let mut pairs: Vec<(u32, f32)> = ids.iter().copied().zip(gates.iter().copied()).collect();
            pairs.chunks_mut(k).for_each(|row| row.sort_by_key(|pair| pair.0));
            pairs.into_iter().unzip::<u32, f32, Vec<_>, Vec<_>>()
        };
        let expected_ids: Vec<u32> =
            all_ids[i * PROMPT * k..(i + 1) * PROMPT * k].iter().map(|&id| id as u32).collect();
        let expected = by_id(&expected_ids, &self.expected(&gates, i));
        let found_pairs = by_id(&found.ids, &found.values);
        let (name, place) = (self.name, format!("{way}, prompt {i}"));
        assert_eq!(found_pairs.0, expected.0, "{name}, {place}: the first wrong tensor is {ids}");
        self.compare(way, i, &gates, &found_pairs.1, &expected.1);
        let descending = |row: &[f32]| row.windows(2).all(|pair| pair[0] >= pair[1]);
        // A bias on the choice, a factor on the gate, or a softmax for each choice, ranks otherwise than gates do.
        let router = &self.model.spec().moe(l).unwrap().router;
        let learned = router.extra.selection_bias || router.extra.expert_scale;
        let by_gate = !learned && router.score != RouterScore::SparseMixer;
        assert!(!by_gate || found.values.chunks(k).all(descending), "{name}, {place}: slots are not in rank order");
    }

    /// The same tokens through the KV cache in pieces.
    fn check_feeding(&self, i: usize) {
        let tokens = &self.prompts[i];
        let in_pieces = |sizes: &[usize]| {
            let mut rest = tokens.as_slice();
            let mut pieces = Vec::new();
            for &size in sizes {
                let (piece, after) = rest.split_at(size);
                pieces.push(rows(0, piece));
                rest = after;
            }
            assert!(rest.is_empty());
            logits_in_turn(&self.model, &pieces, &mut NoLens)
        };
        if !self.turns_otherwise_when_long() {
            self.check_logits("token by token", i, &in_pieces(&[1; PROMPT]));
            self.check_logits("in chunks", i, &in_pieces(&[13, 1, 10]));
        }
        self.check_logits("prompt, then token by token", i, &in_pieces(&[17, 1, 1, 1, 1, 1, 1, 1]));
    }

    /// Whether the frequencies change on the way through the prompt. Keys in the cache keep their turns.
    fn turns_otherwise_when_long(&self) -> bool {
        let mut long = self.model.spec().layers.iter().filter_map(|l| l.attn.rope.long.as_ref());
        long.any(|long| long.above < PROMPT)
    }

    fn check_batches(&self) {
        let [a, b] = &self.prompts;
        let batch = |cache: &mut KvCache, segments: &[Segment], lens: &mut dyn Lens| {
            support::logits_of(self.model.forward(segments, cache, lens).unwrap())
        };
        let cache = || KvCache::new(self.model.spec(), 2);
        for (way, lens) in [("batch", &mut NoLens as &mut dyn Lens), ("batch, all sites", &mut Capture::new(Site::ALL))]
        {
            let both = batch(&mut cache(), &[rows(0, a), rows(1, b)], lens);
            let (first, second) = both.split_at(both.len() / 2);
            self.check_logits(way, 0, first);
            self.check_logits(way, 1, second);
        }
        if self.turns_otherwise_when_long() {
            return self.check_greedy_together();
        }
        // The second prompt enters while the first is under way, and lies before it in the batch.
        let (mut cache, vocab) = (cache(), self.model.spec().vocab_size);
        let mut found = [batch(&mut cache, &[rows(0, &a[..9])], &mut NoLens), Vec::new()];
        let both = batch(&mut cache, &[rows(1, &b[..20]), rows(0, &a[9..10])], &mut NoLens);
        let (second, first) = both.split_at(20 * vocab);
        found[0].extend(first);
        found[1].extend(second);
        let both = batch(&mut cache, &[rows(0, &a[10..]), rows(1, &b[20..])], &mut NoLens);
        let (first, second) = both.split_at(14 * vocab);
        found[0].extend(first);
        found[1].extend(second);
        self.check_logits("mixed batches", 0, &found[0]);
        self.check_logits("mixed batches", 1, &found[1]);
        self.check_greedy_together();
    }

    fn greedy_options() -> GenerateOptions {
        GenerateOptions { max_tokens: ANSWER, ignore_eos: true, ..GenerateOptions::default() }
    }

    fn assert_greedy(&self, way: &str, i: usize, found: &Generation) {
        let expected = self.reference.read_i64(&format!("greedy.{i}")).unwrap();
        let found: Vec<i64> = found.tokens.iter().map(|&t| i64::from(t)).collect();
        assert_eq!(found, expected, "{}, {way}: greedy tokens of prompt {i}", self.name);
    }

    fn check_greedy(&self, way: &str, i: usize, lens: &mut dyn Lens) {
        let mut cache = KvCache::new(self.model.spec(), 1);
        let options = Self::greedy_options();
        let answer = self.model.generate(&self.prompts[i], 0, &mut cache, &options, lens, &mut |_| true).unwrap();
        self.assert_greedy(way, i, &answer);
    }

    fn check_greedy_together(&self) {
        let mut answers = 0;
        let mut check = |i: usize, answer: Generation| {
            self.assert_greedy("together", i, &answer);
            answers += 1;
            true
        };
        self.model.generate_many(&self.prompts, 2, &Self::greedy_options(), &mut NoLens, &mut check).unwrap();
        assert_eq!(answers, 2);
    }
}
