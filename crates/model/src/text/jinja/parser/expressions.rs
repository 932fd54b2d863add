//! Expressions, by descending precedence as Jinja has it (`~` binds tighter than `+`).

use super::super::ast::{Args, BinOp, CmpOp, Const, Expr, FilterCall, Name, Node};
use super::super::lexer::Tok;
use super::{Parser, Res};

/// Height of an expression's tree. Bounds the stack that evaluating and dropping need.
const HEIGHT_MAX: u16 = 200;

impl Parser {
    fn expr(&self, line: u32, node: Node) -> Res<Expr> {
        let below = node.height_below();
        if below >= HEIGHT_MAX {
            return self.error("the expression is too long");
        }
        Ok(Expr { line, height: below + 1, node: Box::new(node) })
    }

    /// An expression or, with commas, a tuple.
    pub(super) fn tuple_expression(&mut self, with_condition: bool) -> Res<Expr> {
        self.tuple(with_condition, false)
    }

    fn tuple(&mut self, with_condition: bool, empty_allowed: bool) -> Res<Expr> {
        let line = self.line();
        let mut items = Vec::new();
        let mut is_tuple = false;
        while !self.at_tuple_end() {
            items.push(if with_condition { self.expression()? } else { self.nested(Self::or)? });
            if !self.skip_op(",") {
                break;
            }
            is_tuple = true;
        }
        match items.pop() {
            Some(only) if !is_tuple => Ok(only),
            None if !empty_allowed => self.unexpected("an expression"),
            last => {
                items.extend(last);
                self.expr(line, Node::Tuple(items))
            }
        }
    }

    fn at_tuple_end(&self) -> bool {
        matches!(self.peek(), Tok::VarEnd | Tok::BlockEnd | Tok::Op(")"))
    }

    /// `a if test else b`
    pub(super) fn expression(&mut self) -> Res<Expr> {
        self.nested(|parser| {
            let line = parser.line();
            let mut then = parser.or()?;
            while parser.skip_name("if") {
                let test = parser.or()?;
                let other = if parser.skip_name("else") { Some(parser.expression()?) } else { None };
                then = parser.expr(line, Node::Cond { test, then, other })?;
            }
            Ok(then)
        })
    }

    fn or(&mut self) -> Res<Expr> {
        let line = self.line();
        let mut left = self.and()?;
        while self.skip_name("or") {
            let right = self.and()?;
            left = self.expr(line, Node::Or(left, right))?;
        }
        Ok(left)
    }

    fn and(&mut self) -> Res<Expr> {
        let line = self.line();
        let mut left = self.not()?;
        while self.skip_name("and") {
            let right = self.not()?;
            left = self.expr(line, Node::And(left, right))?;
        }
        Ok(left)
    }

    fn not(&mut self) -> Res<Expr> {
        let line = self.line();
        if self.skip_name("not") {
            let inner = self.nested(Self::not)?;
            return self.expr(line, Node::Not(inner));
        }
        self.compare()
    }

