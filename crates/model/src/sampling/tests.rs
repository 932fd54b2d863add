use super::*;

fn params() -> SamplingParams {
    SamplingParams { temperature: 1.0, ..SamplingParams::default() }
}

/// Logits of given probabilities.
fn logits(probabilities: &[f64]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln() as f32).collect()
}

/// How often each token is drawn.
fn counts(params: SamplingParams, probabilities: &[f64], draws: usize) -> Vec<usize> {
    let mut sampler = Sampler::new(params).unwrap();
    let mut counts = vec![0; probabilities.len()];
    for _ in 0..draws {
        counts[sampler.sample(&mut logits(probabilities), &[]).unwrap() as usize] += 1;
    }
    counts
}

/// The tokens that can be drawn.
fn support(params: SamplingParams, probabilities: &[f64]) -> Vec<usize> {
    let counts = counts(params, probabilities, 2000);
    (0..counts.len()).filter(|&token| counts[token] > 0).collect()
}

fn chi_square(counts: &[usize], probabilities: &[f64]) -> f64 {
    let draws: usize = counts.iter().sum();
    let term = |(&count, p): (&usize, &f64)| {
        let expected = p * draws as f64;
        (count as f64 - expected).powi(2) / expected
    };
    counts.iter().zip(probabilities).map(term).sum()
}

#[test]
fn random_numbers_are_the_published_ones() {
    let mut random = SplitMix64::new(1_234_567);
    let first = [(); 3].map(|()| random.next());
    assert_eq!(first, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
}

#[test]
fn samples_follow_the_probabilities() {
    let p = [0.4, 0.05, 0.25, 0.1, 0.2];
    // 99.9% of honest runs stay below 18.5 (4 degrees of freedom).
    assert!(chi_square(&counts(params(), &p, 20_000), &p) < 18.5);
    // Temperature 2: square roots, normalised.
    let total: f64 = p.iter().map(|p| p.sqrt()).sum();
    let flat = p.map(|p| p.sqrt() / total);
    let flatter = SamplingParams { temperature: 2.0, seed: 5, ..params() };
    assert!(chi_square(&counts(flatter, &p, 20_000), &flat) < 18.5);
    // What top-k leaves is normalised: 0.4, 0.25 and 0.2 of 0.85.
    let top = SamplingParams { top_k: 3, seed: 9, ..params() };
    let counts = counts(top, &p, 20_000);
    let left = [counts[0], counts[2], counts[4]];
    assert!(chi_square(&left, &[0.4 / 0.85, 0.25 / 0.85, 0.2 / 0.85]) < 13.8);
    assert_eq!([counts[1], counts[3]], [0, 0]);
}

#[test]
fn filters_keep_the_tokens_of_hand_examples() {
    let p = [0.1, 0.4, 0.05, 0.25, 0.2];
    let k = |top_k| support(SamplingParams { top_k, ..params() }, &p);
    assert_eq!([k(1), k(2), k(4)], [vec![1], vec![1, 3], vec![0, 1, 3, 4]]);
    assert_eq!([k(0).len(), k(5).len(), k(99).len()], [5, 5, 5]);
    // Tokens as likely as the last one kept stay, as in transformers.
    assert_eq!(support(SamplingParams { top_k: 1, ..params() }, &[0.3, 0.35, 0.35]), [1, 2]);
    let top = |top_p| support(SamplingParams { top_p, ..params() }, &p);
    assert_eq!([top(0.01), top(0.39), top(0.41), top(0.64)], [vec![1], vec![1], vec![1, 3], vec![1, 3]]);
    assert_eq!([top(0.66), top(0.9)], [vec![1, 3, 4], vec![0, 1, 3, 4]]);
    assert_eq!(top(0.96).len(), 5);
    let min = |min_p| support(SamplingParams { min_p, ..params() }, &p);
    assert_eq!([min(1.0), min(0.6), min(0.4)], [vec![1], vec![1, 3], vec![1, 3, 4]]);
    assert_eq!(min(0.01).len(), 5);
    // top-k first: of 0.4 and 0.25, 0.4 is 61.5%.
    let both = |top_p| support(SamplingParams { top_k: 2, top_p, ..params() }, &p);
    assert_eq!([both(0.6), both(0.63)], [vec![1], vec![1, 3]]);
    // Temperature before min-p: at 0.5 the second is (0.25 / 0.4)^2 = 39% of the first.
    let sharp = SamplingParams { temperature: 0.5, min_p: 0.4, ..params() };
    assert_eq!(support(sharp, &p), [1]);
}

#[test]
fn the_shortcut_of_top_p_changes_nothing() {
    let mut random = SplitMix64::new(3);
    for _ in 0..200 {
        let values: Vec<f32> = (0..50).map(|_| (random.unit() * 12.0) as f32).collect();
        let p = 0.02 + random.unit() as f32 * 0.97;
        let mut sampler = Sampler::new(SamplingParams { top_p: p, ..params() }).unwrap();
        sampler.sample(&mut values.clone(), &[]).unwrap();
        let kept: Vec<u32> = sampler.candidates.iter().map(|candidate| candidate.token).collect();
        let mut order: Vec<u32> = (0..50).collect();
        order.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]));
        let weight = |token: u32| f64::from(values[token as usize] - values[order[0] as usize]).exp();
        let total: f64 = (0..50).map(weight).sum();
        let mut before = 0.0;
        let mut wanted = Vec::new();
        for token in order.iter().copied() {
            if before < f64::from(p) * total {
                wanted.push(token);
            }
            before += weight(token);
        }
        wanted.sort_unstable();
        assert_eq!(kept, wanted);
    }
}

