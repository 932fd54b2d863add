//! Scoring of answers.

/// What an answer says: the text after the last `</think>`, trimmed.
pub fn final_answer(text: &str) -> &str {
    text.rsplit_once("</think>").map_or(text, |(_, after)| after).trim()
}

/// Whether a generated text gives the wanted answer, word for word.
pub fn exact_match(generated: &str, wanted: &str) -> bool {
    final_answer(generated) == final_answer(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinking_is_not_part_of_the_answer() {
        assert!(exact_match("<think>3*7=21</think> 25 ", "25"));
        assert!(!exact_match("<think>25", "25"));
        assert!(!exact_match("25.", "25"));
    }
}