    fn compare(&mut self) -> Res<Expr> {
        let line = self.line();
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let op = match self.peek() {
                Tok::Op("==") => CmpOp::Eq,
                Tok::Op("!=") => CmpOp::Ne,
                Tok::Op("<") => CmpOp::Lt,
                Tok::Op("<=") => CmpOp::Le,
                Tok::Op(">") => CmpOp::Gt,
                Tok::Op(">=") => CmpOp::Ge,
                Tok::Name(name) if name == "in" => CmpOp::In,
                Tok::Name(name) if name == "not" && *self.peek_second() == Tok::Name("in".into()) => {
                    self.next();
                    CmpOp::NotIn
                }
                _ => break,
            };
            self.next();
            rest.push((op, self.sum()?));
        }
        if rest.is_empty() { Ok(first) } else { self.expr(line, Node::Compare(first, rest)) }
    }

    fn sum(&mut self) -> Res<Expr> {
        let line = self.line();
        let mut left = self.concat()?;
        loop {
            let op = match self.peek() {
                Tok::Op("+") => BinOp::Add,
                Tok::Op("-") => BinOp::Sub,
                _ => return Ok(left),
            };
            self.next();
            let right = self.concat()?;
            left = self.expr(line, Node::Binary(op, left, right))?;
        }
    }

    fn concat(&mut self) -> Res<Expr> {
        let line = self.line();
        let first = self.product()?;
        if !self.at_op("~") {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.skip_op("~") {
            parts.push(self.product()?);
        }
        self.expr(line, Node::Concat(parts))
    }

    fn product(&mut self) -> Res<Expr> {
        let line = self.line();
        let mut left = self.power()?;
        loop {
            let op = match self.peek() {
                Tok::Op("*") => BinOp::Mul,
                Tok::Op("/") => BinOp::Div,
                Tok::Op("//") => BinOp::FloorDiv,
                Tok::Op("%") => BinOp::Mod,
                _ => return Ok(left),
            };
            self.next();
            let right = self.power()?;
            left = self.expr(line, Node::Binary(op, left, right))?;
        }
    }

    fn power(&mut self) -> Res<Expr> {
        let line = self.line();
        let mut left = self.unary(true)?;
        while self.skip_op("**") {
            let right = self.unary(true)?;
            left = self.expr(line, Node::Binary(BinOp::Pow, left, right))?;
        }
        Ok(left)
    }

    fn unary(&mut self, with_filters: bool) -> Res<Expr> {
        let line = self.line();
        let mut expr = if self.skip_op("-") {
            let inner = self.nested(|parser| parser.unary(false))?;
            self.expr(line, Node::Neg(inner))?
        } else if self.skip_op("+") {
            let inner = self.nested(|parser| parser.unary(false))?;
            self.expr(line, Node::Pos(inner))?
        } else {
            self.primary()?
        };
        expr = self.postfix(expr)?;
        if with_filters { self.filters_and_tests(expr) } else { Ok(expr) }
    }

    fn primary(&mut self) -> Res<Expr> {
        let line = self.line();
        let node = match self.peek().clone() {
            Tok::Name(name) => {
                self.next();
                match name.as_str() {
                    "true" | "True" => Node::Const(Const::Bool(true)),
                    "false" | "False" => Node::Const(Const::Bool(false)),
                    "none" | "None" => Node::Const(Const::None),
                    _ => {
                        self.mention(&name);
                        Node::Name(name.into())
                    }
                }
            }
            Tok::Str(mut text) => {
                self.next();
                while let Tok::Str(more) = self.peek() {
                    text.push_str(more);
                    self.next();
                }
                Node::Const(Const::Str(text.into()))
            }
            Tok::Int(value) => {
                self.next();
                Node::Const(Const::Int(value))
            }
            Tok::Float(value) => {
                self.next();
                Node::Const(Const::Float(value))
            }
            Tok::Op("(") => {
                self.next();
                let inner = self.tuple(true, true)?;
                self.expect_op(")")?;
                return Ok(inner);
            }
            Tok::Op("[") => {
                self.next();
                Node::List(self.list_items()?)
            }
            Tok::Op("{") => {
                self.next();
                Node::Dict(self.dict_items()?)
            }
            _ => return self.unexpected("an expression"),
        };
        self.expr(line, node)
    }

    fn mention(&mut self, name: &str) {
        match name {
            "varargs" => self.seen.varargs = true,
            "kwargs" => self.seen.kwargs = true,
            "caller" => self.seen.caller = true,
            "loop" => self.seen.loop_ = true,
            _ => {}
        }
    }

    fn list_items(&mut self) -> Res<Vec<Expr>> {
        let mut items = Vec::new();
        while !self.skip_op("]") {
            if !items.is_empty() {
                self.expect_op(",")?;
                if self.skip_op("]") {
                    break;
                }
            }
            items.push(self.expression()?);
        }
        Ok(items)
    }

    fn dict_items(&mut self) -> Res<Vec<(Expr, Expr)>> {
        let mut pairs = Vec::new();
        while !self.skip_op("}") {
            if !pairs.is_empty() {
                self.expect_op(",")?;
                if self.skip_op("}") {
                    break;
                }
            }
            let key = self.expression()?;
            self.expect_op(":")?;
            pairs.push((key, self.expression()?));
        }
        Ok(pairs)
    }

    /// `.name`, `[item]`, `[a:b:c]` and `(args)` after an expression.
    fn postfix(&mut self, mut expr: Expr) -> Res<Expr> {
        loop {
            let line = self.line();
            if self.skip_op(".") {
                expr = match self.next() {
                    Tok::Name(name) => self.expr(line, Node::Attr(expr, name.into()))?,
                    Tok::Int(index) => {
                        let index = self.expr(line, Node::Const(Const::Int(index)))?;
                        self.expr(line, Node::Item(expr, index))?
                    }
                    _ => return self.error("expected a name or a number after '.'"),
                };
            } else if self.skip_op("[") {
                expr = self.subscript(expr, line)?;
            } else if self.at_op("(") {
                let args = self.args()?;
                expr = self.expr(line, Node::Call(expr, args))?;
            } else {
                return Ok(expr);
            }
        }
    }

    fn subscript(&mut self, of: Expr, line: u32) -> Res<Expr> {
        let mut bounds = [None, None, None];
        let mut colons = 0;
        loop {
            if self.at_op("]") {
                break;
            } else if colons < 2 && self.skip_op(":") {
                colons += 1;
            } else if bounds[colons].is_none() {
                bounds[colons] = Some(self.expression()?);
            } else {
                return self.unexpected("']'");
            }
        }
        self.expect_op("]")?;
        match (colons, bounds) {
            (0, [Some(item), _, _]) => self.expr(line, Node::Item(of, item)),
            (0, _) => self.error("expected an index before ']'"),
            (_, bounds) => self.expr(line, Node::Slice(of, bounds)),
        }
    }

    fn args(&mut self) -> Res<Args> {
        let mut args = Args::default();
        let mut first = true;
        self.expect_op("(")?;
        while !self.skip_op(")") {
            if !first {
                self.expect_op(",")?;
                if self.skip_op(")") {
                    break;
                }
            }
            first = false;
            let only_named = args.star.is_some() || !args.named.is_empty();
            if args.double_star.is_some() {
                return self.error("no argument may follow '**'");
            } else if self.skip_op("*") {
                args.star = Some(self.expression()?);
            } else if self.skip_op("**") {
                args.double_star = Some(self.expression()?);
            } else if matches!(self.peek(), Tok::Name(_)) && *self.peek_second() == Tok::Op("=") {
                let name = self.expect_name("an argument name")?;
                self.next();
                args.named.push((name, self.expression()?));
            } else if only_named {
                return self.error("a positional argument follows a named one");
            } else {
                args.positional.push(self.expression()?);
            }
        }
        Ok(args)
    }

    fn filters_and_tests(&mut self, mut expr: Expr) -> Res<Expr> {
        loop {
            let line = self.line();
            if self.skip_op("|") {
                let call = self.filter_call()?;
                expr = self.expr(line, Node::Filter(expr, call))?;
            } else if self.skip_name("is") {
                expr = self.test(expr, line)?;
            } else if self.at_op("(") {
                let args = self.args()?;
                expr = self.expr(line, Node::Call(expr, args))?;
            } else {
                return Ok(expr);
            }
        }
    }

    pub(super) fn filter_call(&mut self) -> Res<FilterCall> {
        let line = self.line();
        let name = self.expect_name("a filter name")?;
        let args = if self.at_op("(") { self.args()? } else { Args::default() };
        Ok(FilterCall { name, args, line })
    }

    fn test(&mut self, of: Expr, line: u32) -> Res<Expr> {
        let negated = self.skip_name("not");
        let name: Name = self.expect_name("a test name")?;
        let mut args = Args::default();
        let ends = ["else", "or", "and"].iter().any(|word| self.at_name(word));
        match self.peek() {
            Tok::Op("(") => args = self.args()?,
            Tok::Name(word) if word == "is" => return self.error("tests cannot be chained with 'is'"),
            Tok::Name(_) | Tok::Str(_) | Tok::Int(_) | Tok::Float(_) | Tok::Op("[" | "{") if !ends => {
                let arg = self.primary()?;
                args.positional.push(self.postfix(arg)?);
            }
            _ => {}
        }
        let test = self.expr(line, Node::Test(of, name, args))?;
        if negated { self.expr(line, Node::Not(test)) } else { Ok(test) }
    }
}
