"""The command: examples in every help, JSON for scripts, and errors of one screen that name what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import typer
from commands import SCREEN_LINES, Said, assert_refused
from conftest import write_prose, write_task
from shoal.point import Evaluation, Point
from shoal_services.cli import MAX_LINE, app, explain

COMMANDS = list(typer.main.get_command(app).commands)
SMALL = ["--window", "64", "--calibration-tokens", "4096", "--evaluation-tokens", "1024", "--dtype", "float32"]
SMALL_EVALUATION = ["--window", "64", "--evaluation-tokens", "1024", "--dtype", "float32"]
SHOAL = Path(sys.executable).with_name("shoal")


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("prose")
    return [str(write_prose(folder / f"{name}.txt", seed=seed)) for seed, name in enumerate("ab")]


def test_help_shows_where_to_start(shoal):
    said = shoal("--help")
    assert said.code == 0
    assert "shoal compress smollm2-135m" in said.output and "shoal search tune_configs/demo.yaml" in said.output
    for command in COMMANDS:
        assert command in said.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_examples(shoal, command):
    said = shoal(command, "--help")
    assert said.code == 0
    assert "Examples" in said.output
    assert said.output.count(f"shoal {command} ") >= 2, "the usage line and an example"


def test_help_is_light():
    """In a process of its own: torch, Ray, MLflow and transformers take seconds, and nobody asked for them."""
    code = """
import sys
sys.argv = ["shoal", "search", "--help"]
from shoal_services.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code
heavy = {"torch", "ray", "mlflow", "transformers", "plotly", "optuna", "datasets", "numpy"} & set(sys.modules)
sys.exit(f"{heavy} were imported" if heavy else 0)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "tune_configs/demo.yaml" in ended.stdout


def test_profile_prints_json_and_a_page(shoal, prose, tmp_path):
    said = shoal(
        "profile", "tiny-random", "--text", prose[0], *SMALL[:4], "--dtype", "float32", "--page", "p.html", "--json"
    )
    assert said.code == 0, said.errors
    profile = json.loads(said.output)
    assert [block["block"] for block in profile["blocks"]] == list(range(6))
    assert all(-1 < block["held_out"] <= 1 and len(block["token_error_quantiles"]) == 4 for block in profile["blocks"])
    assert profile["text"]["name"] == "a.txt" and profile["text"]["num_tokens"] == 4096
    assert "<html" in (tmp_path / "p.html").read_text()


def test_profile_compares_models(shoal, prose, tmp_path):
    said = shoal("profile", "tiny-random", "tiny-random", "--text", prose[0], *SMALL[:4], "--page", "both.html", "--json")
    assert said.code == 0, said.errors
    first, second = json.loads(said.output)
    assert first == second and len(first["nonlinear_tokens"]) == 20
    assert "linearity compared" in (tmp_path / "both.html").read_text()
    table = shoal("profile", "tiny-random", "tiny-random", "--text", prose[0], *SMALL[:4])
    assert table.output.count("(+0.0000)") == 4
    assert_refused(shoal("profile", "tiny-random", "tiny-random", "--revision", "main"), "one model")


def test_profile_prints_a_table(shoal, prose):
    said = shoal("profile", "tiny-random", "--text", prose[0], *SMALL[:4])
    assert said.code == 0, said.errors
    assert "held out" in said.output
    assert "linearity-tiny-random.html" in said.errors


def test_a_model_is_made_and_evaluates_to_what_was_said(shoal, prose, tmp_path):
    texts = ["--text", prose[0], "--evaluation-text", prose[0]]
    said = shoal("compress", "tiny-random", "-n", 2, "-o", "out", *texts, *SMALL, "--json")
    assert said.code == 0, said.errors
    point = Point.model_validate_json(said.output)
    assert point.recipe.num_replaced == len(point.recipe.blocks) == 2
    assert point.num_parameters < point.dense_size.num_parameters
    assert (tmp_path / "out" / "model.safetensors").is_file()

    said = shoal("evaluate", "out", "--evaluation-text", prose[0], *SMALL_EVALUATION, "--json")
    assert said.code == 0, said.errors
    (evaluation,) = [Evaluation.model_validate(each) for each in json.loads(said.output)]
    assert evaluation.perplexity == pytest.approx(point.perplexity, rel=1e-4)
    assert evaluation.dense_perplexity == pytest.approx(point.evaluations[0].dense_perplexity, rel=1e-6)
    assert evaluation.text == point.evaluations[0].text

    assert_refused(
        shoal("compress", "tiny-random", "-n", 2, "-o", "out", *texts, *SMALL),
        "'out' exists already; delete it or choose another folder",
    )


