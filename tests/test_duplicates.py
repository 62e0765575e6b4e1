"""Copies, near copies, leaks of the evaluation, markup, faults of answers, long conversations."""

import random
import re

import pytest
from datasketch import MinHashLSH

from polm_lab.core.knobs import WrongInput
from polm_lab.finetuning.selection import duplicates
from polm_lab.finetuning.selection.duplicates import BOILERPLATE, candidate_probability
from polm_lab.finetuning.selection.duplicates import choose_bands, clean_markup, contaminated
from polm_lab.finetuning.selection.duplicates import faults_of, first_copies, jaccard, near_copies
from polm_lab.finetuning.selection.duplicates import ngrams_of, open_fence, repeated_share, rouge_l
from polm_lab.finetuning.selection.duplicates import split_conversation, split_words, too_similar

SCRIPTS = {
    "Chinese": "今天天气很好，我们去公园散步吧。",
    "Arabic": "ذهب الولد إلى المدرسة في الصباح الباكر مع أخته",
    "Devanagari": "लड़का सुबह अपनी बहन के साथ स्कूल गया और शाम को लौटा",
    "Thai": "วันนี้อากาศดีมาก",
    "Cyrillic": "Мальчик утром пошёл в школу вместе со своей сестрой",
}


def says(call, *args, **kwargs) -> str:
    with pytest.raises(WrongInput) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def random_texts(count: int, words: int, vocabulary: int, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    known = [f"w{n}" for n in range(vocabulary)]
    return [" ".join(source.choices(known, k=source.randrange(words + 1))) for _ in range(count)]


def lcs(x: list, y: list) -> int:
    "The longest common subsequence by the table of its definition."
    row = [0] * (len(y) + 1)
    for word in x:
        before, row = row, [0]
        for n, other in enumerate(y):
            row.append(before[n] + 1 if word == other else max(row[n], before[n + 1]))
    return row[-1]


def by_table(first: str, second: str) -> float:
    "ROUGE-L as Google's scorer computes it: F1 of precision and recall, for ASCII text."
    x, y = (re.sub(r"[^a-z0-9]+", " ", text.lower()).split() for text in (first, second))
    common = lcs(x, y)
    if not common:
        return 0.0
    precision, recall = common / len(y), common / len(x)
    return 2 * precision * recall / (precision + recall)


def test_words_of_all_scripts():
    assert split_words("It's 3.5, snake_case!") == ["it", "s", "3", "5", "snake", "case"]
    assert split_words("ＡＢＣ　Straße") == ["abc", "strasse"]
    assert split_words("cafe\u0301 = café") == ["café", "café"]
    assert split_words("日本語カタカナー abc漢") == [*"日本語カタカナー", "abc", "漢"]
    assert split_words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]  # marks do not cut words
    assert split_words("نمی\u200cخواهم") == ["نمیخواهم"]
    assert len(split_words(SCRIPTS["Thai"])) == 12  # letters, each with its marks
    for text in ("", " \n", "?! … —", "❤️👍🏽", "\ufeff", "\u0301"):
        assert split_words(text) == [], repr(text)


def test_rouge_l_in_closed_form():
    assert rouge_l("police killed the gunman", "police kill the gunman") == 0.75  # Lin 2004, §3.1
    assert rouge_l("police killed the gunman", "the gunman kill police") == 0.5
    assert rouge_l("a b c d", "a c") == 2 * 2 / 6
    assert rouge_l("a b", "a b c d e f") == rouge_l("a b c d e f", "a b") == 2 * 2 / 8
    assert rouge_l("", "a") == rouge_l("a", "") == rouge_l("", "") == rouge_l("?", "!") == 0.0
    assert rouge_l("今天天气好", "今天天气坏") == 0.8


def test_rouge_l_is_that_of_the_table():
    texts = random_texts(120, 90, 6) + ["It's A-b c_d", "its a b c d"]
    for first, second in zip(texts, texts[1:]):
        assert rouge_l(first, second) == pytest.approx(by_table(first, second), abs=1e-12)


def test_exact_copies():
    texts = ["A  b", "a b", "a b.", "\ufeffＡ b\n", "a\u00adb", "ab", "", " \t", "A b."]
    assert first_copies(texts) == [None, 0, None, 0, None, 4, None, 6, 2]
    assert first_copies([]) == []
    for text in SCRIPTS.values():
        assert first_copies([text, "x", f" {text}\n"]) == [None, None, 0]


