"""Every case of the corpus is refused in our words, at once, in little memory, with nothing run and nothing written."""

import contextlib
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from checkpoints import assert_holds

from conversion import open_checkpoint
from hostile.bases import BASES, CONFIG, TENSORS, make_base, weight_files
from hostile.case import RULES, Case
from hostile.config_cases import field
from hostile.corpus import CASES
from hostile.examination import convert
from hostile.metaseq_cases import paying
from hostile.torch_bin_cases import BIAS, flipped, pickled, state_pickle
from hostile.value_cases import WARNINGS
from hostile.worker import MEGABYTES, SECONDS, Worker
from opt_core.errors import CheckpointError, ConfigError
from opt_zoo.main import BAD_INPUT, OK, main


@pytest.fixture(scope="session")
def templates(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("valid")


@pytest.fixture
def base(request, tmp_path, templates) -> Path:
    """The folder of a valid checkpoint, to be named by `parametrize`."""
    return make_base(request.param, tmp_path / "source", templates)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, with sizes and times."""
    found = {str(path): path.lstat() for path in folder.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def refusals_of(case: Case) -> tuple[type[Exception], ...]:
    """Whatever is wrong with a checkpoint is said by our errors; of a target in the way, by those of the system too."""
    return (CheckpointError, ConfigError, *([OSError] if case.rule == 12 else []))


def each(cases: list[Case]) -> list:
    """The cases as parameters, those that are known to fail marked as such."""
    return [
        pytest.param(
            case,
            id=str(case),
            marks=[pytest.mark.xfail(reason=case.open_fault, strict=True, run=False)] if case.open_fault else [],
        )
        for case in cases
    ]


@pytest.mark.parametrize("base", BASES, indirect=True)
def test_before_it_is_damaged_every_checkpoint_is_converted_without_a_warning(base, tmp_path, caplog):
    convert(base, tmp_path / "target")
    assert (tmp_path / "target" / "config.json").is_file()
    assert not caplog.messages


@pytest.mark.parametrize("case", each(CASES))
def test_it_is_refused_by_name_and_nothing_is_run_or_written(case, tmp_path, templates):
    source = make_base(case.base, tmp_path / "source", templates)
    case.damage(source)
    before, start = listing(tmp_path), time.process_time()  # which other programs do not lengthen
    with pytest.raises(refusals_of(case)) as raised:
        convert(source, tmp_path / "target", opening=case.opening, **case.writing)
    assert time.process_time() - start < SECONDS
    assert listing(tmp_path) == before
    assert str(source) in str(raised.value) or case.rule in (7, 12)  # values are looked at when they are written
    assert case.names in str(raised.value)
    assert re.search(case.says, str(raised.value), re.DOTALL)


@pytest.mark.parametrize("case", WARNINGS, ids=str)
def test_what_may_be_meant_is_read_with_a_warning_that_names_it(case, tmp_path, templates, caplog):
    source = make_base(case.base, tmp_path / "source", templates)
    case.damage(source)
    caplog.clear()
    convert(source, tmp_path / "target")
    assert any(case.names in text and case.says in text for text in caplog.messages)


def one_of_each(cases: list[Case]) -> list[Case]:
    """The first case of each base and rule."""
    return list(
        {(case.base, case.rule): case for case in reversed(cases) if not (case.opening or case.writing)}.values()
    )


@pytest.mark.parametrize("case", each(one_of_each(CASES)))
def test_the_command_says_so_in_one_error_and_exit_code(case, tmp_path, templates, capsys):
    source = make_base(case.base, tmp_path / "source", templates)
    case.damage(source)
    before = listing(tmp_path)
    to = "bin" if case.base.startswith("safetensors") else "safetensors"
    assert main(["convert", str(source), str(tmp_path / "target"), "--to", to]) == BAD_INPUT
    assert "opt-zoo convert: error: " in capsys.readouterr().err
    assert main(["inspect", str(source)]) in (OK, BAD_INPUT)  # it lists what is there, whatever the values are
    assert listing(tmp_path) == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux does")
@pytest.mark.parametrize("name", BASES)
def test_it_is_refused_in_little_memory(name, tmp_path, templates):
    cases = [case for case in CASES if case.base == name and not case.open_fault]
    worker = Worker(warm_up=make_base(name, tmp_path / "valid", templates))
    with contextlib.closing(worker):
        for number, case in enumerate(cases):
            source = make_base(name, tmp_path / str(number) / "source", templates)
            case.damage(source)
            outcome = worker.run(source, tmp_path / str(number) / "target", opening=case.opening, **case.writing)
            in_the_way = ["FileExistsError", "NotADirectoryError"] if case.rule == 12 else []
            assert outcome.kind in ("refused", *in_the_way), case
            assert outcome.megabytes < MEGABYTES, case


def test_the_corpus_holds_every_rule_and_every_base():
    assert {case.rule for case in CASES} == set(RULES)
    assert {case.base for case in CASES} == set(BASES)
    assert len(CASES) >= 200
    assert not [id for id, count in Counter(map(str, CASES)).items() if count > 1]


# -- what looks alike and is in order ---------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["torch-bin"], indirect=True)
def test_the_hand_made_pickle_of_the_cases_is_a_good_one(base):
    pickled(state_pickle())(base)
    with open_checkpoint(base, verify=True) as checkpoint:
        assert checkpoint.shapes == {BIAS: (31,)}


@pytest.mark.parametrize("base", ["torch-bin"], indirect=True)
def test_checksums_are_compared_only_when_asked(base):
    flipped(base)
    with open_checkpoint(base) as checkpoint:
        checkpoint.check()


@pytest.mark.parametrize("base", ["safetensors in shards", "torch-bin in shards"], indirect=True)
def test_links_inside_the_folder_are_followed(base):
    shard = weight_files(base)[1]
    shard.rename(base / "blob").with_name(shard.name).symlink_to("blob")
    with open_checkpoint(base) as checkpoint:
        checkpoint.check()
        assert_holds(checkpoint, TENSORS)


@pytest.mark.parametrize("base", ["safetensors"], indirect=True)
def test_a_config_may_be_given_where_there_is_none(base):
    (base / "config.json").unlink()
    with open_checkpoint(base, config=CONFIG) as checkpoint:
        assert_holds(checkpoint, TENSORS)


@pytest.mark.parametrize("base", ["metaseq raw", "metaseq unflattened"], indirect=True)
def test_a_call_beside_what_is_read_is_passed_over_and_not_made(base, tmp_path):
    paying("extra_state")(base)
    convert(base, tmp_path / "target")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("base", ["safetensors"], indirect=True)
def test_code_that_a_config_names_is_not_looked_at(base, tmp_path):
    code = {"AutoModelForCausalLM": "modeling.OPT"}
    field("auto_map", code)(base)
    (base / "modeling.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    convert(base, tmp_path / "target")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "target" / "modeling.py").exists()


@pytest.mark.parametrize("base", ["saved-model"], indirect=True)
def test_the_program_of_a_saved_model_is_not_looked_at(base, tmp_path):
    (base / "saved_model.pb").write_bytes(b"\xff" * 100)
    convert(base, tmp_path / "target")


# -- what no damage to one checkpoint brings about --------------------------------------------------------------------


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such file or folder"):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.safetensors", "reshard.pt", "ckpt-1.index", "weights"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"no such file or folder"):
        open_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"no weights"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("base", ["safetensors in shards"], indirect=True)
def test_all_missing_shards_are_listed(base):
    first, _, third = weight_files(base)
    first.unlink()
    third.unlink()
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(base)
    assert all(f"{path.name}: missing" in str(raised.value) for path in (first, third))
