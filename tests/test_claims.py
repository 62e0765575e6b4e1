"""Where a page makes a claim about a method, the code does it.

Held-out rows, unlabelled inputs, λ of eq. 39, errors that reach the model, scores of a judge.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import polm_lab as lab
from polm_lab.rewards.judges import MARK, ModelJudge, mark_in, mark_of
from polm_lab.rewards.endpoint import Unreadable
from polm_lab.data.encode import encode
from polm_lab.data.load import load_data
from polm_lab.core.knobs import WrongInput
from polm_lab.models.policy import Policy
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.models.save import save_model
from polm_lab.data.tasks import TASKS
from polm_lab.integration import fuse as fusing
from polm_lab.integration.merging.experts import prompt_text, rows_apart
from polm_lab.reasoning.refine.trace import Ask, Reply, Trace, read_traces
from polm_lab.reasoning.refine.tiny_prompts import CodePrompts
from polm_lab.reasoning.refine.rounds import forget, refine, satisfied
from polm_lab.reasoning.selfrefine import REVISERS, ALGORITHMS
from polm_lab.reasoning.refine.solver import equations, solver
from polm_lab.reasoning.refine.tools import ToolCritic
from polm_lab.reasoning.refine.prompts import Prompts


def tuned(folder, seed: int, size: float):
    "`tiny` with every weight moved a little, as a folder."
    model, words = load_model("tiny", "float32", "cpu"), load_tokenizer("tiny")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += size * torch.randn(weight.shape, generator=generator)
    return str(save_model(model, words, folder))


@pytest.fixture(scope="module")
def tunes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tunes")
    return [tuned(folder / "a", 1, 0.002), tuned(folder / "b", 2, 0.004)]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Model soup ---------------------------------------------------------------------------------------


def test_rows_to_choose_on_are_held_out_and_not_those_of_the_report():
    reported = {prompt_text(row) for row in load_data("sums", "completion", "test")[:32]}
    trained = {prompt_text(row) for row in load_data("sums", "completion")}
    held_out = [prompt_text(row) for row in load_data("sums", "completion", "test")]
    found = [prompt_text(row) for row in rows_apart("sums", "completion", ["sums", "chat"], 32, 48)]
    assert len(found) == 48
    assert set(found) <= set(held_out)
    assert not set(found) & reported
    assert not set(found) & trained
    assert found == [words for words in held_out if words not in reported][:48]


def test_the_greedy_soup_is_chosen_on_held_out_rows(tunes, runs, monkeypatch):
    "What the loss of the selection reads, row by row, next to what the report reads."
    read = []
    plain = fusing.mean_nll
    monkeypatch.setattr(
        fusing, "mean_nll", lambda policy, part, pad: read.append(part) or plain(policy, part, pad)
    )
    run = lab.run(
        "fuse",
        models=",".join(tunes),
        tasks="sums",
        data="sums,sums",
        eval_rows=4,
        calibration_samples=6,
        algorithm="greedy",
    )
    assert run.status == "finished"
    assert run.read()["chosen"]
    words = load_tokenizer("tiny")
    rows = rows_apart("sums", "completion", ["sums"], 4, 6)
    wanted = [encode(words, row, "completion", 256)["input_ids"] for row in rows]
    assert [example["input_ids"] for example in read[0]] == wanted
    assert read[0] == read[1]
    reported = [
        encode(words, row, "completion", 256)["input_ids"]
        for row in load_data("sums", "completion", "test")[:4]
    ]
    assert not any(ids in reported for ids in wanted)


def test_a_file_whose_held_out_rows_all_are_in_the_report_is_refused(tunes, runs):
    rows = load_data("sums", "completion")[:60]
    (runs / "few.jsonl").write_text(
        "".join(
            json.dumps(dict(prompt=r["prompt"], completion=r["completion"])) + "\n" for r in rows
        )
    )
    shared = dict(
        models=",".join(tunes), tasks="few.jsonl", data="few.jsonl,few.jsonl", algorithm="greedy"
    )
    with pytest.raises(WrongInput) as error:
        lab.run("fuse", **shared, eval_rows=32)
    assert "few.jsonl" in str(error.value)
    assert "lower rows" in str(error.value)
    assert "\n" not in str(error.value)
    assert lab.run("fuse", **shared, eval_rows=1, calibration_samples=2).status == "finished"


# AdaMerging ---------------------------------------------------------------------------------------


def test_adamerging_reads_prompts_alone(tunes, runs):
    """Other answers to the same prompts, or none, give the same coefficients, to the bit.

    The entropy is that of the first prediction after a prompt.
    """
    rows = load_data("sums", "prompt", "test")[40:80]
    answers = {"right": lambda n: str(n), "wrong": lambda n: "no idea at all", "none": None}
    found = {}
    for name, answer in answers.items():
        file = runs / f"{name}.jsonl"
        lines = [
            dict(prompt=row["prompt"]) | ({} if answer is None else dict(completion=answer(n)))
            for n, row in enumerate(rows)
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        run = lab.run(
            "fuse",
            models=",".join(tunes),
            tasks="",
            data=f"{file},{file}",
            algorithm="adamerging",
            steps=3,
            calibration_samples=4,
        )
        found[name] = run.read()["coefficients"], run.read()["entropy"]
    assert found["right"] == found["wrong"] == found["none"]
    policy, words = Policy(load_model("tiny", "float32", "cpu")), load_tokenizer("tiny")
    state = {name: p.detach() for name, p in policy.model.named_parameters()}
    prompt = encode(words, rows[0], "prompt", 256)["input_ids"]
    with torch.no_grad():
        p = torch.softmax(policy.model(torch.tensor([prompt])).logits[0, -1].double(), -1)
        assert fusing.prediction_entropy(policy, state, prompt).item() == pytest.approx(
            -(p * p.log()).sum().item(), abs=1e-5
        )


# MetaGPT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, 0.1])
def test_the_lambda_of_metagpt_is_that_of_eq_39(tunes, runs, scaling):
    "θ₀ + Σ ‖τ_t‖² / Σ ‖τ_k‖² τ_t, whatever the knob of the other algorithms says."
    run = lab.run(
        "merge",
        models=",".join(tunes),
        tasks="",
        algorithm="metagpt",
        save_dtype="float32",
        **({} if scaling is None else dict(scaling=scaling)),
    )

    def parameters(path):
        model = load_model(path, "float32", "cpu")
        return {name: p.detach() for name, p in model.named_parameters()}

    start, vectors, squares = parameters("tiny"), [], []
    for state in map(parameters, tunes):
        vectors.append({name: state[name] - start[name] for name in start})
        parts = [v.double().square().sum().item() for v in vectors[-1].values()]
        squares.append(sum(parts))
    shares = [square / sum(squares) for square in squares]
    assert shares[0] == pytest.approx(0.2, abs=0.01)  # spreads of 0.002 and 0.004: one to four
    made = load_file(run.path / "model" / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.2.mlp.up_proj.weight"):
        wanted = start[name] + shares[0] * vectors[0][name] + shares[1] * vectors[1][name]
        assert torch.allclose(made[name].float(), wanted, atol=1e-6)


# Complaints that reach the model ------------------------------------------------------------------


def revisions(words, row, drafts, critic, reviser):
    "The prompts of the revisions of one question whose drafts are given, and the trace."
    prompts = []

    def writer(prompt_text, seeds, most, *rest):
        prompts.extend(prompt_text)
        return [Reply(drafts[min(len(prompts), len(drafts) - 1)], 1, 1) for _ in prompt_text]

    trace = Trace(0, row)
    list(
        refine(
            [trace],
            lambda traces, ask: [drafts[0]],
            critic,
            reviser(words),
            satisfied,
            forget,
            Ask(writer),
            2,
        )
    )
    return prompts, trace


def words_of(prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


@pytest.mark.parametrize("words", [CodePrompts(), Prompts()])
def test_the_solvers_complaint_reaches_the_model(words):
    """Logic-LM: the first program cannot be parsed, and the second has no solution.

    The prompt of each repair has the program and the solver's error message.
    """
    assert ALGORITHMS["logic_lm"].reviser == "follow"
    row = dict(equations(1)[0], y=0, value=7)
    bad = ["x ** x", "x * 2", "x + 7"]
    prompts, trace = revisions(words, row, bad, ToolCritic(solver), REVISERS["follow"])
    assert len(prompts) == 2
    assert trace.over in ("satisfied", "rounds")
    prompt_texts = [words_of(prompt) for prompt in prompts]
    assert "x ** x" in prompt_texts[0]
    assert "the solver cannot read it" in prompt_texts[0]
    assert "x * 2" in prompt_texts[1]
    assert "f(x, 0) = 7 has no solution" in prompt_texts[1]
    assert all(words_of(words.draft(row)).split("\n")[0] in text for text in prompt_texts)


@pytest.mark.parametrize("words", [CodePrompts(), Prompts()])
def test_what_a_program_did_wrong_reaches_the_model(words):
    "Self-Debug: the failed program and the output of its tests are in the prompt of the repair."
    way = ALGORITHMS["self_debug"]
    assert way.reviser == "follow"
    assert way.critic == "tests"
    row = dict(TASKS["code"].rows("prompt", 1, 0, "test")[0])
    outcomes = {
        "x + nothing": "NameError: name 'nothing' is not defined",
        "x": "f(2, 3) is 2, not 5",
    }
    critic = ToolCritic(
        lambda row, answer: (outcomes.get(answer, "passes"), answer not in outcomes)
    )
    prompts, trace = revisions(
        words, row, ["x + nothing", "x", "x + y"], critic, REVISERS["follow"]
    )
    prompt_texts = [words_of(prompt) for prompt in prompts]
    assert "x + nothing" in prompt_texts[0]
    assert outcomes["x + nothing"] in prompt_texts[0]
    assert outcomes["x"] in prompt_texts[1]
    assert trace.answer == "x + y"


def test_a_run_of_logic_lm_shows_its_complaints(runs):
    run = lab.run(
        "selfrefine",
        algorithm="logic_lm",
        questions=24,
        rounds=1,
        num_generations=0,
        dtype="float32",
        device="cpu",
    )
    seen = 0
    for trace in read_traces(run):
        feedback = next(step for step in trace.steps if step.role == "feedback")
        prompt_text = [
            part.prompt for step in trace.steps if step.role == "revision" for part in step.parts
        ]
        assert all(
            " ".join(feedback.text.split())[:60] in prompt and trace.answers[0] in prompt
            for prompt in prompt_text
        )
        seen += len(prompt_text)
    assert seen >= 2, "no answer was revised: the test shows nothing"


# Marks of a judge ---------------------------------------------------------------------------------


def test_a_mark_is_the_mean_of_the_marks_by_their_probabilities():
    "Scaled from 1 to 10 to [-1, 1]; what the ten answers have in common counts nothing."
    never = -math.inf
    assert mark_of([never] * 9 + [-3.0]) == 1.0
    assert mark_of([-5.0] + [never] * 9) == -1.0
    assert mark_of([-7.0] * 10) == pytest.approx(0.0)
    assert mark_of([0.0] + [never] * 8 + [0.0]) == pytest.approx(0.0)
    found = mark_of([math.log(0.25), never, never, math.log(0.75), *[never] * 6])
    assert found == pytest.approx(2 * (0.25 * 1 + 0.75 * 4 - 1) / 9 - 1)
    assert mark_of([x - 100.0 for x in (1.0, 2.0, 3.0)]) == pytest.approx(mark_of([1.0, 2.0, 3.0]))


def test_the_mark_of_a_model_is_that_of_the_ten_answers():
    words, policy = load_tokenizer("tiny"), Policy(load_model("tiny", "float32", "cpu"))
    judge = ModelJudge(policy, words, [("Be polite.", "Be rude.")])
    row, reply = dict(prompt=[dict(role="user", content="Name a colour.")]), "Blue, please."
    prompt_text = [
        dict(
            role="user",
            content=MARK.format(request="Name a colour.", reply=reply, principle="Be polite."),
        )
    ]
    logps = []
    for n in range(1, 11):
        answer = [dict(role="assistant", content=str(n))]
        example = encode(words, dict(prompt=prompt_text, completion=answer), "completion", 512)
        ids, mask = torch.tensor([example["input_ids"]]), example["completion_mask"]
        with torch.no_grad():
            logp = torch.log_softmax(policy.model(ids).logits[0].double(), -1)
        logps.append(sum(logp[t - 1, ids[0, t]].item() for t in range(1, len(mask)) if mask[t]))
    weights = [math.exp(logp - max(logps)) for logp in logps]
    mean = sum(n * w for n, w in enumerate(weights, 1)) / sum(weights)
    assert judge.mark(row, reply) == pytest.approx(2 * (mean - 1) / 9 - 1, abs=1e-4)


@pytest.mark.parametrize(
    "content, top, mark, soft",
    [
        ("8", [("8", 0.5), (" 6", 0.25), ("the", 0.25)], 2 * (22 / 3 - 1) / 9 - 1, True),
        ("Mark: 10", [("10", 1.0)], 1.0, True),
        ("I say 1.", [], -1.0, False),
        ("10", [("1", 0.9)], 1.0, False),
    ],
)
def test_the_mark_of_an_endpoint(content, top, mark, soft):
    """The score comes from the probabilities of its tokens.

    If 10 is two tokens, or without probabilities, the number alone counts.
    """
    listed = [dict(token=token, logprob=math.log(p)) for token, p in top]
    logprobs = (
        dict(content=[dict(token=top[0][0], logprob=listed[0]["logprob"], top_logprobs=listed)])
        if top
        else None
    )
    found, from_probabilities = mark_in(dict(message=dict(content=content), logprobs=logprobs))
    assert found == pytest.approx(mark)
    assert from_probabilities == soft
    with pytest.raises(Unreadable):
        mark_in(dict(message=dict(content="a fine reply"), logprobs=None))
    token = dict(token="7", logprob=math.nan)
    with pytest.raises(ValueError, match="above 0"):  # asked again, as for a letter
        mark_in(dict(message=dict(content="7"), logprobs=dict(content=[token])))


def test_direct_rlaif_learns_from_marks(runs):
    shared = dict(
        data="chat",
        prompts=8,
        num_generations=2,
        batch_size=4,
        steps=2,
        eval_rows=2,
        max_new_tokens=12,
        dtype="float32",
        device="cpu",
        seed=3,
    )
    run = lab.run("rlaif", algorithm="mark", judge="model:self", **shared)
    judge = ModelJudge(
        Policy(load_model("tiny", "float32", "cpu")),
        load_tokenizer("tiny"),
        [("Be polite.", "Be rude.")],
    )
    kept = [json.loads(line) for line in open(run.path / "marks.jsonl")]
    assert run.status == "finished"
    assert len(kept) >= 8
    assert all(-1 <= row["mark"] <= 1 for row in kept)
    assert kept[0]["mark"] == pytest.approx(
        judge.mark(dict(prompt=kept[0]["prompt"]), kept[0]["reply"]), abs=1e-4
    )
    marks = {row["reply"]: row["mark"] for row in kept}
    learned = [row for row in run.lines("samples") if row["step"] == 1]
    assert learned
    assert all(
        marks[row["completion"]] == pytest.approx(row["reward"], abs=1e-4) for row in learned
    )
    for judge in ("contrast:self", "rule:correct"):
        with pytest.raises(WrongInput, match="gives no marks") as error:
            lab.run("rlaif", algorithm="mark", judge=judge, **shared)
        assert "\n" not in str(error.value)


def test_words_end_in_any_script():
    """The full stop of a script is no part of an answer.

    A letter next to a Chinese one is a word of its own, and 4 is not in 2004.
    """
    from polm_lab.rewards.judges import verdict
    from polm_lab.training.evaluate import matches
    from polm_lab.reasoning.refine.tools import searched

    assert matches(dict(answer="北京"), "北京。") == 1.0
    assert matches(dict(answer="दिल्ली"), "दिल्ली।") == 1.0
    assert matches(dict(answer="北京"), "南京。") == 0.0
    assert verdict(dict(message=dict(content="答案是A。")))[0] == 1.0
    found = searched(lambda question: ["It was founded in 2004."])
    assert not found(dict(prompt="When?"), "4").fine
    assert found(dict(prompt="When?"), "2004").fine
    assert searched(lambda question: ["首都是北京。"])(dict(prompt="首都?"), "北京").fine
