"""Compares Quorate with llama.cpp on a GGUF file.

    pip install llama-cpp-python numpy safetensors
    python tools/compare_llama_cpp.py target/release/quorate MODEL.gguf [--text FILE] [--windows N]
    python tools/compare_llama_cpp.py target/release/quorate --tokens-only MODEL.gguf..

1. Tokens of 1 MB of mixed text (code, many languages, numbers, emoji, white space; always the same), and whether they give the
   text back.
2. 48 greedy tokens after each of 20 prompts. Where they differ, the gap between the two tokens in both programs' logits: both
   round activations to 8 bits, not in the same way, so near ties may fall otherwise.
3. Perplexity of a text, as llama-perplexity measures it.

Exits 1 if a token of the text differs, a gap exceeds --tie in both programs, or perplexities differ by more than 0.5 %.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import llama_cpp
import numpy as np
from safetensors.numpy import load_file

REPOSITORY = Path(__file__).resolve().parent.parent
TIE = 0.5

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "fn main() {\n    let numbers = vec![3, 1, 2];\n    ",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "Q: What is 17 + 25?\nA:",
    "1, 1, 2, 3, 5, 8, 13,",
    "Water boils at a temperature of",
    "Die Hauptstadt von Österreich ist",
    "La capitale de l'Italie est",
    "日本の首都は",
    "中国的首都是",
    "Столица России —",
    "To make bread, you need the following ingredients:\n- flour\n- ",
    "<html>\n  <head>\n    <title>",
    "import numpy as np\n\ndef softmax(x):\n    \"\"\"",
    "The three laws of motion were formulated by",
    "Dear Sir or Madam,\n\nI am writing to",
    "{\"name\": \"Ada\", \"born\": 1815, \"field\": \"",
    "LONG",
]

WORDS = {
    "English": "the of and to in that it was for on are with as his they at be this from have or by one had not but",
    "German": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch über größer Straße",
    "French": "le la les des et à été où même très déjà garçon l'homme aujourd'hui c'est qu'il français œuvre naïve",
    "Polish": "się nie że jest na to z źródło łódź ćma żółty święta będzie człowiek",
    "Turkish": "bir ve bu için ile çok daha ığdır İstanbul şey göz değil üç",
    "Russian": "и в не на что он как это она по но они мы весь свой ещё объект Москва",
    "Greek": "και το να του η της με που είναι για από Αθήνα ώρα ΐδιος",
    "Chinese": "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会",
    "Japanese": "これは日本語の文章です。カタカナとひらがなと漢字が混ざっています。東京タワー、ﾊﾝｶｸ",
    "Korean": "안녕하세요 세계 한국어 문장입니다 그리고 나는 학교에 갑니다",
    "Arabic": "السلام عليكم هذا نص باللغة العربية مع تشكيل مُحَمَّد ١٢٣٤",
    "Hebrew": "שלום עולם זה טקסט בעברית בְּרֵאשִׁית",
    "Hindi": "नमस्ते दुनिया यह हिन्दी में एक वाक्य है १२३ क्षत्रिय",
    "Thai": "สวัสดีชาวโลก นี่คือข้อความภาษาไทย ๑๒๓",
    "Vietnamese": "xin chào thế giới đây là tiếng Việt được viết bằng chữ quốc ngữ",
    "Decomposed": "cafe\u0301 nai\u0308ve A\u030angstro\u0308m n\u0303",
}
EMOJI = ["😀", "👍🏽", "👨‍👩‍👧‍👦", "🇦🇹", "❤️", "🏴‍☠️", "✨", "1️⃣", "𝒜𝓫", "𐍈", "♟", "→", "∑", "½", "²", "Ⅷ", "①"]
SPACES = [" ", "  ", "   ", "\t", "\n", "\n\n", "\n\n\n", " \n", "\r\n", "\u00a0", "\u3000", "\u2009", "    ", "\t\t", "\v", "        "]
SIGNS = list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + ["...", "--", "==", "!=", "->", "::", "//", "/*", "*/", "'s", "'LL", "n't"]
CODE = [
    "def f(x, y=1):\n    return x ** y  # power\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}\n",
    "let v: Vec<u8> = s.bytes().map(|b| b ^ 0xFF).collect();\n",
    "<div class=\"a-b\">&nbsp;<br/></div>\n",
    "SELECT * FROM t WHERE id IN (1,22,333,4444);\n",
    "if [ \"$x\" -gt 3 ]; then echo ${y%%.*}; fi\n",
    "https://example.org/a?b=c&d=%20e#f user@mail.example\n",
    "\\begin{equation} e^{i\\pi} + 1 = 0 \\end{equation}\n",
    "camelCaseWord snake_case_word SCREAMING_CASE kebab-case XMLHttpRequest2\n",
]


def mixed_text(size):
    """Text of `size` bytes or a little more; the same in every run."""
    rng = random.Random(20240607)
    out, length = [], 0

    def number():
        return str(rng.randrange(10 ** rng.randrange(1, 12)))

    def letter():
        while True:
            c = chr(rng.randrange(0x20, 0x2FA1E) if rng.random() < 0.5 else rng.randrange(0x20, 0x3000))
            if not 0xD800 <= ord(c) <= 0xDFFF and c.isprintable():
                return c

    def sentence():
        words = WORDS[rng.choice(list(WORDS))]
        if " " not in words:
            return "".join(rng.choice(words) for _ in range(rng.randrange(2, 20)))
        words = words.split()
        return " ".join(rng.choice([str.lower, str.title, str.upper])(rng.choice(words)) for _ in range(rng.randrange(2, 12)))

    kinds = [sentence, sentence, sentence, number, lambda: rng.choice(CODE), lambda: rng.choice(EMOJI),
             lambda: rng.choice(SIGNS) * rng.choice([1, 1, 1, 2, 5, 40]), lambda: rng.choice(SPACES) * rng.choice([1, 1, 2, 7, 33]), letter,
             lambda: number() + "." + number(), lambda: "".join(letter() for _ in range(3))]
    while length < size:
        piece = rng.choice(kinds)() + rng.choice([" ", " ", " ", "", "\n", ". ", ", "])
        out.append(piece)
        length += len(piece.encode())
    return "".join(out)


def quorate(binary, *arguments):
    run = subprocess.run([binary, "--quiet", *map(str, arguments)], capture_output=True, text=True, encoding="utf-8")
    if run.returncode:
        sys.exit(f"quorate {' '.join(map(str, arguments))[:200]}: {run.stderr}")
    return run.stdout


class Llama:
    """llama.cpp with a file, all in 32 bits but the weights."""

    def __init__(self, path, threads, vocabulary_only=False, context=2048):
        flash = getattr(llama_cpp, "LLAMA_FLASH_ATTN_TYPE_DISABLED", None)
        more = {} if flash is None else {"flash_attn_type": flash}
        f32 = llama_cpp.GGML_TYPE_F32
        common = {"model_path": str(path), "n_gpu_layers": 0, "verbose": False}
        if vocabulary_only:
            self.llama = llama_cpp.Llama(vocab_only=True, **common)
        else:
            try:
                self.llama = llama_cpp.Llama(n_ctx=context, n_batch=context, n_threads=threads, n_threads_batch=threads,
                                             logits_all=True, type_k=f32, type_v=f32, **common, **more)
            except TypeError:  # a version without the choice of attention
                self.llama = llama_cpp.Llama(n_ctx=context, n_batch=context, n_threads=threads, n_threads_batch=threads,
                                             logits_all=True, type_k=f32, type_v=f32, **common)

    def tokenize(self, text):
        return self.llama.tokenize(text.encode(), add_bos=True, special=True)

    def logits(self, tokens, keep=0):
        """Logits of every token after the first `keep`, which are already held."""
        self.llama.n_tokens = keep
        self.llama.eval(tokens[keep:])
        return self.llama.scores[keep : len(tokens)]

    def greedy(self, tokens, count):
        tokens, row = list(tokens), self.logits(tokens)[-1]
        start = len(tokens)
        for _ in range(count):
            tokens.append(int(np.argmax(row)))
            row = self.logits(tokens, len(tokens) - 1)[-1]
        return tokens[start:]


def compare_tokens(binary, path, text):
    llama = Llama(path, 1, vocabulary_only=True)
    start = time.time()
    theirs = llama.tokenize(text)
    seconds = time.time() - start
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text"
        file.write_bytes(text.encode())
        start = time.time()
        ours = json.loads(quorate(binary, "tokenize", "-m", path, "--file", file, "--json"))["ids"]
        ours_seconds = time.time() - start
    same = ours == theirs
    print(f"{path.name}: {len(theirs)} tokens of {len(text.encode())} bytes: {'identical' if same else 'DIFFERENT'} "
          f"(Quorate {ours_seconds:.2f} s with start and opening, llama.cpp {seconds:.2f} s)")
    if not same:
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        piece = lambda ids: llama.llama.detokenize(ids, special=True)
        print(f"  first at token {at}: Quorate {ours[at:at + 8]} {piece(ours[at:at + 8])}")
        print(f"  llama.cpp {theirs[at:at + 8]} {piece(theirs[at:at + 8])}; before: {piece(theirs[max(0, at - 8):at])}")
    return same


def compare_greedy(binary, path, llama, arguments):
    prompts = [p if p != "LONG" else "Notes of a long walk.\n" + " ".join(f"On day {i} we saw {i * 7 % 31} birds and walked "
               f"{i * 13 % 17 + 3} miles." for i in range(1, 41)) + "\nIn short," for p in PROMPTS]
    equal, ties, worst, sizes = 0, 0, 0.0, []
    for prompt in prompts:
        run = json.loads(quorate(binary, "run", "-m", path, "--raw", "--task", "none", "--ignore-eos", "--max-tokens", arguments.tokens,
                                 "--threads", arguments.threads, "--json", prompt))
        ids = llama.tokenize(prompt)
        theirs, ours = llama.greedy(ids, arguments.tokens), run["tokens"]
        sizes.append((run["prompt_tokens"], run["prefill_tokens_per_s"], run["decode_tokens_per_s"]))
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
        if at is None and len(ours) == len(theirs):
            equal += 1
            continue
        if at is None:
            sys.exit(f"{prompt!r}: {len(ours)} tokens of Quorate, {len(theirs)} of llama.cpp")
        prefix = ids + theirs[:at]
        row = llama.logits(prefix)[-1].astype(np.float64)
        own = own_logits(binary, path, prefix, arguments.threads)
        gaps = row[theirs[at]] - row[ours[at]], own[ours[at]] - own[theirs[at]]
        noise = float(np.sqrt(np.mean((own - row) ** 2)))
        tie = min(gaps) <= arguments.tie
        ties += tie
        worst = max(worst, min(gaps))
        print(f"  {prompt[:40]!r} differs at token {at + 1}: gap {gaps[0]:.3f} in llama.cpp, {gaps[1]:.3f} in Quorate; all logits "
              f"differ by {noise:.3f} (rms){'' if tie else ' NO TIE'}")
    long = max(sizes)
    print(f"{path.name}: {arguments.tokens} greedy tokens after {len(prompts)} prompts: {equal} equal, {ties} up to a near tie (smaller gap "
          f"at most {worst:.3f}), {len(prompts) - equal - ties} different; prompt of {long[0]} tokens at {long[1]:.0f} tokens/s, decoding at "
          f"{np.median([s[2] for s in sizes]):.1f} tokens/s")
    return equal + ties == len(prompts)


def own_logits(binary, path, tokens, threads):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "logits.safetensors"
        quorate(binary, "record", "-m", path, "--tokens", ",".join(map(str, tokens)), "--sites", "logits", "--threads", threads, "-o", file)
        return load_file(file)["logits"][-1].astype(np.float64)


def compare_perplexity(binary, path, llama, text, arguments):
    context = arguments.context
    ids = llama.tokenize(text)
    bos = llama_cpp.llama_vocab_get_add_bos(llama.llama._model.vocab)
    nats, count = 0.0, 0
    for start in range(0, len(ids) - context + 1, context)[: arguments.windows]:
        window = ids[start : start + context]
        if bos:
            window[0] = ids[0]
        rows = llama.logits(window)[context // 2 : -1].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        wanted = window[context // 2 + 1 :]
        nats += float((np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(wanted)), wanted]).sum())
        count += len(wanted)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text"
        file.write_bytes(text.encode())
        own = json.loads(quorate(binary, "perplexity", "-m", path, file, "--context", context, "--windows", arguments.windows,
                                 "--threads", arguments.threads, "--json"))
    if count == 0 or own["scored_tokens"] != count:
        sys.exit(f"{count} tokens scored with llama.cpp, {own['scored_tokens']} with Quorate")
    theirs = float(np.exp(nats / count))
    difference = own["perplexity"] / theirs - 1
    print(f"{path.name}: perplexity over {count} tokens: Quorate {own['perplexity']:.4f}, llama.cpp {theirs:.4f}, {100 * difference:+.3f} %")
    return abs(difference) <= 0.005


def prose():
    """Public-domain prose that comes with the repository."""
    lines = (REPOSITORY / "embedded/tasks/prose.test.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    return "\n\n".join(item["prompt"].replace("<s>", "") + item["answer"] for item in items)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quorate")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--tokens-only", action="store_true", help="compare tokens alone; files without weights will do")
    parser.add_argument("--text", type=Path, help="text for the perplexity; left out, the repository's prose")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48, help="greedy tokens after each prompt")
    parser.add_argument("--tie", type=float, default=TIE, help="largest gap of logits that counts as a near tie")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    mixed, good = mixed_text(1_000_000), True
    for path in arguments.models:
        good &= compare_tokens(arguments.quorate, path, mixed)
        if not arguments.tokens_only:
            llama = Llama(path, arguments.threads)
            good &= compare_greedy(arguments.quorate, path, llama, arguments)
            text = arguments.text.read_text(encoding="utf-8") if arguments.text else prose()
            good &= compare_perplexity(arguments.quorate, path, llama, text, arguments)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
