"""Self-refinement: bounds, traces, tools that fail, and a real endpoint that fails.

Also escaped text, and methods that continue where they were killed.
"""

import json
import math
import re
import threading

import pytest
from serving import Endpoint, endpoint

import polm_lab as lab
from polm_lab.rewards.endpoint import Kept
from polm_lab.core.knobs import WrongInput
from polm_lab.core.run import all_runs, open_run
from polm_lab.data.tasks import TASKS
from polm_lab.reasoning.refine.trace import (
    Ask,
    EndpointWriter,
    Step,
    Trace,
    make_writer,
    read_traces,
    tree_html,
    tree_text,
)
from polm_lab.reasoning.refine.self_critics import feedback_critic
from polm_lab.reasoning.refine.tiny_prompts import FactPrompts, SumPrompts, words_for
from polm_lab.reasoning.refine.rounds import (
    Feedback,
    draft,
    follow,
    forget,
    never,
    refine,
    remember,
    round_metrics,
    satisfied,
    unchanged,
)
from polm_lab.reasoning.selfrefine import ALGORITHMS, chosen, drafts, round_table
from polm_lab.reasoning.refine.solver import equations, solve, solved, solver, symbolic
from polm_lab.reasoning.refine.tools import (
    ProgramPrompts,
    ToolCritic,
    bm25,
    calculator,
    call_with_timeout,
    python,
    read_passages,
    run_tests,
    searched,
    source_of,
)
from polm_lab.reasoning.refine.prompts import Prompts
from polm_lab.training.search import most_for

QUICK = dict(questions=8, rounds=2, num_generations=2, dtype="float32", device="cpu")
KEY = "sk-Very+Secret/0123456789abcdef"


