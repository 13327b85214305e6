"""The parity measurement: honest backends pass, and every fault is found and named."""

import numpy as np
import pytest
from fakes import BackendOnAlteredWeights, FakeBackend, FakeModel
from harness import config_of, save_random

from opt_core.reference import Reference
from opt_core.synthetic import random_tensors
from opt_zoo.backends import BACKENDS, Outputs
from opt_zoo.comparison import BOUNDS, Comparison, Truth, compare, compare_with_eager, top1
from opt_zoo.greedy import GreedyText, compare_texts, judge_text
from opt_zoo.parity_cases import PADDINGS, Case, make_case
from opt_zoo.parity_run import ParityPlan, run_parity

QUICK = dict(dtypes=["float32"], attentions=["eager"], paddings=["left"], tokens=11, new_tokens=0)


def measure(source, backend, **changes):
    return run_parity(ParityPlan(str(source), [backend], **{**QUICK, **changes}))


# -- real backends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_backend_passes_in_every_padding_case(backend, checkpoint, dtype):
    result = measure(checkpoint, BACKENDS[backend.name], dtypes=[dtype], paddings=PADDINGS, new_tokens=5)
    assert result.passed
    assert [cell.padding for cell in result.forward] == list(PADDINGS)
    assert all(0 < cell.worst_row_u < cell.bound_u for cell in result.forward)
    assert [len(row) for row in result.greedy[0].tokens] == [5] * 4


def test_one_altered_value_in_layer_1_of_a_backend_fails_and_names_that_layer(backend, checkpoint, tmp_path):
    altered = BackendOnAlteredWeights(backend.name, tmp_path / "altered", "decoder.layers.1.fc2.weight")
    result = measure(checkpoint, altered)
    assert not result.passed
    assert [cell.first_divergence for cell in result.forward] == ["layer 1"]


# -- faults, in a backend without a framework -------------------------------------------------------------------------


def doubled(weight):
    return 2 * weight


def test_the_reference_itself_passes_without_error(checkpoint):
    result = measure(checkpoint, FakeBackend(), paddings=PADDINGS, new_tokens=7)
    assert result.passed
    assert all(cell.worst_row_u == 0 and cell.top1_agreement == 1 for cell in result.forward)


@pytest.mark.parametrize(
    ("weight", "place"),
    [
        ("decoder.embed_positions.weight", "embeddings"),
        ("decoder.layers.0.self_attn.v_proj.weight", "layer 0"),
        ("decoder.layers.1.self_attn.q_proj.bias", "layer 1"),
        ("decoder.layers.2.fc1.weight", "layer 2, final norm or project_out"),
        ("decoder.final_layer_norm.bias", "layer 2, final norm or project_out"),
    ],
)
def test_the_first_place_that_diverges_is_that_of_the_altered_weight(checkpoint, weight, place):
    result = measure(checkpoint, FakeBackend(**{weight: doubled}))
    assert [cell.first_divergence for cell in result.forward] == [place]


class WrongHead(FakeModel):
    def __call__(self, *args, **kwargs):
        out = super().__call__(*args, **kwargs)
        return out._replace(logits=out.logits * 1.01)


class SpoilsPadding(FakeModel):
    def __call__(self, input_ids, attention_mask=None, labels=None):
        out = super().__call__(input_ids, attention_mask, labels)
        out.hidden_states[1][attention_mask == 0] = 1e-30
        return out


class NotANumber(FakeModel):
    def __call__(self, *args, **kwargs):
        out = super().__call__(*args, **kwargs)
        out.logits[0, -1, 0] = np.nan
        return out


class WrongLoss(FakeModel):
    def __call__(self, *args, **kwargs):
        out = super().__call__(*args, **kwargs)
        return out._replace(loss=out.loss * 1.001)


class SwappedTokens(FakeModel):
    def generate(self, input_ids, attention_mask=None, max_new_tokens=20):
        tokens_BS = super().generate(input_ids, attention_mask, max_new_tokens)
        tokens_BS[2, -3] = (tokens_BS[2, -3] + 1) % 97
        return tokens_BS


@pytest.mark.parametrize(
    ("fault", "problem", "place"),
    [
        (WrongHead, "logits: expected a worst row within 64 u", "head"),
        (SpoilsPadding, "hidden_states[1]: expected zeros in padding rows, got up to 1e-30", None),
        (NotANumber, "logits: expected numbers, got 1 NaN or infinite", "head"),
        (WrongLoss, "loss: expected an error within", None),
    ],
)
def test_a_fault_in_a_forward_pass_is_named(checkpoint, fault, problem, place):
    (cell,) = measure(checkpoint, FakeBackend(fault)).forward
    assert cell.problems[0].startswith(problem)
    assert cell.first_divergence == place


def test_a_greedy_token_that_is_no_tie_fails_and_is_located(checkpoint):
    (text,) = measure(checkpoint, FakeBackend(SwappedTokens), new_tokens=7).greedy
    assert text.problems[0].startswith("tokens: row 2, token 4 is not the reference's choice")


class WorseThanEager(FakeModel):
    def __call__(self, *args, **kwargs):
        out = super().__call__(*args, **kwargs)
        return out._replace(logits=out.logits * (1 + 40 * 2.0**-24))


