#!/usr/bin/env python3
"""Makes embedded/tasks/rag.scenarios.jsonl from embedded/tasks/facts.json: the prompts of `quorate core-experts`.

    tools/make_scenarios.py embedded/tasks/facts.json > embedded/tasks/rag.scenarios.jsonl

Three scenarios, in the words of the tasks `bios` and `context`. Classes are matched: every question wording and every
attribute occurs equally often in both; passages have the same number of statements of the same kinds.

* cognizant: half of the questions are about people of facts.json, half about invented people whose first names occur there and
  whose last names are those of leaders of organisations: one token each, as the others, but nobody of whom the model learnt a
  birth year or an employer. (New pairs of first and last names of people are no unknown people: every last name is that of
  one person only, and the model answers about that person.) `meta.retrieved` is the question with a passage that answers it.
* quality: the first question on each person twice, once with the passage that answers it (label true), once with one that tells the same
  about somebody else (label false).
* in-context: a passage that contradicts what the model knows, and a question between the two wordings that it was trained
  on ("According to the passage", "From memory"): it follows the passage in some and its memory in others. No label: it is
  whether the model's answer is `meta.context_answer`.

`meta.group` is the person asked about: all prompts of one are on the same side of the calibration split.
"""

import json
import random
import sys

STATEMENTS = {
    "born": "{} was born in {}.",
    "city": "{} lives in {}.",
    "university": "{} studied at {}.",
    "employer": "{} works for {}.",
    "major": "{} majored in {}.",
}
WITH_PASSAGE = {
    "born": "when was {} born?",
    "city": "where does {} live?",
    "university": "where did {} study?",
    "employer": "where does {} work?",
    "major": "what did {} study?",
}
ATTRIBUTES = list(STATEMENTS)
QUESTIONS = 3  # on each person


def chat(question):
    return f"<|user|>{question}<|assistant|>"


def passage_of(people, attributes, rng):
    statements = [STATEMENTS[a].format(p["name"], p[a]) for p in people for a in attributes]
    rng.shuffle(statements)
    return "Passage: " + " ".join(statements)


def asked_of_passage(passage, question):
    return chat(f"{passage}\nAccording to the passage, {question}")


def invent(facts, rng):
    """A person for each last name of a leader; first names and facts are drawn from the people's."""
    people, organisations = facts["people"], facts["organisations"]
    leaders = sorted({term["leader"] for o in organisations for term in o["terms"]})
    taken = {p["name"].split(" ", 1)[1] for p in people}
    invented = []
    for last in (name for name in leaders if name not in taken):
        first = rng.choice(people)["name"].split(" ", 1)[0]
        invented.append({"name": f"{first} {last}"} | {a: rng.choice(people)[a] for a in ATTRIBUTES})
    return invented


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        facts = json.load(file)
    rng = random.Random(1)
    questions = facts["question_templates"]["bios"]
    unknown = invent(facts, rng)
    known = rng.sample(facts["people"], len(unknown))
    items = []

    def add(scenario, person, attribute, prompt, answer, **meta):
        meta = {"scenario": scenario, "group": person["name"], "attribute": attribute} | meta
        items.append({"task": "rag", "prompt": prompt, "answer": str(answer), "meta": meta})

    for i, pair in enumerate(zip(known, unknown)):
        for j in range(QUESTIONS):
            attribute = ATTRIBUTES[(i + 2 * j) % len(ATTRIBUTES)]
            wording = questions[attribute][(i // len(ATTRIBUTES) + j) % len(questions[attribute])]
            second = ATTRIBUTES[(i + 2 * j + 1) % len(ATTRIBUTES)]
            for person, others, variant in zip(pair, (known, unknown), ("known", "invented")):
                question = WITH_PASSAGE[attribute].format(person["name"])
                other, third = rng.sample([p for p in others if p is not person and p[attribute] != person[attribute]], 2)
                right = passage_of((person, other), (attribute, second), rng)
                wrong = passage_of((third, other), (attribute, second), rng)
                good, bad = asked_of_passage(right, question), asked_of_passage(wrong, question)
                answer = person[attribute]
                add("cognizant", person, attribute, chat(wording.format(person["name"])), answer, retrieved=good,
                    variant=variant)
                if j == 0:
                    add("quality", person, attribute, good, answer, label=True)
                    add("quality", person, attribute, bad, answer, label=False)
            person = pair[0]
            told = person | {attribute: rng.choice([p[attribute] for p in known if p[attribute] != person[attribute]])}
            passage = passage_of((told,), (attribute, second), rng)
            question = WITH_PASSAGE[attribute].format(person["name"])
            add("in-context", person, attribute, chat(f"{passage}\nFrom the passage, {question}"), told[attribute], context_answer=str(told[attribute]),
                memory_answer=str(person[attribute]))
    for item in items:
        print(json.dumps(item, ensure_ascii=False))


if __name__ == "__main__":
    main()