def plain_too_similar(texts: list[str], threshold: float) -> list:
    found, kept = [], []
    for number, text in enumerate(texts):
        near = [(rouge_l(texts[other], text), -other) for other in kept]
        share, other = max(near, default=(-1.0, 0))
        found.append((-other, share) if share >= threshold else None)
        if found[-1] is None:
            kept.append(number)
    return found


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 1.0])
def test_too_similar_is_the_plain_loop(threshold, monkeypatch):
    texts = random_texts(150, 12, 7)
    expected = plain_too_similar(texts, threshold)
    assert 10 < expected.count(None) < 150
    assert too_similar(texts, threshold) == expected
    monkeypatch.setattr(duplicates, "BLOCK", 16)
    assert too_similar(texts, threshold) == expected


def test_a_text_at_the_threshold_is_dropped_and_a_dropped_one_drops_nothing():
    base, other = "a b c d e f g h i j", "a b c d e f g x y z"
    assert too_similar([base, other], 0.7) == [None, (0, 0.7)]  # 14 of 20, a fraction that rounds
    assert too_similar([base, other], 0.7001) == [None, None]
    chain = ["one two three four five", "one two three four six", "one two three seven six"]
    assert too_similar(chain) == [None, (0, 0.8), None]
    assert too_similar(chain[1:]) == [None, (0, 0.8)]
    # the nearest, and the first of equals
    assert too_similar([base, other.upper(), "q", "a b c d e f g h x y"], 0.75)[3] == (1, 0.9)
    assert too_similar(["a b c x", "a b c y", "a b c z"], 0.8) == [None, None, None]
    assert too_similar(["a b c x", "a b y c", "a b c"], 0.8)[2] == (0, 6 / 7)


def test_texts_without_words_are_kept():
    texts = ["", "!!", "", "a", "?"]
    assert too_similar(texts) == near_copies(texts) == contaminated(texts, ["", "?"]) == [None] * 5
    assert too_similar([]) == near_copies([]) == contaminated([], ["a"]) == []
    assert contaminated(["a"], []) == [None]


def plain_near_copies(texts: list[str], threshold: float, size: int) -> list:
    found, kept = [], {}
    for number, text in enumerate(texts):
        words = text.split()
        count = max(1, len(words) - size + 1)
        runs = {tuple(words[n : n + size]) for n in range(count)} if words else set()
        best = None
        for other, theirs in kept.items():
            share = len(runs & theirs) / len(runs | theirs) if runs else 0.0
            if share >= threshold and (best is None or share > best[1]):
                best = other, share
        found.append(best)
        if best is None:
            kept[number] = runs
    return found


@pytest.mark.parametrize("size", [1, 3])
def test_near_copies_are_those_of_all_pairs(size):
    source, texts = random.Random(1), []
    for text in random_texts(60, 40, 200):
        words = text.split()
        for changed in range(4):  # more and more words are others
            for _ in range(changed if words else 0):
                words[source.randrange(len(words))] = "new"
            texts.append(" ".join(words))
    expected = plain_near_copies(texts, 0.5, size)
    assert 40 < len(expected) - expected.count(None) < 200
    assert near_copies(texts, 0.5, size, permutations=512) == expected


def test_near_copies_in_closed_form():
    base = "a b c d e f g h i j".split()
    last, middle = " ".join([*base[:9], "x"]), " ".join([*base[:5], "x", *base[6:]])
    texts = [" ".join(base), last, middle, " ".join(base).upper()]
    assert near_copies(texts, 7 / 9) == [None, (0, 7 / 9), None, (0, 1.0)]
    assert near_copies(texts, 0.45)[2] == (0, 5 / 11)
    assert near_copies(texts) == [None, None, None, (0, 1.0)]
    assert near_copies(["a b", "A, B", "a", "a b c"]) == [None, (0, 1.0), None, None]
    assert jaccard({"a"}, set()) == jaccard(set(), set()) == 0.0
    assert near_copies(["\ud800 a", "\ud800 a"])[1] == (0, 1.0)  # half of a pair has no UTF-8
    for text in SCRIPTS.values():
        assert near_copies([text, "x y z", text + "!"])[2] == (0, 1.0)


