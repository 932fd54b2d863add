//! Checks that are written into a template's source before the engine reads it. Lines stay lines.
//!
//! | in the template | what the engine reads |
//! |---|---|
//! | `{% set x = y %}` | `{% set x = (y)\|NAMED(..) %}` |
//! | `{% for x in y %}`, `{% macro f(x) %}`, `{% call(x) f() %}`, `{% with x = y %}` | the same, then `{% if [x]\|ROUND(bytes) %}{% endif %}`, bytes of literal text in it |
//! | `x * y` | `x\|FACTOR(..) * y`, and `y\|TIMES` if it is a name or in brackets |
//! | `{% generation %}` | `{% with %}`: blocks that the engine does not know, with a scope of their own, too |

use crate::text::TextError;

/// The filter that values get before they get a name.
pub(super) const NAMED: &str = "value_that_gets_a_name";
/// The filter that names get at the beginning of a body that may run often.
pub(super) const ROUND: &str = "values_of_a_round";
/// The filter that the left side of a product gets.
pub(super) const FACTOR: &str = "value_that_is_multiplied";
/// The filter that the right side gets where it is neither a number nor a text that is written out.
pub(super) const TIMES: &str = "value_that_multiplies";

/// The longest tag, in characters without those of strings. In released templates they have up to 250.
const TAG_CHARS_MAX: usize = 2000;
/// The most signs `+` and `~` in a tag. Released templates have up to 20.
const JOINS_MAX: usize = 64;
/// The most `elif` tags. Released templates have up to 20.
const ELIFS_MAX: usize = 500;

/// The source as the engine shall read it. Without `guards` it has checks of products only, which the engine would compute
/// while it reads them.
pub(super) fn prepared(source: &str, guards: bool) -> Result<String, TextError> {
    let mut out = Output { pieces: vec![String::with_capacity(source.len() * 5 / 4)], open: Vec::new() };
    let (mut rest, mut elifs) = (source, 0);
    while let Some(start) = rest.as_bytes().windows(2).position(|pair| matches!(pair, b"{{" | b"{%" | b"{#")) {
        out.literal(&rest[..start]);
        rest = &rest[start..];
        let word = word(rest);
        let tag = match word {
            "raw" if rest.starts_with("{%") => {
                let mut tags = rest.match_indices("{%").map(|(at, _)| at);
                let end = tags.find(|at| self::word(&rest[*at..]) == "endraw");
                Tag { end, ..Tag::default() }
            }
            _ if rest.starts_with("{#") => Tag { end: rest.find("#}").map(|end| end + 2), ..Tag::default() },
            _ => Tag::scan(rest),
        };
        elifs += usize::from(word == "elif");
        if let Some(message) = too_much(&tag, elifs) {
            let line = 1 + source[..source.len() - rest.len()].matches('\n').count() as u32;
            return Err(TextError::TemplateSyntax { line, message });
        }
        // The engine says what is wrong with a tag without end.
        let Some(end) = tag.end else { break };
        match word {
            "generation" | "endgeneration" => out.code(&rest[..end].replacen("generation", "with", 1)),
            "raw" => out.literal(&rest[..end]),
            _ if guards => out.guarded(&rest[..end], word, &tag),
            _ => out.code(&with_factors(&rest[..end], &tag.stars)),
        }
        rest = &rest[end..];
    }
    out.code(rest);
    Ok(out.pieces.concat())
}

fn too_much(tag: &Tag, elifs: usize) -> Option<String> {
    if elifs > ELIFS_MAX {
        Some(format!("there are more than {ELIFS_MAX} elif tags"))
    } else if tag.chars > TAG_CHARS_MAX {
        Some(format!("a tag has more than {TAG_CHARS_MAX} characters"))
    } else if tag.joins > JOINS_MAX {
        Some(format!("a tag has more than {JOINS_MAX} signs + and ~"))
    } else {
        None
    }
}

/// The prepared source.
struct Output {
    /// Pieces of it; those that `open` names are numbers still to be written.
    pieces: Vec<String>,
    /// Bodies that are open: the piece for the number of bytes, and the bytes so far.
    open: Vec<(usize, usize)>,
}

