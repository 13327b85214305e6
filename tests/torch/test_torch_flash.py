"""FlashAttention, FlexAttention and the runs of tokens they take, with doubles for kernels that need a GPU."""

import types

import numpy as np
import pytest
import torch
from attention_truth import Attended, attention_inputs, check_bound
from harness import ROUNDOFF, config_of, load_backend, mask_named, token_ids, worst_row
from test_torch_attention import attended, documents, tensors
from torch._dynamo.testing import CompileCounter

from opt_core.errors import InputError
from opt_torch import flash, flex, sdpa
from opt_torch.attention import cached_attention, causal_attention, eager_attention
from opt_torch.cache import slots_behind
from opt_torch.segments import make_segments, one_by_one

B, N, T, H = 2, 3, 13, 16
FLEX = "flex_attention"
LENGTHS_B = torch.tensor([13, 5])
PACKAGES = [
    ("flash_attention_2", "flash_attn"),
    ("flash_attention_3", "flash_attn_interface"),
    ("flash_attention_2", None),
]


def of_runs(q_RNH, k_RNH, v_RNH, starts, longest, *asked):
    """Sums are in float32, as those of the kernels."""
    calls.append(("runs", *asked))
    assert starts.dtype == torch.int32
    assert longest == starts.diff().max()
    return one_by_one(0.0, q_RNH.float(), k_RNH.float(), v_RNH.float(), starts, longest).to(q_RNH.dtype)


calls: list[tuple] = []  # of the doubles: "dense", "runs" or "cached"; dropout and whether to be deterministic


def fake_package(name: str) -> types.ModuleType:
    """The calls of flash_attn 2.8 and of flash_attn_interface (FlashAttention 3), with their own signatures."""

    def dense(q, k, v, softmax_scale, causal, *asked):
        calls.append(("dense", *asked))
        assert causal
        assert softmax_scale == 1.0
        out = eager_attention(*(x.transpose(1, 2).float() for x in (q, k, v)), None)[0]
        return out.transpose(1, 2).to(q.dtype)

    def runs(q, k, v, starts_q, starts_k, longest_q, longest_k, softmax_scale, causal, *asked):
        assert causal
        assert softmax_scale == 1.0
        assert starts_k is starts_q
        assert longest_k == longest_q
        return of_runs(q, k, v, starts_q, longest_q, *asked)

    def cached(q, k_cache, v_cache, filled_B, softmax_scale, causal):
        calls.append(("cached",))
        assert causal
        assert softmax_scale == 1.0
        assert filled_B.dtype == torch.int32
        assert k_cache.stride(-1) == v_cache.stride(-1) == 1
        qkv = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
        return eager_attention(*qkv, filled_B.long() - q.shape[1])[0].transpose(1, 2)

    package = types.ModuleType(name)
    if name == "flash_attn":

        def flash_attn_func(
            q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
            alibi_slopes=None, deterministic=False, return_attn_probs=False,
        ):  # fmt: skip
            return dense(q, k, v, softmax_scale, causal, dropout_p, deterministic)

        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
            return_attn_probs=False, block_table=None,
        ):  # fmt: skip
            lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            return runs(q, k, v, *lengths, softmax_scale, causal, dropout_p, deterministic)

        def flash_attn_with_kvcache(
            q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
            cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
            window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
            return_softmax_lse=False,
        ):  # fmt: skip
            return cached(q, k_cache, v_cache, cache_seqlens, softmax_scale, causal)

    else:

        def flash_attn_func(
            q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
            window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
            sm_margin=0, return_attn_probs=False,
        ):  # fmt: skip
            return dense(
                q, k, v, softmax_scale, causal, 0.0, deterministic
            ), "sums, which early releases return as well"

        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
            softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
            window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
            sm_margin=0, return_attn_probs=False,
        ):  # fmt: skip
            lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            return runs(q, k, v, *lengths, softmax_scale, causal, 0.0, deterministic)

        def flash_attn_with_kvcache(
            q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
            cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
            max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None,
            softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
            rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
            return_softmax_lse=False,
        ):  # fmt: skip
            return cached(q, k_cache, v_cache, cache_seqlens, softmax_scale, causal)

    for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache):
        setattr(package, function.__name__, function)
    return package


