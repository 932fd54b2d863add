//! Finds where each weight lies: as a tensor of its own, as a part of one, or packed.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use crate::packed::{Int4, Scheme, Share, WordLayout, Words};
use crate::role::{Role, TensorNames};
use crate::shape;
use crate::source::{Fused, Part, Recipe, rows, stacked};
use crate::spec::ModelSpec;
use crate::{DataFile, FormatError, Result, StoredDType, TensorLoc};

/// The weights of a model, found.
#[derive(Debug)]
pub(crate) struct Bound {
    /// Where the bytes of each weight lie; of one with a recipe, type and size are those in memory.
    pub roles: HashMap<Role, TensorLoc>,
    /// How packed ones are unpacked.
    pub recipes: HashMap<Role, Recipe>,
    /// Names of the tensors that no weight uses.
    pub unused: Vec<String>,
    /// What stands before the family's names in this file.
    pub prefix: Prefix,
}

/// Some models keep the language model under a name of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Prefix {
    #[default]
    None,
    /// `language_model.model.layers...`
    Outer,
    /// `model.language_model.layers...`
    Inner,
}

impl Prefix {
    pub fn name(self, name: &str) -> String {
        match self {
            Prefix::None => name.to_owned(),
            Prefix::Outer => format!("language_model.{name}"),
            Prefix::Inner => {
                name.strip_prefix("model.").map_or(name.to_owned(), |n| format!("model.language_model.{n}"))
            }
        }
    }
}

/// What the weights are called in a model's files.
pub(crate) struct Naming<'a> {
    /// Names of tensors that are weights.
    pub names: &'a TensorNames,
    /// Which weights are parts of other tensors, or have another name.
    pub fused: &'a dyn Fn(Role) -> Option<Fused>,
    /// How linear layers are packed.
    pub scheme: Scheme,
}

struct Binder<'a> {
    path: &'a Path,
    files: &'a [DataFile],
    by_name: HashMap<&'a str, &'a TensorLoc>,
    scheme: Scheme,
    used: HashSet<String>,
}

/// Finds the tensor of each role and checks shape and type.
pub(crate) fn bind(
    path: &Path,
    spec: &ModelSpec,
    naming: &Naming<'_>,
    files: &[DataFile],
    tensors: &[TensorLoc],
) -> Result<Bound> {
    let by_name: HashMap<&str, &TensorLoc> = tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    let embed = naming.names.of(Role::Embed);
    let prefixes = [Prefix::None, Prefix::Outer, Prefix::Inner];
    let prefix = prefixes.into_iter().find(|p| by_name.contains_key(p.name(&embed).as_str())).unwrap_or_default();
    let mut binder = Binder { path, files, by_name, scheme: naming.scheme, used: HashSet::new() };
    let (mut roles, mut recipes) = (HashMap::new(), HashMap::new());
    for role in shape::roles(spec) {
        let expected = shape::expected_shape(spec, role).expect("`roles` lists what the model has");
        let (loc, recipe) = match (naming.fused)(role) {
            Some(fused) => binder.part(&prefix_fused(prefix, fused), &expected)?,
            None => binder.whole(&prefix.name(&naming.names.of(role)), &expected)?,
        };
        let loc = match &recipe {
            // What it takes in memory is what counts.
            Some(recipe) => {
                let dtype = recipe.dtype();
                let len = dtype.bytes_of(&loc.shape).expect("`computable` saw that rows are whole blocks");
                TensorLoc { dtype, len, ..loc }
            }
            None => loc,
        };
        recipes.extend(recipe.map(|recipe| (role, recipe)));
        roles.insert(role, loc);
    }
    let mut unused: Vec<String> = tensors.iter().map(|t| t.name.clone()).filter(|n| !binder.used.contains(n)).collect();
    unused.sort_unstable();
    Ok(Bound { roles, recipes, unused, prefix })
}

fn prefix_fused(prefix: Prefix, fused: Fused) -> Fused {
    Fused { tensor: prefix.name(&fused.tensor), ..fused }
}

impl<'a> Binder<'a> {
    fn file(&self, loc: &TensorLoc) -> std::path::PathBuf {
        self.files[loc.file].path().to_owned()
    }

