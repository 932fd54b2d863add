//! What a lens may rely on, and what the engine does about a lens, a batch or a model that is wrong: a clear error, and
//! the cache as it was.

mod support;

use std::collections::BTreeSet;

use candle_core::DType;
use quorate_model::{
    Chain, Flow, KvCache, Lens, LogitRows, Model, ModelError, NO_EXPERT, NoLens, Phase, Routing, RoutingMode, Segment,
    Site, ops,
};
use support::{
    Capture, Seen, Visit, assert_close, assert_same, chain, fixture, largest, logits, logits_of, open, open_empty,
    plain, prompts, rows, values,
};

/// A model with a dense layer (1), two MoE layers, and a shared expert: it has every site.
const MODEL: &str = "qwen2_moe_mixed";

/// A sequence under way, against which a pass goes wrong that must leave no trace.
struct Trial {
    model: Model,
    tokens: Vec<u32>,
    cache: KvCache,
    expected: Vec<f32>,
}

impl Trial {
    fn new(model: Model) -> Self {
        let [tokens, other] = prompts(MODEL);
        let mut cache = KvCache::new(model.spec(), 2);
        model.forward(&[rows(0, &tokens[..10]), rows(1, &other[..3])], &mut cache, &mut NoLens).unwrap();
        let expected = logits_of(model.forward(&[rows(0, &tokens[10..])], &mut cache.clone(), &mut NoLens).unwrap());
        Self { model, tokens, cache, expected }
    }

    /// A pass with more and other tokens than those of the text, in both sequences.
    fn run(&mut self, lens: &mut dyn Lens) -> Result<Option<Vec<f32>>, ModelError> {
        let segments = [rows(1, &self.tokens[..5]), rows(0, &self.tokens[..17])];
        let forward = self.model.forward(&segments, &mut self.cache, lens)?;
        Ok(forward.logits.as_ref().map(values))
    }

    #[track_caller]
    fn assert_untouched(&mut self, what: &str) {
        assert_eq!(self.cache.lengths(), [10, 3], "{what}");
        let mut cache = self.cache.clone();
        let found = logits_of(self.model.forward(&[rows(0, &self.tokens[10..])], &mut cache, &mut NoLens).unwrap());
        assert_same(what, &found, &self.expected);
    }

    #[track_caller]
    fn assert_refused(&mut self, what: &str, lens: &mut dyn Lens, message: &str) {
        let error = chain(&self.run(lens).expect_err(what));
        assert!(error.contains(message), "{what}: {error}");
        self.assert_untouched(what);
    }
}

#[test]
fn each_site_is_visited_where_it_is_and_nothing_else() {
    let model = open(&fixture(MODEL));
    let tokens = &prompts(MODEL)[0];
    let layers = model.spec().layers.len();
    let mut all = Vec::new();
    logits(
        &model,
        tokens,
        &mut Visit::new(Site::ALL, |at, _| {
            all.push((at.layer, at.site));
            Ok(Flow::Continue)
        }),
    );
    let mut sorted = all.clone();
    sorted.sort();
    assert_eq!(all, sorted, "visits come layer by layer, in the order of `Site::ALL`");
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len(), "each is visited once");
    for &site in Site::ALL {
        let mut visits = Vec::new();
        logits(
            &model,
            tokens,
            &mut Visit::new(&[site], |at, _| {
                visits.push((at.layer, at.site));
                Ok(Flow::Continue)
            }),
        );
        let found: Vec<usize> = visits.iter().map(|v| v.0).collect();
        let expected = match site {
            Site::RouterLogits | Site::Selection | Site::Routing => vec![0, 2],
            Site::ExpertHidden | Site::ExpertOut | Site::MoeOut => vec![0, 2],
            _ if !site.per_layer() => vec![layers],
            _ => vec![0, 1, 2],
        };
        assert_eq!(found, expected, "{site}");
        assert!(visits.iter().all(|v| v.1 == site));
        assert_eq!(visits, all.iter().copied().filter(|v| v.1 == site).collect::<Vec<_>>(), "{site}");
    }
}

