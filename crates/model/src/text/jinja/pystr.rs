//! Python's rules for text: space, case, splitting, `repr`.

/// Python's `str.isspace` for one character.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Whether `strip(chars)` removes `c`; no `chars` means space.
fn strips(chars: Option<&str>, c: char) -> bool {
    chars.map_or_else(|| is_space(c), |chars| chars.contains(c))
}

/// `s.lstrip(chars)`
pub(super) fn lstrip<'s>(s: &'s str, chars: Option<&str>) -> &'s str {
    s.trim_start_matches(|c| strips(chars, c))
}

/// `s.rstrip(chars)`
pub(super) fn rstrip<'s>(s: &'s str, chars: Option<&str>) -> &'s str {
    s.trim_end_matches(|c| strips(chars, c))
}

/// `s.capitalize()`
pub(super) fn capitalize(s: &str) -> String {
    let mut chars = s.chars();
    match chars.next() {
        Some(first) => first.to_uppercase().chain(chars.as_str().to_lowercase().chars()).collect(),
        None => String::new(),
    }
}

/// `s.title()`: a letter after a non-letter is upper case.
pub(super) fn title(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    let mut in_word = false;
    for c in s.chars() {
        if in_word {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        in_word = c.is_alphabetic();
    }
    out
}

/// Jinja's filter `title`: words end at space, hyphens and opening brackets only.
pub(super) fn title_words(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    let mut in_word = false;
    for c in s.chars() {
        if in_word {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        in_word = !(is_space(c) || matches!(c, '-' | '(' | '{' | '[' | '<'));
    }
    out
}

/// Whether there are letters with case and all of them are of the wanted case.
pub(super) fn all_cased(s: &str, upper: bool) -> bool {
    let wrong = |c: char| if upper { c.is_lowercase() } else { c.is_uppercase() };
    s.chars().any(|c| c.is_uppercase() || c.is_lowercase()) && !s.chars().any(wrong)
}

/// `s.split(separator, limit)` or, from the right, `s.rsplit(separator, limit)`.
pub(super) fn split<'s>(s: &'s str, separator: Option<&str>, limit: Option<usize>, from_right: bool) -> Vec<&'s str> {
    let limit = limit.unwrap_or(usize::MAX);
    match (separator, from_right) {
        (Some(separator), false) => s.splitn(limit.saturating_add(1), separator).collect(),
        (Some(separator), true) => {
            let mut parts: Vec<_> = s.rsplitn(limit.saturating_add(1), separator).collect();
            parts.reverse();
            parts
        }
        (None, false) => {
            let mut parts = Vec::new();
            let mut rest = lstrip(s, None);
            while !rest.is_empty() && parts.len() < limit {
                let end = rest.find(is_space).unwrap_or(rest.len());
                parts.push(&rest[..end]);
                rest = lstrip(&rest[end..], None);
            }
            parts.extend((!rest.is_empty()).then_some(rest));
            parts
        }
        (None, true) => {
            let mut parts = Vec::new();
            let mut rest = rstrip(s, None);
            while !rest.is_empty() && parts.len() < limit {
                let from = rest.rfind(is_space);
                let from = from.map_or(0, |at| at + rest[at..].chars().next().map_or(0, char::len_utf8));
                parts.push(&rest[from..]);
                rest = rstrip(&rest[..from], None);
            }
            parts.extend((!rest.is_empty()).then_some(rest));
            parts.reverse();
            parts
        }
    }
}

/// `s.splitlines(keepends)`
pub(super) fn split_lines(s: &str, keep_ends: bool) -> Vec<&str> {
    let is_end = |c| matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = s;
    while let Some(at) = rest.find(is_end) {
        let width =
            if rest[at..].starts_with("\r\n") { 2 } else { rest[at..].chars().next().map_or(0, char::len_utf8) };
        lines.push(&rest[..if keep_ends { at + width } else { at }]);
        rest = &rest[at + width..];
    }
    lines.extend((!rest.is_empty()).then_some(rest));
    lines
}

/// `repr(s)`
pub(super) fn repr(s: &str) -> String {
    let quote = if s.contains('\'') && !s.contains('"') { '"' } else { '\'' };
    let mut out = String::with_capacity(s.len() + 2);
    out.push(quote);
    for c in s.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            _ if c == quote => out.extend(['\\', c]),
            _ if is_printable(c) => out.push(c),
            _ => {
                let code = c as u32;
                out.push_str(&match code {
                    0..=0xff => format!("\\x{code:02x}"),
                    0x100..=0xffff => format!("\\u{code:04x}"),
                    _ => format!("\\U{code:08x}"),
                });
            }
        }
    }
    out.push(quote);
    out
}

/// Python's `str.isprintable` for one character. Rust escapes the same characters, and combining ones, but those only at
/// the start of a string.
fn is_printable(c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_graphic() || c == ' ';
    }
    let mut text = [b'a'; 5];
    let length = 1 + c.encode_utf8(&mut text[1..]).len();
    let text = std::str::from_utf8(&text[..length]).unwrap_or_default();
    text.escape_debug().nth(1) == Some(c)
}

/// `repr(x)` of a float: the shortest digits that read back, with an exponent below 1e-4 and from
/// 1e16.
pub(super) fn float_repr(x: f64) -> String {
    if x.is_nan() {
        return "nan".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.into();
    }
    let text = format!("{x:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        return format!("{x:?}");
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_as_in_python() {
        let cases = [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-5, "1.5e-05"),
            (0.0001, "0.0001"),
            (1e300, "1e+300"),
            (123456789.125, "123456789.125"),
        ];
        for (x, text) in cases {
            assert_eq!(float_repr(x), text);
        }
    }

    #[test]
    fn strings_print_as_in_python() {
        assert_eq!(repr("a'b"), "\"a'b\"");
        assert_eq!(repr("a'b\""), "'a\\'b\"'");
        assert_eq!(repr("é\u{301}\u{200b}\u{a0}\x7f😀\\"), "'é\u{301}\\u200b\\xa0\\x7f😀\\\\'");
    }

    #[test]
    fn splits_as_in_python() {
        assert_eq!(split("  a b  c ", None, None, false), ["a", "b", "c"]);
        assert_eq!(split("  a b  c ", None, Some(1), false), ["a", "b  c "]);
        assert_eq!(split("  a b  c ", None, Some(1), true), ["  a b", "c"]);
        assert_eq!(split("a,b,c", Some(","), Some(1), true), ["a,b", "c"]);
        assert_eq!(split_lines("a\r\nb\n\nc", false), ["a", "b", "", "c"]);
        assert_eq!(split_lines("a\r\nb\n", true), ["a\r\n", "b\n"]);
    }
}
