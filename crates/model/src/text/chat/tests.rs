use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::*;

fn fixture(name: &str) -> Json {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn specials(json: &Json) -> SpecialTokens {
    let mut specials = SpecialTokens::default();
    for role in ["bos_token", "eos_token", "pad_token"] {
        specials.set(role, json[role].as_str().unwrap());
    }
    specials
}

fn render(source: &str) -> Result<String, TextError> {
    ChatTemplate::new(source, SpecialTokens::default())?.render(&[Message::new("user", "hi")], None, &Map::new(), true)
}

#[test]
fn renders_as_transformers() {
    let file = fixture("chat_templates.json");
    let cases = file["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 120);
    for case in cases {
        let source = file["templates"][case["template"].as_str().unwrap()].as_str().unwrap();
        let conversation = &file["conversations"][case["conversation"].as_str().unwrap()];
        let template = ChatTemplate::new(source, specials(&file)).unwrap();
        let kwargs = conversation["kwargs"].as_object().cloned().unwrap_or_default();
        let rendered = template.render_json(
            &conversation["messages"],
            conversation.get("tools"),
            &kwargs,
            case["add_generation_prompt"].as_bool().unwrap(),
        );
        match (case["error"].as_str(), rendered) {
            (None, Ok(text)) => assert_eq!(text, case["rendered"].as_str().unwrap(), "{case}"),
            (Some(error), Err(TextError::TemplateRaised { message })) => {
                assert_eq!(error, format!("TemplateError: {message}"));
            }
            (_, rendered) => panic!("{case}: {rendered:?}"),
        }
    }
}

/// Renders the small templates of a list in `chat_expressions.json`; gives those that render not as the key `want` says
/// (null: with an error).
fn other_than(list: &str, want: &str) -> Vec<String> {
    let file = fixture("chat_expressions.json");
    let mut failed = Vec::new();
    for case in file[list].as_array().unwrap() {
        let got = ChatTemplate::new(case["template"].as_str().unwrap(), specials(&file["specials"]))
            .map(|template| template.with_time(1_700_000_000))
            .and_then(|template| template.render_json(&file["messages"], None, &Map::new(), true));
        if got.as_deref().ok() != case[want].as_str() {
            failed.push(format!("{case}\n    {got:?}"));
        }
    }
    failed
}

/// Small templates for every part of the language, with what Jinja makes of them.
#[test]
fn evaluates_as_jinja() {
    let failed = other_than("cases", "rendered");
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Where the engine differs from Jinja. If it does no longer, the case belongs to the others.
#[test]
fn differs_from_jinja_only_as_known() {
    let changed = other_than("differing", "here");
    assert!(changed.is_empty(), "{}", changed.join("\n"));
}

#[test]
fn messages_keep_their_further_fields() {
    let messages: Vec<Message> =
        serde_json::from_value(json!([{"role": "user", "content": "x", "name": "n", "n": [1]}])).unwrap();
    assert_eq!(messages[0].extra["n"], json!([1]));
    let template = ChatTemplate::new("{{ messages | tojson }}", SpecialTokens::default()).unwrap();
    let text = template.render(&messages, None, &Map::new(), false).unwrap();
    assert_eq!(text, r#"[{"role": "user", "content": "x", "name": "n", "n": [1]}]"#);
}

#[test]
fn what_the_assistant_wrote_may_be_marked() {
    let source = "{% for m in messages %}{{ m.role }}:\n  \
                  {% generation %}\n{{ m.content }}{%- endgeneration -%} ;{% endfor %}\
                  {% raw %}{% generation %}{% endraw %}{# {% generation %} #}{{ '{% generation %}' }}";
    let template = ChatTemplate::new(source, SpecialTokens::default()).unwrap();
    let messages = json!([{"role": "a", "content": "é1 "}, {"role": "b", "content": ""}]);
    let text = template.render_json(&messages, None, &Map::new(), false).unwrap();
    assert_eq!(text, "a:\né1 ;b:\n;{% generation %}{% generation %}");
}

#[test]
fn reasoning_is_found_under_any_of_its_names() {
    let source = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}{{ messages[1].thinking is defined }}";
    let template = ChatTemplate::new(source, SpecialTokens::default()).unwrap();
    let messages = json!([{"role": "assistant", "reasoning": "r"}, {"role": "user"}]);
    assert_eq!(template.render_json(&messages, None, &Map::new(), false).unwrap(), "rrFalse");
}

#[test]
fn without_a_time_there_is_no_strftime() {
    assert_eq!(render("{{ strftime_now is defined }}").unwrap(), "False");
    let error = render("a\n{{ strftime_now('%Y') }}").unwrap_err().to_string();
    assert_eq!(
        error,
        "the chat template failed in line 2: strftime_now is unknown: the template asks for the time and none was given"
    );
}

#[test]
fn errors_say_where_and_why() {
    let cases = [
        ("{{ raise_exception('No ' ~ messages[0].role) }}", "the chat template refuses the conversation: No user"),
        ("x\n{{ messages[0].a.b }}", "the chat template failed in line 2: undefined value in '.a.b'"),
        ("\n\n{% if %}", "the chat template is broken in line 3: unexpected end of block"),
        ("{% set x = %}", "the chat template is broken in line 1: unexpected end of block"),
        ("{% nope 'x' %}", "the chat template is broken in line 1: unknown statement nope"),
        ("{{ 1 | nope }}", "the chat template failed in line 1: filter nope is unknown in 'nope'"),
        (
            "{% include 'x' %}",
            "the chat template failed in line 1: tried to include non-existing template \"x\" in 'include 'x''",
        ),
        ("{% for x in y %}", "the chat template is broken in line 1: unexpected end of input, expected end of block"),
    ];
    for (source, message) in cases {
        assert_eq!(render(source).unwrap_err().to_string(), message);
    }
    let template = ChatTemplate::new("", SpecialTokens::default()).unwrap();
    for messages in [json!({}), json!(["x"]), json!(null)] {
        assert!(matches!(
            template.render_json(&messages, None, &Map::new(), false),
            Err(TextError::Conversation { .. })
        ));
    }
    let kwargs = Map::from_iter([("tools".to_owned(), json!(1))]);
    assert!(template.render(&[], None, &kwargs, false).is_err());
}

/// Templates that would run for ever, fill the memory or overflow the stack. What of this kind is NOT stopped stands in
/// the documentation of `template`.
#[test]
fn hostile_templates_are_stopped() {
    let grow = |start: &str, step: &str| {
        format!("{{% set ns = namespace(s={start}) %}}{{% for i in range(100000) %}}{step}{{% endfor %}}")
    };
    let repeat = |body: &str| format!("{{% for i in range(100000) %}}{body}{{% endfor %}}");
    let big = "{% set s = 'a' * 10**6 %}";
    let nest = |open: &str, close: &str| format!("{{{{ {}1{} }}}}", open.repeat(50_000), close.repeat(50_000));
    let hostile = [
        repeat(&repeat(&repeat("x"))),
        "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}".into(),
        grow("'ab'", "{% set ns.s = ns.s + ns.s %}"),
        grow("'ab'", "{% set ns.s = ns.s ~ ns.s %}"),
        grow("[1]", "{% set ns.s = ns.s + ns.s %}"),
        grow("1", "{% set ns.s = [ns.s] %}"),
        grow("1", "{% set ns.s = {'a': ns.s} %}"),
        grow("1", "{% set ns.s = namespace(s=ns.s) %}"),
        grow("1", "{% set ns.s = [ns] %}"),
        grow("0", "{% for x in [ns.s] %}{% set ns.s = loop %}{% endfor %}"),
        grow("[1]", "{% if i < 60 %}{% set ns.s = [ns.s, ns.s] %}{% else %}{{ ns.s }}{% endif %}"),
        grow("[1]", "{% if i < 60 %}{% set ns.s = [ns.s, ns.s] %}{% else %}{{ ns.s | tojson }}{% endif %}"),
        "{% set s = 'ab' %}".to_owned() + &"{% set s = s ~ s %}".repeat(50),
        "{{ 'a' * 10**9 }}".into(),
        "{{ ('a' * 10**7) * 10**7 }}".into(),
        "{{ range(10**9) }}".into(),
        "{{ [1] * 10**9 }}".into(),
        "{{ ([1] * 10**12) | list }}".into(),
        "{{ ([1] * 10**12) | sort }}".into(),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into(),
        "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ g() }}".into(),
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}".into(),
        "{% macro m() %}{{ caller() }}{% endmacro %}{% macro f() %}{% call m() %}{{ f() }}{% endcall %}{% endmacro %}\
         {{ f() }}"
            .into(),
        "{% block a %}{{ self.a() }}{% endblock %}".into(),
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}".into(),
        "{{ '%999999999d' | format(5) }}".into(),
        "{{ '{:999999999}'.format(5) }}".into(),
        "{{ '{:.999999999f}'.format(5) }}".into(),
        "{{ [1] | tojson(indent=10**12) }}".into(),
        "{{ ('\\n' * 10**6) | indent(10**6, blank=true) }}".into(),
        "{{ [1] | slice(10**12) | list }}".into(),
        "{{ [1] | batch(10**12, 'x') | list }}".into(),
        format!("{big}{{{{ s.replace('', s) }}}}"),
        format!("{big}{{{{ s | replace('a', s) }}}}"),
        format!("{big}{{{{ ([s] * 1000) | join }}}}"),
        format!("{big}{{{{ s.join([s] * 1000) }}}}"),
        format!("{big}{{{{ ('{{0}}' * 100000).format(s) }}}}"),
        format!("{big}{}", repeat("{% set x = s.split('a') %}")),
        repeat(&"z".repeat(10_000)),
        // Growth that no assignment shows: arguments, loops, scopes, recursion, calls back.
        "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('ab') }}".into(),
        "{% macro f(x='ab') %}{{ f(x=x + x) }}{% endmacro %}{{ f() }}".into(),
        "{% macro f(x) %}{{ f([x, x]) }}{% endmacro %}{{ f(1) }}".into(),
        "{% for x in ['ab'] recursive %}{{ loop([x ~ x]) }}{% endfor %}".into(),
        "{% set x = 'ab' %}".to_owned() + &"{% for x in [x ~ x] %}".repeat(60) + &"{% endfor %}".repeat(60),
        "{% set x = 'ab' %}".to_owned() + &"{% with x = x ~ x %}".repeat(60) + &"{% endwith %}".repeat(60),
        "{% macro m(x) %}{{ caller(x ~ x) }}{% endmacro %}{% macro f(z) %}{% call(y) m(z) %}{{ f(y) }}{% endcall %}\
         {% endmacro %}{{ f('ab') }}"
            .into(),
        // Text that is captured, not printed.
        format!("{{% set x %}}{}{{% endset %}}", repeat(&"z".repeat(10_000))),
        format!("{{% macro z() %}}{}{{% endmacro %}}{}", "z".repeat(60_000), repeat("{% set x = z() %}")),
        format!("{{% set x %}}{}{{% endset %}}", repeat("{{ 'z' * 60000 }}")),
        // Nested values behind many others.
        grow("[1]", "{% set ns.s = [1] * 1000 + [ns.s] %}"),
        // Products.
        format!("{{{{ [{}] }}}}", vec!["'x' * 99999999"; 100].join(", ")),
        "{{ 99999999 * 'x' }}".into(),
        "{% set n = 99999999 %}{{ n * ['x'][0] }}".into(),
        "{% set n = 99999999 %}{{ 'x' * n }}".into(),
        "{% set n = 99999999 %}{{ 'x' * [n][0] }}".into(),
        "{% set s = 'x' * 60000 %}{{ 1000 * s }}".into(),
        // Time that no instruction counts.
        format!("{{% set s = 'a' * 60000 %}}{{% set t = s ~ 'b' %}}{}", repeat(&repeat("{% if t in s %}{% endif %}"))),
        nest("(", ")"),
        nest("[", "]"),
        nest("not ", ""),
        nest("-", ""),
        nest("1 + ", ""),
        nest("", ".a"),
        nest("", " | upper"),
        nest("1 if 0 else ", ""),
        "{% if 1 %}".repeat(5000) + &"{% endif %}".repeat(5000),
        "{% if 0 %}".to_owned() + &"{% elif 0 %}".repeat(50_000) + "{% endif %}",
        "x".repeat(2_000_000),
    ];
    for source in hostile {
        let start = Instant::now();
        let rendered = render(&source);
        let (source, time) = (&source[..source.len().min(200)], start.elapsed());
        assert!(rendered.is_err(), "{source}");
        assert!(time < Duration::from_secs(2), "{source}: {time:?}");
    }
}

/// Namespaces cannot get into each other or into themselves, but they may be listed and printed.
#[test]
fn namespaces_are_values() {
    assert_eq!(render("{% set ns = namespace(x=1) %}{% set l = [ns] %}{{ l[0].x }}{{ l }}").unwrap(), "1[{'x': 1}]");
    let error = render("{% set ns = namespace() %}\n{% set ns.x = ns %}").unwrap_err();
    assert_eq!(error.to_string(), "the chat template was stopped in line 2: it puts values into each other too deeply");
}

/// The engine panics here.
#[test]
fn a_panic_of_the_engine_is_an_error() {
    assert!(matches!(render("{{ [][::-1] | list }}"), Err(TextError::TemplateFailed { .. })));
}

/// The limits grow with the conversation: long ones must not be refused.
#[test]
fn long_conversations_are_rendered() {
    let file = fixture("chat_templates.json");
    let messages: Vec<_> =
        (0..4000).map(|i| Message::new(if i % 2 == 0 { "user" } else { "assistant" }, "word ".repeat(100))).collect();
    for (name, source) in file["templates"].as_object().unwrap() {
        let template = ChatTemplate::new(source.as_str().unwrap(), specials(&file)).unwrap();
        let text = template.render(&messages, None, &Map::new(), true);
        assert!(text.unwrap_or_else(|error| panic!("{name}: {error}")).len() > 1_900_000, "{name}");
    }
}