#[test]
fn a_visit_carries_the_context_of_the_rows() {
    let model = open(&fixture(MODEL));
    let [a, b] = prompts(MODEL);
    let mut cache = KvCache::new(model.spec(), 2);
    model.forward(&[rows(1, &b[..4])], &mut cache, &mut NoLens).unwrap();
    let (mut visits, mut with_routing) = (0, BTreeSet::new());
    let mut lens = Visit::new(Site::ALL, |at, seen| {
        assert_eq!(at.rows.segment, [0, 0, 0, 0, 0, 1], "{}", at.site);
        assert_eq!(at.rows.position, [0, 1, 2, 3, 4, 4]);
        assert_eq!(at.rows.token, [a[0], a[1], a[2], a[3], a[4], b[4]]);
        assert_eq!(at.rows.phase[1..], [Phase::Prompt, Phase::PromptLast, Phase::Answer, Phase::Answer, Phase::Decode]);
        assert_eq!(at.rows.logit_rows, [2, 3, 4, 5]);
        let rows = if at.site.per_layer() { 6 } else { 4 };
        match seen {
            Seen::Tensor(tensor) => assert_eq!(tensor.dims()[0], rows, "{}", at.site),
            Seen::Routing(routing) => assert_eq!(routing.ids.len(), rows * routing.k),
        }
        if at.routing.is_some() {
            with_routing.insert(at.site);
        }
        visits += 1;
        Ok(Flow::Continue)
    });
    let segments = [Segment::teacher_forced(0, &a[..3], &a[3..5]), Segment::decode(1, b[4])];
    model.forward(&segments, &mut cache, &mut lens).unwrap();
    assert_eq!(visits, 3 * 16 + 2 * 6 + 2);
    assert_eq!(with_routing, BTreeSet::from([Site::ExpertHidden, Site::ExpertOut, Site::MoeOut]));
}

#[test]
fn in_a_chain_each_lens_sees_what_the_one_before_left() {
    let model = open(&fixture(MODEL));
    let tokens = &prompts(MODEL)[0];
    let (mut before, mut after) = (Capture::new(&[Site::ResidMid]), Capture::new(&[Site::ResidMid, Site::Logits]));
    let mut double = Visit::new(&[Site::ResidMid], |_, seen| {
        if let Seen::Tensor(tensor) = seen {
            *tensor = tensor.affine(2.0, 0.0)?;
        }
        Ok(Flow::Continue)
    });
    let found = logits(&model, tokens, &mut Chain(vec![&mut before, &mut double, &mut after]));
    let doubled: Vec<f32> = before.get(0, Site::ResidMid).values.iter().map(|v| 2.0 * v).collect();
    assert_same("doubled", &after.get(0, Site::ResidMid).values, &doubled);
    assert!(!before.kept.contains_key(&(3, Site::Logits)), "a lens of a chain sees its own sites only");
    assert_same("logits", &after.get(3, Site::Logits).values, &found);
    assert_ne!(found, plain(&model, tokens));
}

#[test]
fn values_may_be_replaced_by_views() {
    let model = open(&fixture(MODEL));
    let tokens = &prompts(MODEL)[0];
    let mut turned_twice = Visit::new(&[Site::ResidPre, Site::FfnIn, Site::MlpHidden, Site::FinalNorm], |_, seen| {
        if let Seen::Tensor(tensor) = seen {
            *tensor = tensor.t()?.contiguous()?.t()?;
            assert!(!tensor.is_contiguous());
        }
        Ok(Flow::Continue)
    });
    let found = logits(&model, tokens, &mut turned_twice);
    assert_same("views", &found, &plain(&model, tokens));
}

#[test]
fn a_value_of_another_shape_or_type_is_refused() {
    let mut trial = Trial::new(open(&fixture(MODEL)));
    for &site in Site::ALL.iter().filter(|&&site| site != Site::Routing) {
        let mut flat = Visit::new(&[site], |_, seen| {
            if let Seen::Tensor(tensor) = seen {
                *tensor = tensor.flatten_all()?;
            }
            Ok(Flow::Continue)
        });
        let layer = if site.per_layer() { 0 } else { 3 };
        let message = format!("a lens changed the shape of {site} in layer {layer}");
        trial.assert_refused(site.name(), &mut flat, &message);
        let mut short = Visit::new(&[site], |at, seen| {
            if let (Seen::Tensor(tensor), true) = (seen, at.layer > 0) {
                *tensor = tensor.narrow(0, 1, tensor.dims()[0] - 1)?;
            }
            Ok(Flow::Continue)
        });
        trial.assert_refused(site.name(), &mut short, &format!("a lens changed the shape of {site} in layer "));
        let mut wide = Visit::new(&[site], |_, seen| {
            if let Seen::Tensor(tensor) = seen {
                *tensor = tensor.to_dtype(DType::F64)?;
            }
            Ok(Flow::Continue)
        });
        let message = format!("a lens left {site} in layer {layer} as a tensor of f64; help: it must be f32");
        trial.assert_refused(site.name(), &mut wide, &message);
    }
}

