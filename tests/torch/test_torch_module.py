"""What only PyTorch has: state dicts of published files, torch.compile without graph breaks, the fused operator."""

import numpy as np
import pytest
from harness import ROUNDOFF, config_of, load_backend, mask_named, rounded_weights, token_ids, worst_row

from opt_core.schema import published_name


@pytest.fixture(scope="module")
def torch_backend():
    return load_backend("torch")


def state_dict(torch_backend, config, rename=published_name, *, head=False):
    weights = rounded_weights(config)
    named = {rename(name): torch_backend.torch.from_numpy(weight) for name, weight in weights.items()}
    if head:
        named["lm_head.weight"] = named[rename("decoder.embed_tokens.weight")]
    return named


@pytest.mark.parametrize("variant", ["pre-norm", "350m style", "galactica style", "untied head"])
@pytest.mark.parametrize("prefix", ["model.", ""], ids=["model.decoder", "decoder"])
@pytest.mark.parametrize("head", [True, False], ids=["head stored", "head left out"])
def test_published_state_dicts_load_as_they_are(torch_backend, variant, prefix, head):
    config = config_of(variant)
    stored = state_dict(
        torch_backend,
        config,
        lambda name: prefix + name if name.startswith("decoder.") else name,
        head=head and config.tie_word_embeddings,
    )
    model = torch_backend.model_class()(config).eval()
    model.load_state_dict(stored)
    ids = token_ids(config)
    want = torch_backend.random_model(config)(ids).logits
    np.testing.assert_array_equal(torch_backend.numpy(model(ids).logits), torch_backend.numpy(want))
    if config.tie_word_embeddings:
        assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_state_dict_has_the_published_names(torch_backend):
    config = config_of("350m style")
    got = torch_backend.model_class()(config).state_dict()
    assert set(got) == {published_name(name) for name in rounded_weights(config)} | {"lm_head.weight"}


def test_a_head_stays_tied_through_a_move_and_a_copy(torch_backend):
    import copy

    for changed in (
        torch_backend.random_model(config_of()).double(),
        copy.deepcopy(torch_backend.random_model(config_of())),
        torch_backend.random_model(config_of()).to("cpu", torch_backend.torch.bfloat16),
    ):
        assert changed.lm_head.weight is changed.get_input_embeddings().weight


@pytest.mark.parametrize("case", ["alone", "mask", "cache", "labels", "positions"])
def test_a_call_compiles_into_one_graph(torch_backend, case):
    torch, config = torch_backend.torch, config_of()
    model, ids = torch_backend.random_model(config), torch.as_tensor(token_ids(config))
    mask = torch.as_tensor(mask_named("left"))
    arguments = {
        "alone": {},
        "mask": dict(attention_mask=mask),
        "cache": dict(past_key_values=model.init_cache(4, 20)),
        "labels": dict(attention_mask=mask, labels=ids),
        "positions": dict(position_ids=torch.arange(13)[None] + 3),
    }[case]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        want = torch_backend.numpy(model(ids, **arguments).logits)
        got = torch_backend.numpy(compiled(ids, **arguments).logits)
    assert worst_row(got, want) <= 64 * ROUNDOFF["float32"]  # with a cache, products of another order


def test_a_forward_pass_uses_the_fused_operator(torch_backend):
    torch, config = torch_backend.torch, config_of()
    model, ids = torch_backend.random_model(config), token_ids(config)
    with torch.profiler.profile() as profile, torch.no_grad():
        model(ids, attention_mask=mask_named("left"))
    names = [event.name for event in profile.events()]
    fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert names.count(fused) == config.num_hidden_layers


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_autocast_reaches_generation_and_a_float32_cache(torch_backend, attn_implementation):
    torch, model = torch_backend.torch, torch_backend.random_model(config_of(), attn_implementation=attn_implementation)
    ids = token_ids(model.config)
    want = torch_backend.numpy(model(ids).logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(ids, max_new_tokens=2).shape == (len(ids), ids.shape[1] + 2)
        out = model(ids, past_key_values=model.init_cache(len(ids), 20))
    assert worst_row(torch_backend.numpy(out.logits), want) < 0.02