def says(call, *args, **more):
    with pytest.raises(WrongInput) as found:
        call(*args, **more)
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.fixture(scope="module")
def writer():
    return make_writer("tiny", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def sums():
    return TASKS["sums"].rows("prompt", 16, 5, "test")


def loop(words, **more):
    return (
        dict(
            draft=draft(words),
            critic=feedback_critic(words, contradiction=True),
            reviser=follow(words),
            stop=satisfied,
            memory=forget,
        )
        | more
    )


def refined(rows, ask, rounds=3, left=math.inf, start=0, **places):
    traces = [Trace(start + i, row, left=left) for i, row in enumerate(rows)]
    list(refine(traces, **loop(SumPrompts(), **places), ask=ask, rounds=rounds))
    return traces


# The loop ---------------------------------------------------------------------------------------


def test_a_trace_is_the_same_alone_and_in_a_batch(writer, sums):
    "Answers, steps and tokens; a batch in another order changes nothing either."
    together = refined(sums[:6], Ask(writer, 48))
    alone = [refined([row], Ask(writer, 48), start=i)[0] for i, row in enumerate(sums[:6])]
    turned = [Trace(i, sums[i]) for i in reversed(range(6))]
    list(refine(turned, **loop(SumPrompts()), ask=Ask(writer, 48), rounds=3))
    # a probability, whose last digit is rounding
    without_sure = lambda text: re.sub(r"sure: [\d.e-]+", "sure", text)
    shown = lambda trace: (
        trace.answers,
        trace.over,
        trace.tokens(),
        without_sure(tree_text(trace)),
    )
    assert (
        [shown(t) for t in together]
        == [shown(t) for t in alone]
        == [shown(t) for t in reversed(turned)]
    )
    assert len({t.answers[0] for t in together}) > 1, "nothing was revised: the comparison is empty"
    assert any(len(t.answers) > 1 for t in together), "nothing was revised: the comparison is empty"


def test_another_seed_gives_other_traces(writer, sums):
    first, second = (refined(sums, Ask(writer, 48, seed=s)) for s in (0, 1))
    assert [t.answers for t in first] != [t.answers for t in second]


def test_a_critic_that_is_never_content_ends_with_the_rounds(writer, sums):
    traces = refined(sums[:4], Ask(writer, 24), rounds=4, stop=never)
    assert {t.over for t in traces} == {"rounds"}
    assert all(len(t.answers) == 5 for t in traces)
    assert max(step.round for t in traces for step in t.steps) == 4


@pytest.mark.parametrize("tokens", [12, 30, 31, 77, 150])
def test_no_question_costs_more_than_its_tokens(writer, sums, tokens):
    "A critic and a reviser that want to write without end, many rounds, and a memory that grows."

    def greedy(traces, ask):
        replies = ask(
            traces,
            [SumPrompts().feedback(t.row, t.answer) for t in traces],
            "critique",
            max_new_tokens=10**6,
        )
        return [Feedback(one.text, False) for one in replies]

    traces = refined(
        sums[:6],
        Ask(writer, 64),
        rounds=10**6,
        left=tokens,
        critic=greedy,
        stop=never,
        memory=remember,
    )
    assert all(t.tokens() <= tokens for t in traces)
    assert {t.over for t in traces} == {"tokens"}
    assert all(t.tokens() + t.left == tokens for t in traces)
    assert max(t.tokens() for t in traces) > tokens - 40
    assert all(t.answer for t in traces), "the last answer is kept"


def test_no_room_for_a_draft_is_reported(writer, sums):
    assert "no room for a draft" in says(refined, sums[:2], Ask(writer), left=3)


def test_what_ended_is_asked_no_more():
    asked = []

    def writer(prompts, seeds, most, *rest):
        asked.append(len(prompts))
        raise AssertionError("nobody is to be asked")

    traces = [Trace(i, dict(prompt="?")) for i in range(4)]
    critic = lambda live, ask: [Feedback("", t.index % 2 == 0) for t in live]
    drafts = lambda ts, ask: ["0"] * 4
    reviser = lambda ts, fs, ask: [t.answer + "'" for t in ts]
    rounds = refine(traces, drafts, critic, reviser, satisfied, forget, Ask(writer), 3)
    opened = [len(live) for _, live in rounds]
    assert opened == [4, 4, 2, 2]
    assert [t.answer for t in traces] == ["0", "0'''", "0", "0'''"]
    assert not asked


def test_stopping_rules():
    trace = Trace(0, dict(prompt="?"), answers=["a", "b"])
    assert (
        satisfied(trace, Feedback("", True)),
        satisfied(trace, Feedback("", None)),
        never(trace, Feedback("", True)),
    ) == ("satisfied", "", "")
    assert unchanged(trace, Feedback("", False)) == ""
    assert unchanged(Trace(0, {}, answers=["a", "a"]), Feedback("", False)) == "unchanged"


def test_memory_is_bounded():
    trace = Trace(0, dict(prompt="?"), answers=["a"])
    for i in range(50):
        remember(trace, Feedback(f"no {i}"))
    assert len(trace.memory) == 8
    assert trace.memory[-1] == "a: no 49"


def test_accuracy_is_what_was_not_broken_and_what_was_corrected(writer, sums):
    score, traces = TASKS["sums"].score, refined(sums, Ask(writer, 48))
    first, last = (round_metrics(traces, r, score) for r in (0, 3))
    assert math.isclose(
        last["accuracy"],
        first["accuracy"] * (1 - last["correct_to_incorrect"])
        + (1 - first["accuracy"]) * last["incorrect_to_correct"],
    )
    assert "incorrect_to_correct" not in round_metrics(
        [Trace(0, dict(answer="2"), answers=["2"])], 0, score
    )  # nothing was wrong, so nothing can be corrected


# Traces -----------------------------------------------------------------------------------------

NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</pre></details><b>",
    "&lt;b&gt;",
    '"><svg onload=alert(1)>',
]