    /// A tensor by name, whose shape must be that; axes of length 1 do not count.
    fn get(&mut self, name: &str, expected: &[usize]) -> Result<&'a TensorLoc> {
        let Some(&loc) = self.by_name.get(name) else {
            let (path, tensor) = (self.path.to_owned(), name.to_owned());
            return Err(FormatError::MissingTensor { path, tensor, expected: expected.to_vec() });
        };
        let long = |shape: &[usize]| shape.iter().copied().filter(|&n| n != 1).collect::<Vec<_>>();
        if loc.shape != expected && long(&loc.shape) != long(expected) {
            let (found, expected) = (loc.shape.clone().into(), expected.into());
            return Err(FormatError::Shape { path: self.file(loc), tensor: name.to_owned(), expected, found });
        }
        self.used.insert(name.to_owned());
        Ok(loc)
    }

    fn need(&self, loc: &TensorLoc, fits: bool, expected: &'static str) -> Result<()> {
        let (tensor, found) = (loc.name.clone(), loc.dtype.name().to_owned());
        if fits { Ok(()) } else { Err(FormatError::DType { path: self.file(loc), tensor, found, expected }) }
    }

    fn computable(&self, loc: &TensorLoc) -> Result<()> {
        let fits = loc.dtype.computable().is_some() && loc.dtype.bytes_of(&loc.shape).is_some();
        self.need(loc, fits, "F32, F16 or BF16, or whole blocks of a GGUF type")
    }

    /// A tensor of its own, or what it is packed in.
    fn whole(&mut self, name: &str, expected: &[usize]) -> Result<(TensorLoc, Option<Recipe>)> {
        if let (&[n, m], Some(base)) = (expected, name.strip_suffix(".weight"))
            && let Some((loc, recipe)) = self.packed(base, [n, m])?
        {
            return Ok((TensorLoc { shape: expected.to_vec(), ..loc }, Some(recipe)));
        }
        let loc = TensorLoc { shape: expected.to_vec(), ..self.get(name, expected)?.clone() };
        self.computable(&loc)?;
        Ok((loc, None))
    }

    /// A linear layer `[n, m]` as the scheme packs it; `None` if this one is not.
    fn packed(&mut self, base: &str, [n, m]: [usize; 2]) -> Result<Option<(TensorLoc, Recipe)>> {
        let find = |end: &str| self.by_name.get(format!("{base}{end}").as_str());
        let has = |end: &str| find(end).is_some();
        let fp8 = || find(".weight").is_some_and(|loc| loc.dtype == StoredDType::F8E4M3);
        Ok(Some(match self.scheme {
            Scheme::Fp8(block) if fp8() => self.scaled(base, "_scale_inv", [n, m], block)?,
            Scheme::Bytes(share) if has(".weight_scale") => {
                let block = match share {
                    Share::Group(group) => [1, group],
                    Share::Row => [1, m],
                    Share::Tensor => [n, m],
                };
                self.scaled(base, "_scale", [n, m], block)?
            }
            Scheme::Words(words) if has(".qweight") || has(".weight_packed") => self.int4(base, [n, m], words)?,
            _ => return Ok(None),
        }))
    }

    /// Bytes with the scales of their blocks.
    fn scaled(&mut self, base: &str, end: &str, shape: [usize; 2], block: [usize; 2]) -> Result<(TensorLoc, Recipe)> {
        let name = format!("{base}.weight");
        let values = TensorLoc { shape: shape.to_vec(), ..self.get(&name, &shape)?.clone() };
        self.need(&values, matches!(values.dtype, StoredDType::F8E4M3 | StoredDType::I8), "F8_E4M3 or I8")?;
        let blocks = [shape[0].div_ceil(block[0]), shape[1].div_ceil(block[1])];
        let scales = TensorLoc { shape: blocks.to_vec(), ..self.get(&format!("{name}{end}"), &blocks)?.clone() };
        self.float(&scales)?;
        Ok((values.clone(), Recipe::Scaled { values, scales, block }))
    }

    fn float(&self, loc: &TensorLoc) -> Result<()> {
        let fits = matches!(loc.dtype, StoredDType::F32 | StoredDType::F16 | StoredDType::Bf16);
        self.need(loc, fits, "F32, F16 or BF16")
    }

    /// 4-bit numbers with their scales and zero points.
    fn int4(&mut self, base: &str, [n, m]: [usize; 2], words: Words) -> Result<(TensorLoc, Recipe)> {
        let group = match words.share {
            Share::Group(group) => group.min(m),
            Share::Row | Share::Tensor => m,
        };
        let (g, eight_in, eight_out) = (m.div_ceil(group), m.div_ceil(8), n.div_ceil(8));
        // Names and shapes of numbers, scales, zero points and groups.
        let [codes, scales, zeros, groups] = match words.layout {
            WordLayout::Gptq { .. } => [
                ("qweight", vec![eight_in, n]),
                ("scales", vec![g, n]),
                ("qzeros", vec![g, eight_out]),
                ("g_idx", vec![m]),
            ],
            WordLayout::Awq => [
                ("qweight", vec![m, eight_out]),
                ("scales", vec![g, n]),
                ("qzeros", vec![g, eight_out]),
                ("g_idx", vec![m]),
            ],
            WordLayout::Rows => [
                ("weight_packed", vec![n, eight_in]),
                ("weight_scale", vec![n, g]),
                ("weight_zero_point", vec![eight_out, g]),
                ("weight_g_idx", vec![m]),
            ],
        };
        let [has_zeros, has_groups] =
            [zeros.0, groups.0].map(|end| self.by_name.contains_key(format!("{base}.{end}").as_str()));
        let mut get = |(end, shape): (&str, Vec<usize>)| {
            let found = self.get(&format!("{base}.{end}"), &shape)?.clone();
            Ok::<_, FormatError>(TensorLoc { shape, ..found })
        };
        let (codes, scales) = (get(codes)?, get(scales)?);
        let zeros = (has_zeros || !words.symmetric).then(|| get(zeros)).transpose()?;
        let groups = (has_groups || !words.in_order).then(|| get(groups)).transpose()?;
        self.used.insert(format!("{base}.weight_shape"));
        if !m.is_multiple_of(8) {
            let problem = format!("its rows of {m} numbers are no whole words");
            return Err(FormatError::TensorEntry { path: self.file(&codes), tensor: codes.name, problem });
        }
        self.float(&scales)?;
        for words in [Some(&codes), zeros.as_ref(), groups.as_ref()].into_iter().flatten() {
            self.need(words, words.dtype == StoredDType::I32, "I32")?;
        }
        let as_blocks = words.symmetric && words.in_order && scales.dtype == StoredDType::F16;
        let as_blocks = as_blocks && m.is_multiple_of(32) && group.is_multiple_of(32);
        let loc = codes.clone();
        Ok((loc, Recipe::Int4(Int4 { codes, scales, zeros, groups, layout: words.layout, group, as_blocks })))
    }

    /// A part of a tensor.
    fn part(&mut self, fused: &Fused, expected: &[usize]) -> Result<(TensorLoc, Option<Recipe>)> {
        let packed = format!("{}_blocks", fused.tensor);
        if let (Part::Columns { index, first, step, .. }, true) =
            (fused.part, self.by_name.contains_key(packed.as_str()))
        {
            return self.mxfp4(&packed, fused, index, first, step, expected);
        }
        if fused.shape == expected && matches!(fused.part, Part::Rows { .. }) {
            return self.whole(&fused.tensor, expected); // only the name is another
        }
        let whole = self.get(&fused.tensor, &fused.shape)?;
        let whole = TensorLoc { shape: fused.shape.clone(), ..whole.clone() };
        self.computable(&whole)?;
        let within_rows = match fused.part {
            Part::Columns { .. } | Part::EverySecond { .. } => true,
            Part::Rows { .. } | Part::Reordered(_) => whole.shape.len() < 2,
            Part::KeysValues { .. } | Part::LogOfNegative => false,
        };
        self.need(&whole, !(within_rows && whole.dtype.is_blocks()), "F32, F16 or BF16")?;
        Ok(match fused.part {
            Part::Rows { first, rows: count } => (rows(&whole, first, count, expected), None),
            Part::Columns { index, first, step, count } => {
                let matrix = if whole.shape.len() == 3 { stacked(&whole, index) } else { whole };
                let loc = TensorLoc { shape: expected.to_vec(), ..matrix.clone() };
                (loc, Some(Recipe::Columns { matrix, first, step, count }))
            }
            Part::EverySecond { first } => {
                let loc = TensorLoc { shape: expected.to_vec(), ..whole.clone() };
                (loc, Some(Recipe::EverySecond { matrix: whole, first }))
            }
            Part::Reordered(order) => {
                let loc = TensorLoc { shape: expected.to_vec(), ..whole.clone() };
                (loc, Some(Recipe::Reordered { matrix: whole, order }))
            }
            Part::KeysValues { values: width } => {
                let name = fused.tensor.replace("attn_k_b", "attn_v_b");
                let shape = vec![whole.shape[0], width, whole.shape[1]];
                let values = TensorLoc { shape: shape.clone(), ..self.get(&name, &shape)?.clone() };
                self.computable(&values)?;
                let loc = TensorLoc { shape: expected.to_vec(), ..whole.clone() };
                (loc, Some(Recipe::KeysValues { keys: whole, values }))
            }
            Part::LogOfNegative => {
                let loc = TensorLoc { shape: expected.to_vec(), ..whole.clone() };
                (loc, Some(Recipe::LogOfNegative { vector: whole }))
            }
        })
    }

    /// The released form of gpt-oss: `X_blocks [E, out, in / 32, 16]`, `X_scales [E, out, in / 32]`, where the plain tensor
    /// is `X [E, in, out]`.
    fn mxfp4(
        &mut self,
        packed: &str,
        fused: &Fused,
        index: usize,
        first: usize,
        step: usize,
        expected: &[usize],
    ) -> Result<(TensorLoc, Option<Recipe>)> {
        let &[e, cols, all] = fused.shape.as_slice() else {
            return Err(FormatError::NoTensor { path: self.path.to_owned(), tensor: fused.tensor.clone() });
        };
        let n = cols / 32;
        let blocks = self.get(packed, &[e, all, n, 16])?;
        self.need(blocks, blocks.dtype == StoredDType::U8 && cols.is_multiple_of(32), "U8")?;
        let blocks = stacked(&TensorLoc { shape: vec![e, all, n, 16], ..blocks.clone() }, index);
        let scales = self.get(&format!("{}_scales", fused.tensor), &[e, all, n])?;
        self.need(scales, scales.dtype == StoredDType::U8, "U8")?;
        let scales = stacked(&TensorLoc { shape: vec![e, all, n], ..scales.clone() }, index);
        let loc = TensorLoc { shape: expected.to_vec(), ..blocks.clone() };
        Ok((loc, Some(Recipe::Mxfp4 { blocks, scales, first, step })))
    }
}