@pytest.fixture(params=PACKAGES, ids=lambda names: f"{names[0]} of {names[1] or 'PyTorch'}")
def name(request, monkeypatch):
    """An implementation as if a CPU had its kernels."""
    implementation, package = request.param
    calls.clear()
    monkeypatch.setattr(flash, "DEVICE", "cpu")
    if package is not None:
        monkeypatch.setitem(flash.sys.modules, package, fake_package(package))
    monkeypatch.setattr(flash, "runs_inside_pytorch", lambda: of_runs)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    return implementation


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tokens_attend_among_themselves_or_within_documents(name, packed, dtype):
    inputs, first_BT = attention_inputs(dtype, B, N, T, H), documents(T) if packed else None
    first = None if first_BT is None else torch.as_tensor(first_BT)
    got = attended(lambda *qkv: causal_attention(*qkv, 0.0, first, name), "cpu", dtype, inputs)
    check_bound(got, inputs, dtype, first_BT)
    if packed or flash.package(name) is not None:  # else the flash kernel of this very PyTorch
        assert [call[0] for call in calls] == ["runs" if packed else "dense"]


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_padding_is_computed_by_no_kernel_and_gives_zero_with_zero_gradients(name, packed):
    inputs, first_BT = attention_inputs("bfloat16", B, N, T, H), documents(T) if packed else None
    first = None if first_BT is None else torch.as_tensor(first_BT)
    segments = make_segments(B, T, first, LENGTHS_B, "cpu")
    assert len(segments.index_R) == LENGTHS_B.sum()
    for x in inputs:  # with the gradient that arrives there, too
        x[1, :, 5:] = np.nan
    got = attended(lambda *qkv: causal_attention(*qkv, 0.0, first, name, segments), "cpu", "bfloat16", inputs)
    for x in got:
        assert (x[1, :, 5:] == 0).all()
    for b, length in enumerate(LENGTHS_B.tolist()):
        row, real = slice(b, b + 1), np.s_[b : b + 1, :, :length]
        first = None if first_BT is None else first_BT[row, :length]
        check_bound(Attended(*(x[real] for x in got)), [x[real] for x in inputs], "bfloat16", first)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_packages_are_told_of_dropout_and_determinism(name, packed):
    if flash.package(name) is None:
        pytest.skip("PyTorch's kernels ask PyTorch")
    first = torch.as_tensor(documents(T)) if packed else None
    qkv = tensors("cpu", "bfloat16", *attention_inputs("bfloat16", B, N, T, H)[:3])
    torch.use_deterministic_algorithms(True)
    try:
        causal_attention(*qkv, 0.0, first, name)
    finally:
        torch.use_deterministic_algorithms(False)
    dropout = 0.1 if name == "flash_attention_2" else 0.0  # the other has none
    causal_attention(*qkv, dropout, first, name)
    assert [call[1:] for call in calls] == [(0.0, True), (dropout, False)]


@pytest.mark.parametrize("tokens", [1, 5])
def test_tokens_attend_to_a_cache(name, tokens):
    lengths_B, S = np.array([0, 7]), 31
    q, k, v, _ = attention_inputs("bfloat16", B, N, tokens, H, S)
    out = cached_attention(
        *tensors("cpu", "bfloat16", q, k, v), slots_behind(torch.as_tensor(lengths_B), tokens), 0.0, name
    )
    check_bound(Attended(out.double().numpy()), (q, k, v), "bfloat16", None, lengths_B)


@pytest.mark.parametrize("padding", ["none", "left", "holes", "an empty row"])
def test_a_model_gives_the_logits_of_eager_attention(name, padding):
    torch_backend, config = load_backend("torch"), config_of(hidden_size=5 * 8)
    ids, mask = token_ids(config), mask_named(padding)
    model = torch_backend.random_model(config, dtype="bfloat16", attn_implementation=name)
    got = torch_backend.numpy(model(ids, attention_mask=mask).logits)
    behind = logits_behind_a_cache(model, ids, mask) if padding in ("none", "left") else None
    model.set_attn_implementation("eager")
    want = torch_backend.numpy(model(ids, attention_mask=mask).logits)
    assert worst_row(got, want) <= 16 * ROUNDOFF["bfloat16"]
    if behind is not None:
        assert worst_row(behind, logits_behind_a_cache(model, ids, mask)) <= 16 * ROUNDOFF["bfloat16"]


def logits_behind_a_cache(model, ids, mask) -> np.ndarray:
    """Of the last three tokens, those before them being in the cache."""
    ids, mask = torch.as_tensor(ids), torch.ones(ids.shape) if mask is None else torch.as_tensor(mask)
    with torch.no_grad():
        past = model(ids[:, :-3], attention_mask=mask[:, :-3], use_cache=True).past_key_values
        return model(ids[:, -3:], attention_mask=mask, past_key_values=past).logits.double().numpy()