@pytest.mark.parametrize("text", NASTY)
def test_what_a_model_wrote_is_text_in_the_tree(text):
    trace = Trace(
        0,
        dict(prompt=text),
        answers=[text],
        over=text,
        open=[Step(text, 0, text, [dict(role="user", content=text)], facts=dict(error=text))],
    )
    trace.close("draft", 0, text, hint=text)
    from html.parser import HTMLParser

    tags, shown = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append((tag, dict(attributes).keys() - {"style"}))

        def handle_data(self, data):
            shown.append(data)

    Reader().feed(tree_html(trace))
    assert {tag for tag, _ in tags} <= {"details", "summary", "pre", "div", "i"}
    assert not any(more for _, more in tags)
    assert sum(text in part for part in shown) >= 4


def test_the_record_gives_the_traces_back(tmp_path):
    run = lab.run("selfrefine", out=tmp_path, **QUICK)
    traces = read_traces(open_run(run.path))
    assert len(traces) == 8
    assert all(t.over in ("satisfied", "rounds", "tokens") for t in traces)
    assert all(
        t.steps[0].role == "draft" and t.steps[0].parts[0].prompt == t.row["prompt"] for t in traces
    )
    mean = sum(t.tokens() for t in traces) / 8
    assert math.isclose(mean, run.summary["after"]["tokens"])
    assert "<details" in tree_html(traces)
    table = round_table(run)
    assert table.index.tolist() == [0, 1, 2]
    assert (table.tokens.diff()[1:] >= 0).all()
    from polm_lab.core.metrics import metric

    assert all(metric(name) for name in table.columns)


# Prompts ------------------------------------------------------------------------------------------


def test_the_embedded_model_is_asked_in_forms_that_it_has_read(writer):
    tokenizer = writer.tokenizer
    assert type(words_for("sums#5", tokenizer)) is SumPrompts
    assert type(words_for("facts", tokenizer)) is FactPrompts
    assert type(words_for("sums", None)) is Prompts
    assert "prompts for sums, facts, code, chat" in says(words_for, "stories", tokenizer)
    assert "expected a sum" in says(SumPrompts().feedback, dict(prompt="Hello"), "1")
    for name, task in (("sums", SumPrompts()), ("facts", FactPrompts())):
        row = TASKS[name].rows("prompt", 1, 0, "test")[0]
        feedback = Feedback("x", False, row["answer"])
        for prompt in (
            task.draft(row),
            task.feedback(row, row["answer"]),
            task.revision(row, "1", feedback),
            *task.ways(row),
            *task.questions(row, "1"),
            task.reflection(row, "1", feedback),
        ):
            assert prompt


@pytest.mark.parametrize("answer", ["", "no idea", "9" * 40, "-5", "6\n8", "<|im_end|>"])
def test_odd_answers_do_not_break_the_words(answer, sums):
    for words in (SumPrompts(), Prompts()):
        found = words.verdict(sums[0], answer, answer)
        assert words.feedback(sums[0], answer)
        assert words.revision(sums[0], answer, found)
        assert isinstance(words.answer(sums[0], answer), str)


# Tools ------------------------------------------------------------------------------------------


def test_a_tool_that_fails_costs_one_feedback(writer, sums):
    count = []

    def shaky(row, answer):
        count.append(answer)
        if len(count) % 3 == 0:
            raise OSError("the line is down")
        return calculator(row, answer)

    traces = refined(sums, Ask(writer, 48), rounds=1, critic=ToolCritic(shaky))
    has_error = lambda trace: any("error" in step.facts for step in trace.steps)
    failed = list(filter(has_error, traces))
    assert len(failed) == 5
    assert all("the line is down" in tree_text(t) and t.answer == t.answers[0] for t in failed)
    assert all(TASKS["sums"].score(t.row, t.answer) for t in traces if t not in failed)


def test_a_tool_that_always_fails_ends_the_run_with_one_line(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def ruler(row, answer):\n    raise KeyError('length')\n\n"
        "def fine(row, answer):\n    return True\n"
    )
    message = says(
        lab.run,
        "selfrefine",
        out=tmp_path,
        critic=f"{tmp_path}/mine.py:ruler",
        **QUICK | dict(num_generations=0),
    )
    assert "tool ruler: failed on each of its first 8 questions (KeyError: 'length')" in message
    run = lab.run("selfrefine", out=tmp_path, critic=f"{tmp_path}/mine.py:fine", **QUICK)
    assert run.record["endings"] == {"satisfied": 8}
    assert run.summary["after"]["accuracy"] == run.summary["before"]["accuracy"]