#[test]
fn the_same_seed_gives_the_same_tokens() {
    let p = [0.2; 5];
    let run = |seed| {
        let mut sampler = Sampler::new(SamplingParams { seed, top_k: 4, top_p: 0.9, ..params() }).unwrap();
        (0..40).map(|_| sampler.sample(&mut logits(&p), &[]).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn greedy_takes_the_first_of_the_most_likely() {
    let mut sampler = Sampler::new(SamplingParams::default()).unwrap();
    assert_eq!(sampler.sample(&mut [1.0, 3.0, 3.0, 2.0], &[]), Ok(1));
    assert_eq!(sampler.sample(&mut [f32::NEG_INFINITY, -5.0], &[]), Ok(1));
}

#[test]
fn the_penalty_counts_each_token_once() {
    let mut sampler = Sampler::new(SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() }).unwrap();
    let mut values = [4.0, -1.0, 3.0, 0.0];
    assert_eq!(sampler.sample(&mut values, &[0, 1, 0, 3, 0]), Ok(2));
    assert_eq!(values, [2.0, -2.0, 3.0, 0.0]);
    let mut values = [4.0, -1.0, 3.0, 0.0];
    assert_eq!(sampler.sample(&mut values, &[2]), Ok(0), "what was penalised before is forgotten");
    assert_eq!(values, [4.0, -1.0, 1.5, 0.0]);
    let error = sampler.sample(&mut [0.0; 4], &[4]);
    assert_eq!(error, Err(SamplingError::HistoryToken { token: 4, vocab_size: 4 }));
}

#[test]
fn broken_logits_are_errors() {
    for temperature in [0.0, 1.0] {
        let mut sampler = Sampler::new(SamplingParams { temperature, ..params() }).unwrap();
        assert!(matches!(
            sampler.sample(&mut [0.0, f32::NAN], &[]),
            Err(SamplingError::BrokenLogit { token: 1, value }) if value.is_nan()
        ));
        assert!(sampler.sample(&mut [f32::INFINITY], &[]).is_err());
        let nothing = sampler.sample(&mut [f32::NEG_INFINITY; 3], &[]);
        assert_eq!(nothing, Err(SamplingError::NothingToChoose { count: 3 }));
        assert!(sampler.sample(&mut [], &[]).is_err());
        assert_eq!(sampler.sample(&mut [f32::NEG_INFINITY, f32::MIN, f32::NEG_INFINITY], &[]), Ok(1));
    }
}

#[test]
fn parameters_are_checked() {
    assert!(SamplingParams::default().check().is_ok());
    let d = SamplingParams::default;
    let wrong = [
        (SamplingParams { temperature: -0.1, ..d() }, "temperature"),
        (SamplingParams { temperature: f32::NAN, ..d() }, "temperature"),
        (SamplingParams { top_p: 0.0, ..d() }, "top_p"),
        (SamplingParams { top_p: 1.5, ..d() }, "top_p"),
        (SamplingParams { min_p: 1.1, ..d() }, "min_p"),
        (SamplingParams { repetition_penalty: 0.0, ..d() }, "repetition_penalty"),
        (SamplingParams { repetition_penalty: f32::INFINITY, ..d() }, "repetition_penalty"),
    ];
    for (params, field) in wrong {
        let error = Sampler::new(params).unwrap_err().to_string();
        assert!(error.starts_with(field) && error.contains("it must be"), "{error}");
    }
    let json: SamplingParams = serde_json::from_str(r#"{"top_k": 5, "seed": 18446744073709551615}"#).unwrap();
    assert_eq!(json, SamplingParams { top_k: 5, seed: u64::MAX, ..SamplingParams::default() });
}

/// Pushes pieces; gives what came out and whether it stopped.
fn stream(stops: &[&str], pieces: &[&str]) -> (String, bool) {
    let mut matcher = StopStrings::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
    let mut out = String::new();
    for piece in pieces {
        out.push_str(&matcher.push(piece));
    }
    let stopped = matcher.stopped();
    out.push_str(&matcher.flush());
    (out, stopped)
}

#[test]
fn stop_strings_may_be_split_over_pieces() {
    assert_eq!(stream(&["STOP"], &["a S", "T", "OP b"]), ("a ".into(), true));
    assert_eq!(stream(&["STOP"], &["a S", "T", "O", "x"]), ("a STOx".into(), false));
    assert_eq!(stream(&["STOP"], &["aSTO"]), ("aSTO".into(), false));
    assert_eq!(stream(&["aab"], &["a", "a", "a", "a", "b", "c"]), ("aa".into(), true));
    assert_eq!(stream(&["\n\n", "User:"], &["x\n", "Us", "er", ":", "y"]), ("x\n".into(), true));
    assert_eq!(stream(&["→é"], &["a→", "é", "b"]), ("a".into(), true));
    assert_eq!(stream(&[], &["a", "b"]), ("ab".into(), false));
    assert_eq!(stream(&[""], &["a"]), ("a".into(), false));
    assert_eq!(stream(&["b", "abc"], &["abc"]), ("".into(), true), "the one that begins first wins");
}

#[test]
fn stop_strings_hold_back_no_more_than_needed() {
    let mut matcher = StopStrings::new(vec!["<end>".into()]);
    assert_eq!(matcher.push("text <e"), "text ");
    assert_eq!(matcher.push("m> more <"), "<em> more ");
    assert_eq!(matcher.push("end> after"), "");
    assert_eq!(matcher.matched(), Some("<end>"));
    assert_eq!(matcher.push("x") + &matcher.flush(), "");
}

/// Any split of a text gives what the whole text gives.
#[test]
fn stop_strings_do_not_depend_on_the_pieces() {
    let mut random = SplitMix64::new(8);
    for _ in 0..3000 {
        let text: String = (0..12).map(|_| ['a', 'b', 'é'][(random.next() % 3) as usize]).collect();
        let stops = ["abé", "bb", "ééa"];
        let cut = stops.iter().filter_map(|stop| text.find(stop)).min();
        let mut pieces = Vec::new();
        let mut start = 0;
        for (at, _) in text.char_indices().skip(1) {
            if random.unit() < 0.5 {
                pieces.push(&text[start..at]);
                start = at;
            }
        }
        pieces.push(&text[start..]);
        let (out, stopped) = stream(&stops, &pieces);
        assert_eq!(stopped, cut.is_some());
        // Piece by piece, a stop text that ends earlier is seen before one that begins earlier.
        let ends = stops.iter().filter_map(|stop| Some((text.find(stop)? + stop.len(), text.find(stop)?)));
        let by_end = ends.min().map_or(text.len(), |(_, at)| at);
        assert!(out.len() == by_end || Some(out.len()) == cut, "{text:?} {pieces:?} {out:?}");
        assert!(stops.iter().all(|stop| !out.contains(stop)));
    }
}
