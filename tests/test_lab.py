import json
import os
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from IPython.testing.globalipapp import start_ipython

from attnlab import lab

SLUG = "circuit-reuse"


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Every test measures into its own folder and leaves torch's threads as they were."""
    monkeypatch.setenv("ATTNLAB_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("ATTNLAB_THREADS", "1")
    monkeypatch.delenv("ATTNLAB_BOOK", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_importing_it_loads_no_numerical_library():
    heavy = {"torch", "numpy", "altair", "pandas", "IPython", "tqdm"}
    found = run_python("import sys, attnlab.lab; print(*sorted(sys.modules))").stdout.split()
    assert not heavy & set(found)


def test_outside_a_notebook_setup_prints_one_line_with_everything():
    line = run_python(f"from attnlab import lab; lab.setup({SLUG!r})").stdout
    assert line.count("\n") == 1
    for part in (SLUG, "Circuit Component Reuse", "python ", "torch ", "attnlab ", "1 thread ", "budget 90 s, 3 GB"):
        assert part in line, part


def test_setup_seeds_every_generator(capsys):
    def draw():
        return random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002

    lab.setup(SLUG)
    first = draw()
    assert draw() != first
    lab.setup(SLUG)
    assert draw() == first
    capsys.readouterr()


@pytest.mark.parametrize("wrong", [-1, 2**32, 1.0, True, None])
def test_a_seed_that_no_generator_takes_is_refused(wrong):
    with pytest.raises(ValueError, match="n: a seed is an integer"):
        lab.seed(wrong)


def test_setup_refuses_an_unknown_slug_and_names_close_ones():
    with pytest.raises(ValueError, match=r"'circuit-resue'.*did you mean 'circuit-reuse'"):
        lab.setup("circuit-resue")


def test_with_a_title_the_slug_is_free(capsys):
    assert lab.setup("explore-heads", title="Heads of any model").title == "Heads of any model"
    assert "explore-heads" in capsys.readouterr().out


def test_threads_come_from_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("ATTNLAB_THREADS", "2")
    assert lab.setup(SLUG).threads == torch.get_num_threads() == 2
    monkeypatch.delenv("ATTNLAB_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert lab.setup(SLUG).threads == lab.MOST_THREADS
    capsys.readouterr()


@pytest.mark.parametrize("wrong", ["0", "-2", "many", ""])
def test_a_number_of_threads_that_is_none_is_refused(monkeypatch, wrong):
    monkeypatch.setenv("ATTNLAB_THREADS", wrong)
    with pytest.raises(ValueError, match="ATTNLAB_THREADS: a positive integer"):
        lab.setup(SLUG)


def test_the_chapter_shows_itself_in_html_escaped():
    shown = lab.Chapter("x", "a < b", {"python": "3"}, "cpu", 1)._repr_html_()
    assert "a &lt; b" in shown
    assert "python 3 · cpu · 1 thread · budget" in shown


def test_device_and_dtype_follow_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (str(lab.device()), lab.dtype()) == ("cpu", torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, dtype in (((7, 5), torch.float32), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert (str(lab.device()), lab.dtype()) == ("cuda", dtype)


def test_progress_yields_everything(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert list(lab.progress(range(3), "count")) == [0, 1, 2]


def test_out_dir_defaults_to_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("ATTNLAB_OUT")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    assert lab.out_dir() == tmp_path / "attnlab" / "attnlab-out"
    assert lab.out_dir().is_dir()


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "folder" / "row.json"
    lab.write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        lab.write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(file.parent.iterdir()) == [file]


class TestSource:
    def test_text_is_the_code_as_it_is_written(self):
        shown = lab.source(lab.seed, lab.Chapter)
        assert repr(shown).startswith('def seed(n: int) -> None:\n    """Seed Python')
        assert "\n\n@dataclass(frozen=True)\nclass Chapter:" in repr(shown)
        assert "# noqa: NPY002 - the global stream" in repr(shown)

    def test_a_live_notebook_gets_inline_styles_and_the_book_gets_classes(self, monkeypatch):
        live = lab.source(lab.seed)._repr_html_()
        assert live.startswith('<div class="attnlab-source highlight"><pre style="background')
        assert '<span style="' in live
        monkeypatch.setenv("ATTNLAB_BOOK", "1")
        book = lab.source(lab.seed)._repr_html_()
        assert book.startswith('<div class="attnlab-source highlight"><pre><span class="k">def</span>')
        assert "style=" not in book

    def test_code_is_escaped(self):
        assert "0 &lt;= n" in lab.source(lab.seed)._repr_html_().replace("</span>", "").replace('<span class="o">', "")

    @pytest.mark.parametrize("thing", [len, 3])
    def test_what_has_no_source_is_refused(self, thing):
        with pytest.raises(ValueError, match="source: a function or class written in Python"):
            lab.source(thing)

    def test_nothing_is_refused(self):
        with pytest.raises(ValueError, match="at least one"):
            lab.source()


@pytest.fixture(scope="module")
def shell():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ipython = start_ipython()
    yield ipython
    type(ipython).clear_instance()


@pytest.fixture
def notebook(shell):
    """A shell without the callbacks and the clock of other tests."""
    for event in ("pre_run_cell", "post_run_cell"):
        shell.events.callbacks[event] = [f for f in shell.events.callbacks[event] if f.__module__ != lab.__name__]
    lab._clock = None
    yield shell
    lab._clock = None


def report() -> dict:
    return json.loads((lab.out_dir() / f"{SLUG}.run.json").read_text())


SETUP = f"from attnlab import lab; chapter = lab.setup({SLUG!r})"


@pytest.fixture
def wall(monkeypatch):
    """The wall clock, in our hands: ``wall(s)`` sets it, also from within a cell."""
    now = 0.0

    def set_to(seconds: float) -> None:
        nonlocal now
        now = seconds

    monkeypatch.setattr("attnlab.lab.time.perf_counter", lambda: now)
    return set_to


class TestClock:
    def test_every_cell_rewrites_the_report(self, notebook, wall, capsys):
        notebook.run_cell(SETUP)
        first = report()
        notebook.push({"wall": wall})
        notebook.run_cell("wall(12.5)")
        assert set(first) == {"slug", "seconds", "cpu_seconds", "peak_memory_mb"}
        assert (first["slug"], first["seconds"], report()["seconds"]) == (SLUG, 0, 12.5)
        assert 10 < report()["peak_memory_mb"] < 100_000
        assert SLUG not in capsys.readouterr().out  # the value of the cell shows it, nothing is printed as well

    def test_waiting_costs_no_cpu_seconds_and_computing_does(self, notebook):
        notebook.run_cell(SETUP)
        before = report()["cpu_seconds"]
        notebook.run_cell("import time; end = time.process_time() + 0.2\nwhile time.process_time() < end: pass")
        after = report()["cpu_seconds"]
        notebook.run_cell("time.sleep(0.5)")
        assert after - before >= 0.19
        assert report()["cpu_seconds"] - after < 0.4

    def test_pauses_between_cells_do_not_count(self, notebook, wall):
        notebook.run_cell(SETUP)
        wall(1000.0)
        notebook.run_cell("1 + 1")
        assert report()["seconds"] == 0

    def test_setting_up_twice_starts_again_and_registers_once(self, notebook, wall):
        notebook.push({"wall": wall})
        notebook.run_cell(SETUP)
        notebook.run_cell("wall(10)")
        assert report()["seconds"] == 10
        notebook.run_cell(SETUP)
        assert report()["seconds"] == 0
        assert notebook.events.callbacks["post_run_cell"].count(lab._after_cell) == 1

    def test_a_failing_cell_counts_too(self, notebook, capsys):
        notebook.run_cell(SETUP)
        (lab.out_dir() / f"{SLUG}.run.json").unlink()
        notebook.run_cell("1 / 0")
        assert report()["slug"] == SLUG
        capsys.readouterr()

    @pytest.mark.parametrize(("name", "word"), [("BUDGET_CPU_SECONDS", "CPU seconds"), ("BUDGET_MB", "GB")])
    def test_exceeding_the_budget_is_said_once(self, notebook, monkeypatch, capsys, name, word):
        notebook.run_cell(SETUP)
        capsys.readouterr()
        monkeypatch.setattr(lab, name, -1.0)
        notebook.run_cell("pass")
        notebook.run_cell("pass")
        out = capsys.readouterr().out
        assert out.count("over its budget") == 1
        assert word in out


def test_one_thread_gives_the_others_back_even_after_an_error() -> None:
    import torch

    def fails() -> None:
        with lab.one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError):
            fails()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
