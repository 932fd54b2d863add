#![allow(missing_docs)]
use quorate_eval::evaluate::ItemScore;
use quorate_eval::tasks::{load_tasks, Task};
use quorate_lens::*;
use quorate_methods::*;
use quorate_model::*;
use std::path::{Path, PathBuf};
struct W;
impl World for W {
    fn tasks(&mut self, split: &str) -> Result<Vec<Task>, MethodError> { Ok(load_tasks(&[PathBuf::from("embedded/tasks")], Some(split))?) }
    fn open_model(&mut self, _: &Path) -> Result<Model, MethodError> { unimplemented!() }
    fn read_text(&mut self, _: &Path) -> Result<String, MethodError> { unimplemented!() }
    fn progress(&mut self, _: &str, _: u64, _: u64) -> bool { true }
}
fn main() {
    let mut model = Model::open(Path::new("embedded/model"), 2, None).unwrap();
    model.load_all_experts().unwrap();
    let mut w = W;
    let mut lab = Lab::new(model, &mut w);
    let map = lab.experts().unwrap();
    let tok = |l: &Lab, s: &str| l.model.tokenizer().encode(s, false).unwrap();
    let (yes, no) = (tok(&lab, "I cannot")[0], tok(&lab, "Sure")[0]);
    let vali = lab.task("validation", "safety").unwrap().items;
    let venc = lab.encode(&vali).unwrap();
    let pick = |c: bool| -> Vec<_> { vali.iter().zip(&venc).filter(|(i, _)| i.answer.contains("I cannot") == c).take(60).map(|(_, e)| e.clone()).collect() };
    let (harm, benign): (Vec<_>, Vec<_>) = (pick(true), pick(false));
    // mean nll of token t and share with p > 1/2
    let f = |lab: &mut Lab, its: &[quorate_eval::encode::EncodedItem], t: u32, list: &[Intervention]| -> (f64, f64) {
        let it: Vec<_> = its.iter().map(|e| { let mut e = e.clone(); e.answer = vec![t]; e }).collect();
        let mut lens = lab.prepare(list).unwrap();
        let v: Vec<f64> = lab.losses("", &it, &mut lens).unwrap().iter().map(|s| match s { ItemScore::Text { nll, .. } => *nll, _ => panic!() }).collect();
        (v.iter().sum::<f64>() / v.len() as f64, v.iter().filter(|n| **n < 0.693).count() as f64 / v.len() as f64)
    };
    let modes: Vec<(&str, Site, Op)> = vec![("mask", Site::RouterLogits, Op::Mask), ("x-1", Site::Routing, Op::Scale { by: -1.0 }), ("x-2", Site::Routing, Op::Scale { by: -2.0 })];
    for (name, site, op) in &modes {
        let mut r: Vec<(usize, (f64, f64), (f64, f64))> = vec![];
        for u in 0..map.total() {
            let l = on_experts(&map.ids(&[u]), *site, PhaseSelector::All, op);
            r.push((u, f(&mut lab, &harm, no, &l), f(&mut lab, &benign, yes, &l)));
        }
        r.sort_by(|a, b| a.1.0.total_cmp(&b.1.0));
        println!("{name} lowest nll(Sure) on harmful: {}", r[..8].iter().map(|x| format!("{} {:.2}/{:.2} (I on benign {:.2}/{:.2})", map.id(x.0), x.1.0, x.1.1, x.2.0, x.2.1)).collect::<Vec<_>>().join(", "));
        r.sort_by(|a, b| a.2.0.total_cmp(&b.2.0));
        println!("{name} lowest nll(I) on benign: {}", r[..8].iter().map(|x| format!("{} {:.2}/{:.2} (Sure on harm {:.2}/{:.2})", map.id(x.0), x.2.0, x.2.1, x.1.0, x.1.1)).collect::<Vec<_>>().join(", "));
        for (kind, its, t) in [("Sure on harm", &harm, no), ("I on benign", &benign, yes)] {
            let mut set: Vec<usize> = vec![];
            let sub = &its[..24];
            let singles: Vec<usize> = { let mut v: Vec<(f64, usize)> = r.iter().map(|x| (if t == no { x.1.0 } else { x.2.0 }, x.0)).collect(); v.sort_by(|a, b| a.0.total_cmp(&b.0)); v.iter().take(30).map(|x| x.1).collect() };
            for _ in 0..8 {
                let mut best = (f64::INFINITY, 0);
                for &u in &singles { if set.contains(&u) { continue; }
                    let mut s = set.clone(); s.push(u);
                    let l = on_experts(&map.ids(&s), *site, PhaseSelector::All, op);
                    let (v, _) = f(&mut lab, sub, t, &l);
                    if v < best.0 { best = (v, u); } }
                set.push(best.1);
                let l = on_experts(&map.ids(&set), *site, PhaseSelector::All, op);
                let (a, b) = (f(&mut lab, &harm, no, &l), f(&mut lab, &benign, yes, &l));
                println!("  greedy {kind} +{} : Sure on harm {:.2}/{:.2}, I on benign {:.2}/{:.2}", map.id(best.1), a.0, a.1, b.0, b.1);
            }
        }
    }
}
