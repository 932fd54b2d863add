use quorate_methods::{Cards, ExpertCard, HeatMap};
use serde_json::{Value, json};

use super::*;

/// What a token or a file name might hold.
const HOSTILE: &str = "</script><script>alert(1)</script><!--<script>{script}{data}&amp;\u{2028}\"\\'";

fn hostile() -> Report {
    let mut report = Report { title: HOSTILE.into(), method: HOSTILE.into(), ..Report::default() };
    report.params = json!({ HOSTILE: HOSTILE });
    report.headline(HOSTILE, HOSTILE);
    report.note(HOSTILE);
    report.table(HOSTILE, HOSTILE, &[HOSTILE]).row([json!(HOSTILE)]);
    let (name, about, values) = (HOSTILE.to_string(), HOSTILE.to_string(), vec![vec![Some(0.5), None]]);
    report.maps.push(HeatMap { name, about, layers: vec![0], values, diverging: false });
    let lists = vec![vec![vec![json!(HOSTILE), json!([[HOSTILE, HOSTILE, HOSTILE]])]]];
    let cards = vec![ExpertCard { layer: 0, expert: 0, flags: vec![HOSTILE.into()], lists }];
    report.cards = Some(Cards { about: HOSTILE.into(), cards, ..Cards::default() });
    report
}

/// The content of the element that holds the data, ended where a browser ends it.
fn data(page: &str) -> &str {
    let start = page.find("id=\"report\">").unwrap() + "id=\"report\">".len();
    let end = page[start..].to_ascii_lowercase().find("</script").unwrap();
    &page[start..start + end]
}

#[test]
fn hostile_text_stays_text() {
    let (page, plain) = (page(&hostile()).unwrap(), page(&Report::default()).unwrap());
    let count = |page: &str, what: &str| page.to_ascii_lowercase().matches(what).count();
    for what in ["<script", "</script", "<!--", "<title", "</title"] {
        assert_eq!(count(&page, what), count(&plain, what), "{what}");
    }
    assert!(!data(&page).contains('<'));
    let read: Value = serde_json::from_str(data(&page)).unwrap();
    assert_eq!(read, serde_json::to_value(hostile()).unwrap());
    assert!(page.ends_with("</html>\n"));
}

/// The program makes elements of text only by text nodes, and runs no text.
#[test]
fn the_program_has_no_way_from_text_to_code() {
    let ways = [
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "DOMParser",
        "srcdoc",
    ];
    for way in ways {
        assert!(!SCRIPT.contains(way), "{way}");
    }
}

#[test]
fn nothing_is_loaded_from_elsewhere() {
    let page = page(&Report::default()).unwrap();
    for what in ["http:", "https:", "src=", "href=\"", "@import", "url(", "fetch(", "XMLHttpRequest", "import "] {
        assert!(!page.contains(what), "{what}");
    }
    assert!(page.contains("default-src 'none'"));
}