def test_listed_blocks_are_the_ones_replaced(shoal, prose):
    texts = ["--text", prose[0], "--evaluation-text", prose[1]]
    said = shoal("compress", "tiny-random", "--blocks", "1,4", "--kind", "dropped", *texts, *SMALL, "--json")
    assert said.code == 0, said.errors
    point = Point.model_validate_json(said.output)
    assert (point.recipe.blocks, point.recipe.selection, point.recipe.kind) == ((1, 4), "listed", "dropped")
    assert point.artefact == "tiny-random-dropped-2"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["-n", "6"], ["6", "blocks"]),
        (["-n", "60"], ["60", "blocks"]),
        (["-n", "0"], ["choose 1 or more blocks to replace"]),
        (["-n", "-1"], ["choose 1 or more blocks to replace"]),
        (["-n", "-1", "--sparsity", "0.5"], ["choose 1 or more blocks to replace, or 0 with --sparsity or --weight-share"]),
        (["-n", "2", "--sparsity", "1:4"], ["sparsity='1:4' is neither a share of zeros", "'2:4' or '4:8'"]),
        (["-n", "2", "--sparsity", "1.5"], ["sparsity='1.5' is neither a share of zeros from 0 to below 1"]),
        (["-n", "2", "--weight-share", "1.5"], ["weight_share", "less than 1"]),
        (["-n", "2", "--weight-share", "0.01"], ["weight_share=0.01 leaves no projection a rank of 8"]),
        (["--blocks", "1,1"], ["blocks lists [1] more than once; name each block once"]),
        (["--blocks", "1,99"], ["99"]),
        (["--blocks", "-1"], ["--blocks '-1': unit '-1' is no block"]),
        (["--blocks", "1,two"], ["--blocks '1,two': unit 'two' is no block: give its index, as 12, or a part of it"]),
        (["--blocks", ""], ["--blocks '': unit '' is no block"]),
        ([], ["give one of --num-replaced, --parameters, --megabytes, --kv-cache and --blocks"]),
        (["--parameters", "120%"], ["--parameters '120%' is no share of the dense model's: give 85% or 0.85"]),
        (["--kv-cache", "much"], ["--kv-cache 'much' is no share of the dense model's"]),
        (["--kv-cache", "10%"], ["kv_cache=0.1 is out of reach", "ask for that or more"]),
        (["--megabytes", "900"], ["--megabytes 900: the dense model takes 1 MB; give less"]),
        (["--parameters", "5%"], ["parameters=0.05 is out of reach", "ask for that or more"]),
        (["-n", "1", "--parts"], ["parts=True needs parameters"]),
        (["-n", "1", "--blocks", "1"], ["give one of --num-replaced, --parameters, --megabytes, --kv-cache and --blocks"]),
        (["-n", "2", "--kind", "low_rank"], ["give rank with kind='low_rank'"]),
        (["-n", "2", "--rank", "4"], ["give rank with kind='low_rank'"]),
        (["-n", "2", "--distil-tokens", "-5"], ["num_tokens", "greater than or equal to 1"]),
        (["-n", "2", "--distil-tokens", "64", "--trained", "everything"], ["trained", "'maps', 'lora', 'blocks' or 'all'"]),
        (["-n", "2", "--distil-tokens", "64", "--learning-rate", "0"], ["learning_rate", "greater than 0"]),
        (["-n", "2", "--dtype", "float8"], ["dtype='float8' is not known; choose one of bfloat16"]),
        (["-n", "2", "--window", "4"], ["window", "greater than or equal to 8"]),
        (["-n", "2", "--window", "4096"], ["window=4096 is longer than the model's context"]),
        (
            ["-n", "2", "--calibration-tokens", "256"],
            ["256 calibration tokens are too few for a hidden size of", "or more"],
        ),
        (["-n", "2", "--text", "nowhere.txt"], ["'nowhere.txt' does not exist; check the path"]),
        (["-n", "2", "--text", "no-such-owner/no-such-set"], ["cannot load text 'no-such-owner/no-such-set'"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("-") else None,
)
def test_what_cannot_be_compressed_is_refused(shoal, prose, tmp_path, words, parts):
    defaults = {"--text": prose[0], "--evaluation-text": prose[1], "--window": "64", "--calibration-tokens": "4096"}
    given = [word for name, value in defaults.items() if name not in words for word in (name, value)]
    assert_refused(shoal("compress", "tiny-random", *words, *given, "--evaluation-tokens", "1024", "-o", "out"), *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["profile", "compress", "evaluate"])
def test_a_model_that_is_none_is_named(shoal, command):
    words = {"compress": ["-n", "2"], "evaluate": ["--dense", "tiny-random"]}.get(command, [])
    assert_refused(shoal(command, "no-such-owner/no-such-model", *words), "no-such-owner/no-such-model")


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertModel"])
def test_an_encoder_is_refused_where_a_decoder_is_needed(shoal, tmp_path, head):
    config = transformers.BertConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    getattr(transformers, head)(config).save_pretrained(tmp_path / "bert")
    said = shoal("evaluate", "bert", "--dense", "tiny-random", *SMALL_EVALUATION)
    assert_refused(said, "'bert'", "it is an encoder (bert), and this needs a causal decoder")


def test_a_folder_that_holds_no_model_is_refused(shoal, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(shoal("profile", "empty"), "empty")


def test_evaluating_needs_to_know_the_dense_model(shoal):
    assert_refused(
        shoal("evaluate", "tiny-random", *SMALL_EVALUATION), "has no recipe.json that names its dense model; give --dense"
    )


@pytest.mark.parametrize(
    ("content", "part"), [("", "holds no text"), ("Only this.\n", "fewer than one window of 64: give more text")]
)
def test_a_text_without_enough_words_is_named(shoal, prose, tmp_path, content, part):
    (tmp_path / "short.txt").write_text(content)
    said = shoal("compress", "tiny-random", "-n", 1, "--text", "short.txt", "--evaluation-text", prose[1], *SMALL)
    assert_refused(said, "'short.txt'", part)


def test_evaluating_on_what_was_trained_on_is_refused(shoal, prose, tmp_path):
    """A page of the training text inside another evaluation text, at another place."""
    shared = tmp_path / "shared.txt"
    shared.write_text(Path(prose[1]).read_text()[:1000] + Path(prose[0]).read_text()[500:3000])
    sizes = ["--window", "256", "--calibration-tokens", "4096", "--evaluation-tokens", "4096"]
    said = shoal("compress", "tiny-random", "-n", 1, "--text", prose[0], "--evaluation-text", shared, *sizes)
    assert_refused(said, "evaluation text 'shared.txt' overlaps 'a.txt'", "evaluate on other text")


def test_tasks_print_json_and_nothing_else(shoal, tmp_path):
    task = write_task(tmp_path, "colours")
    said = shoal("evaluate", "tiny-random", "--dense", "tiny-random", "--tasks", task, "--limit", 5, "--json")
    (score,) = json.loads(said.output)
    assert (score["task"], score["metric"], score["num_examples"], score["difference"]) == ("colours", "acc", 5, 0)
    assert_refused(shoal("evaluate", "tiny-random", "--tasks", "gone.yaml"), "task file 'gone.yaml' does not exist")


def write_labelled(file: Path, labels: str) -> Path:
    """Texts that begin with their label."""
    rows = ({"text": f"{label} of number {number}", "label": label} for number, label in enumerate(labels))
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_probes_of_several_models_print_a_table_or_json(shoal, tmp_path):
    data = write_labelled(tmp_path / "data.jsonl", "ab" * 12)
    first, second = json.loads(shoal("probe", "tiny-random", "tiny-random", "--data", data, "--json").output)
    assert first == second
    assert [layer["num_passed"] for layer in first["layers"]] == list(range(7))
    output = shoal("probe", "tiny-random", "--data", data).output
    assert "Naming the largest class: 0.500" in " ".join(output.split())
    assert f"{first['layers'][0]['accuracy']:.3f} ± " in output


def test_labels_that_cannot_be_probed_are_refused(shoal, tmp_path):
    one = write_labelled(tmp_path / "one.jsonl", "aaaaaaaa")
    assert_refused(shoal("probe", "tiny-random", "--data", one), "'one.jsonl' has the one label 'a'")
    few = write_labelled(tmp_path / "few.jsonl", "aaaaaaab")
    assert_refused(shoal("probe", "tiny-random", "--data", few), "has 1 texts with label 'b': 5 folds need 5")
    assert_refused(
        shoal("probe", "tiny-random", "--data", "gone.jsonl"), "text file 'gone.jsonl' does not exist; check the path"
    )


def test_a_judge_that_is_not_there_is_refused_and_the_stories_are_kept(shoal, tmp_path):
    words = ["judge", "tiny-random", "--url", "http://127.0.0.1:9/v1", "--judge", "wise", "--samples", 1, "--max-tokens", 4]
    assert_refused(shoal(*words), "the judge at http://127.0.0.1:9/v1 cannot be reached", "give the same command again")
    kept = json.loads((tmp_path / "tiny-random-stories.json").read_text())
    assert len(kept["stories"]) == 10


def test_output_that_cannot_be_written_is_refused(shoal, prose, tmp_path):
    (tmp_path / "file").write_text("")
    said = shoal(
        "compress", "tiny-random", "-n", 1, "-o", "file/out", "--text", prose[0], "--evaluation-text", prose[1], *SMALL
    )
    assert_refused(said, "file")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot read 'mine.yaml': No such file or directory"),
        ("- a\n", "holds no mapping"),
        ("name: mine\nmodel: tiny-random\nspace: {num_replacd: 1}\n", "did you mean 'num_replaced'?"),
    ],
)
def test_a_search_file_that_is_wrong_is_refused(shoal, tmp_path, content, part):
    if content is not None:
        (tmp_path / "mine.yaml").write_text(content)
    assert_refused(shoal("search", "mine.yaml"), part)