#[test]
fn a_routing_that_does_not_fit_is_refused() {
    let mut trial = Trial::new(open(&fixture(MODEL)));
    let change = |edit: fn(&mut Routing)| {
        Visit::new(&[Site::Routing], move |_, seen| {
            if let Seen::Routing(routing) = seen {
                edit(routing);
            }
            Ok(Flow::Continue)
        })
    };
    trial.assert_refused("id", &mut change(|r| r.ids[3] = 6), "(id out of range: Some(6))");
    trial.assert_refused(
        "ids",
        &mut change(|r| r.ids.truncate(43)),
        "a routing in layer 0 with 43 ids and 44 gates for 44 slots",
    );
    trial.assert_refused("k", &mut change(|r| r.k = 3), "44 ids and 44 gates for 66 slots");
    let gates = |r: &mut Routing| r.gates = r.gates.narrow(1, 0, 1).unwrap().contiguous().unwrap();
    trial.assert_refused("gates", &mut change(gates), "44 ids and 22 gates for 44 slots");
}

/// A lens may give tokens fewer or more slots than the model has.
#[test]
fn slots_may_be_fewer_or_more() {
    let model = open(&fixture(MODEL));
    let tokens = &prompts(MODEL)[0];
    let with = |edit: fn(&mut Routing)| {
        let mut lens = Visit::new(&[Site::Routing], move |_, seen| {
            if let Seen::Routing(routing) = seen {
                edit(routing);
            }
            Ok(Flow::Continue)
        });
        logits(&model, tokens, &mut lens)
    };
    let first_only = with(|r| {
        r.ids = r.ids.chunks(r.k).map(|row| row[0]).collect();
        r.gates = r.gates.narrow(1, 0, 1).unwrap().contiguous().unwrap();
        r.k = 1;
    });
    let others_empty = with(|r| r.ids.chunks_mut(2).for_each(|row| row[1] = NO_EXPERT));
    assert_same("one slot", &first_only, &others_empty);
    assert_ne!(first_only, plain(&model, tokens));
    let none = with(|r| {
        r.ids.clear();
        r.gates = r.gates.narrow(1, 0, 0).unwrap().contiguous().unwrap();
        r.k = 0;
    });
    assert_same("no slot", &none, &with(|r| r.ids.fill(NO_EXPERT)));
    // Two more: an empty one, and an expert that weighs nothing.
    let more = with(|r| {
        let gates = values(&r.gates);
        r.ids = r.ids.chunks(2).flat_map(|row| [row[0], NO_EXPERT, row[1], (row[1] + 1) % 6]).collect();
        let wider: Vec<f32> = gates.chunks(2).flat_map(|row| [row[0], 7.0, row[1], 0.0]).collect();
        r.gates = ops::tensor(wider, &[r.ids.len() / 4, 4]).unwrap();
        r.k = 4;
    });
    assert_same("more slots", &more, &plain(&model, tokens));
}

#[test]
fn router_logits_that_are_no_numbers_are_an_error() {
    let mut trial = Trial::new(open(&fixture(MODEL)));
    let put = |site: Site, layer: usize, number: f32| {
        Visit::new(&[site], move |at, seen| {
            if let (Seen::Tensor(tensor), true) = (seen, at.layer == layer) {
                let mut x = values(tensor);
                x[7] = number;
                *tensor = ops::tensor(x, tensor.dims())?;
            }
            Ok(Flow::Continue)
        })
    };
    for layer in [0, 2] {
        let message = format!("router logits of layer {layer} are not numbers");
        for number in [f32::NAN, f32::INFINITY] {
            trial.assert_refused("router", &mut put(Site::RouterLogits, layer, number), &message);
        }
        trial.assert_refused("selection", &mut put(Site::Selection, layer, f32::NAN), &message);
        trial.assert_refused("input", &mut put(Site::FfnIn, layer, f32::NAN), &message);
        let first_after = if layer == 0 { Site::AttnIn } else { Site::ResidPre };
        trial.assert_refused("before", &mut put(first_after, layer, f32::NAN), &message);
    }
    // Minus infinity masks, and plus infinity at `selection` forces.
    assert!(trial.run(&mut put(Site::RouterLogits, 0, f32::NEG_INFINITY)).unwrap().is_some());
    let mut trial = Trial::new(open(&fixture(MODEL)));
    for number in [f32::NEG_INFINITY, f32::INFINITY] {
        let logits = trial.run(&mut put(Site::Selection, 0, number)).unwrap().unwrap();
        assert!(logits.iter().all(|v| v.is_finite()));
        trial = Trial::new(trial.model);
    }
}

