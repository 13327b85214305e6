"""The report as data, as JSON, as a page and as a picture."""

import json
import re

import pytest
from fakes import FakeBackend, FakeModel

from opt_zoo.heatmap import error_shares, write_heatmap
from opt_zoo.parity_run import ParityPlan, run_parity
from opt_zoo.report import parity_report, write_json
from opt_zoo.report_html import html_page


class NotANumber(FakeModel):
    def __call__(self, *args, **kwargs):
        out = super().__call__(*args, **kwargs)
        out.logits[0, 0, 0] = float("nan")
        return out


@pytest.fixture
def report(checkpoint):
    return report_of(checkpoint, FakeBackend())


@pytest.fixture
def failed_report(checkpoint):
    return report_of(checkpoint, FakeBackend(NotANumber))


def report_of(checkpoint, backend):
    plan = ParityPlan(str(checkpoint), [backend], ["float32"], ["eager", "sdpa"], ["none", "left"], 11, 3)
    return parity_report(plan, run_parity(plan))


def test_a_report_tells_what_was_measured_where_and_against_which_bounds(report):
    assert report["passed"] is True
    assert {"date", "versions", "platform", "settings"} <= report["environment"].keys()
    assert report["bounds"]["float32"] == {"roundoff": 2.0**-24, "row": 64, "entry": 400}
    assert [(c["attn_implementation"], c["padding"]) for c in report["forward"]] == [
        ("eager", "none"), ("eager", "left"), ("sdpa", "none"), ("sdpa", "left")
    ]  # fmt: skip
    assert len(report["greedy"]) == 2


def test_json_has_null_where_a_number_is_not_finite(failed_report, tmp_path):
    write_json(failed_report, str(tmp_path / "report.json"))
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert read == failed_report
    assert read["passed"] is False
    assert read["forward"][0]["worst_row_u"] is None


def test_the_page_loads_nothing_from_elsewhere_and_shows_every_cell(report):
    page = html_page(report)
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\(", page)
    assert page.count("<tr><td>fake</td>") == 4 + 2
    assert "FAILED" not in page


def test_the_page_of_a_failure_names_the_place_and_escapes_the_source(failed_report):
    page = html_page({**failed_report, "source": "<b>&"})
    assert "diverges first at: head" in page
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;" in page


def test_the_heat_map_has_a_row_per_kernel_and_a_column_per_case(failed_report, tmp_path):
    rows, columns, shares = error_shares(failed_report["forward"])
    assert rows == ["fake eager", "fake sdpa"]
    assert columns == ["float32 none", "float32 left"]
    assert (shares == float("inf")).sum() == 2  # the first token is padding in one of the two cases
    write_heatmap(failed_report, str(tmp_path / "map"))
    assert (tmp_path / "map").read_bytes().startswith(b"\x89PNG")
