//! Numbers and strings as they are written in templates.

/// Length of the number at the start of `s` and whether it is a float.
pub(super) fn number_length(s: &str, after_dot: bool) -> (usize, bool) {
    let digits = |from: usize, accept: fn(u8) -> bool| {
        let tail = &s.as_bytes()[from.min(s.len())..];
        let mut end = tail.iter().take_while(|&&b| accept(b) || b == b'_').count();
        while end > 0 && tail[end - 1] == b'_' {
            end -= 1;
        }
        from + end
    };
    let decimal: fn(u8) -> bool = |b| b.is_ascii_digit();
    let prefixed: Option<fn(u8) -> bool> = match s.get(..2).map(str::to_ascii_lowercase).as_deref() {
        Some("0x") => Some(|b| b.is_ascii_hexdigit()),
        Some("0o") => Some(|b| (b'0'..=b'7').contains(&b)),
        Some("0b") => Some(|b| b == b'0' || b == b'1'),
        _ => None,
    };
    if let Some(accept) = prefixed {
        let end = digits(2, accept);
        if end > 2 {
            return (end, false);
        }
    }
    let whole = digits(0, decimal);
    if after_dot {
        return (whole, false);
    }
    let mut end = whole;
    if s[end..].starts_with('.') && digits(end + 1, decimal) > end + 1 {
        end = digits(end + 1, decimal);
    }
    if s[end..].starts_with(['e', 'E']) {
        let sign = usize::from(s[end + 1..].starts_with(['+', '-']));
        let exponent = digits(end + 1 + sign, decimal);
        if exponent > end + 1 + sign {
            end = exponent;
        }
    }
    if end == whole && s.starts_with('0') {
        // Python has no whole numbers with leading zeros.
        end = s.bytes().take_while(|&b| b == b'0').count();
    }
    (end, end > whole)
}

/// Python's escapes in a string literal; `None` if one is broken.
pub(super) fn unescape(body: &str) -> Option<String> {
    let mut out = String::with_capacity(body.len());
    let mut rest = body;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let escape = rest[at + 1..].chars().next()?;
        let tail = &rest[at + 1 + escape.len_utf8()..];
        let hex = |n: usize| -> Option<(char, &str)> {
            let code = u32::from_str_radix(tail.get(..n)?, 16).ok()?;
            Some((char::from_u32(code)?, &tail[n..]))
        };
        rest = tail;
        let simple = match escape {
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'a' => '\x07',
            'b' => '\x08',
            'f' => '\x0c',
            'v' => '\x0b',
            '\\' | '\'' | '"' => escape,
            '\n' => continue,
            'x' | 'u' | 'U' => {
                let (decoded, after) = hex(match escape {
                    'x' => 2,
                    'u' => 4,
                    _ => 8,
                })?;
                rest = after;
                decoded
            }
            '0'..='7' => {
                let n = 1 + tail.bytes().take(2).take_while(|b| (b'0'..=b'7').contains(b)).count();
                let digits = &body[body.len() - tail.len() - 1..][..n];
                rest = &tail[n - 1..];
                char::from_u32(u32::from_str_radix(digits, 8).ok()?)?
            }
            other => {
                out.push('\\');
                other
            }
        };
        out.push(simple);
    }
    out.push_str(rest);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_follow_python() {
        assert_eq!(unescape(r"a\n\x41\u00e9\101\q\'").as_deref(), Some("a\nAéA\\q'"));
        assert_eq!(unescape(r"\x4"), None);
    }

    #[test]
    fn numbers_follow_jinja() {
        assert_eq!(number_length("1.5e3x", false), (5, true));
        assert_eq!(number_length("1.foo", false), (1, false));
        assert_eq!(number_length("1.5", true), (1, false));
        assert_eq!(number_length("0xff_", false), (4, false));
        assert_eq!(number_length("1_000", false), (5, false));
    }
}