class FusedIsWorse(FakeBackend):
    def load(self, source, *, dtype, attn_implementation):
        self.model_class = WorseThanEager if attn_implementation == "sdpa" else FakeModel
        return super().load(source, dtype=dtype, attn_implementation=attn_implementation)


def test_a_fused_kernel_within_the_bound_fails_where_eager_is_far_better(checkpoint):
    eager, fused = measure(checkpoint, FusedIsWorse(), attentions=["eager", "sdpa"]).forward
    assert eager.passed
    assert fused.worst_row_u < fused.bound_u
    assert "twice the 0 u of eager" in fused.problems[0]


# -- the rules --------------------------------------------------------------------------------------------------------


def test_another_token_is_a_tie_only_within_twice_the_tolerance():
    bounds = BOUNDS["float32"]
    tolerance = bounds.entry * bounds.roundoff  # of logits whose root mean square is about 1
    truth_RV = np.array([[1.0, 1.0 - 1.9 * tolerance, 1.0], [1.0, 1.0 - 2.1 * tolerance, 1.0], [1.0, 0.9, 1.0]])
    truth_RV[:, 2] = -1
    got_RV = np.array([[0, 1, 0], [0, 1, 0], [1, 0, 0]])
    agrees, ties = top1(got_RV, truth_RV, bounds)
    assert agrees.tolist() == [True, False, True]
    assert ties.tolist() == [True, False, False]


def test_another_first_choice_fails_even_where_the_row_is_within_its_bound():
    logits_V = np.where(np.arange(10_007) % 2, 1.0, -1.0)
    logits_V[4], logits_V[7] = 1.0 + 900 * 2.0**-24, 1.0
    swapped_V = logits_V.copy()
    swapped_V[7] += 901 * 2.0**-24
    case = make_case("none", np.array([[5]]), None)
    truth, got = (Truth(x[None, None], (np.ones((1, 1, 3)),), 0.0) for x in (logits_V, swapped_V))
    cell = compare(Outputs(*got), truth, case, backend="torch", dtype="float32", attn_implementation="eager")
    assert cell.worst_row_u < cell.bound_u
    assert [problem.partition(":")[0] for problem in cell.problems] == ["top-1"]


def test_what_follows_the_end_of_a_text_is_not_judged():
    config = config_of(eos_token_id=11)
    prompts = Case("left", np.array([[5, 7], [1, 3]]), np.array([[1, 1], [0, 1]]))
    tokens_BS = FakeModel(Reference(config, dict(random_tensors(config)))).generate(*prompts[1:], 6)
    honest = Reference(config.replace(eos_token_id=int(tokens_BS[0, 4])), dict(random_tensors(config)))
    tokens_BS[0, 5:] = 1
    text = judge_text(tokens_BS, prompts, honest, BOUNDS["float32"], backend="", dtype="", attn_implementation="")
    end = tokens_BS[0, 2:].tolist().index(tokens_BS[0, 4]) + 1
    assert text.passed
    assert text.tokens[0] == tokens_BS[0, 2 : 2 + end].tolist()


def test_a_fused_kernel_may_be_twice_as_far_off_as_eager_but_not_more():
    def cell(attention, worst):
        return Comparison("torch", "float32", attention, "none", worst, 64, 0.0, 1.0, 0, 0.0, 0.0, 0.0)

    cells = [cell("eager", 20), cell("sdpa", 39), cell("flash", 41)]
    compare_with_eager(cells)
    assert [bool(c.problems) for c in cells] == [False, False, True]
    assert "twice the 20 u of eager" in cells[2].problems[0]


def test_two_texts_are_compared_up_to_their_first_difference():
    a, b = (GreedyText(name, "float32", "eager", tokens, 5, 0) for name, tokens in
            (("torch", [[5, 7, 11], [3, 2]]), ("flax", [[5, 7, 11], [3, 13]])))  # fmt: skip
    other_dtype = GreedyText("tf", "float16", "eager", [[1]], 1, 0)
    (agreement,) = compare_texts([a, b, other_dtype])
    assert not agreement.equal
    assert agreement.first_difference == "row 1, token 1: torch 2, flax 13"


def test_padding_cases_hold_the_same_tokens_in_other_places():
    rows_BT = np.arange(100, 100 + 4 * 37).reshape(4, 37)
    left, right, holes = (make_case(padding, rows_BT, pad_token_id=1) for padding in ("left", "right", "holes"))
    for row in range(3):
        kept = [case.input_ids[row][case.real_BT[row]].tolist() for case in (left, right, holes)]
        assert kept[0] == kept[1] == kept[2] == rows_BT[row, : len(kept[0])].tolist()
    assert left.real_BT[:, -1].all()
    assert right.real_BT[:, 0].all()
    assert not holes.real_BT[3].any()
    assert make_case("none", rows_BT, 1).attention_mask is None


def test_a_model_with_few_positions_is_measured_and_generates_to_its_last_position(tmp_path):
    folder = save_random(tmp_path, config_of(max_position_embeddings=7))
    result = measure(folder, BACKENDS["torch"], tokens=263, paddings=PADDINGS, new_tokens=40)
    assert result.passed
    assert {len(row) for row in result.greedy[0].tokens} == {7 + 1 - 2}  # the longest prompt has two tokens
