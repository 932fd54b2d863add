//! What llama.cpp computes otherwise than a model's authors, whatever its file says.

use crate::spec::{GroupRule, ModelSpec, RouterScore};

/// What llama.cpp does otherwise with a model that is written as GGUF, so that its answers differ by more than rounding; as seen
/// in its version that docs/llama_cpp.md names. Empty if nothing is known.
pub fn elsewhere(spec: &ModelSpec) -> Vec<&'static str> {
    let moe = || (0..spec.layers.len()).filter_map(|l| spec.moe(l));
    let sparse_mixer = moe().any(|moe| moe.router.score == RouterScore::SparseMixer);
    let by_their_best = moe().any(|moe| {
        moe.router
            .extra
            .groups
            .is_some_and(|groups| groups.rule == GroupRule::Max && groups.topk_group < groups.n_group)
    });
    let renormalised = spec.family == "olmoe" && moe().any(|moe| moe.router.norm_topk_prob);
    let yarn = spec.family == "gpt_oss" && spec.layers.iter().any(|layer| layer.attn.rope.attention_factor != 1.0);
    [
        (
            sparse_mixer,
            "it weights the two experts of a token by one softmax, where the authors' sparse mixer has one for each",
        ),
        (by_their_best, "it compares groups of experts by their two best scores, where the authors take the best one"),
        (renormalised, "it does not renormalise the gates of this architecture"),
        (yarn, "it rounds the bounds of YaRN, where the authors do not"),
    ]
    .into_iter()
    .filter_map(|(known, what)| known.then_some(what))
    .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::Checkpoint;

    #[test]
    fn what_is_known_is_said() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
        for (model, says) in [
            ("phimoe", Some("sparse mixer")),
            ("phimoe/gguf/phimoe-f32.gguf", Some("sparse mixer")),
            ("deepseek_v2", Some("groups")),
            ("olmoe_norm_clip", Some("renormalise")),
            ("gpt_oss/gguf/gpt_oss-f16.gguf", Some("YaRN")),
            ("olmoe", None),
            ("deepseek_v2_greedy", None),
            ("deepseek_v3", None),
            ("qwen3_moe", None),
        ] {
            let found = elsewhere(Checkpoint::open(&fixtures.join(model)).unwrap().spec());
            assert_eq!(found.len(), usize::from(says.is_some()), "{model}: {found:?}");
            assert!(says.is_none_or(|says| found[0].contains(says)), "{model}: {found:?}");
        }
    }
}
