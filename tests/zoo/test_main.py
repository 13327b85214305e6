"""The command line: exit codes, pure JSON on stdout, one clear error, and no framework before it is needed."""

import json
import subprocess
import sys

import pytest
from fakes import FakeBackend

from opt_zoo.backends import BACKENDS, installed_backends, load_backend

QUICK = ["--dtypes", "float32", "--attn", "eager", "--padding", "left", "--tokens", "11", "--new-tokens", "3"]


def with_missing_framework(monkeypatch, name):
    monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(frameworks=("no_such_framework",)))


@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        (["generate", "a", "--num-beams", "0", "--backend", "torch"], "opt-zoo generate: error: num_beams: expected"),
        (["inspect", "opt-tiny", "--model", "opt-tiny"], "opt-zoo inspect: error: --model: expected"),
    ],
)
def test_an_error_says_once_which_command_it_is_of(opt_zoo, backends, arguments, beginning):
    if "torch" in arguments and "torch" not in [backend.name for backend in backends]:
        pytest.skip("--backends leaves out torch")
    assert opt_zoo(*arguments)[2].startswith(beginning)


def test_building_the_command_line_imports_no_framework():
    code = (
        "import sys, opt_zoo.main; opt_zoo.main.build_parser();"
        "print([m for m in ('torch', 'tensorflow', 'keras', 'jax', 'flax', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_asking_for_one_backend_imports_no_other(checkpoint):
    arguments = ["parity", str(checkpoint), "--backends", "torch", *QUICK]
    code = (
        f"import sys, opt_zoo.main; code = opt_zoo.main.main({arguments});"
        "print(code, [m for m in ('tensorflow', 'keras', 'jax', 'flax', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("0 []\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["parity", "--backends", "torch,numpy"],
        ["parity", "--dtypes", "float64"],
        ["convert"],
        ["convert", "source", "target", "--to", "parquet"],
        ["generate"],
    ],
)
def test_wrong_usage_exits_with_2_and_says_how_to_use_it(opt_zoo, arguments):
    code, out, err = opt_zoo(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: opt-zoo")


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "./no-such-folder"],
        ["convert", "./no-such-folder", "target"],
        ["parity", "./no-such-folder", "--backends", "torch"],
        ["generate", "./no-such-folder", "prompt", "--backend", "torch"],
        ["perplexity", "./no-such-folder", "text.txt", "--backend", "torch"],
    ],
)
def test_a_source_that_does_not_exist_exits_with_2_and_one_error(opt_zoo, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = opt_zoo(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert "./no-such-folder" in err
    assert not (tmp_path / "target").exists()


def test_source_and_model_together_are_refused(opt_zoo, checkpoint):
    code, _, err = opt_zoo("inspect", checkpoint, "--model", checkpoint)
    assert code == 2
    assert "expected SOURCE or --model, got both" in err


@pytest.mark.parametrize(
    "command", [["parity", "--backends"], ["generate", "text", "--backend"], ["perplexity", "text", "--backend"]]
)
@pytest.mark.parametrize("name", list(BACKENDS))
def test_a_missing_framework_exits_with_2_and_names_the_extra(opt_zoo, checkpoint, monkeypatch, command, name):
    with_missing_framework(monkeypatch, name)
    code, out, err = opt_zoo(*command, name, "--model", checkpoint)
    assert (code, out) == (2, "")
    assert f"backend {name} needs no_such_framework: pip install opt-zoo[{name}]" in err


def test_only_backends_whose_framework_is_there_count_as_installed(monkeypatch):
    before = installed_backends()
    with_missing_framework(monkeypatch, "tf")
    assert installed_backends() == tuple(name for name in before if name != "tf")


def test_a_parity_run_that_fails_exits_with_1_and_names_the_layer(opt_zoo, checkpoint, monkeypatch):
    fault = {"decoder.layers.1.fc1.bias": lambda bias: bias + 1}
    monkeypatch.setattr("opt_zoo.parity.load_backend", lambda name: FakeBackend(**fault))
    code, out, _ = opt_zoo("parity", checkpoint, "--backends", "torch", *QUICK)
    assert code == 1
    assert "diverges first at: layer 1" in out
    assert out.rstrip().endswith("failed 2 comparisons")


def test_parity_prints_json_alone_where_it_is_asked_for_on_stdout(opt_zoo, checkpoint):
    code, out, _ = opt_zoo("parity", checkpoint, "--backends", "torch", *QUICK, "--json", "-")
    report = json.loads(out)
    assert (code, report["passed"], len(report["forward"])) == (0, True, 1)
    assert report["environment"]["versions"]["torch"]


def test_parity_writes_the_three_files_and_still_prints_the_table(opt_zoo, checkpoint, tmp_path):
    files = {option: tmp_path / f"report.{option}" for option in ("json", "html", "png")}
    options = [word for option, path in files.items() for word in (f"--{option}", path)]
    code, out, _ = opt_zoo("parity", checkpoint, "--backends", "torch", *QUICK, *options)
    assert code == 0
    assert "worst row" in out
    assert all(path.stat().st_size > 1000 for path in files.values())


def test_a_report_for_a_folder_that_is_missing_is_refused_before_anything_is_measured(opt_zoo, checkpoint, tmp_path):
    code, out, err = opt_zoo("parity", checkpoint, "--html", tmp_path / "no" / "report.html", "--new-tokens", "-1")
    assert (code, out) == (2, "")
    assert "--html: expected a file in a folder that exists" in err
    assert "--new-tokens: expected 0 or more, got -1" in err


def test_loading_a_backend_by_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError):
        load_backend("numpy")


def test_a_reader_that_goes_away_ends_the_command_without_a_word(checkpoint):
    command = [sys.executable, "-m", "opt_zoo", "inspect", str(checkpoint), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)
    process.stderr.close()


def test_a_framework_says_nothing_on_stderr_when_a_command_starts_it(backend, checkpoint_with_tokenizer):
    source = str(checkpoint_with_tokenizer)
    command = [sys.executable, "-m", "opt_zoo", "generate", source, "a", "--backend", backend.name]
    done = subprocess.run([*command, "--max-new-tokens", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_failed_import_wrote_is_shown(monkeypatch, tmp_path, capfd):
    (tmp_path / "fails_to_import.py").write_text("import os; os.write(2, b'no driver'); raise ImportError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(BACKENDS, "tf", BACKENDS["tf"]._replace(package="fails_to_import", frameworks=()))
    with pytest.raises(ImportError, match="broken"):
        load_backend("tf")
    assert capfd.readouterr().err == "no driver"