def test_a_cluster_that_is_not_there_is_refused(root, tmp_path):
    """In a process of its own, as a person would see it: this one may be connected to a cluster."""
    command = [SHOAL, "search", root / "tune_configs" / "smoke.yaml", "--address", "127.0.0.1:1", "--storage", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    said = Said(ended.returncode, ended.stdout, ended.stderr)
    assert_refused(said, "no Ray cluster at '127.0.0.1:1'", "check the address, or leave it out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_search_is_refused(shoal, tmp_path):
    assert_refused(shoal("frontier", tmp_path), "is no search's folder: it has no config.json; give shoal-runs/NAME")
    assert_refused(shoal("frontier", "nowhere"), "is no search's folder")


def test_debug_shows_the_whole_traceback():
    """In a process of its own, as a person would see it."""
    shoal = Path(sys.executable).with_name("shoal")
    ended = subprocess.run(
        [shoal, "--debug", "search", "nowhere.yaml"], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "Traceback (most recent call last)" in ended.stderr
    assert "cannot read 'nowhere.yaml'" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "words", [["compres"], ["compress", "tiny-random", "--blocs", "1"], ["compress"], ["profile", "m", "--window", "x"]]
)
def test_a_mistyped_command_is_told_its_usage(shoal, words):
    said = shoal(*words)
    assert said.code == 2
    assert "Usage: " in said.errors and "Traceback" not in said.errors
    assert len(said.errors.splitlines()) < SCREEN_LINES


class RemoteError(ValueError):
    """As Ray raises on the driver what was raised on a worker: the text is the worker's traceback."""

    def __init__(self, cause: Exception):
        super().__init__("Traceback (most recent call last):\n  File …")
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (AttributeError("'list' object has no attribute 'get'"), "AttributeError: 'list' object has no attribute 'get'"),
        (KeyError("architectures"), "KeyError: 'architectures'"),
        (IndexError("list index out of range"), "IndexError: list index out of range"),
        (StopIteration(), "StopIteration"),
        (TypeError("unhashable type"), "TypeError: unhashable type"),
        (AssertionError(), "AssertionError"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (RemoteError(ValueError("too few tokens; give more")), "too few tokens; give more"),
        (RemoteError(RemoteError(KeyError("x"))), "KeyError: 'x'"),
        (MemoryError(), "there is not enough memory"),
        (ConnectionError("no server at http://me:s3cret@host"), "no server at http://me:***@host"),
        (ValueError("x" * 100_000), "x…"),
        (RuntimeError("line\n" * 1000), "line …"),
        (OSError(28, "No space left on device", "/x"), "the storage is full (/x): make room"),
    ],
)
def test_every_error_ends_on_one_screen(shoal, monkeypatch, error, part):
    """Of a command of its own, through the whole of `shoal`; and --debug shows where it was raised."""
    monkeypatch.setattr(app, "registered_commands", [*app.registered_commands])

    @app.command("fail")
    def fail() -> None:
        raise error

    assert_refused(shoal("fail"), part)
    assert max(map(len, explain(error).splitlines())) <= MAX_LINE + 1
    said = shoal("--debug", "fail")
    assert said.code == 1 and "Traceback (most recent call last)" in said.errors and "raise error" in said.errors
    assert "s3cret" not in said.errors


@pytest.mark.parametrize("content", ["[]", "{}", '{"model_type": "llama", "hidden_size": "x"}', '{"model_type": 3}', "{"])
def test_a_model_folder_that_is_none_is_refused(shoal, tmp_path, content):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(content)
    assert_refused(shoal("profile", "odd"))


def test_output_that_nobody_reads_ends_quietly(root):
    command = [SHOAL, "plan", root / "tune_configs" / "demo.yaml", "--model-config", "llama-3.1-8b"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.close()
        assert running.stderr.read() == "" and running.wait(60) == 1


def test_texts_that_are_not_what_they_seem_are_refused(shoal, prose, tmp_path):
    (tmp_path / "latin.txt").write_bytes("naïve\n".encode("latin-1") * 9999)
    said = shoal("compress", "tiny-random", "-n", 1, "--text", "latin.txt", "--evaluation-text", prose[1], *SMALL)
    assert_refused(said, "text file 'latin.txt' is not UTF-8", "iconv -f latin1 -t utf-8")
