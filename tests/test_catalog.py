"""The data sets of the survey's table 9: every mapping, and the whole way from a name to rows.

The rows have the columns that the cards and the published files have; their content is made up.
"""

import csv
import json

import pytest
from conftest import ROOT

from polm_lab.data.catalog import CATALOG
from polm_lab.data.rows import Row
from polm_lab.data.schema import convert, normalize_schema
from polm_lab.data.load import datasets_table, load_data
from polm_lab.core.knobs import WrongInput

ALPACA = [
    dict(
        instruction="Add.",
        input="2, 3",
        output="5",
        text="Below is an instruction. ### Response: 5",
    ),
    dict(instruction="Greet.", input="", output="Hello.", text="Below is. Hello."),
]
PLAIN_ALPACA = [
    dict(instruction=row["instruction"], input=row["input"], output=row["output"]) for row in ALPACA
]
SHAREGPT = [
    dict(
        id="x_0",
        conversations=[
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello!"},
            {"from": "human", "value": "Bye"},
            {"from": "gpt", "value": "Farewell."},
        ],
    )
]
INPUTS = [
    dict(inputs="Is it true? yes or no\n", targets="yes", task="boolq"),
    dict(inputs="Translate: chat", targets="cat", task="wmt"),
]
COMPARISON = dict(worker="w1", batch="batch3", split="train", extra={"confidence": None})
MAGPIE = [
    dict(
        uuid="u1",
        model="m",
        gen_input_configs={
            "temperature": 1.0,
            "top_p": 1.0,
            "input_generator": "m",
            "seed": None,
            "pre_query_template": "<|user|>",
        },
        instruction="Name a river.",
        response="The Nile.",
        conversations=[
            {"from": "human", "value": "Name a river."},
            {"from": "gpt", "value": "The Nile."},
        ],
        task_category="Information seeking",
        difficulty="easy",
        input_quality="good",
        instruct_reward=1.5,
        min_neighbor_distance=0.1,
        repeat_count=0,
        language="EN",
    )
]


def message(name, parent, role, text, rank=None, **more):
    facts = dict(
        user_id="u",
        created_date="2023-02-05",
        lang="en",
        review_count=3,
        review_result=True,
        deleted=False,
        synthetic=False,
        model_name=None,
    )
    return dict(
        message_id=name,
        parent_id=parent,
        role=role,
        text=text,
        rank=rank,
        message_tree_id="q",
        tree_state="ready_for_export",
        **facts,
        **more,
    )