#[test]
fn logits_that_are_no_numbers_end_a_generation() {
    let model = open(&fixture("llama"));
    let prompt = &prompts("llama")[0];
    let mut broken = Visit::new(&[Site::ResidMid], |_, seen| {
        if let Seen::Tensor(tensor) = seen {
            *tensor = tensor.affine(f64::NAN, 0.0)?;
        }
        Ok(Flow::Continue)
    });
    let options = quorate_model::GenerateOptions { max_tokens: 3, ..Default::default() };
    let mut cache = KvCache::new(model.spec(), 1);
    let error = model.generate(prompt, 0, &mut cache, &options, &mut broken, &mut |_| true).unwrap_err();
    assert!(chain(&error).contains("the model's numbers are broken"), "{}", chain(&error));
}

#[test]
fn an_expert_that_is_not_loaded_is_named() {
    let mut model = open_empty(&fixture(MODEL));
    let none = model.forward(&[rows(0, &[1, 2])], &mut KvCache::new(model.spec(), 1), &mut NoLens).unwrap_err();
    assert!(chain(&none).contains("of layer 0 is not loaded; help: keep it in the plan"), "{}", chain(&none));

    // Masked so that only layer 2 needs what is not there.
    model.load_experts(&[None, Some(vec![0, 1, 2])], RoutingMode::Mask).unwrap();
    let mut trial = Trial::new(model);
    trial.model.mask_experts(&[None, None], RoutingMode::Mask).unwrap();
    let error = chain(&trial.run(&mut NoLens).unwrap_err());
    assert!(error.contains(" of layer 2 is not loaded"), "{error}");
    trial.model.mask_experts(&[None, Some(vec![0, 1, 2])], RoutingMode::Mask).unwrap();
    trial.assert_untouched("masked again");

    // A lens that routes to one.
    let mut to_five = Visit::new(&[Site::Routing], |at, seen| {
        if let (Seen::Routing(routing), 2) = (seen, at.layer) {
            routing.ids[3] = 5;
        }
        Ok(Flow::Continue)
    });
    trial.assert_refused("routed by a lens", &mut to_five, "expert 5 of layer 2 is not loaded");
}

#[test]
fn a_lens_that_stops_or_fails_leaves_the_cache_as_it_was() {
    let mut trial = Trial::new(open(&fixture(MODEL)));
    let layers = trial.model.spec().layers.len();
    for &site in Site::ALL {
        for layer in 0..=layers {
            let mut visits_after = 0;
            let mut reached = false;
            let mut stop = Visit::new(Site::ALL, |at, _| {
                visits_after += usize::from(reached);
                reached |= at.site == site && at.layer == layer;
                Ok(if reached { Flow::Stop } else { Flow::Continue })
            });
            let logits = trial.run(&mut stop).unwrap();
            if !reached {
                // The layer does not have the site: the pass was whole.
                assert!(logits.is_some());
                trial = Trial::new(trial.model);
                continue;
            }
            assert!(logits.is_none(), "{site} in layer {layer}");
            assert_eq!(visits_after, 0, "{site} in layer {layer}: the pass went on");
            trial.assert_untouched(site.name());
            let mut fail = Visit::new(&[site], |at, _| match at.layer == layer {
                true => Err(ModelError::Lens(format!("no more of {site}"))),
                false => Ok(Flow::Continue),
            });
            trial.assert_refused(site.name(), &mut fail, &format!("no more of {site}"));
        }
    }
}