def test_near_copies_are_the_same_for_a_seed_and_leave_random_numbers_alone():
    texts = random_texts(80, 12, 5)
    random.seed(7)
    expected = random.random()
    random.seed(7)
    assert near_copies(texts, 0.3, 1, 2, seed=3) == near_copies(texts, 0.3, 1, 2, seed=3)
    assert random.random() == expected
    assert near_copies(texts, 0.3, 1, 2, seed=3) != near_copies(texts, 0.3, 1, 2, seed=5)


def test_bands_find_a_pair_at_the_threshold():
    assert candidate_probability(0.5, 1, 1) == 0.5
    assert candidate_probability(0.5, 2, 1) == 0.75
    assert candidate_probability(0.5, 1, 2) == 0.25
    assert candidate_probability(0.8, 20, 5) == pytest.approx(0.99964, abs=1e-5)  # the textbook's
    assert choose_bands(0.8, 128) == (21, 6)
    for threshold in (0.3, 0.5, 0.7, 0.9, 1.0):
        bands, rows = choose_bands(threshold, 128)
        assert bands * rows <= 128
        assert candidate_probability(threshold, bands, rows) >= 0.99
        more = 128 // (rows + 1)
        assert more < 2 or candidate_probability(threshold, more, rows + 1) < 0.99
        MinHashLSH(num_perm=128, params=(bands, rows))  # it takes them
    assert choose_bands(0.01, 16) == (16, 1)  # as good as it gets
    assert choose_bands(1.0, 2) == (2, 1)


def test_leaks():
    exam = ["one two three four five", "six seven", "two three four five", "SIX"]
    texts = [
        "zero one two, THREE four five six",
        "two three four five",
        "seven six",
        "six seven",
        "one two three",
    ]
    found = contaminated(texts, exam, n=4)
    assert found[0] == (0, "one two three four")  # the first in the text, of the first that shares
    assert found[1] == (0, "two three four five")
    assert found[2] == (3, "six")
    assert found[3] == (1, "six seven")
    assert found[4] is None
    assert contaminated(texts, exam[:1], n=5) == [(0, "one two three four five"), *[None] * 4]
    assert contaminated(texts, exam[:1], n=6)[0] == (0, "one two three four five")  # as a whole
    assert contaminated(["one two three four"], exam[:1], n=6) == [None]  # a part of it is none
    chinese = SCRIPTS["Chinese"]
    assert contaminated([f"你说：{chinese}"], [chinese[:8]], n=5)[0] == (0, "今 天 天 气 很")


def test_leaks_are_those_of_all_pairs():
    texts, exam = random_texts(80, 20, 6), random_texts(20, 8, 6, seed=1)
    expected = []
    for text in texts:
        padded = f" {text} "
        best = None
        for number, other in enumerate(exam):
            runs = [run for run in ngrams_of(other.split(), 5) if f" {run} " in padded]
            if runs and best is None:
                best = number, min(runs, key=lambda run: padded.index(f" {run} "))
        expected.append(best)
    assert 10 < expected.count(None) < 70
    found = contaminated(texts, exam, n=5)
    assert found == expected


def test_text_without_tags_is_left_alone():
    for text in (
        "a < b and c > d; x<y>z; 1 <2> 3",
        "AT&amp;T &lt;b&gt;\n\n\n\nx",
        "List<String> Map<P, B> FC<P> vector<int> #include <stdio.h>",
        "<think>so</think><|im_start|><s> x <!-- no --> <unk>",
        "<s>[INST] x [/INST] y</s>",
        "Write `<b>x</b>`:\n```html\n<p>x</p>\n```\n",
        "````\n```\n<p>x</p>\n```\n````",
        "",
        " \n ",
        "<",
    ):
        assert clean_markup(text) == text
    assert "<think>so</think><|im_start|>" in clean_markup("<think>so</think><|im_start|><b>x</b>")


