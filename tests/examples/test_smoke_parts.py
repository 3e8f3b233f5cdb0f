"""The smoke run's own parts: problems, code split, tokenizer, datasets, report. Training itself is tested elsewhere."""

import itertools
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from examples.smoke import arithmetic, build, corpus, report, run
from examples.smoke.tokenizer import EOD_TOKEN, train_tokenizer
from remit_megatron.config import load_recipe
from remit_megatron.data.manifest import quick_verify
from remit_megatron.data.tokenizer import tokenizer_hash
from remit_megatron.errors import RunError, UserError
from remit_megatron.evaluate import boxed_answer
from remit_megatron.toml import dump_value


def take(count: int, seed: int = 1, **kwargs: Any) -> list[arithmetic.Problem]:
    return list(itertools.islice(arithmetic.problems(seed, **kwargs), count))


@pytest.fixture(scope="module")
def training() -> list[arithmetic.Problem]:
    return take(5000, held_out=False)


@pytest.fixture(scope="module")
def held_out() -> list[arithmetic.Problem]:
    return take(600, held_out=True, unique_numbers=True)


def test_every_equation_holds_and_the_last_is_the_answer(training: list[arithmetic.Problem]) -> None:
    for problem in training:
        equations = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", problem.solution)
        assert equations
        for left, sign, right, result in equations:
            a, b, c = int(left), int(right), int(result)
            assert {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": c * b == a}[sign], problem
        assert equations[-1][-1] == problem.answer
        assert boxed_answer(problem.solution) == problem.answer


def test_question_states_every_number_that_the_solution_starts_from(training: list[arithmetic.Problem]) -> None:
    for problem in training:
        known = set(re.findall(r"\d+", problem.question))
        for a, b, result in re.findall(r"(\d+)[-+*/](\d+)=(\d+)", problem.solution):
            assert {a, b} <= known, problem
            known.add(result)


def test_wordings_leave_no_placeholder_and_agree_in_numbers(training: list[arithmetic.Problem]) -> None:
    for problem in training:
        for text in (problem.question, problem.reworded):
            assert not re.search(r"[{}]", text)
            assert text.endswith("?")
        assert problem.question != problem.reworded
        assert set(re.findall(r"\d+", problem.question)) == set(re.findall(r"\d+", problem.reworded))
    assert {problem.kind for problem in training} == {kind.name for kind in arithmetic.KINDS}


def test_no_problem_is_in_training_and_held_out(held_out: list[arithmetic.Problem]) -> None:
    forms = [problem.canonical for problem in held_out]
    assert len(set(forms)) == len(forms)
    for seed in (1, 2, 77):
        assert not set(forms) & {problem.canonical for problem in take(3000, seed, held_out=False)}


def test_answers_are_not_memorable(training: list[arithmetic.Problem]) -> None:
    questions = [problem.question for problem in training]
    assert len(set(questions)) == len(questions)
    assert len({problem.canonical for problem in training}) > 0.4 * len(training)
    answers = [problem.answer for problem in training]
    assert max(answers.count(answer) for answer in set(answers)) < 0.05 * len(answers)


def test_problems_depend_on_the_seed_only() -> None:
    assert take(50, 3, held_out=False) == take(50, 3, held_out=False)
    assert take(50, 3, held_out=False) != take(50, 4, held_out=False)


def test_code_is_split_by_file_and_leaves_out_the_rest(tmp_path: Path) -> None:
    body = "x = 1\n" * 200
    for index in range(200):
        path = tmp_path / f"package{index % 7}" / f"module{index}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {index}\n{body}")
    for skipped in ("test/case.py", "site-packages/other/module.py", "config-3.11/make.py"):
        (tmp_path / skipped).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / skipped).write_text(body)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n" + body.encode())
    (tmp_path / "huge.py").write_text(body * 1000)
    files = corpus.code_files(tmp_path)
    assert sorted(file.path for file in files) == sorted(f"package{i % 7}/module{i}.py" for i in range(200))
    assert files == corpus.code_files(tmp_path)
    train, held = corpus.split_code(files)
    assert len(train) + len(held) == 200
    assert not {file.path for file in train} & {file.path for file in held}
    assert 2 <= len(held) <= 40


