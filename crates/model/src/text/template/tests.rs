use super::*;

#[test]
fn the_source_is_prepared_for_the_engine() {
    let cases = [
        ("a{% generation %}b{%- endgeneration +%}", "a{% with %}b{%- endwith +%}"),
        ("{% set x = 'a = %}' -%} {{ x }}", "{% set x = ( 'a = %}' )|G(false) -%} {{ x }}"),
        ("{%set ns.x={'a':{}}['a']%}", "{%set ns.x= ({'a':{}}['a'])|G(true) %}"),
        ("{%- set (a, b) = f(c=1), 2 %}", "{%- set (a, b) = ( f(c=1), 2 )|G(false) %}"),
        ("{% set x %}1{% endset %}{% if a == 1 %}{% endif %}", "{% set x %}1{% endset %}{% if a == 1 %}{% endif %}"),
        (
            "{% raw %}{% set x = 1 %}{{ '{%- endraw %}{# {% set x = 1 #}",
            "{% raw %}{% set x = 1 %}{{ '{%- endraw %}{# {% set x = 1 #}",
        ),
        ("{{ '{% set x = 1 %}' }}{{ {'a': {'b': 1}} }}", "{{ '{% set x = 1 %}' }}{{ {'a': {'b': 1}} }}"),
        ("{% set x = 'no end", "{% set x = 'no end"),
        ("{% raw %}{{", "{% raw %}{{"),
        ("{ {", "{ {"),
    ];
    for (source, wanted) in cases {
        assert_eq!(prepared(source, true).unwrap().replace(GUARD, "G"), wanted);
    }
}

#[test]
fn time_is_limited() {
    let limits = Limits { bytes: 100, until: Some(Instant::now()) };
    for source in ["{{ 1 }}", "{{ [1] | list }}", "{{ 1 | value_that_may_have_a_name(false) }}"] {
        let rendered = guarded(source, || environment(limits).render_str(source, ()));
        let Err(TextError::TemplateLimit { line: 1, message }) = rendered else { panic!("{rendered:?}") };
        assert_eq!(message, "it takes too long");
    }
}

#[test]
fn dates_follow_the_calendar() {
    let text = |seconds, format| python::strftime(seconds, format).unwrap();
    assert_eq!(text(0, "%A %d %b %Y %H:%M:%S %j %p"), "Thursday 01 Jan 1970 00:00:00 001 AM");
    assert_eq!(text(1_709_210_096, "%F %T %-d %B %I %j"), "2024-02-29 12:34:56 29 February 12 060");
    assert_eq!(text(1_709_251_200, "%d %j"), "01 061");
    assert_eq!(text(-86_400, "%d/%m/%y %a %% %j"), "31/12/69 Wed % 365");
    assert!(python::strftime(0, "%Q").is_err());
}