#[test]
fn bad_batches_are_refused() {
    let mut trial = Trial::new(open(&fixture(MODEL)));
    let vocab = trial.model.spec().vocab_size as u32;
    let unequal = Segment { phases: vec![Phase::Prompt], ..rows(0, &[1, 2]) };
    let cases: [(&[Segment], &str); 6] = [
        (&[rows(2, &[1])], "cache slot 2 does not exist, the cache has 2"),
        (&[rows(0, &[1]), rows(0, &[2])], "segment for cache slot 0 is empty, or its slot occurs twice"),
        (&[rows(0, &[1]), rows(1, &[])], "segment for cache slot 1 is empty, or its slot occurs twice"),
        (&[rows(0, &[1, vocab])], "is outside the vocabulary of"),
        (&[rows(1, &[1]), rows(0, &[u32::MAX])], "is outside the vocabulary of"),
        (&[unequal], "segment for cache slot 0 has 2 tokens and 1 phases"),
    ];
    for (segments, message) in cases {
        let error = chain(&trial.model.forward(segments, &mut trial.cache, &mut NoLens).unwrap_err());
        assert!(error.contains(message), "{error}");
        trial.assert_untouched(message);
    }
    for lens in [&mut NoLens as &mut dyn Lens, &mut Capture::new(Site::ALL)] {
        let forward = trial.model.forward(&[], &mut trial.cache, lens).unwrap();
        assert!(forward.logits.is_none() && forward.rows.is_empty());
        trial.assert_untouched("no segments");
    }
}

#[test]
fn only_wanted_rows_get_logits() {
    let model = open(&fixture(MODEL));
    let [a, b] = prompts(MODEL);
    let vocab = model.spec().vocab_size;
    let (all_a, all_b) = (plain(&model, &a), plain(&model, &b));
    let forward = |first: LogitRows, second: LogitRows| {
        let segments = [Segment { logits: first, ..rows(0, &a) }, Segment { logits: second, ..rows(1, &b) }];
        model.forward(&segments, &mut KvCache::new(model.spec(), 2), &mut NoLens).unwrap()
    };
    let found = logits_of(forward(LogitRows::From(20), LogitRows::Last));
    assert_same("rows", &found, &[&all_a[20 * vocab..], &all_b[23 * vocab..]].concat());
    let found = logits_of(forward(LogitRows::None, LogitRows::All));
    assert_same("rows", &found, &all_b);
    assert!(forward(LogitRows::None, LogitRows::From(24)).logits.is_none());
}

/// The cache of latent attention keeps latent vectors; a lens on keys and values gets them all the same, from any token on,
/// and what it changes stays changed.
#[test]
fn latent_attention_unfolds_keys_and_values_for_a_lens() {
    for name in ["deepseek_v2", "deepseek_v3"] {
        let model = open(&fixture(name));
        let text = &prompts(name)[0];
        let plain = logits(&model, text, &mut NoLens);
        let mut seen = Capture::new(&[Site::AttnK, Site::AttnV, Site::AttnKRot]);
        let tolerance = 1e-5 * largest(&plain);
        assert_close(name, &logits(&model, text, &mut seen), &plain, tolerance);
        let attn = &model.spec().layers[0].attn;
        assert_eq!(seen.get(0, Site::AttnV).values.len(), text.len() * attn.n_heads * attn.v_head_dim());

        let (width, vocab) = (model.cache_layout().bytes_per_token(), model.spec().vocab_size);
        let full = attn.n_heads * (attn.head_dim + attn.v_head_dim()) * 4 * model.spec().layers.len();
        assert!(2 * width < full as u64, "{width} of {full} bytes a token");
        // Latent, then with a lens, then without.
        let mut cache = KvCache::new(model.spec(), 1);
        for (i, part) in [0..9, 9..16, 16..text.len()].into_iter().enumerate() {
            let mut capture = Capture::new(if i == 1 { &[Site::AttnK] } else { &[] });
            let found = logits_of(model.forward(&[rows(0, &text[part.clone()])], &mut cache, &mut capture).unwrap());
            assert_close(name, &found, &plain[part.start * vocab..part.end * vocab], tolerance);
        }
        cache.truncate(0, 0);
        let again = logits_of(model.forward(&[rows(0, text)], &mut cache, &mut NoLens).unwrap());
        assert_same(name, &again, &plain);
    }
}
