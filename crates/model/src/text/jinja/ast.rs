//! The syntax tree of a template.

use std::sync::Arc;

/// A name of a variable, attribute, filter, test or argument.
pub(crate) type Name = Arc<str>;

/// An expression with the line it starts on and the height of its tree.
pub(crate) struct Expr {
    pub(crate) line: u32,
    pub(crate) height: u16,
    pub(crate) node: Box<Node>,
}

/// A literal.
pub(crate) enum Const {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Arc<str>),
}

/// Binary operators that compute a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BinOp {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Mod,
    Pow,
}

/// Comparisons; they chain as in Python.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CmpOp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    In,
    NotIn,
}

/// What an expression is made of.
pub(crate) enum Node {
    Const(Const),
    Name(Name),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Neg(Expr),
    Pos(Expr),
    Not(Expr),
    And(Expr, Expr),
    Or(Expr, Expr),
    Binary(BinOp, Expr, Expr),
    Compare(Expr, Vec<(CmpOp, Expr)>),
    /// `a ~ b ~ c`
    Concat(Vec<Expr>),
    /// `then if test else other`
    Cond {
        test: Expr,
        then: Expr,
        other: Option<Expr>,
    },
    Attr(Expr, Name),
    Item(Expr, Expr),
    /// `a[start:stop:step]`
    Slice(Expr, [Option<Expr>; 3]),
    Call(Expr, Args),
    Filter(Expr, FilterCall),
    Test(Expr, Name, Args),
}

impl Node {
    /// The height of the highest expression in it.
    pub(crate) fn height_below(&self) -> u16 {
        let of = |expr: &Expr| expr.height;
        let all = |exprs: &[Expr]| exprs.iter().map(|expr| expr.height).max().unwrap_or(0);
        let args = |args: &Args| {
            let named = args.named.iter().map(|(_, expr)| expr.height).max().unwrap_or(0);
            let stars = args.star.iter().chain(&args.double_star).map(of).max().unwrap_or(0);
            all(&args.positional).max(named).max(stars)
        };
        match self {
            Node::Const(_) | Node::Name(_) => 0,
            Node::List(items) | Node::Tuple(items) | Node::Concat(items) => all(items),
            Node::Dict(pairs) => pairs.iter().map(|(key, value)| of(key).max(of(value))).max().unwrap_or(0),
            Node::Neg(a) | Node::Pos(a) | Node::Not(a) | Node::Attr(a, _) => of(a),
            Node::And(a, b) | Node::Or(a, b) | Node::Binary(_, a, b) | Node::Item(a, b) => of(a).max(of(b)),
            Node::Compare(a, rest) => rest.iter().map(|(_, expr)| expr.height).max().unwrap_or(0).max(of(a)),
            Node::Cond { test, then, other } => of(test).max(of(then)).max(other.as_ref().map_or(0, of)),
            Node::Slice(a, bounds) => bounds.iter().flatten().map(of).max().unwrap_or(0).max(of(a)),
            Node::Call(a, list) | Node::Test(a, _, list) => of(a).max(args(list)),
            Node::Filter(a, call) => of(a).max(args(&call.args)),
        }
    }
}

/// Arguments of a call: `f(a, name=b, *c, **d)`.
#[derive(Default)]
pub(crate) struct Args {
    pub(crate) positional: Vec<Expr>,
    pub(crate) named: Vec<(Name, Expr)>,
    pub(crate) star: Option<Expr>,
    pub(crate) double_star: Option<Expr>,
}

/// One link of a filter chain.
pub(crate) struct FilterCall {
    pub(crate) name: Name,
    pub(crate) args: Args,
    pub(crate) line: u32,
}

/// Where an assignment goes.
pub(crate) enum Target {
    Name(Name),
    /// `ns.attribute`
    Attr(Name, Name),
    Tuple(Vec<Target>),
}

/// A statement.
pub(crate) enum Stmt {
    Text(Arc<str>),
    Emit(Expr),
    If(Vec<(Expr, Vec<Stmt>)>, Vec<Stmt>),
    For(Arc<ForLoop>),
    Set(Target, Expr),
    SetBlock(Target, Vec<FilterCall>, Vec<Stmt>),
    With(Vec<(Target, Expr)>, Vec<Stmt>),
    Macro(Arc<Macro>),
    /// `{% call(..) macro(..) %}`: the block is handed to the macro as `caller`.
    CallBlock(Arc<Macro>, Expr),
    FilterBlock(Vec<FilterCall>, Vec<Stmt>),
    /// `{% generation %}`: what the assistant wrote, for loss masks.
    Generation(Vec<Stmt>),
    Break,
    Continue,
}

/// `{% for target in iter if test %}`.
pub(crate) struct ForLoop {
    pub(crate) target: Target,
    pub(crate) iter: Expr,
    pub(crate) test: Option<Expr>,
    pub(crate) recursive: bool,
    /// Whether the body names `loop`; if not, the test is evaluated as the loop goes, as Jinja does.
    pub(crate) uses_loop: bool,
    pub(crate) body: Vec<Stmt>,
    pub(crate) otherwise: Vec<Stmt>,
}

/// `{% macro name(params) %}`, also the body of a call block.
pub(crate) struct Macro {
    pub(crate) name: Name,
    pub(crate) params: Vec<Name>,
    /// Defaults of the last parameters.
    pub(crate) defaults: Vec<Expr>,
    pub(crate) body: Vec<Stmt>,
    pub(crate) takes_varargs: bool,
    pub(crate) takes_kwargs: bool,
    pub(crate) takes_caller: bool,
}