ROWS = {
    "openai-summarization": [
        dict(
            info=dict(
                id="t3_1",
                post="I lost my keys and found them.",
                title="Keys",
                subreddit="tifu",
                site=None,
                article=None,
            ),
            choice=1,
            summaries=[
                dict(text=" Lost.", policy="sup1", note=None),
                dict(text=" Keys lost, then found.", policy="ref", note=None),
            ],
            **COMPARISON,
        ),
        dict(
            info=dict(
                id="c1", post=None, title="News", subreddit=None, site="cnn", article="It rained."
            ),
            choice=0,
            summaries=[
                dict(text="Rain.", policy="sup1", note=None),
                dict(text="Sun.", policy="ref", note=None),
            ],
            **COMPARISON,
        ),
    ],
    "flan": INPUTS,
    "p3": [
        dict(
            answer_choices=["yes", "no"],
            inputs=[3, 4, 1],
            inputs_pretokenized="Is it so?",
            targets=[7, 1],
            targets_pretokenized="\n yes",
        )
    ],
    "shp": [
        dict(
            post_id="p",
            domain="askculinary_train",
            upvote_ratio=0.98,
            history="How do I peel garlic?",
            c_root_id_A="a",
            c_root_id_B="b",
            created_at_utc_A=2,
            created_at_utc_B=1,
            score_A=s,
            score_B=10,
            human_ref_A="Shake it.",
            human_ref_B="Slowly.",
            labels=label,
            seconds_difference=1.0,
            score_ratio=2.0,
        )
        for s, label in ((20, 1), (5, 0))
    ],
    "webgpt": [
        dict(
            question=dict(dataset="eli5", id="i", full_text="Why is ice slippery?"),
            quotes_0=dict(title=["a"], extract=["b"]),
            answer_0="A film of water [1].",
            tokens_0=dict(prefix=[1], completion=[2]),
            score_0=s,
            quotes_1=dict(title=[], extract=[]),
            answer_1="It is cold.",
            tokens_1=dict(prefix=[1], completion=[3]),
            score_1=-s,
        )
        for s in (0.75, 0.0, -0.25)
    ],
    "sup-natinst": [
        dict(
            task_name="task1_x",
            id="task1-1",
            definition="Answer the question.",
            inputs="Who wrote it?",
            targets="She did.",
        )
    ],
    "hh-rlhf": [
        dict(
            chosen="\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Help?\n\nAssistant: Gladly.",
            rejected="\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Help?\n\nAssistant: No.",
        )
    ],
    "self-instruct": [dict(prompt="Make a list of fruit.\n\nOutput:", completion=" Apple, pear.")],
    "unnatural": [
        dict(
            instruction="Sort the words.",
            instances=[
                dict(
                    instruction_with_input="Sort the words.\nb a",
                    input="b a",
                    constraints="The output is one line.",
                    output="a b",
                )
            ],
            reformulations=[
                dict(
                    instruction="Put in order {INPUT}",
                    input="b a",
                    instruction_with_input="Put in order b a",
                    output="a b",
                )
            ],
        ),
        dict(
            instruction="Name it.",
            instances=[
                dict(
                    instruction_with_input="Name it: cat",
                    input="cat",
                    constraints="None.",
                    output="Tom",
                )
            ],
            reformulations=None,
        ),
    ],
    "flan-v2": [
        dict(
            inputs="Q: 2+2?",
            targets="4",
            _template_idx=3,
            _task_source="Flan2021",
            _task_name="math",
            _template_type="zs_opt",
        )
    ],
    "xp3": [dict(inputs="Phrase: an apple. Is it fruit?", targets="Yes")],
    "alpaca": ALPACA,
    "vicuna": SHAREGPT,
    "oasst1": [
        message("q", None, "prompter", "Name a prime."),
        message("a", "q", "assistant", "Four.", 1),
        message("b", "q", "assistant", "Seven.", 0),
        message("c", "b", "prompter", "Another?"),
        message("d", "c", "assistant", "Eleven."),
    ],
    "hc3": [
        dict(
            index=None,
            question="What is a quark?",
            human_answers=["A particle."],
            chatgpt_answers=["A quark is an elementary particle."],
            source="reddit_eli5",
        ),
        dict(
            index=None,
            question="Empty?",
            human_answers=["Yes."],
            chatgpt_answers=[],
            source="finance",
        ),
    ],
    "dolly-15k": [
        dict(
            instruction="When was it?",
            context="It was in 1999.",
            response="1999",
            category="closed_qa",
        ),
        dict(instruction="Say hi.", context="", response="Hi.", category="open_qa"),
    ],
    "sharegpt": SHAREGPT,
    "alpaca-gpt4": ALPACA,
    "evol-instruct": [
        dict(instruction="Explain recursion to a cook.", output="A recipe that calls itself.")
    ],
    "belle": [dict(instruction="列出两种颜色。", input="", output="红、蓝。")],
    "openorca": [
        dict(
            id="niv.1",
            system_prompt="You are a helpful assistant.",
            question="What is 1+1?",
            response="2",
        ),
        dict(id="flan.2", system_prompt="", question="And 2+2?", response="4"),
    ],
    "stackexchange": [
        dict(
            qid=1,
            question="<p>How do I exit?</p>",
            date="2011/07/19",
            metadata=["https://x"],
            answers=[
                dict(
                    answer_id=1,
                    author="A",
                    author_id=1,
                    author_profile="u",
                    pm_score=1,
                    selected=False,
                    text="<p>Reboot.</p>",
                ),
                dict(
                    answer_id=2,
                    author="B",
                    author_id=2,
                    author_profile="u",
                    pm_score=5,
                    selected=True,
                    text="<p>Type <code>:q</code></p>",
                ),
            ],
        )
    ],
    "openhermes-1": PLAIN_ALPACA,
    "openhermes-2.5": [
        dict(
            category="general",
            source="airoboros2.2",
            **dict.fromkeys(("topic", "title", "model", "language")),
            conversations=[
                {"from": who, "value": text, "weight": None}
                for who, text in (("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello."))
            ],
        )
    ],
    "ultrachat": [
        dict(
            prompt="Hi",
            prompt_id="f0",
            messages=[dict(role="user", content="Hi"), dict(role="assistant", content="Hello.")],
        )
    ],
    "instinwild": PLAIN_ALPACA,
    "baize": [
        dict(
            topic="whales",
            input=(
                "The conversation between human and AI assistant.\n[|Human|] Is a whale a "
                "fish?\n[|AI|] No.\n[|Human|] "
            ),
        )
    ],
    "wildchat": [
        dict(
            conversation_hash="h",
            model="gpt-4",
            timestamp="2023-04-09",
            turn=1,
            language="English",
            toxic=False,
            redacted=False,
            country="Norway",
            conversation=[
                dict(
                    role="user",
                    content="Hi",
                    language="English",
                    toxic=False,
                    redacted=False,
                    turn_identifier=1,
                ),
                dict(
                    role="assistant",
                    content="Hello.",
                    language="English",
                    toxic=False,
                    redacted=False,
                    turn_identifier=1,
                ),
            ],
        )
    ],
    "genqa": [
        dict(
            text=[
                dict(content="Sort a list in C.", role="user"),
                dict(content="Use qsort.", role="assistant"),
            ],
            prompt="p",
            template="t",
            idx=7,
            category="code",
        )
    ],
    **{name: MAGPIE for name in CATALOG if name.startswith("magpie")},
}
EXPECTED = {  # name -> (kind, what the first rows say last)
    "openai-summarization": ("preference", ["Keys lost, then found.", "Rain."]),
    "flan": ("completion", ["yes", "cat"]),
    "p3": ("completion", ["yes"]),
    "shp": ("preference", ["Shake it.", "Slowly."]),
    "webgpt": ("preference", ["A film of water [1].", "It is cold."]),
    "sup-natinst": ("completion", ["She did."]),
    "hh-rlhf": ("preference", ["Gladly."]),
    "self-instruct": ("completion", [" Apple, pear."]),
    "unnatural": ("completion", ["a b", "a b", "Tom"]),
    "flan-v2": ("completion", ["4"]),
    "xp3": ("completion", ["Yes"]),
    "alpaca": ("completion", ["5", "Hello."]),
    "vicuna": ("text", ["Farewell."]),
    "oasst1": ("completion", ["Seven.", "Eleven."]),
    "hc3": ("completion", ["A quark is an elementary particle."]),
    "dolly-15k": ("completion", ["1999", "Hi."]),
    "sharegpt": ("text", ["Farewell."]),
    "alpaca-gpt4": ("completion", ["5", "Hello."]),
    "evol-instruct": ("completion", ["A recipe that calls itself."]),
    "belle": ("completion", ["红、蓝。"]),
    "openorca": ("completion", ["2", "4"]),
    "stackexchange": ("preference", ["Type :q"]),
    "openhermes-1": ("completion", ["5", "Hello."]),
    "openhermes-2.5": ("text", ["Hello."]),
    "ultrachat": ("text", ["Hello."]),
    "instinwild": ("completion", ["5", "Hello."]),
    "baize": ("text", ["No."]),
    "wildchat": ("text", ["Hello."]),
    "genqa": ("text", ["Use qsort."]),
    **{name: ("completion", ["The Nile."]) for name in CATALOG if name.startswith("magpie")},
}


