use super::*;

#[test]
fn time_is_limited() {
    let limits = Limits { bytes: 1000, until: Some(Instant::now()), ..Limits::NONE };
    for source in ["{{ 1 }}", "{{ [1] | list }}", "{{ 1 | value_that_gets_a_name(false) }}", "{{ 'a' * 3 }}"] {
        let source = &guard::prepared(source, true).unwrap();
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