def test_a_tool_that_hangs_is_left_behind():
    over = threading.Event()
    assert call_with_timeout(over.wait, seconds=0.1) == (None, "no answer within 0.1 s")
    assert not over.is_set()
    over.set()
    assert call_with_timeout(lambda: 1 / 0)[1].startswith("ZeroDivisionError")
    assert call_with_timeout(lambda: 5) == (5, "")


def test_worked_examples_before_a_question_are_no_question():
    turns = [("user", "What is 9 - 4?"), ("assistant", "9 - 4 = 5"), ("user", "What is 6 + 11?")]
    row = dict(prompt=[dict(role=role, content=text) for role, text in turns], answer="17")
    assert calculator(row, "6 + 11 = 17").fine
    assert calculator(row, "6 + 11 = 16").hint == "17"
    row["prompt"][-1]["content"] = "Add 6 and 11."
    assert calculator(row, "6 + 11 = 17").text == "all sums are right"
    assert calculator(row, "6 + 11 = 18").text == "6 + 11=17"
    code = [
        dict(role="system", content="You write code."),
        dict(role="user", content="def f(x):\n"),
    ]
    assert source_of(dict(prompt=code), "    return x") == "def f(x):\n    return x"


def test_the_calculator_reads_what_is_stated():
    assert calculator(dict(prompt="23+45="), "68").fine
    assert not calculator(dict(prompt="23+45="), "67").fine
    assert not calculator(dict(prompt="23+45="), "3+5=9\n68").fine
    assert calculator(dict(prompt="9-12="), "-3").fine
    assert "neither the question nor the answer" in says(calculator, dict(prompt="Who?"), "Anna")


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "x.real",
        "x ** 9",
        "9 ** 9 ** 9",
        "(lambda: 1)()",
        "x if x else 1",
        "'a'",
        "x / 2",
        "q + 1",
        "x +",
        "(" * 500,
        "True + x",
        "x" * 200,
    ],
)
def test_the_solver_executes_nothing(text):
    with pytest.raises(ValueError):
        symbolic(text, {"x": 1, "y": 2})
    row = dict(prompt="", answer="x + 1", y=1, value=5)
    assert solver(row, text).fine is False
    assert solved(row, text) == 0.0


def test_the_solver_solves():
    for row in equations(40, 1):
        found = solve(row["answer"], row["y"], row["value"])
        assert found is not None
        assert solved(row, row["answer"]) == 1.0
    assert solve("x * 2", 0, 7) is None
    assert solve("x * x", 0, 16) == 4
    assert solve("max(x, 3) + 2", 0, 9) == 7
    assert solve("x % 13 * 3", 1, 9) == 3


def test_search_finds_what_is_there():
    assert says(bm25, []).startswith("search: no passage")
    assert "cannot be read" in says(read_passages, "nowhere.txt")
    search = bm25(["the cat sat", "a dog ran", "birds fly"], most=2)
    assert search("dog")[0] == "a dog ran"
    assert search("zebra") == []
    tool = searched(search)
    assert tool(dict(prompt="Question: which animal ran?\nAnswer:"), " dog.").fine
    assert tool(dict(prompt="zebra"), "dog").fine is None
    assert tool(dict(prompt="dog"), "").fine is False


@pytest.mark.parametrize(
    "code, outcome",
    [
        ("x + y", "passes"),
        ("x", "f(1, 2) is 1, not 3"),
        ("x +", "SyntaxError"),
        ("z", "NameError"),
        ("sum(0 for _ in iter(int, 1))", "no end within"),
        ("[0] * 10**10", "too much memory"),
        ("__import__('os')._exit(0)", "it left too early"),
        ("__import__('sys').exit(0)", "it left too early"),
        ("print('passes')", "not 3"),
        ("open('/etc/passwd').read()", "Error"),
        ("'<b>' + str(x)", "'<b>1'"),
    ],
)
def test_code_runs_in_the_sandbox_and_its_outcome_is_one_line(code, outcome):
    found = run_tests(
        source_of(dict(prompt="# add\nf = lambda x, y:"), f" {code}"),
        ["f(1, 2) == 3", "f(0, 0) == 0"],
        seconds=1.0,
    )
    assert outcome in found
    assert "\n" not in found
    assert (found == "passes") == (outcome == "passes")