def test_a_batch_of_padding_alone_reaches_no_kernel(name):
    segments = make_segments(B, T, None, torch.zeros(B, dtype=torch.int64), "cpu")
    qkv = tensors("cpu", "bfloat16", *attention_inputs("bfloat16", B, N, T, H)[:3])
    assert (causal_attention(*qkv, 0.0, None, name, segments) == 0).all()


def test_segments_drawn():
    """Documents a, b, ... of real tokens, padding as a dot: aaab / cd.. begin at 0, 3, 4 and 5."""
    first_BT = torch.tensor([[0, 0, 0, 3], [0, 1, 1, 1]])
    segments = make_segments(2, 4, first_BT, torch.tensor([4, 2]), "cpu")
    assert segments.index_R.tolist() == [0, 1, 2, 3, 4, 5]
    assert segments.starts.tolist() == [0, 3, 4, 5, 6]
    assert segments.longest == 3


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_dtype_and_device_are_refused_at_once():
    qkv = tensors("cpu", "float32", *attention_inputs("float32", B, N, T, H)[:3])
    with pytest.raises(InputError) as caught:
        causal_attention(*qkv, 0.0, None, "flash_attention_2")
    assert caught.value.problems == (
        "attn_implementation: flash_attention_2 expects float16 or bfloat16, got float32",
        "attn_implementation: flash_attention_2 expects a cuda device, got cpu",
    )
    with pytest.raises(InputError, match="expects a cuda device, got cpu"):
        cached_attention(*qkv, slots_behind(torch.tensor([1, 2]), T), 0.0, "flash_attention_2")


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
def test_a_package_that_is_missing_and_a_head_size_are_refused_when_the_model_is_made(monkeypatch, implementation):
    monkeypatch.setattr(flash, "package", lambda name: None)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    model_class = load_backend("torch").model_class()
    with pytest.raises(InputError) as caught:
        model_class(config_of(), attn_implementation=implementation)
    missing, head_size = caught.value.problems
    assert f"{implementation} expects the package {flash.PACKAGES[implementation]}" in missing
    assert head_size.endswith("expects a head size that is a multiple of 8 up to 256, got 7")
    with pytest.raises(InputError, match="expects the package"):
        model_class(config_of()).set_attn_implementation(implementation)


def test_an_unknown_name_is_refused_with_the_list():
    with pytest.raises(
        InputError, match="expected one of eager, sdpa, flash_attention_2, flash_attention_3, flex_atte"
    ):
        load_backend("torch").model_class()(config_of(), attn_implementation="flash")


def test_dropout_in_training_is_refused_where_the_kernel_has_none(monkeypatch):
    monkeypatch.setattr(flash, "DEVICE", "cpu")
    qkv = tensors("cpu", "float16", *attention_inputs("float16", B, N, T, H)[:3])
    segments = make_segments(B, T, None, LENGTHS_B, "cpu")
    monkeypatch.setattr(flash, "package", lambda name: None)
    with pytest.raises(InputError, match=r"expects attention_dropout 0 in training here, got 0\.1"):
        causal_attention(*qkv, 0.1, None, "flash_attention_2", segments)
    with pytest.raises(InputError, match=r"flex_attention expects attention_dropout 0 in training, got 0\.1"):
        causal_attention(*qkv, 0.1, None, "flex_attention")


def test_a_padded_batch_is_refused_before_pytorch_2_11(monkeypatch):
    monkeypatch.setattr(flash, "DEVICE", "cpu")
    monkeypatch.setattr(flash, "runs_inside_pytorch", lambda: None)
    monkeypatch.setattr(flash, "package", lambda name: None)
    qkv = tensors("cpu", "float16", *attention_inputs("float16", B, N, T, H)[:3])
    with pytest.raises(InputError, match=r"expects PyTorch 2.11 for a padded batch"):
        causal_attention(*qkv, 0.0, None, "flash_attention_2", make_segments(B, T, None, LENGTHS_B, "cpu"))


def test_this_pytorch_has_a_kernel_for_runs_as_it_is_called():
    """The signature of 2.11 and later; the kernel itself is for CUDA alone."""
    kernel = flash.runs_inside_pytorch()
    assert kernel is not None
    q, k, v = (torch.zeros(5, N, H, dtype=torch.float16, device="meta") for _ in range(3))
    starts = torch.zeros(3, dtype=torch.int32, device="meta")
    assert kernel(q, k, v, starts, 3).shape == q.shape