def test_html_becomes_markdown():
    assert clean_markup("<p>a &lt; b &amp; <b>c</b>&nbsp;d</p>") == "a < b & **c**\xa0d"
    assert clean_markup("<p>snake_case * 2</p><p>x</p>") == "snake_case * 2\n\nx"
    assert clean_markup("<h2>T</h2><ul><li>a</li><li>b</li></ul>") == "## T\n\n- a\n- b"
    assert clean_markup('<ol start="9"><li>a</li><li>b<ul><li>c</li></ul></li></ol>') == (
        "9. a\n10. b\n    - c"
    )
    assert clean_markup("a<br>b") == "a  \nb"
    assert clean_markup("<script>let x = '<p>';</script><style>p {}</style><p>x</p>") == "x"
    assert clean_markup("<p>a<!-- <b>x</b> -->b</p> <!-- open") == "ab\n\n<!-- open"
    assert clean_markup("<p>如果 a &lt; b</p>") == "如果 a < b"
    assert clean_markup('<a href="u">x</a>') == "[x](u)"
    assert clean_markup("<p>x</p>y<z and List<String>") == "x\n\ny<z and List<String>"
    assert clean_markup("<table><tr><th>a</th></tr><tr><td>b</td></tr></table>") == (
        "| a |\n| --- |\n| b |"
    )


def test_code_keeps_its_lines():
    page = (
        '<p>See</p><pre><div><span>py</span><button>Copy code</button></div><div>'
        '<code class="hljs language-py"><span>def</span> f(a_b):\n\n\n\n    return a_b &lt; 1\n'
        "</code></div></pre>"
    )  # fmt: skip
    assert clean_markup(page) == "See\n\n```py\ndef f(a_b):\n\n\n\n    return a_b < 1\n```"
    assert clean_markup("<pre>  x<br>    y\n</pre>") == "```\n  x\n    y\n```"
    assert clean_markup("<pre>```\nx\n```</pre>") == "````\n```\nx\n```\n````"
    mixed = "<p>Use <b>it</b>: `<i>`</p>\n```html\n<p>a   b</p>\n\n\n\n```\n"
    assert clean_markup(mixed) == "Use **it**: `<i>`\n\n```html\n<p>a   b</p>\n```"
    assert clean_markup("<p>x</p><pre><code>a `b` c</code></pre>") == "x\n\n```\na `b` c\n```"


def test_hostile_markup_gives_a_result():
    for name in ("div", "b", "blockquote", "ul><li", "span"):
        closing = "".join(f"</{part}>" for part in reversed(name.split("><")))
        assert "found" in clean_markup(f"<{name}>" * 2000 + "found" + closing * 2000)
    assert clean_markup("<p>&#" + "9" * 5000 + ";</p>").startswith("&#999")
    assert clean_markup("<ol start='²'><li>x</li></ol>") == "1. x"
    assert "x" in clean_markup("<table><tr><td colspan='²'>x</td></tr></table>")
    for part in ("<b ", "<!--", "`", "<p>\n", '<a href="', "  \t", "<li>x</li>", "x<br>", "</p>"):
        assert isinstance(clean_markup("<p>x</p>" + part * 3000), str)
        assert isinstance(clean_markup("<pre>" + part * 3000), str)
    many = clean_markup("<div>" * 150 + "deep" + "</div>" * 150 + "<b>x</b>")
    assert many.endswith("**x**")  # what follows is as before


def test_faults():
    assert faults_of("Name a colour.", "Red.") == ""
    assert faults_of("x", "") == faults_of("x", " \u200b\n") == faults_of("", "") == "empty"
    assert faults_of("Name a colour.", " name A  colour.") == "repeats the prompt"
    assert faults_of("Name a colour.", "Name a colour. Red.") == ""
    for phrase in BOILERPLATE:
        assert faults_of("x", f"Well, {phrase.upper()}, so no.") == "boilerplate", phrase
    assert faults_of("x", "I’m sorry, but I can’t do that.") == "boilerplate"
    assert faults_of("x", "OpenAI was an AI laboratory; ChatGPT came later.") == ""
    assert faults_of("x", "no no no no no no") == "loops"
    assert faults_of("x", "哈哈哈哈哈哈哈哈") == "loops"
    assert faults_of("x", "The sun is warm today.\n" * 3) == "loops"
    assert faults_of("x", "Yes, yes, yes!") == ""
    assert faults_of("x", "!" * 20) == faults_of("x", "a" * 20) == "loops"
    assert faults_of("x", "!" * 19) == faults_of("x", "1" + "0" * 40) == ""
    for sign in ("\ufffd", "\x00", "\x1b", "\x85", "\ud800"):
        assert faults_of("x", f"a{sign}b") == "broken text"
    assert faults_of("x", "a\tb\r\nc") == ""
    assert faults_of("x", "So:\n```python\nx = 1") == "cut off in code"
    assert faults_of("a b", "c d e", longest=5) == ""
    assert faults_of("a b", "c d e", longest=4) == "too long"
    assert faults_of("ab", "cde", longest=4, count_tokens=len) == "too long"
    for text in SCRIPTS.values():
        assert faults_of("x", text) == ""