def test_assertions_and_whole_programs():
    assert run_tests("def f(x):\n    return x", ["assert f(2) == 2"]) == "passes"
    assert run_tests("def f(x):\n    return x", ["assert f(2) == 3"]) == "assert f(2) == 3 fails"
    assert (
        source_of(dict(prompt="Write f."), "```python\ndef f(x):\n    return x\n```")
        == "def f(x):\n    return x"
    )


@pytest.mark.parametrize(
    "code, returned, fine, says",
    [
        ("def solution():\n    return 6 * 7", "42", True, "returns 42"),
        ("def solution():\n    return '1,250.5'", "1,250.5", True, "returns 1,250.5"),
        ("print(6)\nprint(6 * 7)", "42", True, "returns 42"),
        ("def solution():\n    print(6)\n    return 7", "7", True, "returns 7"),
        ("def solution():\n    return 'many'", "many", False, "no number"),
        ("def solution():\n    6 * 7", "None", False, "no number"),
        ("def solution():\n    return apples", "", False, "NameError"),
        ("def solution(:", "", False, "SyntaxError"),
        ("while True:\n    pass", "", False, "no end within"),
        ("__import__('os')._exit(0)", "", False, "it left"),
        ("open('/etc/passwd').read()", "", False, "Error"),
        ("", "", False, "it returns nothing"),
    ],
)
def test_a_program_answers_with_what_it_returns(code, returned, fine, says):
    found = python(dict(prompt="?"), code)
    assert found.fine is fine
    assert says in found.text
    assert "\n" not in found.text
    assert ProgramPrompts().result(code) == returned


# Sampling more ----------------------------------------------------------------------------------


@pytest.mark.parametrize("judged", [False, True])
def test_sampling_more_costs_no_more_than_refining(writer, sums, judged):
    "And what is drawn bit by bit is what is drawn at once."
    words, score = SumPrompts(), TASKS["sums"].score
    make = lambda: drafts(
        sums, 8, words, Ask(writer, 48, seed=9), feedback_critic(words) if judged else None
    )
    paid = lambda samples, tokens: samples.compared(
        tokens, lambda i, group: score(sums[i], chosen(group, words))
    )
    samples, drawn = make(), []
    for tokens in (1, 12, 60, 120, 10**6):
        found = paid(samples, tokens)
        drawn.append(len(samples.groups[0]))
        n = most_for(tokens, [samples.cost(k) for k in range(1, drawn[-1] + 1)])
        assert found[1] == samples.cost(n)
        assert n == 1 or samples.cost(n) <= tokens
        assert n == 8 or samples.cost(n + 1) > tokens
    assert drawn[0] == 1
    assert drawn[-1] == 8
    whole = make()
    whole.draw(8)
    for group, other in zip(whole.groups, samples.groups, strict=True):
        assert [(t.index, t.answers) for t in group] == [(t.index, t.answers) for t in other]
    assert paid(whole, 10**6) == found
    by_hand = 0
    for group in whole.groups:
        by_hand += sum(t.tokens() for t in group)
        by_hand -= 7 * group[0].steps[0].parts[0].read  # the prompt is read once
    assert math.isclose(whole.cost(8), by_hand / 16)


# Strategies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_runs_and_is_bounded(name, tmp_path):
    run = lab.run("selfrefine", out=tmp_path, algorithm=name, **QUICK)
    traces = read_traces(run)
    assert run.status == "finished"
    assert len(traces) == 8
    assert all(len(t.answers) <= 3 and t.tokens() <= 600 for t in traces)
    after = run.summary["after"]
    score = "gold_score" if name == "constitution" else "accuracy"  # its replies are graded
    assert 0 <= after[score] <= 1
    assert {"tokens", f"{score}/majority", f"{score}/best"} <= set(after)


