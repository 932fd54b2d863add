use std::path::Path;

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
            (None, Ok(chat)) => assert_eq!(chat.text, case["rendered"].as_str().unwrap(), "{case}"),
            (Some(error), Err(TextError::TemplateRaised { message })) => {
                assert_eq!(error, format!("TemplateError: {message}"));
            }
            (_, rendered) => panic!("{case}: {rendered:?}"),
        }
    }
}

/// Small templates for every part of the language, with what Jinja makes of them.
#[test]
fn evaluates_as_jinja() {
    let file = fixture("chat_expressions.json");
    let mut failed = Vec::new();
    for case in file["cases"].as_array().unwrap() {
        let got = ChatTemplate::new(case["template"].as_str().unwrap(), specials(&file["specials"]))
            .map(|template| template.with_time(1_700_000_000))
            .and_then(|template| template.render_json(&file["messages"], None, &Map::new(), true));
        if got.as_ref().ok().map(|chat| chat.text.as_str()) != case["rendered"].as_str() {
            failed.push(format!("{case}\n    {got:?}"));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
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
fn marks_what_the_assistant_wrote() {
    let source = "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}";
    let template = ChatTemplate::new(source, SpecialTokens::default()).unwrap();
    let messages = json!([{"role": "a", "content": "é1"}, {"role": "b", "content": ""}]);
    let chat = template.render_json(&messages, None, &Map::new(), false).unwrap();
    assert_eq!(chat.text, "a:é1;b:;");
    assert_eq!(chat.generated, [2..5, 8..8]);
}

#[test]
fn reasoning_is_found_under_any_of_its_names() {
    let source = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}{{ messages[1].thinking is defined }}";
    let template = ChatTemplate::new(source, SpecialTokens::default()).unwrap();
    let messages = json!([{"role": "assistant", "reasoning": "r"}, {"role": "user"}]);
    assert_eq!(template.render_json(&messages, None, &Map::new(), false).unwrap().text, "rrFalse");
}

#[test]
fn without_a_time_there_is_no_strftime() {
    assert_eq!(render("{{ strftime_now is defined }}").unwrap(), "False");
    let error = render("a\n{{ strftime_now('%Y') }}").unwrap_err().to_string();
    assert_eq!(
        error,
        "the chat template failed in line 2: 'strftime_now' is undefined: the template asks for the time and none was \
         given"
    );
}

#[test]
fn errors_say_where_and_why() {
    let cases = [
        ("{{ raise_exception('No ' ~ messages[0].role) }}", "the chat template refuses the conversation: No user"),
        ("x\n{{ messages[0].a.b }}", "the chat template failed in line 2: 'dict object' has no attribute 'a'"),
        ("\n\n{% if %}", "the chat template is broken in line 3: expected an expression, found '%}'"),
        ("{% include 'x' %}", "the chat template is broken in line 1: unknown tag 'include'"),
        ("{% for x in y %}", "the chat template is broken in line 1: the template ends before 'else' or 'endfor'"),
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
    let deep = (0..200).fold(json!(1), |inner, _| json!([inner]));
    let kwargs = Map::from_iter([("deep".to_owned(), deep)]);
    assert!(matches!(template.render(&[], None, &kwargs, false), Err(TextError::Conversation { .. })));
}

/// Templates that would run for ever, fill the memory or overflow the stack.
#[test]
fn hostile_templates_are_stopped() {
    let grow = |start: &str, step: &str| {
        format!("{{% set ns = namespace(s={start}) %}}{{% for i in range(100000) %}}{step}{{% endfor %}}")
    };
    let repeat = |setup: &str, body: &str| format!("{setup}{{% for i in range(100000) %}}{body}{{% endfor %}}");
    let big = "{% set s = 'a' * 10**6 %}";
    let nest = |open: &str, close: &str| format!("{{{{ {}1{} }}}}", open.repeat(50_000), close.repeat(50_000));
    let hostile = [
        repeat("", &repeat("", "{% for i in range(100000) %}x{% endfor %}")),
        grow("'ab'", "{% set ns.s = ns.s + ns.s %}"),
        grow("'ab'", "{% set ns.s = ns.s ~ ns.s %}"),
        grow("[1]", "{% set ns.s = ns.s + ns.s %}"),
        grow("1", "{% set ns.s = [ns.s] %}"),
        grow("1", "{% set ns.s = {'a': ns.s} %}"),
        grow("[]", "{% set ns.s = ns.s + [range(100000)] %}"),
        grow("[1]", "{% if i < 60 %}{% set ns.s = [ns.s, ns.s] %}{% else %}{{ ns.s }}{% endif %}"),
        grow("[1]", "{% if i < 60 %}{% set ns.s = [ns.s, ns.s] %}{% else %}{{ ns.s == [ns.s[0], ns.s] }}{% endif %}"),
        grow("[1]", "{% if i < 60 %}{% set ns.s = [ns.s, ns.s] %}{% else %}{{ ns.s | tojson }}{% endif %}"),
        grow("0", "{% for x in [ns.s] %}{% set ns.s = loop %}{% endfor %}"),
        "{{ 'a' * 10**9 }}".into(),
        "{{ ('a' * 10**7) * 10**7 }}".into(),
        "{{ range(10**9) }}".into(),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into(),
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}".into(),
        "{% macro m() %}{{ caller() }}{% endmacro %}{% macro f() %}{% call m() %}{{ f() }}{% endcall %}{% endmacro %}\
         {{ f() }}"
            .into(),
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}".into(),
        "{{ '%999999999d' % 5 }}".into(),
        "{{ '{:999999999}'.format(5) }}".into(),
        "{{ 'a'.center(10**12) }}{{ 'a'.zfill(10**30) }}".into(),
        "{{ [1] | tojson(indent=10**12) }}".into(),
        "{{ ('\\n' * 10**6) | indent(10**6, blank=true) }}".into(),
        "{{ [1] | slice(10**12) | list }}".into(),
        "{{ [1] | batch(10**12, 'x') | list }}".into(),
        format!("{big}{{{{ s.replace('', s) }}}}"),
        format!("{big}{{{{ ([s] * 1000) | join }}}}"),
        format!("{big}{{{{ ('{{0}}' * 100000).format(s) }}}}"),
        repeat(big, "{% if 'b' in s %}{% endif %}"),
        repeat(big, "{% if s == 'a' * 10**6 %}{% endif %}"),
        repeat(big, "{% set x = s.split('a') %}"),
        repeat(big, "{% for c in s %}{% break %}{% endfor %}"),
        repeat(big, "{% set x = s.strip(s) %}"),
        repeat("", &"z".repeat(10_000)),
        repeat("", &format!("{{% set x %}}{}{{% endset %}}", "z".repeat(10_000))),
        repeat("", "{% set x = range(100000) | sort %}"),
        "{{ range(100000) | unique | list }}".into(),
        nest("(", ")"),
        nest("[", "]"),
        nest("not ", ""),
        nest("-", ""),
        nest("1 + ", ""),
        nest("", ".a"),
        nest("", " | upper"),
        nest("1 if 0 else ", ""),
        "{% if 1 %}".repeat(5000) + &"{% endif %}".repeat(5000),
        "x".repeat(2_000_000),
    ];
    // Far less than the stack of any thread.
    let small_stack = std::thread::Builder::new().stack_size(if cfg!(debug_assertions) { 2 << 20 } else { 512 << 10 });
    let check = move || {
        for source in hostile {
            assert!(render(&source).is_err(), "{}", &source[..source.len().min(200)]);
        }
    };
    small_stack.spawn(check).unwrap().join().unwrap();
}

/// Circles and long chains are not stopped, but must not leak, overflow or hang.
#[test]
fn circles_of_namespaces_are_harmless() {
    let circle = "{% set ns = namespace() %}{% set ns.x = ns %}{% set ns.l = [ns] %}{{ ns.x == ns }}{{ ns.l }}";
    assert_eq!(render(circle).unwrap(), "True[<Namespace>]");
    let chain =
        "{% set ns = namespace(x=1) %}{% for i in range(50000) %}{% set ns.x = namespace(x=ns.x) %}{% endfor %}ok";
    assert_eq!(render(chain).unwrap(), "ok");
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
