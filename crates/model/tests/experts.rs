//! Loading few experts, masking them and removing them from the files are the same; and nothing else is read.

mod support;

use quorate_formats::{Role, write_pruned_hf};
use quorate_model::{Model, ModelError, NoLens, RoutingMode, Site};
use quorate_residency::{ResidencyError, skeleton_bytes};
use support::{
    Capture, assert_close, assert_same, chain, change, choose, edited, keep, largest, logits_of_all, moe_cases, open,
    open_empty, sizes,
};

const MODES: [RoutingMode; 4] =
    [RoutingMode::Mask, RoutingMode::MaskFullGates, RoutingMode::Drop, RoutingMode::DropRenormalise];

/// Choices of experts: equally many in each layer, unequally many, and as few as possible in all layers.
fn choices(model: &Model) -> [Vec<Vec<usize>>; 3] {
    let (e, k) = sizes(model);
    [choose(model, 1, |_| (e + k) / 2), choose(model, 2, |i| k + (3 * i + 1) % (e - k)), choose(model, 3, |_| k)]
}

/// I1: a load that keeps all experts by name is the normal load.
#[test]
fn keeping_all_is_loading_all() {
    for (name, path, texts) in moe_cases() {
        let expected = logits_of_all(&open(&path), &texts, &mut NoLens);
        let mut model = open_empty(&path);
        let all = choose(&model, 0, |_| usize::MAX);
        for mode in MODES {
            model.load_experts(&keep(&all), mode).unwrap();
            let found = logits_of_all(&model, &texts, &mut NoLens);
            assert_same(&format!("{name}, {}", mode.name()), &found, &expected);
        }
    }
}

/// I2, in memory: experts that are not loaded are as if they were masked, in every routing mode.
#[test]
fn loading_few_is_masking_the_others() {
    for (name, path, texts) in moe_cases() {
        let (mut whole, mut few) = (open(&path), open_empty(&path));
        let full = logits_of_all(&whole, &texts, &mut NoLens);
        for kept in choices(&whole) {
            for mode in MODES {
                whole.mask_experts(&keep(&kept), mode).unwrap();
                few.load_experts(&keep(&kept), mode).unwrap();
                let masked = logits_of_all(&whole, &texts, &mut NoLens);
                let what = format!("{name}, {}, experts {kept:?}", mode.name());
                assert!(change(&masked, &full) > 1e-3, "{what}: removing experts changes nothing");
                assert_same(&what, &logits_of_all(&few, &texts, &mut NoLens), &masked);
            }
        }
        // One layer keeps all, the others few; then everything is allowed again.
        let mut kept = keep(&choices(&whole)[1]);
        kept[0] = None;
        whole.mask_experts(&kept, RoutingMode::Mask).unwrap();
        few.load_experts(&kept, RoutingMode::Mask).unwrap();
        let masked = logits_of_all(&whole, &texts, &mut NoLens);
        assert_same(name, &logits_of_all(&few, &texts, &mut NoLens), &masked);
        whole.load_all_experts().unwrap();
        assert_same(name, &logits_of_all(&whole, &texts, &mut NoLens), &full);
    }
}

/// I2, on disk: a written model without the other experts, its router rows cut out, computes what masking computes.
#[test]
fn a_pruned_folder_is_the_masked_model() {
    let folder = tempfile::tempdir().unwrap();
    for (name, path, texts) in moe_cases() {
        let mut whole = open(&path);
        let (e, k) = sizes(&whole);
        let kept = choose(&whole, 4, |_| (e + k) / 2);
        let out = folder.path().join(name);
        write_pruned_hf(whole.checkpoint(), &kept, &out, 5 << 20, &mut |_, _| true).unwrap();
        let pruned = open(&out);
        assert_eq!(sizes(&pruned), ((e + k) / 2, k), "{name}");

        whole.mask_experts(&keep(&kept), RoutingMode::Mask).unwrap();
        let (mut by_mask, mut by_file) = (Capture::new(&[Site::Routing]), Capture::new(&[Site::Routing]));
        let masked = logits_of_all(&whole, &texts, &mut by_mask);
        let found = logits_of_all(&pruned, &texts, &mut by_file);
        assert_close(name, &found, &masked, 1e-5 * largest(&masked));
        for (&layer, kept) in whole.spec().moe_layers().iter().zip(&kept) {
            let old_ids = by_file.get(layer, Site::Routing).ids.iter().map(|&new| kept[new as usize] as u32);
            assert_eq!(old_ids.collect::<Vec<_>>(), by_mask.get(layer, Site::Routing).ids, "{name}, layer {layer}");
        }
    }
}