@pytest.mark.parametrize(
    "name", ["self_refine", "cove", "self_contrast", "constitution", "critic", "reflexion"]
)
def test_another_local_model_is_asked_in_english(name, tmp_path):
    "A chat model with a vocabulary of its own: its replies are nonsense here, its prompts are not."
    from polm_lab.models.load import load_model
    from polm_lab.models.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("tiny")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "model")
    model = load_model("tiny", "float32", "cpu")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    run = lab.run(
        "selfrefine",
        out=tmp_path / "runs",
        model=str(tmp_path / "model"),
        algorithm=name,
        data="sums",
        token_budget=2000,
        **QUICK | dict(questions=4, num_generations=0),
    )
    asked = [
        part.prompt
        for t in read_traces(run)
        for step in t.steps
        for part in step.parts
        if part.prompt and not part.role.startswith("tool")
    ]
    assert run.status == "finished"
    assert all(isinstance(prompt, list) and prompt[-1]["role"] == "user" for prompt in asked)
    assert len(asked) > 4


def test_on_the_command_line(forked):
    done = forked(
        "run",
        "selfrefine",
        "--bare",
        "--json",
        "-p",
        "algorithm",
        "critic",
        "-p",
        "questions",
        "4",
        "-p",
        "num_generations",
        "2",
    )
    assert done.returncode == 0
    assert json.loads(done.stdout.splitlines()[-1])["summary"]["after"]["accuracy"] >= 0.75
    wrong = forked("run", "selfrefine", "--bare", "-p", "algorithm", "critik")
    assert wrong.returncode == 2
    assert len(wrong.stderr.strip().splitlines()) == 1
    assert "did you mean 'critic'" in wrong.stderr


def test_wrong_settings_are_refused_before_a_model_is_asked(tmp_path):
    refused = lambda **more: says(lab.run, "selfrefine", out=tmp_path, **QUICK | more)
    assert "did you mean 'reflexion'" in refused(algorithm="reflexon")
    assert "critic = 'calcullator'" in refused(critic="calcullator")
    assert "no prompts for feedback in code" in refused(data="code")
    assert "there is no file" in refused(critic="nowhere.py:f")
    assert "it asks for no program" in refused(critic="python", prompt_style="sums")
    assert "cannot be read" in refused(algorithm="flare", source="nowhere.txt")
    assert "rounds = 0" in refused(rounds=0)


# Endpoints --------------------------------------------------------------------------------------


