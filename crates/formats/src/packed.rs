//! Linear layers packed in safetensors by other programs: GPTQ, AWQ, compressed-tensors, and DeepSeek's FP8 blocks.

use crate::config::{Section, WIDTH_MAX};
use crate::{Config, Result, StoredDType, TensorLoc};

/// How a configuration says that linear layers are packed. A layer that has its plain tensor is not, whatever is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// As they are.
    Plain,
    /// 8-bit floats with a scale for each block of rows and columns.
    Fp8([usize; 2]),
    /// 4-bit numbers, eight to a word.
    Words(Words),
    /// `compressed-tensors` with a byte for each number: `weight` and `weight_scale`.
    Bytes(Share),
}

/// What the configuration says of 4-bit numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Words {
    pub layout: WordLayout,
    pub share: Share,
    /// All zero points are 8.
    pub symmetric: bool,
    /// Columns of a group lie side by side.
    pub in_order: bool,
}

/// Which numbers share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    /// So many of a row.
    Group(usize),
    Row,
    Tensor,
}

/// Where a number lies in words of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WordLayout {
    /// `[in / 8, out]`, a word holds eight inputs of one output; zero points `[groups, out / 8]` are stored less this.
    Gptq {
        /// 1, or 0 in the format's second version.
        zero_offset: u8,
    },
    /// `[in, out / 8]`, a word holds eight outputs in the order 0, 2, 4, 6, 1, 3, 5, 7; so do zero points `[groups, out / 8]`.
    Awq,
    /// `[out, in / 8]` (compressed-tensors); zero points `[out / 8, groups]`.
    Rows,
}

/// A matrix of 4-bit numbers: `scale * (number - zero point)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Int4 {
    /// The numbers.
    pub codes: TensorLoc,
    /// Scales `[groups, out]`; with [`WordLayout::Rows`] `[out, groups]`.
    pub scales: TensorLoc,
    /// Zero points; all are 8 if there are none.
    pub zeros: Option<TensorLoc>,
    /// Group of each input `[in]`, if the file tells.
    pub groups: Option<TensorLoc>,
    /// Where a number lies.
    pub layout: WordLayout,
    /// Inputs of a group.
    pub group: usize,
    /// Whether the values are kept as blocks of `Q4_0`, which holds them exactly: all zero points are 8, groups lie in order
    /// and are whole blocks, and scales are F16.
    pub as_blocks: bool,
}

impl Int4 {
    /// The type in which the values are kept in memory: blocks if they fit, else the type of the scales, in which the programs
    /// that write such files compute.
    pub fn dtype(&self) -> StoredDType {
        match self.scales.dtype {
            _ if self.as_blocks => StoredDType::Blocks(crate::GgmlType::Q4_0),
            StoredDType::F32 => StoredDType::F32,
            other => other,
        }
    }

    /// The stored tensors that it needs.
    pub fn stored(&self) -> Vec<&TensorLoc> {
        [Some(&self.codes), Some(&self.scales), self.zeros.as_ref(), self.groups.as_ref()]
            .into_iter()
            .flatten()
            .collect()
    }
}

const KNOWN: &str = "not supported; known: fp8, mxfp4, gptq, awq, compressed-tensors; or take the model in bfloat16";

/// The scheme that a configuration names.
///
/// # Errors
/// One that is not read.
pub(crate) fn scheme(config: &Config) -> Result<Scheme> {
    let Some(section) = config.opt_section("quantization_config")? else { return Ok(Scheme::Plain) };
    match section.opt_text("quant_method")?.unwrap_or("") {
        "fp8" | "mxfp4" => fp8_block(&section).map(|block| block.map_or(Scheme::Plain, Scheme::Fp8)),
        "gptq" => gptq(&section),
        "awq" => awq(&section),
        "compressed-tensors" => compressed(&section),
        _ => Err(section.refuse("quant_method", KNOWN)),
    }
}

fn fp8_block(section: &Section) -> Result<Option<[usize; 2]>> {
    let key = "weight_block_size";
    match section.opt_indices(key)?.as_deref() {
        None => Ok(None),
        Some(&[rows, cols]) if rows > 0 && cols > 0 => Ok(Some([rows, cols])),
        Some(_) => Err(section.refuse(key, "two numbers above 0 expected")),
    }
}

fn four_bits(section: &Section, key: &str) -> Result<()> {
    match section.opt_count(key, 64)? {
        Some(4) => Ok(()),
        _ => Err(section.refuse(key, "only 4 bits are read in this form")),
    }
}

/// `group_size`, of which -1 is the whole row.
fn group(section: &Section) -> Result<Share> {
    match section.opt_number("group_size")? {
        Some(-1.0) => Ok(Share::Row),
        _ => Ok(Share::Group(section.count("group_size", WIDTH_MAX)?)),
    }
}

fn gptq(section: &Section) -> Result<Scheme> {
    four_bits(section, "bits")?;
    let zero_offset = match section.opt_text("checkpoint_format")?.unwrap_or("gptq") {
        "gptq" => 1,
        "gptq_v2" => 0,
        _ => return Err(section.refuse("checkpoint_format", "not supported; known: gptq, gptq_v2")),
    };
    Ok(Scheme::Words(Words {
        layout: WordLayout::Gptq { zero_offset },
        share: group(section)?,
        symmetric: section.flag("sym", false)?,
        in_order: !section.flag("desc_act", false)?,
    }))
}

fn awq(section: &Section) -> Result<Scheme> {
    four_bits(section, "bits")?;
    if !matches!(section.opt_text("version")?.map(str::to_ascii_lowercase).as_deref(), None | Some("gemm")) {
        return Err(section.refuse("version", "not supported; known: gemm"));
    }
    let share = group(section)?;
    Ok(Scheme::Words(Words { layout: WordLayout::Awq, share, symmetric: false, in_order: true }))
}

fn compressed(section: &Section) -> Result<Scheme> {
    let groups = section.opt_section("config_groups")?.ok_or_else(|| section.missing("config_groups"))?;
    let mut names = groups.json().keys();
    let (Some(name), None) = (names.next(), names.next()) else {
        return Err(section.refuse("config_groups", "one group of layers expected"));
    };
    let of = groups.opt_section(name)?.ok_or_else(|| groups.missing(name))?;
    let weights = of.opt_section("weights")?.ok_or_else(|| of.missing("weights"))?;
    let share = match weights.opt_text("strategy")?.unwrap_or("tensor") {
        "group" => group(&weights)?,
        "channel" => Share::Row,
        "tensor" => Share::Tensor,
        _ => return Err(weights.refuse("strategy", "not supported; known: group, channel, tensor")),
    };
    match section.opt_text("format")?.unwrap_or("") {
        "pack-quantized" => {
            four_bits(&weights, "num_bits")?;
            if share == Share::Tensor {
                return Err(weights.refuse("strategy", "not supported with this format; known: group, channel"));
            }
            let symmetric = weights.flag("symmetric", true)?;
            let in_order = weights.opt_text("actorder")?.is_none();
            Ok(Scheme::Words(Words { layout: WordLayout::Rows, share, symmetric, in_order }))
        }
        "int-quantized" | "float-quantized" | "naive-quantized" => match weights.flag("symmetric", true)? {
            true => Ok(Scheme::Bytes(share)),
            false => Err(weights.refuse("symmetric", "zero points of bytes are not supported")),
        },
        _ => Err(section.refuse("format", "not supported; known: pack-quantized, int-quantized, float-quantized")),
    }
}