def test_stripped_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 0 usable"):
        corpus.code_files(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoke") / "data"
    build.build(folder, build.QUICK, say=lambda line: None)
    return folder


def test_tokenizer_round_trip_digits_and_prompt_boundary(built: Path, held_out: list[arithmetic.Problem]) -> None:
    tokenizer = Tokenizer.from_file(str(built / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 4096
    assert tokenizer.token_to_id(EOD_TOKEN) == 0
    assert tokenizer.encode("1203").tokens == ["1", "2", "0", "3"]
    for text in [problem.document for problem in held_out[:50]] + ["def f(x):\n\treturn x**2  # \u00e9 \u4e2d\n"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    for problem in held_out[:50]:
        prompt = tokenizer.encode(problem.prompt).ids
        assert tokenizer.encode(problem.document).ids[: len(prompt)] == prompt


def test_tokenizer_is_deterministic(training: list[arithmetic.Problem]) -> None:
    texts = [problem.document for problem in training[:300]]
    assert train_tokenizer(texts, 400).to_str() == train_tokenizer(texts, 400).to_str()


def test_datasets_hold_the_documents_and_nothing_held_out(built: Path) -> None:
    tokenizer = Tokenizer.from_file(str(built / "tokenizer.json"))
    texts = {}
    for name in ("code", "statements", "worked", "solutions", "code_held_out", "worked_held_out"):
        info = quick_verify(str(built / name), vocab_size=4096, tokenizer_hash=tokenizer_hash(built / "tokenizer.json"))
        assert not info.warnings
        dataset = IndexedDataset(str(built / name))
        documents = [dataset[i] for i in range(len(dataset))]
        assert all(ids[-1] == 0 and (ids[:-1] != 0).all() for ids in documents)
        texts[name] = [tokenizer.decode(ids[:-1].tolist()) for ids in documents]
    train, held = corpus.split_code(corpus.code_files())
    assert texts["code"] == [file.text for file in train[: build.QUICK.code_files]]
    assert texts["code_held_out"] == [file.text for file in held]
    assert texts["worked"] == [p.document for p in take(build.QUICK.worked, 1001, held_out=False)]
    assert len(set(texts["worked"]) & set(texts["solutions"])) < 0.02 * len(texts["solutions"])  # a chance repeat
    assert not any("Answer" in text for text in texts["statements"])
    exact = [json.loads(line) for line in (built / "problems_held_out.jsonl").read_text().splitlines()]
    assert len(exact) == build.QUICK.held_out_exact
    for problem in exact:
        assert boxed_answer(problem["solution"]) == problem["answer"]
        assert problem["prompt"].endswith("Answer:")
        assert not any(text.startswith(problem["prompt"]) for text in texts["worked"] + texts["worked_held_out"])


def test_build_skips_what_is_there_and_mends_what_is_not(built: Path) -> None:
    said: list[str] = []
    before = (built / "worked.bin").stat().st_mtime_ns
    build.build(built, build.QUICK, say=said.append)
    assert (built / "worked.bin").stat().st_mtime_ns == before
    assert len(said) == 1
    assert "already built" in said[0]
    content = (built / "worked.bin").read_bytes()
    (built / "worked.bin").write_bytes(content[:-2])
    build.build(built, build.QUICK, say=said.append)
    assert (built / "worked.bin").read_bytes() == content


def metrics(name: str) -> list[dict[str, float]]:
    lines = []
    for step in range(1, 31):
        line = {"step": step, "tokens": step * 1000, "loss": 3.0 / step, "nll": 3.1 / step, "step_ms": 100.0}
        if step <= 3:
            line["step_ms"] = 5000.0
        if name == "remit":
            line |= {"step_ms": 130.0, "score_ms": 26.0, "gap_mean": 0.1, "weight_mean": 1.0, "weight_std": 0.1}
            line |= {"ref_nll": 2.0, "clipped_low": 0.1, "clipped_high": 0.2}
        if step % 10 == 0:
            line |= {"eval/code/nll": 3.0, "eval/arithmetic/nll": 2.0}
        lines.append(line)
    return lines


def test_report_table_results_and_plot(tmp_path: Path) -> None:
    runs = {}
    for name in ("base", "reference", "ntp", "remit"):
        runs[name] = tmp_path / name
        runs[name].mkdir()
        (runs[name] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(name)))
    evaluations: dict[str, dict[str, Any]] = {
        name: {"eval/code/nll": 3.25, "eval/arithmetic/nll": 1.5, "correct": i, "problems": 8}
        for i, name in enumerate(runs)
    }
    text = report.write_report(tmp_path, runs, evaluations)
    lines = text.splitlines()
    assert lines[5].split() == ["ReMiT", "30,000", "3.2500", "1.5000", "37.5%", "(3/8)", "130", "20.0%"]
    assert lines[4].split()[-2:] == ["100", "-"]  # the slow first steps do not count
    assert len({len(line) for line in lines[:6]}) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["step_ms_remit_over_ntp"] == 1.3
    assert [row["correct"] for row in results["runs"]] == [0, 1, 2, 3]
    assert (tmp_path / "mid_training.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "ntp" / "metrics.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"ntp/metrics\.jsonl"):
        report.write_report(tmp_path, runs, evaluations)


@pytest.mark.parametrize("name", run.STAGES)
def test_recipes_move_to_another_folder(name: str, tmp_path: Path) -> None:
    path = run.RECIPES / f"{name}.toml"
    written = load_recipe(path)
    assert run.moved(tomllib.loads(path.read_text()), Path(run.FOLDER_IN_RECIPES)) == {}
    sets = [f"{k}={dump_value(v)}" for k, v in run.moved(tomllib.loads(path.read_text()), tmp_path / "a b").items()]
    there = load_recipe(path, sets)
    assert str(tmp_path) in there.model_dump_json()
    assert run.FOLDER_IN_RECIPES not in there.model_dump_json()
    back = there.model_dump_json().replace(str(tmp_path / "a b"), run.FOLDER_IN_RECIPES)
    assert back == written.model_dump_json()


def test_both_mid_training_runs_differ_in_objective_and_reference_only() -> None:
    ntp, remit = (load_recipe(run.RECIPES / f"{name}.toml").model_dump() for name in ("ntp", "remit"))
    assert {key for key in ntp if ntp[key] != remit[key]} == {"run", "objective", "reference"}
    assert ntp["parallel"]["tensor"] == 2
    assert ntp["optimizer"]["min_lr"] == 1e-7


def test_a_stage_that_fails_ends_the_run_with_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="remit train of base ended with exit code 2") as error:
        run.remit("train", "base", tmp_path, {"schedule.train_token": 1}, [])
    assert error.value.exit_code == 2
    assert not (tmp_path / "base").exists()