def copy_of(name, folder, rows=None):
    "The data set's rows as a file, and how it is called."
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows or ROWS[name]), encoding="utf-8")
    return f"{name}@{path}"


def last(row):
    for name in ("chosen", "completion", "messages", "text", "prompt"):
        if name in row:
            return row[name] if isinstance(row[name], str) else row[name][-1]["content"]


def table9():
    with open(ROOT / "data/survey/table9_datasets.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_data_set_of_table_9_is_there():
    rows = {row["system"]: row for row in table9()}
    assert set(rows) == {entry.system for entry in CATALOG.values()}
    assert len(CATALOG) == 37
    assert set(ROWS) == set(EXPECTED) == set(CATALOG)
    for entry in CATALOG.values():
        assert entry.size == rows[entry.system]["nums"], entry.name
        assert entry.phase.split(" (")[0] == rows[entry.system]["phase"], entry.name
        assert entry.licence
        assert entry.citation
        assert entry.checked
        assert entry.address.startswith("https://")


@pytest.mark.parametrize("name", CATALOG)
def test_rows_of_the_true_schema_become_ours(name, tmp_path):
    kind, said = EXPECTED[name]
    rows = load_data(copy_of(name, tmp_path), kind, "all")
    assert [last(row) for row in rows] == said
    for other in CATALOG[name].kinds:
        found = load_data(copy_of(name, tmp_path), other, "all")
        assert found, other


@pytest.mark.parametrize("name", [n for n, e in CATALOG.items() if e.rows.__name__ != "as_it_is"])
def test_rows_that_lack_a_column_are_refused_where_they_stand(name, tmp_path):
    kind = EXPECTED[name][0]
    with pytest.raises(WrongInput, match=rf"{name}\.jsonl:1: .*expected .*"):
        load_data(copy_of(name, tmp_path, [dict(colour="red")]), kind, "all")


def test_what_a_mapping_keeps(tmp_path):
    first = lambda name, kind: load_data(copy_of(name, tmp_path), kind, "all")[0]  # noqa: E731
    assert first("unnatural", "completion")["prompt"][0]["content"].endswith(
        "The output is one line."
    )
    assert (
        load_data(copy_of("unnatural", tmp_path), "completion", "all")[-1]["prompt"][0]["content"]
        == "Name it: cat"
    )
    assert first("openorca", "completion")["prompt"][0]["role"] == "system"
    assert (
        first("dolly-15k", "completion")["prompt"][0]["content"]
        == "When was it?\n\nIt was in 1999."
    )
    assert first("hc3", "completion")["human"] == ["A particle."]
    assert first("stackexchange", "ranked")["scores"] == [5.0, 1.0]
    assert first("oasst1", "ranked")["scores"] == [0.0, -1.0]
    assert (
        load_data(copy_of("oasst1", tmp_path), "prompt", "all")[1]["prompt"][-1]["content"]
        == "Another?"
    )
    assert first("hh-rlhf", "preference")["rejected"][0]["content"] == "No."


def test_a_mapping_that_turns_preferences_round_would_be_seen(tmp_path):
    "The label says who won: with it turned, chosen and rejected change places."
    rows = [dict(row, labels=1 - row["labels"]) for row in ROWS["shp"]]
    assert [last(r) for r in load_data(copy_of("shp", tmp_path, rows), "preference", "all")] == [
        "Slowly.",
        "Shake it.",
    ]
    rows = [dict(row, choice=1 - row["choice"]) for row in ROWS["openai-summarization"]]
    assert [
        last(r)
        for r in load_data(copy_of("openai-summarization", tmp_path, rows), "preference", "all")
    ] == ["Lost.", "Sun."]


def test_a_wrong_choice_is_refused(tmp_path):
    rows = [dict(ROWS["openai-summarization"][0], choice=2)]
    with pytest.raises(WrongInput, match="choice is 2 of 2 summaries"):
        load_data(copy_of("openai-summarization", tmp_path, rows), "preference", "all")


def test_limits_splits_and_skipping(tmp_path):
    spec = copy_of("shp", tmp_path, ROWS["shp"] * 20)
    assert len(load_data(spec + "#7", "preference", "all")) == 7
    train, test = load_data(spec, "preference"), load_data(spec, "preference", "test")
    assert len(train) + len(test) == 40
    assert test
    spec = copy_of("shp", tmp_path, [*ROWS["shp"], dict(colour="red")])
    with pytest.raises(WrongInput, match="no labels|no human_ref_A"):
        load_data(spec, "preference", "all")
    assert len(load_data(spec + "#skip", "preference", "all")) == 2


def cached(tmp_path, monkeypatch, hub_id, files, ref="main"):
    "A snapshot of a data set in the Hub's local cache, as the Hub's own code leaves it."
    import datasets
    import huggingface_hub.constants as hub
    import pandas as pd

    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / f"datasets--{hub_id.replace('/', '--')}"
    (repo / "refs" / ref).parent.mkdir(parents=True)
    (repo / "refs" / ref).write_text(revision)
    for name, rows in files.items():
        file = repo / "snapshots" / revision / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pd.DataFrame(rows).to_parquet(file)
        else:
            file.write_text("\n".join(json.dumps(r) for r in rows))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")


def test_a_name_goes_through_the_hub(tmp_path, monkeypatch):
    cached(
        tmp_path,
        monkeypatch,
        "stanfordnlp/SHP",
        {"train.jsonl": ROWS["shp"], "test.jsonl": ROWS["shp"][:1]},
    )
    assert [last(r) for r in load_data("shp", "preference")] == ["Shake it.", "Slowly."]
    assert [last(r) for r in load_data("shp", "preference", "test")] == ["Shake it."]
    with pytest.raises(WrongInput, match="not to be had from the Hub.*did you mean 'shp'"):
        load_data("shpp", "preference")


def test_a_data_set_may_be_a_file_of_what_is_on_the_hub(tmp_path, monkeypatch):
    cached(
        tmp_path,
        monkeypatch,
        "bigscience/xP3",
        {"ak/merged_ak.jsonl": ROWS["xp3"], "sw/merged_sw.jsonl": ROWS["xp3"] * 2, "xP3.py": []},
    )
    assert [last(r) for r in load_data("xp3", "completion", "all")] == ["Yes"]
    assert len(load_data("xp3@bigscience/xP3:sw/merged_sw.jsonl", "completion", "all")) == 2
    with pytest.raises(WrongInput, match="^bigscience/xP3:sw/merged_sw.jsonl:1: no .*score_0"):
        load_data("webgpt@bigscience/xP3:sw/merged_sw.jsonl", "preference", "all")
    with pytest.raises(
        WrongInput,
        match=(
            "data 'bigscience/xP3:tw/none.jsonl': not to be had from the Hub .*; expected a "
            "file of bigscience/xP3; name another"
        ),
    ):
        load_data("bigscience/xP3:tw/none.jsonl", "completion", "all")


@pytest.mark.parametrize("network", [False, True])
def test_what_a_script_would_make_is_read_from_the_hubs_own_copy(tmp_path, monkeypatch, network):
    """`datasets` refuses four data sets of table 9, since they come with a script.

    The Hub keeps their rows as Parquet, in a branch of its own.
    """
    import datasets
    import huggingface_hub

    rows = ROWS["openai-summarization"]
    files = {
        "comparisons/train/0000.parquet": rows,
        "comparisons/validation/0000.parquet": rows[::-1],
        "axis/test/0000.parquet": [dict(summary="x")],
    }
    cached(tmp_path, monkeypatch, "openai/summarize_from_feedback", files, "refs/convert/parquet")
    if network:  # then the Hub answers, and `datasets` finds the script
        real = datasets.load_dataset

        def refusing(path, *args, **options):
            if path == "openai/summarize_from_feedback":
                raise RuntimeError(
                    "Dataset scripts are no longer supported, but found summarize_from_feedback.py"
                )
            return real(path, *args, **options)

        monkeypatch.setattr(datasets, "load_dataset", refusing)
        asked = (
            huggingface_hub.HfApi.dataset_info
        )  # that of the branch goes to the cache, as without network
        monkeypatch.setattr(
            huggingface_hub.HfApi,
            "dataset_info",
            lambda self, *args, **options: (
                asked(self, *args, **options) if "revision" in options else None
            ),
        )
    assert [last(r) for r in load_data("openai-summarization", "preference")] == [
        "Keys lost, then found.",
        "Rain.",
    ]
    assert [last(r) for r in load_data("openai-summarization", "preference", "test")] == [
        "Rain.",
        "Keys lost, then found.",
    ]


def test_what_is_not_on_the_hub_says_where_it_is():
    with pytest.raises(
        WrongInput,
        match=(
            r"data 'instinwild': it is not on the Hub; .*github.com/XueFuzhao/InstructionWild "
            r"and write instinwild@FILE"
        ),
    ):
        load_data("instinwild", "completion")


def test_the_table_lists_them():
    table = datasets_table().set_index("data")
    assert set(CATALOG) < set(table.index)
    assert {"sums", "chat"} < set(table.index)
    assert table.loc["dolly-15k"][["phase", "rows", "licence", "hub"]].tolist() == [
        "SFT",
        "15K",
        "CC-BY-SA-3.0",
        "databricks/databricks-dolly-15k",
    ]
    assert (
        (
            table.loc[list(CATALOG), ["kinds", "phase", "licence", "hub", "citation", "checked"]]
            != ""
        )
        .all()
        .all()
    )


def test_known_schemas_are_known():
    "What the catalogue leaves to `core/data` as it is."
    for name in (n for n, e in CATALOG.items() if e.rows.__name__ == "as_it_is"):
        for row in ROWS[name]:
            assert convert(normalize_schema(Row(row)), EXPECTED[name][0])
