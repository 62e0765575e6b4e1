"""Retrieval in scripts of all kinds: words, answers, passages and pages.

Also an index of an older tokenizer, and the comparison of answers.
"""

import json
import math
import random
import unicodedata

import pytest

from polm_lab.core.knobs import WrongInput
from polm_lab.models.policy import Policy
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.integration.retrieval import passages as passages_module
from polm_lab.integration.retrieval.text import (
    cut,
    fold,
    holds,
    shortened,
    spans,
    squeezed,
    words_of,
)
from polm_lab.integration.retrieval.documents import html_text, load_documents
from polm_lab.integration.retrieval.library import open_library
from polm_lab.integration.retrieval.passages import Index
from polm_lab.integration.rag import LocalReader, Reading, with_other_answer, exact_match
from polm_lab.integration.retrieval.passages import Hit
from polm_lab.integration.retriever import retrieval_metrics, states_answer

# words


@pytest.mark.parametrize(
    "text, words",
    [
        ("Which river flows, Dr. Ó Floinn?", ["which", "river", "flows", "dr", "floinn"]),
        ("丢了308分", ["丢", "了", "丢了", "308", "分"]),
        ("鲁特\n琴", ["鲁", "特", "琴", "鲁特", "特琴"]),  # a line break is no border of a word
        ("サッカー", ["サッ", "ッカ", "カー"]),
        ("ｻｯｶｰ", ["サッ", "ッカ", "カー"]),  # half-width
        ("ｶﾞ", ["ガ"]),
        ("น้ำท่วม", ["น้ำท่", "ท่ว", "วม"]),
        ("ນ້ຳຂອງ", ["ນ້ຳຂ", "ຂອ", "ອງ"]),
        ("ភ្នំពេញ", ["ភ្នំពេ", "ពេញ"]),  # ្ stacks the next consonant
        ("ភ្នំ\u200bពេញ", ["ភ្នំពេ", "ពេញ"]),  # a space that cannot be seen
        ("서울에서 열린", ["서울", "울에", "에서", "열린"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs are no borders
        ("كِتَابٌ", ["كتاب"]),  # points may be left out
        ("שָׁלוֹם", ["שלום"]),
        ("می\u200cخواهم", ["میخواهم"]),
        ("\u200f٢٠١٥ २०१५", ["2015", "2015"]),
        ("ＡＢＣ１２", ["abc12"]),
        ("İSTANBUL ISPARTA ısparta", ["istanbul", "isparta", "isparta"]),
        ("STRASSE Straße", ["strasse", "strasse"]),
        ("ΟΔΟΣ οδός", ["οδοσ", "οδόσ"]),
        ("cafe\u0301 café", ["café", "café"]),
        ("6½ m² ﬁne", ["6½", "m²", "fine"]),
        ("the of and a I", []),
        ("。，！?", []),
    ],
)
def test_the_words_of_a_text(text, words):
    assert words_of(text) == words


LIBRARIES = {
    "Chinese": (
        ["埃斯克河流经巴顿小镇。", "阿德兰演奏鲁特琴。", "钟楼建于一二〇四年。"],
        {"哪条河流经巴顿？": 0, "谁会弹鲁特琴？": 1, "钟楼是什么时候建的": 2},
    ),
    "Japanese": (
        ["エスク川はバートンを流れる。", "アドランはリュートを弾く。", "鐘楼は古い。"],
        {"バートンの川は何ですか": 0, "誰がリュートを弾きますか": 1, "鐘": 2},
    ),
    "Thai": (
        ["แม่น้ำเอสค์ไหลผ่านเมืองบาร์ตัน", "อัดรันเล่นลูต", "หอระฆังเก่ามาก"],
        {"แม่น้ำอะไรไหลผ่านบาร์ตัน": 0, "ใครเล่นลูต": 1, "หอระฆังอยู่ที่ไหน": 2},
    ),
    "Lao": (["ແມ່ນ້ຳຂອງໄຫຼຜ່ານວຽງຈັນ", "ລາວມີພູຫຼາຍ"], {"ແມ່ນ້ຳຫຍັງຢູ່ວຽງຈັນ": 0, "ລາວມີຫຍັງ": 1}),
    "Khmer": (["ទន្លេមេគង្គហូរកាត់ភ្នំពេញ", "អង្គរវត្តជាប្រាសាទ"], {"ភ្នំពេញមានទន្លេអ្វី": 0, "ប្រាសាទអ្វី": 1}),
    "Burmese": (["ဧရာဝတီမြစ်သည်မန္တလေးကိုဖြတ်စီးသည်", "ရွှေတိဂုံဘုရား"], {"မန္တလေးမြစ်": 0, "ဘုရား": 1}),
    "Korean": (
        ["에스크강은 바턴을 흐른다.", "아드란이 류트를 연주한다."],
        {"바턴에는 어떤 강이 있나?": 0, "류트는 누가 연주하나?": 1},
    ),
    "Hindi": (
        ["एस्क नदी बार्टन में बहती है।", "आद्रान वीणा बजाता है।"],
        {"बार्टन की नदी": 0, "वीणा कौन बजाता है?": 1},
    ),
    "Arabic": (
        ["يجري نهر إسك في بارتون.", "يعزف أدران على العود."],
        {"نَهر بارتون": 0, "من يعزف على العود؟": 1},
    ),
}


@pytest.mark.parametrize("language", LIBRARIES)
def test_bm25_finds_the_passage_of_a_question(language, tmp_path):
    texts, asked = LIBRARIES[language]
    index = Index([{"id": str(n), "text": text} for n, text in enumerate(texts)])
    for opened in (index, Index.open(index.save(tmp_path / "index"))):
        found = opened.search(list(asked), 3)
        assert [int(hits[0].id) for hits in found] == list(asked.values())
        assert all(hits[0].score > 0 for hits in found)


def test_bm25_of_a_chinese_question_by_hand():
    index = Index([{"id": "a", "text": "鲁特琴"}, {"id": "b", "text": "钟楼"}])
    # 鲁 特 琴 鲁特 特琴 and 钟 楼 钟楼; of 鲁特 琴 the question shares 鲁 特 琴 鲁特 (no 特琴: a comma parts it)
    idf = math.log(1 + (2 - 1 + 0.5) / (1 + 0.5))
    each = idf / (1 + 1.5 * (1 - 0.75 + 0.75 * 5 / 4))
    (hit,) = index.search(["鲁特，琴"])[0]
    assert hit.id == "a"
    assert math.isclose(hit.score, 4 * each, rel_tol=1e-5)


def test_an_index_of_another_tokenizer_is_made_again(tmp_path, monkeypatch):
    rows = [{"id": str(n), "text": text} for n, text in enumerate(LIBRARIES["Chinese"][0])]
    asked = list(LIBRARIES["Chinese"][1])
    fresh = Index(rows).search(asked)
    with monkeypatch.context() as patch:
        patch.setattr(passages_module, "words_of", lambda text: [text])  # a clause a word
        folder = Index(rows).save(tmp_path / "index")
        assert Index.open(folder).search(asked) == [[], [], []]
    facts = json.loads((folder / "index.json").read_text())
    assert Index.open(folder).search(asked) == [[], [], []], "the matrix that was saved is used"
    for version in (None, 1, 99):
        facts.pop("words", None)
        facts |= {} if version is None else {"words": version}
        (folder / "index.json").write_text(json.dumps(facts))
        assert Index.open(folder).search(asked) == fresh
    kept = json.loads((Index.open(folder).save(folder) / "index.json").read_text())
    assert kept["words"] == passages_module.WORDS
    assert Index.open(folder).search(asked) == fresh


def test_a_library_without_words_finds_nothing(tmp_path):
    index = Index([{"id": "a", "text": "。"}, {"id": "b", "text": "the"}])
    assert index.search(["river", "the", "。"]) == [[], [], []]
    assert Index.open(index.save(tmp_path / "index")).search(["river"]) == [[]]


# answers

HELD = [
    ("The river Esk.", "esk", True),
    ("The river Eskford.", "Esk", False),
    ("in 2004", "4", False),
    ("a line\nbreak", "line break", True),
    ("同时也以24次拦截领先", "24", True),
    ("同时也以124次拦截领先", "24", False),
    ("黑豹队的防守", "黑豹队", True),
    ("黑 豹\n队的防守", "黑豹队", True),
    ("黑豹队的防守", "黑豹对", False),
    ("エスク川はﾊﾞｰﾄﾝを", "バートン", True),
    ("ไหลผ่านบาร์ตันและ", "บาร์ตัน", True),
    ("ที่น้ำ", "น้", False),  # ำ belongs to the letter before it
    ("ที่นี่", "ที", False),
    ("서울에서 열렸다", "서울", True),
    ("남서울에서", "서울", False),
    ("1988년에", "1988", True),
    ("२०१५ में", "2015", True),
    ("हिन्दी में", "हिन्द", False),
    ("كِتَابٌ جديد", "كتاب", True),
    ("Die STRASSE", "Straße", True),
    ("İstanbul'da", "istanbul", True),
    ("Ｔｈｅ Ｅｓｋ", "esk", True),
    ("61⁄2", "6½", False),
    ("anything", " ", False),
    ("anything", "\u200b", False),
]


@pytest.mark.parametrize("text, answer, found", HELD)
def test_an_answer_is_held_as_whole_words(text, answer, found):
    assert holds(text, answer) is found
    places = spans(text, answer)
    assert bool(places) is found
    assert all(squeezed(text[start:end]) == squeezed(answer) for start, end in places)


def test_places_of_answers_are_those_of_the_text_as_written():
    assert spans("Ｔｈｅ Ｅｓｋ, the Esk", "esk") == [(4, 7), (13, 16)]
    assert spans("黑 豹\n队。黑豹队", "黑豹队") == [(0, 5), (6, 9)]
    assert spans("aﬁne ﬁne", "fine") == [(5, 8)]
    assert spans("cafe\u0301!", "CAFÉ") == [(0, 5)]
    rng = random.Random(2)
    letters = [
        "a",
        "Straße ",
        "黑",
        "ガ",
        "ｶﾞ",
        "น้ำ",
        " ",
        "\n",
        "é",
        "e\u0301",
        "½",
        "ﬁ",
        "서",
        "٣",
        "हि",
        ".",
        "\u200b",
    ]
    for _ in range(300):
        text = "".join(rng.choices(letters, k=12))
        for answer in rng.choices(letters, k=4):
            assert bool(spans(text, answer)) == holds(text, answer), (text, answer)


def test_another_answer_takes_the_place_of_the_right_one():
    assert (
        with_other_answer(
            "埃斯克河流经巴顿。埃斯克河很长。", ["埃斯克河", "河"], ["埃斯克河", "泰河"]
        )
        == "泰河流经巴顿。泰河很长。"
    )
    assert (
        with_other_answer("Ｔｈｅ Ｅｓｋ is long", ["esk"], ["ESK", "Tay"]) == "Ｔｈｅ Tay is long"
    )
    assert with_other_answer("서울에서", ["서울"], ["부산"]) == "부산에서"


def test_answers_are_equal_but_for_what_writing_may_vary():
    for said, right in (
        ("北京。[1]", "北京"),
        ("【1】北京", "北京"),
        ("「北 京」", "北京"),
        ("１０％", "10"),
        ("The Esk.", "esk"),
        ("เอสค์ ครับ", "เอสค์ครับ"),
        ("٢٠١٥", "2015"),
        ("die Straße", "Die Strasse"),
        ("कि", "कि"),
    ):
        assert exact_match(said, right) == 1.0, (said, right)
    for said, right in (("कि", "की"), ("北京市", "北京"), ("6½", "6"), ("x²", "x"), ("...", "。")):
        assert exact_match(said, right) == 0.0, (said, right)
    hits = [Hit("a", "钟楼很古老。", 1.0), Hit("b", "他演奏鲁特琴。", 1.0)]
    assert Reading("谁？", "鲁特琴。【2】", hits).cited == [2]
    assert Reading("谁？", "笛子。", hits).cited == []


def test_questions_without_a_right_passage_give_no_recall():
    assert retrieval_metrics([["a"], ["b"]], [[], []]) == {}
    assert retrieval_metrics([["a"], ["b"]], [[], ["b"]], (1,)) == {"recall/1": 1.0, "mrr": 1.0}


def test_a_reward_counts_the_words_of_a_chinese_question():
    question, passage = "谁弹鲁特琴", "阿德兰演奏鲁特琴"
    held = [w for w in words_of(question) if w in ("鲁", "特", "琴", "鲁特", "特琴")]
    assert (
        states_answer(question, passage, "阿德兰")
        == 1 + len(held) / len(words_of(question))
        == 1 + 5 / 9
    )
    assert states_answer(question, passage, "埃南") == 5 / 9


def test_a_chinese_library_of_ones_own_is_labelled(tmp_path):
    (tmp_path / "books").mkdir()
    for n, text in enumerate(LIBRARIES["Chinese"][0]):
        (tmp_path / "books" / f"{n}.txt").write_text(text, encoding="utf-8")
    rows = [{"question": f"谁会弹鲁特琴？{n}", "answer": "阿德兰"} for n in range(20)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, learned, held_out = open_library(str(tmp_path / "asked.jsonl"), str(tmp_path / "books"))
    assert all(row["positives"] == ["1.txt"] for row in [*learned, *held_out])


# passages


def test_cutting_ends_with_sentences_and_adds_no_space():
    chinese = "巴顿是一座小镇。“钟声！”他说。埃斯克河流经这里，一直到海边。他喜欢（很）吗？是。"
    assert cut(chinese, 4) == [
        "巴顿是一座小镇。",
        "“钟声！”他说。",
        "埃斯克河流经这里，",
        "一直到海边。",
        "他喜欢（很）吗？",
        "是。",
    ]
    assert cut(chinese, 6)[0] == "巴顿是一座小镇。“钟声！”他说。"
    assert "".join(cut(chinese, 6)) == chinese
    assert cut("東京は都市です。大阪も都市です。「はい。」と言った。", 4) == [
        "東京は都市です。",
        "大阪も都市です。",
        "「はい。」と言った。",
    ]
    assert cut("埃斯克河，一直流到海边的小镇。", 4) == ["埃斯克河，", "一直流到海边的小", "镇。"], (
        "a clause is whole where it fits"
    )
    thai = "แม่น้ำเอสค์ไหลผ่าน เมืองบาร์ตัน และลงสู่ทะเล"
    assert cut(thai, 7) == ["แม่น้ำเอสค์ไหลผ่าน", "เมืองบาร์ตัน", "และลงสู่ทะเล"]
    assert cut("एस्क बहती है। आद्रान गाता है।", 3) == ["एस्क बहती है।", "आद्रान गाता है।"]
    assert cut("丢了 308分，他说NFL好", 100) == ["丢了 308分，他说NFL好"]
    long = "巴顿" * 700
    assert cut(long, 100) == [long[i : i + 200] for i in range(0, 1400, 200)]
    assert cut("One.\r\n\r\nTwo.", 1) == ["One.", "Two."]
    assert cut("x" * 450, 2) == ["x" * 400, "x" * 50]


def test_cutting_any_script_keeps_every_character_in_order():
    rng = random.Random(4)
    parts = [
        "黑豹队",
        "。",
        "，",
        "”",
        "（",
        "word",
        "Dr",
        ". ",
        " ",
        "\n\n",
        "\u3000",
        "น้ำ",
        "ที่",
        "서울에",
        "x" * 250,
        "हिन्दी",
        "カー",
        "、",
        "！？",
        "…",
        "12",
    ]
    for spaced in (True, False):
        for _ in range(150):
            text = "".join(
                part
                for part in rng.choices(parts, k=40)
                if spaced or not any(map(str.isspace, part))
            )
            size = rng.randint(1, 12)
            pieces = cut(text, size)
            assert "".join("".join(pieces).split()) == "".join(text.split())
            assert all(len(piece.split()) <= size for piece in pieces)
            if not spaced:
                assert "".join(pieces) == text, "no space is added"
            assert cut(text, 10**6) == ([" ".join(text.split())] if text.strip() else []), (
                "and none is lost"
            )
            assert not any(unicodedata.combining(piece[0]) for piece in pieces)


def test_no_run_of_characters_takes_long():
    for character in (
        " ",
        "\n",
        "。",
        "，",
        "(",
        "\u0e31",
        "\u17d2",
        "\u200b",
        "\u0301",
        "[",
        "黑 ",
        "น้ำ ",
        '"',
    ):
        text = "é" + character * 20_000 + "é"
        assert "".join("".join(cut(text, 50)).split()) == "".join(text.split())
        assert not holds(text, "z")
        assert exact_match(text, "z") == 0.0
        words_of(text)


def test_a_passage_that_is_too_long_for_the_reader_is_halved():
    assert shortened("黑豹队的防守只丢了分") == "黑豹队的"
    assert shortened("one two three four") == "one two"
    assert shortened("one") == shortened("黑豹") == ""
    reader = LocalReader(Policy(load_model("tiny", "float32", "cpu")), load_tokenizer("tiny"))
    ids = reader.prompt("谁？", ["巴顿小镇" * 200])
    said = reader.tokenizer.decode(ids)
    assert "巴顿小镇巴顿小镇" in said
    assert len(ids) <= reader.longest - reader.max_new_tokens


# pages

HTML = {
    "<table><tr><td>Zorb</td><td>4711</td></tr>"
    "<tr><td>Mib</td><td>12</td></tr></table>": "Zorb 4711\n\nMib 12",
    "<table><tr><th>a<th>b<tr><td>1<td>2</table>": "a b\n\n1 2",
    "<p>One<p>Two": "One\n\nTwo",
    "One<br>Two<br/>Three": "One\nTwo\nThree",
    "<ul><li>One</li><li>Two</li></ul>": "One\n\nTwo",
    "<h1>Title</h1>text": "Title\n\ntext",
    "<div>a</div>b<div>c</div>": "a\n\nb\n\nc",
    "<select><option>a</option><option>b</option></select>": "a\n\nb",
    "<dl><dt>a</dt><dd>b</dd></dl>": "a\n\nb",
    "<figure>a<figcaption>b</figcaption></figure>": "a\n\nb",
    "Zo<b>r<i>b</i></b> is<span>n't</span> <a href='#'>he</a>re": "Zorb isn't here",
    "long<wbr>word x<sup>2</sup>": "longword x2",
    "a\n  b\n\n\n c": "a b c",
    "<pre>a\n  b</pre>": "a\nb",
    "<ruby>漢<rp>(</rp><rt>かん</rt><rp>)</rp>字<rt>じ</rt></ruby>": "漢字",
    "<script>var a</script><style>p{}</style><nav>home</nav>text<!-- no -->": "text",
    "<button>OK</button><button>No</button>": "OK No",
}


@pytest.mark.parametrize("page", HTML)
def test_blocks_and_cells_part_text_and_inline_elements_do_not(page):
    text = html_text(page)
    assert text.split() == HTML[page].split()
    assert ("\n" in text) == ("\n" in HTML[page])


def test_a_page_is_read_in_the_encoding_that_it_names(tmp_path):
    said = "エスク川は流れる。"
    for name in ("shift_jis", "euc-jp", "utf-8"):
        page = f'<html><head><meta charset="{name}"><title>川</title></head><p>{said}</p>'
        (tmp_path / "page.html").write_bytes(page.encode(name))
        assert said in load_documents(tmp_path / "page.html")[0].text
    for name in ("no-such", "utf-8"):
        (tmp_path / "page.html").write_bytes(
            f'<meta charset="{name}"><p>{said}</p>'.encode("shift_jis")
        )
        with pytest.raises(WrongInput, match="page.html:1: byte 0x"):
            load_documents(tmp_path / "page.html")


def test_folding_is_idempotent():
    for text, _, _ in HELD:
        assert fold(fold(text)) == fold(text)
        assert squeezed(squeezed(text)) == squeezed(text)