def test_repeated_share_in_closed_form():
    assert repeated_share("a b c d") == repeated_share("a b") == repeated_share("") == 0.0
    assert repeated_share("a b c d a b c d") == 1 / 5  # of five runs one occurred before
    assert repeated_share("a a a a a a a") == 3 / 4
    half = "a b c d a b c d a b c"  # eight runs of four kinds
    assert repeated_share(half) == 1 / 2
    assert faults_of("x", half) == ""
    assert faults_of("x", half + " d") == "loops"


def test_open_fences():
    for text, is_open in {
        "```\nx\n```": False,
        "```\nx": True,
        "  ```py\nx\n  ```\ny": False,
        "```a\n```b\n": True,  # a closing fence has no language
        "````\n```\n````": False,
        "```\n````": False,
        "````\n```": True,
        "use ``` to begin": False,
        "```x``` and": False,
    }.items():
        assert open_fence(text) is is_open, text


def turns(*words: str) -> list[dict]:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[word[0]], "content": word} for word in words]


def length(messages: list[dict]) -> int:
    return sum(len(message["content"]) for message in messages)


def test_a_conversation_is_split_between_exchanges():
    talk = turns("u11", "a11", "u22", "a22", "u33", "a33")
    assert split_conversation(talk, length, 18) == [talk]
    assert split_conversation(talk, length, 12) == [talk[:4], talk[4:]]  # the last one is not lost
    assert split_conversation(talk, length, 11) == [talk[:2], talk[2:4], talk[4:]]
    assert split_conversation(talk, length, 5) == []
    head = turns("s")
    assert split_conversation(head + talk, length, 13) == [head + talk[:4], head + talk[4:]]
    assert split_conversation(head + talk, length, 12) == [
        head + talk[:2],
        head + talk[2:4],
        head + talk[4:],
    ]
    assert split_conversation([], length, 5) == split_conversation(head, length, 5) == []


def test_an_exchange_that_is_too_long_is_dropped_and_ends_a_part():
    talk = turns("u1", "a1", "u2", "a" * 20, "u3", "a3", "u4")
    assert split_conversation(talk, length, 12) == [talk[:2], talk[4:]]
    assert split_conversation(talk[2:], length, 12) == [talk[4:]]
    assert split_conversation(talk[:4], length, 12) == [talk[:2]]


def test_an_exchange_has_all_turns_up_to_the_next_of_the_user():
    talk = turns("a0", "u1", "a1", "t1", "a1", "u2", "u3", "a3")
    assert split_conversation(talk, length, 8) == [talk[1:5], talk[5:]]
    before = [dict(turn) for turn in talk]
    split_conversation(talk, length, 100)[0].append({})
    assert talk == before


def test_wrong_input_is_one_line():
    chat = [{"role": "user", "content": "x"}]
    for call in (first_copies, too_similar, near_copies, lambda texts: contaminated(texts, [])):
        assert "text 1 is a list; expected a string" in says(call, ["x", chat])
    assert "against" in says(contaminated, ["x"], [None])
    for share in (0, -1, 1.5, float("nan")):
        assert "expected a number above 0" in says(too_similar, ["x"], share)
        assert "expected a number above 0" in says(near_copies, ["x"], share)
    assert "size is 0" in says(near_copies, ["x"], size=0)
    assert "permutations is 1" in says(near_copies, ["x"], permutations=1)
    assert "seed is -1" in says(near_copies, ["x"], seed=-1)
    for n in (0, 2.5, True):
        assert "whole number of at least 1" in says(contaminated, ["x"], ["y"], n)
    assert "longest is -1" in says(faults_of, "x", "y", longest=-1)
    assert "text 1 is a list" in says(faults_of, "x", chat)
    assert "longest is 0" in says(split_conversation, chat, length, 0)
    assert "turn 0" in says(split_conversation, [{"content": "x"}], length, 5)