impl Output {
    fn code(&mut self, text: &str) {
        match self.pieces.last_mut() {
            Some(last) => last.push_str(text),
            None => self.pieces.push(text.to_owned()),
        }
    }

    fn literal(&mut self, text: &str) {
        if let Some((_, bytes)) = self.open.last_mut() {
            *bytes += text.len();
        }
        self.code(text);
    }

    /// A tag, with its checks.
    fn guarded(&mut self, text: &str, word: &str, tag: &Tag) {
        if matches!(word, "endfor" | "endmacro" | "endcall" | "endwith")
            && let Some((piece, bytes)) = self.open.pop()
        {
            self.pieces[piece] = bytes.to_string();
        }
        let (inner, close) = split_close(text);
        let mut inner = with_factors(inner, &tag.stars);
        if let ("set", Some(assigned)) = (word, tag.assigned) {
            // No product stands before the sign.
            let (target, value) = inner.split_at(assigned);
            inner = format!("{target} ({value})|{NAMED}({}) ", target.contains('.'));
        }
        self.code(&inner);
        let names = match word {
            "for" | "macro" | "call" | "with" => bound(&text[..text.len() - close.len()], word),
            _ => return self.code(close),
        };
        self.code(&format!("%}}{{% if [{}]|{ROUND}(", names.join(", ")));
        self.open.push((self.pieces.len(), 0));
        self.pieces.extend(["0".to_owned(), ") %}{% endif ".to_owned()]);
        self.code(close);
    }
}

/// A tag without the sign that closes it, and that sign.
fn split_close(text: &str) -> (&str, &str) {
    let inner = text.strip_suffix("%}").or_else(|| text.strip_suffix("}}")).unwrap_or(text);
    let inner = inner.strip_suffix(['-', '+']).unwrap_or(inner);
    text.split_at(inner.len())
}

/// Writes checks around each sign of a product.
fn with_factors(tag: &str, stars: &[usize]) -> String {
    let mut checks = Vec::new();
    for &star in stars {
        let right = &tag[star + 1..];
        let operand = right.trim_start();
        let (end, kind) = right_side(operand);
        checks.push((star, format!("|{FACTOR}({kind})")));
        if kind == "'other'" {
            checks.push((star + 1 + right.len() - operand.len() + end, format!("|{TIMES}")));
        }
    }
    checks.sort_by_key(|(at, _)| *at);
    let mut out = tag.to_owned();
    for (at, check) in checks.iter().rev() {
        out.insert_str((*at).min(tag.len()), check);
    }
    out
}

/// Where the right side of a product ends, and what it is: `'number', n`, `'text', bytes`, `'other'`, or `'unknown'` if it
/// goes on in a way that is not looked into.
fn right_side(text: &str) -> (usize, String) {
    let length = |is_part: &dyn Fn(char) -> bool| text.find(|c| !is_part(c)).unwrap_or(text.len());
    let (end, kind) = match text.chars().next() {
        Some(c) if c.is_ascii_digit() => {
            let end = length(&|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_'));
            (end, text[..end].parse::<u32>().ok().map(|n| format!("'number', {n}")))
        }
        Some(quote @ ('\'' | '"')) => {
            let bytes = text[1..].find(quote).unwrap_or(0);
            (bytes + 2, Some(format!("'text', {bytes}")))
        }
        Some('(') => (in_brackets(text).len() + 2, Some("'other'".to_owned())),
        Some(c) if c.is_alphabetic() || c == '_' => {
            (length(&|c| c.is_alphanumeric() || matches!(c, '.' | '_')), Some("'other'".to_owned()))
        }
        _ => (0, None),
    };
    let behind = text.get(end..).unwrap_or_default().trim_start();
    let goes_on = behind.starts_with(['.', '(', '[', '|', '\'', '"']) || behind.starts_with("**");
    (end, kind.filter(|_| !goes_on).unwrap_or_else(|| "'unknown'".to_owned()))
}

/// The names that a tag binds.
fn bound<'a>(tag: &'a str, word: &str) -> Vec<&'a str> {
    let behind = tag.split_once(word).map_or("", |(_, behind)| behind);
    let list = match word {
        "for" => behind.split_once(" in").map_or(behind, |(targets, _)| targets),
        "with" => behind,
        "call" if !behind.trim_start().starts_with('(') => "",
        _ => in_brackets(behind),
    };
    let mut names = Vec::new();
    for part in parts(list.trim().trim_start_matches('(')) {
        let name = part.split('=').next().unwrap_or_default();
        names.extend(name.split([',', '(', ')', ' ', '\n', '\t', '\r']).map(str::trim).filter(|name| is_name(name)));
    }
    names
}