class CudaQueries:
    """What is asked of queries on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, H: int = 64, dtype=torch.float16):
        self.shape, self.dtype = (B, N, T, H), dtype


@pytest.mark.parametrize(("implementation", "has"), [("flash_attention_2", (7, 5)), ("flash_attention_3", (8, 9))])
def test_a_gpu_that_is_too_old_is_refused(monkeypatch, implementation, has):
    monkeypatch.setattr(flash, "_capability", lambda device: has)
    with pytest.raises(InputError, match=f"{implementation} expects a GPU of .* got {has[0]}.{has[1]}$"):
        flash.check_call(implementation, CudaQueries(), False, 0.0)
    monkeypatch.setattr(flash, "_capability", lambda device: (9, 0))
    flash.check_call(implementation, CudaQueries(), False, 0.0)


@pytest.mark.parametrize(("changes", "order", "has", "may"), [
    ({}, "", (9, 0), True),
    ({}, "efficient,flash", (9, 0), True),
    ({}, "efficient,math", (9, 0), False),
    ({}, "", (7, 5), False),
    ({"H": 12}, "", (9, 0), False),
    ({"dtype": torch.float32}, "", (9, 0), False),
])  # fmt: skip
def test_documents_run_inside_pytorch_where_its_kernel_takes_them_and_may_run(monkeypatch, changes, order, has, may):
    monkeypatch.setattr(flash, "_capability", lambda device: has)
    monkeypatch.setattr(sdpa, "_order_asked_for", order)
    assert flash.may_run_inside_pytorch(CudaQueries(**changes)) is may


# -- FlexAttention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flex_attention_is_within_the_bound(monkeypatch, packed, dtype):
    """Not compiled here: the same mask, step by step."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    inputs, first_BT = attention_inputs(dtype, B, N, T, H), documents(T) if packed else None
    first = None if first_BT is None else torch.as_tensor(first_BT)
    out = causal_attention(*tensors("cpu", dtype, *inputs[:3]), 0.0, first, "flex_attention")
    check_bound(Attended(out.double().numpy()), inputs, dtype, first_BT)


def test_a_model_makes_the_mask_of_flex_attention_once_for_all_layers(monkeypatch):
    torch_backend, config = load_backend("torch"), config_of(num_hidden_layers=3)
    ids, mask = token_ids(config), mask_named("left")
    documents = np.minimum(np.cumsum(mask, axis=1), 2) * mask  # the first real token, and the others
    model = torch_backend.random_model(config, attn_implementation="flex_attention")
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    made, make = [], flex.create_block_mask
    monkeypatch.setattr(flex, "create_block_mask", lambda *args, **options: made.append(1) or make(*args, **options))
    with torch.no_grad():
        for segment_ids in (None, torch.as_tensor(documents)):
            model.set_attn_implementation("flex_attention")
            made.clear()
            got = torch_backend.numpy(model(ids, attention_mask=mask, segment_ids=segment_ids).logits)
            assert len(made) == 1
            model.set_attn_implementation("eager")
            want = torch_backend.numpy(model(ids, attention_mask=mask, segment_ids=segment_ids).logits)
            assert worst_row(got, want) <= 64 * ROUNDOFF["float32"]


def test_flex_attention_stays_compiled_beyond_the_limit_of_pytorch(monkeypatch):
    """Of 8 shapes; then PyTorch ran the function as it is written, with all T x T scores."""
    counter = CompileCounter()
    compiled = torch.compile(flex.flex_attention, backend=counter, dynamic=False, fullgraph=True)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    lengths = range(3, 14)
    for length in lengths:
        causal_attention(*tensors("cpu", "float32", *attention_inputs("float32", 1, 1, length, H)[:3]), 0.0, None, FLEX)
    assert counter.frame_count == len(lengths)


@pytest.mark.slow
def test_compiled_flex_attention_is_within_the_bound():
    inputs, first_BT = attention_inputs("float32", B, N, 128, H), documents(128)
    out = causal_attention(*tensors("cpu", "float32", *inputs[:3]), 0.0, torch.as_tensor(first_BT), "flex_attention")
    check_bound(Attended(out.double().numpy()), inputs, "float32", first_BT)


def test_flex_attention_refuses_a_gradient_on_a_cpu():
    qkv = (x.requires_grad_() for x in tensors("cpu", "float32", *attention_inputs("float32", B, N, T, H)[:3]))
    with pytest.raises(InputError, match="flex_attention expects no gradient on a CPU"):
        causal_attention(*qkv, 0.0, None, "flex_attention")
