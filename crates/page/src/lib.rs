//! A report as one HTML page that carries its data, style and program, and loads nothing.
//!
//! This crate must never know a method, open a file, or print. What the page does is in `assets/`: `page.js` (what all parts
//! share; head, numbers, tables), `maps.js` (a heat map), `compare.js` (choosing and comparing maps), `cards.js` (cards of
//! experts), `start.js`.

use quorate_methods::Report;

const TEMPLATE: &str = include_str!("../assets/page.html");
const STYLE: &str = include_str!("../assets/page.css");
const SCRIPT: &str = concat!(
    "\"use strict\";\n",
    include_str!("../assets/page.js"),
    include_str!("../assets/maps.js"),
    include_str!("../assets/compare.js"),
    include_str!("../assets/cards.js"),
    include_str!("../assets/start.js"),
);

/// The page of a report. Whatever text the report holds, such as tokens of a model, stays text.
///
/// # Errors
/// A report that cannot be JSON; none that a method makes.
pub fn page(report: &Report) -> Result<String, serde_json::Error> {
    // In JSON `<` occurs within strings only. Escaped there, no text can end the element that holds the document.
    let data = serde_json::to_string(report)?.replace('<', "\\u003c");
    let title = escaped(&format!("{} - Quorate", report.title));
    Ok(filled(&[("{title}", &title), ("{style}", STYLE), ("{data}", &data), ("{script}", SCRIPT)]))
}

/// The template with texts in the place of its marks, which stand in this order. What is put in is not searched for marks.
fn filled(texts: &[(&str, &str)]) -> String {
    let mut out = String::new();
    let mut rest = TEMPLATE;
    for (mark, text) in texts {
        let (before, after) =
            rest.split_once(mark).expect("the template has every mark, in order; a test makes a page");
        out += before;
        out += text;
        rest = after;
    }
    out + rest
}

/// Text for the inside of an element.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests;