/// What stands in the first brackets.
fn in_brackets(text: &str) -> &str {
    let Some(open) = text.find('(') else { return "" };
    let inner = &text[open + 1..];
    let mut depth = 0;
    let end = signs(inner).find(|(_, c)| {
        depth += i32::from(matches!(c, '(' | '[' | '{')) - i32::from(matches!(c, ')' | ']' | '}'));
        depth < 0
    });
    end.map_or(inner, |(at, _)| &inner[..at])
}

/// A list's parts, which commas part.
fn parts(list: &str) -> Vec<&str> {
    let (mut out, mut from, mut depth) = (Vec::new(), 0, 0);
    for (at, c) in signs(list) {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            ',' if depth <= 0 => {
                out.push(&list[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    out.push(&list[from..]);
    out
}

fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_alphabetic() || c == '_') && text.chars().all(|c| c.is_alphanumeric() || c == '_')
}

/// The first word of a block tag.
fn word(tag: &str) -> &str {
    let inner = tag.strip_prefix("{%").unwrap_or_default();
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start();
    &inner[..inner.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(inner.len())]
}

/// Characters that are not in strings, and where they are.
fn signs(text: &str) -> impl Iterator<Item = (usize, char)> {
    let mut chars = text.char_indices();
    let mut quote = None;
    std::iter::from_fn(move || {
        loop {
            let (at, c) = chars.next()?;
            match (quote, c) {
                (Some(_), '\\') => drop(chars.next()),
                (Some(open), _) if open == c => quote = None,
                (Some(_), _) => {}
                (None, '\'' | '"') => quote = Some(c),
                (None, _) => return Some((at, c)),
            }
        }
    })
}

/// What a tag looks like from outside.
#[derive(Default)]
struct Tag {
    /// Its length, if it ends.
    end: Option<usize>,
    /// Characters that are neither in strings nor white.
    chars: usize,
    /// Behind the first `=` outside of brackets.
    assigned: Option<usize>,
    /// Signs of products.
    stars: Vec<usize>,
    /// Signs `+` and `~`.
    joins: usize,
}

impl Tag {
    /// Looks at the tag that `text` begins with, as the engine's own scanner does.
    fn scan(text: &str) -> Self {
        let mut tag = Self::default();
        let close = if text.starts_with("{{") { "}}" } else { "%}" };
        let mut depth = 0_i32;
        for (at, c) in signs(&text[2..]) {
            let at = at + 2;
            if depth == 0 && text[at..].starts_with(close) {
                tag.end = Some(at + 2);
                break;
            }
            match c {
                '(' | '[' | '{' => depth += 1,
                ')' | ']' | '}' => depth -= 1,
                '=' if depth == 0 && tag.assigned.is_none() => tag.assigned = Some(at + 1),
                '*' if !text[at + 1..].starts_with('*') && !text[..at].ends_with('*') => tag.stars.push(at),
                '+' | '~' => tag.joins += 1,
                _ => {}
            }
            tag.chars += usize::from(!c.is_whitespace());
        }
        tag
    }
}

/// Whether a piece of the prepared source shows that it was prepared.
pub(super) fn shows(text: &str) -> bool {
    [NAMED, ROUND, FACTOR, TIMES].iter().any(|name| text.contains(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_is_prepared_for_the_engine() {
        let round =
            |names: &str, bytes: usize, close: &str| format!("%}}{{% if [{names}]|R({bytes}) %}}{{% endif {close}");
        let cases = [
            ("a{% generation %}b{%- endgeneration +%}", "a{% with %}b{%- endwith +%}".to_owned()),
            ("{% set x = 'a = %}' -%} {{ x }}", "{% set x = ( 'a = %}' )|N(false) -%} {{ x }}".to_owned()),
            ("{%set ns.x={'a':{}}['a']%}", "{%set ns.x= ({'a':{}}['a'])|N(true) %}".to_owned()),
            ("{%- set (a, b) = f(c=1), 2 %}", "{%- set (a, b) = ( f(c=1), 2 )|N(false) %}".to_owned()),
            (
                "{% set x %}1{% endset %}{% if a == 1 %}{% endif %}",
                "{% set x %}1{% endset %}{% if a == 1 %}{% endif %}".to_owned(),
            ),
            (
                "{% raw %}{% set x = 1 %}{{ '{%- endraw %}{# {% set x = 1 #}",
                "{% raw %}{% set x = 1 %}{{ '{%- endraw %}{# {% set x = 1 #}".to_owned(),
            ),
            ("{{ '{% set x = 1 %}' }}{{ {'a': {'b': 1}} }}", "{{ '{% set x = 1 %}' }}{{ {'a': {'b': 1}} }}".to_owned()),
            ("{% set x = 'no end", "{% set x = 'no end".to_owned()),
            ("{% raw %}{{", "{% raw %}{{".to_owned()),
            ("{ {", "{ {".to_owned()),
            (
                "{% for k, v in a.items() -%}xyz{% endfor %}",
                format!("{{% for k, v in a.items() {}xyz{{% endfor %}}", round("k, v", 3, "-%}")),
            ),
            (
                "{%for (a, (b, c)) in d%}{%endfor%}",
                format!("{{%for (a, (b, c)) in d{}{{%endfor%}}", round("a, b, c", 0, "%}")),
            ),
            (
                "{% macro f(a, b=g(1, 2), c='x,y') %}1{% with d = a, e = 2 %}22{% endwith %}3{% endmacro %}",
                format!(
                    "{{% macro f(a, b=g(1, 2), c='x,y') {}1{{% with d = a, e = 2 {}22{{% endwith %}}3{{% endmacro %}}",
                    round("a, b, c", 2, "%}"),
                    round("d, e", 2, "%}")
                ),
            ),
            ("{% call f(1) %}{% endcall %}", format!("{{% call f(1) {}{{% endcall %}}", round("", 0, "%}"))),
            ("{% call(x) f(1) %}{% endcall %}", format!("{{% call(x) f(1) {}{{% endcall %}}", round("x", 0, "%}"))),
            ("{{ '=' * 20 ~ n *'ab' }}", "{{ '=' |F('number', 20)* 20 ~ n |F('text', 2)*'ab' }}".to_owned()),
            ("{{ 2 ** 3 * m.n }}", "{{ 2 ** 3 |F('other')* m.n|T }}".to_owned()),
            (
                "{{ a * (b * (2 - c)) * d }}",
                "{{ a |F('other')* (b |F('other')* (2 - c)|T)|T |F('other')* d|T }}".to_owned(),
            ),
            (
                "{{ a * 10**9 * b[0] * c|f }}",
                "{{ a |F('unknown')* 10**9 |F('unknown')* b[0] |F('unknown')* c|f }}".to_owned(),
            ),
        ];
        for (source, wanted) in cases {
            let prepared = prepared(source, true).unwrap().replace(NAMED, "N").replace(ROUND, "R").replace(FACTOR, "F");
            let prepared = prepared.replace(TIMES, "T");
            assert_eq!(prepared, wanted);
        }
    }

    #[test]
    fn tags_that_no_released_template_has_are_refused() {
        for (source, says) in [
            ("\n{{ 1".to_owned() + &" + 1".repeat(65) + " }}", "signs + and ~"),
            ("\n{{ ".to_owned() + &"x".repeat(2001) + " }}", "2000 characters"),
            ("\n{% if 1 %}".to_owned() + &"{% elif 1 %}".repeat(501), "500 elif"),
        ] {
            let error = prepared(&source, true).unwrap_err();
            let TextError::TemplateSyntax { line: 2, message } = error else { panic!("{error}") };
            assert!(message.contains(says), "{message}");
        }
    }
}