class Server(Endpoint):
    "It adds up badly."

    def answer(self, body, echo):
        return {
            "choices": [
                {"message": {"content": self.reply(body["messages"])}, "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": 11, "completion_tokens": 3},
        }

    def reply(self, messages):
        a, _, b = messages[0]["content"].split("\n")[0].rstrip("=").partition("+")
        truth, last = int(a) + int(b), messages[-1]["content"]
        if "Check that answer" in last:
            verdict = "right" if messages[-2]["content"] == str(truth) else "wrong"
            return f"{a}+{b} is {truth}. VERDICT: {verdict}"
        if "Feedback on your answer" in last:
            return f"{truth}"
        return str(truth + truth % 2)  # odd sums come out wrong


server = endpoint(Server)


def test_an_endpoint_is_asked_in_english_and_corrects_its_answers(server, tmp_path, monkeypatch):
    monkeypatch.setenv("REFINE_KEY", KEY)
    server.fails = [503, "drop", "torn", 429, "[]", "{"]
    run = lab.run(
        "selfrefine",
        out=tmp_path,
        endpoint=server.spec,
        key_variable="REFINE_KEY",
        data="sums",
        **QUICK | dict(num_generations=0),
    )
    assert run.summary["after"]["accuracy"] == 1.0 > run.summary["before"]["accuracy"]
    assert run.record["endings"] == {"satisfied": 8}
    assert run.summary["after"]["tokens"] >= 28
    assert all("Check that answer" not in body["messages"][0]["content"] for body in server.bodies)
    for path in run.path.rglob("*"):
        assert not path.is_file() or KEY not in path.read_text(errors="replace")


class Programmer(Server):
    "It forgets a name in its first program, and reads the error."

    def reply(self, messages):
        text = messages[-1]["content"]
        numbers = re.findall(r"\d+", messages[0]["content"])[:2]
        code = f"    return {' + '.join(numbers)}" if "NameError" in text else "    return apples"
        return f"Sure:\n```python\ndef solution():\n{code}\n```"


programmer = endpoint(Programmer)


def test_a_program_is_corrected_after_its_error(programmer, tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [
        dict(prompt=f"Ann has {a} pens and buys {a + 5} more. How many?", answer=f"{2 * a + 5}")
        for a in range(3, 9)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    values = dict(endpoint=programmer.spec, data=str(path), algorithm="critic", critic="python")
    run = lab.run("selfrefine", out=tmp_path, **QUICK | values | dict(num_generations=0))
    assert run.summary["before"]["accuracy"] == 0
    assert run.summary["after"]["accuracy"] == 1
    assert run.record["endings"] == {"satisfied": 6}
    assert "one fenced code block" in programmer.bodies[0]["messages"][0]["content"]


def test_an_endpoint_that_dies_ends_the_run_with_one_line_and_is_not_asked_twice(
    server, tmp_path, monkeypatch
):
    values = dict(endpoint=server.spec, data="sums", **QUICK | dict(num_generations=0))
    plain, count = Server.reply, []

    def dies(self, messages):
        count.append(1)
        self.dead = len(count) >= 8  # after the drafts
        return plain(self, messages)

    monkeypatch.setattr(Server, "reply", dies)
    message = says(lab.run, "selfrefine", out=tmp_path, **values)
    assert message.startswith(f"endpoint {server.url}#small: status 503")
    assert "resume the run" in message
    run = all_runs(tmp_path)[0]
    assert run.status == "failed"
    assert run.read()["reason"] == message
    monkeypatch.setattr(Server, "reply", plain)
    server.dead, server.bodies = False, []
    from polm_lab.training.chain import execute

    execute(open_run(run.path))
    drafts = [body for body in server.bodies if len(body["messages"]) == 1]
    assert open_run(run.path).status == "finished"
    assert not drafts, "it was asked again for replies that it had given"
    assert sum(row["step"] == 0 for row in open_run(run.path).lines("samples")) == 8, (
        "the drafts are in the record once"
    )


def test_an_endpoint_that_is_not_there_or_refuses(server, tmp_path):
    refused = lambda endpoint, **more: says(
        lab.run,
        "selfrefine",
        out=tmp_path,
        endpoint=endpoint,
        data="sums",
        **QUICK | dict(num_generations=0) | more,
    )
    assert "cannot be reached" in refused("openai:http://127.0.0.1:9/v1#m")
    assert "a rule; expected openai" in refused("rule:correct")
    assert "no such environment variable" in refused(server.spec, key_variable="NO_SUCH_VARIABLE")
    server.fails = [404] * 20
    assert "status 404" in refused(server.spec)


def test_an_endpoint_may_count_no_tokens(server, tmp_path):
    writer = EndpointWriter(server.url, "small", Kept(tmp_path / "said.jsonl"))
    server.fails = [
        json.dumps({"choices": [{"message": {"content": None}}]}),
        json.dumps({"choices": [{"message": {"content": "x" * 40}}], "usage": None}),
    ]
    empty, long = (writer(["12+34="], [i], [1000], 64, 1.0)[0] for i in range(2))
    assert empty.text == ""
    assert empty.written >= 1
    assert long.written == 11
    assert long.read >= 2
    assert math.isnan(long.sure)
    assert writer(["12+34="], [5], [1], 64, 1.0)[0].written == 0
    assert server.asked == 2  # no room: not asked