/// I3: dropping an expert after the choice is an expert whose output is zero.
#[test]
fn dropping_is_zeroing_the_down_projection() {
    for (name, path, texts) in moe_cases() {
        let mut few = open_empty(&path);
        for kept in [&choices(&few)[1], &choose(&few, 5, |i| i % 2)] {
            few.load_experts(&keep(kept), RoutingMode::Drop).unwrap();
            let layers = few.spec().moe_layers();
            let zeroed = edited(&path, |role, _, values| {
                if let Role::ExpertDown(l, e) = role {
                    let moe = layers.iter().position(|&layer| layer == l).unwrap();
                    if !kept[moe].contains(&e) {
                        values.fill(0.0);
                    }
                }
            });
            let expected = logits_of_all(&open(zeroed.path()), &texts, &mut NoLens);
            assert_same(name, &logits_of_all(&few, &texts, &mut NoLens), &expected);
        }
    }
}

/// A load reads the skeleton and the kept experts, once, and holds nothing else; computing reads nothing.
#[test]
fn only_what_is_kept_is_read_and_held() {
    for (name, path, texts) in moe_cases() {
        let mut model = open_empty(&path);
        let checkpoint = model.checkpoint().clone();
        let skeleton = skeleton_bytes(&checkpoint);
        assert_eq!(model.weights().bytes_read(), checkpoint.non_expert_bytes(), "{name}");
        assert_eq!(model.weights().resident_bytes(), skeleton, "{name}");

        let kept = choices(&model)[1].clone();
        let layers = model.spec().moe_layers();
        let each = layers.iter().zip(&kept).flat_map(|(&l, ids)| ids.iter().map(move |&e| (l, e)));
        let experts: u64 = each.map(|(l, e)| checkpoint.expert_bytes(l, e)).sum();
        model.load_experts(&keep(&kept), RoutingMode::Mask).unwrap();
        logits_of_all(&model, &texts, &mut NoLens);
        assert_eq!(model.weights().bytes_read(), checkpoint.non_expert_bytes() + experts, "{name}");
        assert_eq!(model.weights().resident_bytes(), skeleton + experts, "{name}");

        // The limit is kept to the byte, and a load that it refuses changes nothing.
        let mut exact = Model::open(&path, 2, Some(skeleton + experts)).unwrap();
        exact.load_experts(&keep(&kept), RoutingMode::Mask).unwrap();
        let before = logits_of_all(&exact, &texts, &mut NoLens);
        let error = exact.load_all_experts().unwrap_err();
        assert!(matches!(error, ModelError::Residency(ResidencyError::OverBudget { .. })), "{name}: {error}");
        assert_eq!(exact.weights().resident_bytes(), skeleton + experts, "{name}");
        assert_same(name, &logits_of_all(&exact, &texts, &mut NoLens), &before);
        assert!(Model::open(&path, 2, Some(skeleton - 1)).is_err(), "{name}");
    }
}

#[test]
fn keep_lists_that_do_not_fit_are_refused_and_change_nothing() {
    let (_, path, texts) = moe_cases().remove(0);
    let mut model = open(&path);
    let (e, k) = sizes(&model);
    let kept = keep(&choices(&model)[0]);
    model.load_experts(&kept, RoutingMode::Mask).unwrap();
    let before = logits_of_all(&model, &texts, &mut NoLens);
    let few = choose(&model, 6, |i| if i == 1 { k - 1 } else { k });
    let wrong = [
        (keep(&few[..1]), "keep list has 1 layers, the model has 2 MoE layers".to_string()),
        (vec![None, Some(vec![e])], format!("layer 1 has no expert {e}, it has {e}")),
        (keep(&few), format!("layer 1 keeps {} experts but each token uses {k}; help: keep at least {k}", k - 1)),
        // Naming one twice does not make it two.
        (vec![None, Some(vec![0; k])], format!("layer 1 keeps 1 experts but each token uses {k}")),
    ];
    for (kept, message) in wrong {
        for mode in [RoutingMode::Mask, RoutingMode::MaskFullGates] {
            for error in [model.load_experts(&kept, mode), model.mask_experts(&kept, mode)].map(Result::unwrap_err) {
                assert!(chain(&error).contains(&message), "{}", chain(&error));
            }
        }
        assert_same("after an error", &logits_of_all(&model, &texts, &mut NoLens), &before);
    }
    // Modes that do not refill may keep fewer than a token uses, even none.
    for mode in [RoutingMode::Drop, RoutingMode::DropRenormalise] {
        model.load_experts(&keep(&few), mode).unwrap();
        model.load_experts(&[Some(vec![]), Some(vec![])], mode).unwrap();
        assert_eq!(model.weights().experts_resident(), 0);
        assert!(logits_of_all(&model, &texts, &mut NoLens).iter().all(|v| v.is_finite()));
    }
}
